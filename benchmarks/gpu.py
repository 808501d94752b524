"""Everything that a GPU is needed for, in nine minutes: ``make gpu``; a dry run on the CPU: ``make gpu DEVICE=cpu``.

Parts run in the order of their value, each in a process of its own and within its seconds: whatever a part holds up,
the next one begins. Every row is written when it is measured, so a run that is cut short counts, and the next one with
the same ``--results`` goes on where it stopped (``--fresh`` starts again). Nothing is downloaded. ``report.py`` takes
the rows into ``benchmarks/results`` and writes the tables and figures of ``docs/gpus.md``.

A dry run takes the same way through the same files with small networks and few turns; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from meter import Results, read

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 525.0  # seconds, of the nine minutes
SMALL = 12_000_000  # bytes of weights


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        name: What it is called by.
        seconds: After which it is told to end.
        command: Script or module and its options on CUDA.
        dry: The same on the CPU.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    dry: tuple[str, ...]


TINY_POLICY = ("--sizes", "0.5M", "--dims", "8", "16", "--batch", "16", "--repeats", "1", "--train", "0.5")
PARTS = (
    Part(
        "policy",
        200,
        ("policy.py", "--latency", "--sizes", "4.4M", "16M", "--train", "12"),
        ("policy.py", "--latency", "--samplers", "flow", "--no-compile", *TINY_POLICY),
    ),
    Part(
        "overhead",
        30,
        ("overhead.py", "--profile"),
        ("overhead.py", "--profile", "--states", "policy", "--samples", "1", "--repeats", "1"),
    ),
    Part(
        "images",
        115,
        ("latency.py", "--parts", "images", "curves", "--models", "digits-unconditional"),
        (
            *("latency.py", "--parts", "images", "curves", "throughput", "large", "--models", "digits-unconditional"),
            *("--steps", "6", "--windows", "4", "--repeats", "1", "--most", "1", "--count", "1", "--rows", "2"),
            *("--tiny", "--no-compile"),
        ),
    ),
    Part("tests", 60, ("pytest", "-m", "cuda"), ("pytest", "-m", "cuda")),
    Part(
        "images in float32",
        80,
        ("latency.py", "--parts", "images", "--models", "digits-unconditional", "--dtypes", "float32"),
        (),
    ),
    Part(
        "more policies",
        110,
        ("policy.py", "--latency", "--sizes", "0.5M", "63M", "--train", "12", "--repeats", "15"),
        (),
    ),
    Part(
        "reduce-overhead",
        30,
        ("policy.py", "--latency", "--sizes", "4.4M", "--samplers", "ddpm", "--dtype", "bfloat16", "--reduce-overhead"),
        (),
    ),
    Part("large networks", 60, ("latency.py", "--parts", "large"), ()),
    Part("more images", 90, ("latency.py", "--parts", "throughput", "images", "curves"), ()),
)


def command_of(part: Part, options: argparse.Namespace, seconds: float) -> list[str]:
    """Return the command line of a part."""
    chosen = part.command if options.device == "cuda" else part.dry
    if chosen[0] == "pytest":
        file = ROOT / "tests" / "test_cuda.py"
        command = ["-m", *chosen, str(file), "-W", "default", "-p", "no:cacheprovider", "--tb", "short", "-rs"]
        return [sys.executable, *command, "--junitxml", str(options.results / "tests.xml")]
    command = [str(ROOT / "benchmarks" / chosen[0]), *chosen[1:], "--device", options.device]
    command += ["--results", str(options.results), "--seconds", f"{seconds:.0f}", "--resume"]
    if chosen[0] == "policy.py":
        command += ["--weights", str(options.results / "weights")]
    return [sys.executable, *command]


def watched(command: list[str], seconds: float, log: Path, environment: dict[str, str]) -> str:
    """Run a command and copy its output to a file; end it, and all that it started, after so many seconds."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    watchdog = threading.Timer(max(seconds, 1.0), end)
    watchdog.start()
    try:
        with log.open("a") as file, process.stdout as output:
            for line in output:
                file.write(line)
                file.flush()
                print(line, end="", flush=True)
        code = process.wait()
    finally:
        watchdog.cancel()
    return "ended by the watchdog" if late.is_set() else "done" if code == 0 else f"failed with status {code}"


