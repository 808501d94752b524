"""One sample on 1, 2 and 4 processes: seconds and efficiency.

    python benchmarks/scaling.py [--device cuda] [--ranks 1 2 4]
    python benchmarks/scaling.py --simulate [--curve benchmarks/results/latency_curve.csv]

Three networks: one that sleeps for a time in proportion to its rows, which shows the scheduling whatever the machine
has; one that does nothing, which shows what a round costs besides; and a shipped model, which shows what this machine
gains: on the CPU, where one process can use all cores, every process has one thread. The ideal on P ranks is a P-th of
the seconds on one. Writes ``scaling.csv``, ``scaling-DEVICE.png`` and the table of ``gpus.md``.

``--simulate`` measures nothing: from a measured latency curve it says what 1 to 64 ranks on one to eight machines would
gain, and from ``scaling.csv`` by how much the same model is off where it was measured; see ``simulation.py``. Writes
``simulation.csv`` and ``scaling-simulated.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import parataxis as px
from meter import machine, write
from rounds import problem
from simulation import simulate

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = ("sleeping", "idle", "digits")
REPEATS = 2
MARKS = "<!-- scaling: written by benchmarks/scaling.py -->\n", "<!-- end -->\n"


def work(options: argparse.Namespace) -> None:
    """Measure as one of the ranks; the first one writes what it found."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()
    if options.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(options.device, (size,), mesh_dim_names=("time",))
    found = []
    for name in options.networks:
        chosen = problem(name if name == "digits" else "mixture-64")
        sampler = chosen.make("ddpm", options.steps)
        denoise = chosen.denoise

        def sleeping(x: Tensor, t: Tensor) -> Tensor:
            time.sleep(1e-3 * options.milliseconds * len(x))
            return denoise(x, t)  # noqa: B023  # used within this turn

        for width in options.widths:
            seconds, rounds, evaluations = [], 0, 0
            for seed in range(-1 if width == options.widths[0] else 0, REPEATS):  # the first solve sets up the ranks
                noise = torch.randn(1, *chosen.shape, generator=torch.Generator().manual_seed(abs(seed)))
                condition = None if chosen.classes is None else torch.tensor([abs(seed)], device=options.device)
                dist.barrier()
                begun = time.perf_counter()
                result = px.sample(
                    sleeping if name == "sleeping" else denoise,
                    noise.to(options.device),
                    sampler,
                    px.Secant(window=width),
                    condition=condition,
                    generator=torch.Generator().manual_seed(abs(seed)),
                    mesh=mesh,
                )
                if seed >= 0:
                    seconds.append(time.perf_counter() - begun)
                    rounds, evaluations = rounds + result.rounds, evaluations + result.evaluations
            about = {"network": name, "width": width, "ranks": size, "steps": options.steps}
            found.append({**about, "rounds": rounds, "evaluations": evaluations, "seconds": sum(seconds)})
    if rank == 0:
        Path(options.worker).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured(ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the ranks, and return what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(Path(__file__)), "--worker", str(out), "--device", options.device]
        command += ["--milliseconds", str(options.milliseconds), "--steps", str(options.steps)]
        command += ["--widths", *map(str, options.widths), "--networks", *options.networks]
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the speed-up against the number of ranks."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["network"] != "idle"]
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.5 * len(names), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    most = max(row["ranks"] for row in rows)
    for axis, name in zip(axes[0], names, strict=True):
        axis.plot([1, most], [1, most], color="0.7", label="ideal")
        for width in sorted({row["width"] for row in rows}):
            own = [row for row in rows if row["network"] == name and row["width"] == width]
            axis.plot([row["ranks"] for row in own], [row["speedup"] for row in own], "o-", label=f"width {width}")
        axis.set(
            title=f"{name}, DDPM-{rows[0]['steps']}", xlabel="ranks", xticks=sorted({row["ranks"] for row in rows})
        )
        axis.legend(frameon=False)
    axes[0][0].set_ylabel("speed-up over one rank")
    figure.suptitle(rows[0]["device"])
    figure.savefig(path, dpi=150)


def tell(rows: list[dict[str, Any]], page: Path) -> None:
    """Put the table between the marks of docs/gpus.md."""
    lines = ["| network | width | rounds, 2 samples | ranks | speed-up | of the ideal |", "|---" * 6 + "|"]
    rows = [row for row in rows if row["network"] != "idle"]
    for row in sorted(rows, key=lambda row: (row["network"] != "sleeping", row["width"], row["ranks"])):
        cells = [row[name] for name in ("network", "width", "rounds", "ranks")]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['speedup']:.2f}", f"{row['efficiency']:.2f}"])) + " |")
    before, rest = page.read_text().split(MARKS[0])
    table = "\n".join(lines)
    page.write_text(f"{before}{MARKS[0]}{table}\n{MARKS[1]}{rest.split(MARKS[1], 1)[1]}")


def main() -> None:
    """Measure with every number of ranks, write the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes, 1 among them")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--milliseconds", type=float, default=60.0, help="what a row costs the sleeping network")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs")
    parser.add_argument("--simulate", action="store_true", help="say what more ranks would gain, from what is measured")
    curve = ROOT / "benchmarks" / "results" / "latency_curve.csv"
    parser.add_argument("--curve", type=Path, default=curve, help="of the simulation: measured by latency.py")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if options.simulate:
        found = simulate(options.results, options.figures, options.curve, options.milliseconds)
        for row in found:
            if row["kind"] == "check":
                print({name: row[name] for name in ("window", "ranks", "seconds", "measured", "off_by_percent")})
        print(f"{sum(row['kind'] == 'forecast' for row in found)} forecasts from {options.curve}")
        return
    rows = [row for ranks in tqdm(sorted({1, *options.ranks})) for row in measured(ranks, options)]
    alone = {(row["network"], row["width"]): row["seconds"] for row in rows if row["ranks"] == 1}
    for row in rows:
        row["speedup"] = round(alone[row["network"], row["width"]] / row["seconds"], 3)
        row["efficiency"] = round(row["speedup"] / row["ranks"], 3)
        row["seconds"] = round(row["seconds"], 3)
        row |= machine(options.device)
        print({name: row[name] for name in ("network", "width", "ranks", "rounds", "speedup", "efficiency")})
    write(options.results / "scaling.csv", rows)
    draw(rows, options.figures / f"scaling-{options.device}.png")
    if (options.figures / "gpus.md").exists():
        tell(rows, options.figures / "gpus.md")


if __name__ == "__main__":
    main()