def tests_of(options: argparse.Namespace) -> None:
    """Write ``cuda_tests.csv`` from what pytest left."""
    path = options.results / "tests.xml"
    if not path.exists():
        return
    results = Results(options.results / "cuda_tests.csv", ("test",), options.device)
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
        row = {"test": case.get("name"), "outcome": outcome, "seconds": case.get("time")}
        results.add(row, quiet=outcome in ("passed", "skipped"))


def summary(folder: Path) -> list[str]:
    """Return one line for each policy and image model: the loops to beat and the best of ours, in milliseconds."""
    lines = []
    for name, groups in (("policy_latency", ("size", "sampler")), ("latency", ("model", "sampler", "steps"))):
        rows = read(folder / f"{name}.csv")
        for cell in dict.fromkeys(tuple(row[group] for group in groups) for row in rows):
            own = [row for row in rows if tuple(row[group] for group in groups) == cell]
            best: dict[str, dict[str, Any]] = {}
            for row in own:  # of ours the fastest window that keeps to the tolerance
                known = best.get(row["method"])
                wrong = row["method"] == "secant" and float(row["error"]) > 1e-2
                if not wrong and (known is None or float(row["p50_ms"]) < float(known["p50_ms"])):
                    best[row["method"]] = row
            cells = [f"{method} {row['p50_ms']}" for method, row in best.items()]
            for method in ("secant", "paradigms"):
                if method in best:
                    row = best[method]
                    cells.append(f"{method} {row['window']} x {row['speedup']}, error {row['error']}")
            lines.append(" ".join(cell) + " | " + " | ".join(cells))
    return lines


def keep(folder: Path, kept: Path | None) -> None:
    """Put all tables into one archive in another folder, and beside it the trained weights that are small."""
    if kept is None:
        return
    kept.mkdir(parents=True, exist_ok=True)
    part = kept / "results.part"
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted([*folder.glob("*.csv"), *folder.glob("*.log")]):
            archive.write(file, file.name)
    part.replace(kept / "results.zip")
    for file in (folder / "weights").glob("*.safetensors"):
        if file.stat().st_size < SMALL and not (kept / file.name).exists():
            shutil.copy(file, kept)


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds of all parts")
    parser.add_argument("--results", type=Path, help="default: out/gpu, out/gpu-dry on the CPU")
    parser.add_argument("--keep", type=Path, help="folder that gets all tables in one archive, and small weights")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results hold already")
    options = parser.parse_args()
    begun = time.perf_counter()
    options.results = (options.results or ROOT / "out" / ("gpu" if options.device == "cuda" else "gpu-dry")).resolve()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        for path in (*options.results.glob("*.csv"), *options.results.glob("*.log")):
            path.unlink()
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(options.results / "compiled"), "HF_HUB_OFFLINE": "1"}
    states = []
    for part in PARTS:
        left = options.total - (time.perf_counter() - begun)
        if (options.parts and part.name not in options.parts) or (options.device == "cpu" and not part.dry):
            continue
        if left < 15:
            states.append(f"{part.name}: no time left")
            continue
        seconds = min(part.seconds, left - 10)
        print(f"== {part.name}: {seconds:.0f} s", flush=True)
        start = time.perf_counter()
        command = command_of(part, options, seconds)
        state = watched(command, min(1.1 * part.seconds + 10, left), options.results / "gpu.log", environment)
        if part.command[0] == "pytest":
            tests_of(options)
        states.append(f"{part.name}: {state}, {time.perf_counter() - start:.0f} s")
        keep(options.results, options.keep)
    print(
        "\n".join(
            [
                "==",
                *summary(options.results),
                *states,
                f"{time.perf_counter() - begun:.0f} s; rows in {options.results}",
            ]
        ),
        flush=True,
    )
    if any("failed" in state for state in states):
        sys.exit(1)


if __name__ == "__main__":
    main()
