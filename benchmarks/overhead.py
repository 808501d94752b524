"""The solver's own work: time, operations and memory a round, without the network.

    python benchmarks/overhead.py [--device cuda] [--sizes SD SDXL ..]

For latents of the usual sizes, one and 16 samples, several widths and N; on the CPU with one thread. The network is
one elementwise operation, and its time is not counted (on CUDA, where it runs asynchronously, it is). Memory is what
the solve holds besides the trajectory of noise of a stochastic sampler, in windows (width x latent, float32). Writes
``overhead.csv`` and ``overhead.png``.

With ``--profile`` also ``px.sample`` as a user calls it, its network captured as a CUDA graph where that is offered:
for plans of a robot and latents of Stable Diffusion, one and 16 samples, windows 8 and 16, the milliseconds of a solve
over its rounds, those of drawing the noise apart, and what the profiler counts in a round: launches of kernels and of
graphs, copies, waits of the host for the device, and milliseconds of the device and of the host. What the network
costs is taken off each figure: it is profiled alone, in calls of as many rows. Writes ``profile.csv``.

With ``--against TREE`` two versions in turns: this one and another in a work tree of its own (``git worktree add
--detach TREE COMMIT``), milliseconds a round outside the network, and the sequential loop on a network of 2 ms against
the same loop written out by hand. Each turn is a process; the table has the medians over the turns. Writes
``overhead-versions.csv``; ``--resume`` goes on where a run before was ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import parataxis as px
from baselines import cuda_graph, drawn
from meter import Budget, Results, machine, measure, synchronize, write

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"SD": (4, 64, 64), "SDXL": (4, 128, 128), "Flux": (16, 128, 128), "video": (16, 21, 60, 104)}
SOLVERS = (px.Picard, px.Anderson, px.Secant)
SAMPLERS = ("ddim", "ddpm", "dpmpp_2m")
STATES = {"policy": (16, 4), "SD": (4, 64, 64)}
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
COUNTS = {
    "launches": LAUNCHES,
    "graph_launches": ("cudaGraphLaunch",),
    "copies": ("cudaMemcpyAsync",),
    "synchronisations": WAITS,
}


def cases(sizes: list[str]) -> list[tuple[str, str, int, Any, int]]:
    """Return size, sampler, N, solver and number of samples of every row; the smallest size has the most rows."""
    some = [(100, 16, 1), (100, 16, 16), (1000, 16, 1), (100, 8, 1)]
    every = [
        ("SD", name, steps, solver(window=width), count)
        for solver, name, (steps, width, count) in product(SOLVERS, SAMPLERS, some)
        if "SD" in sizes
    ]
    larger = [size for size in sizes if size != "SD"]
    return every + [(size, name, 50, px.Secant(window=16), 1) for size, name in product(larger, ("ddim", "ddpm"))]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw milliseconds a round against the elements of a round."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for place, name in enumerate(SAMPLERS):
        own = [row for row in rows if row["solver"] == "Secant" and row["sampler"] == name]
        for row in own:
            size = row["width"] * row["samples"] * torch.Size(SIZES[row["size"]]).numel()
            axis.plot(size, row["milliseconds_a_round"], "os^"[place], color=f"C{list(SIZES).index(row['size'])}")
    for size in dict.fromkeys(row["size"] for row in rows):
        color = f"C{list(SIZES).index(size)}"
        axis.plot([], [], "o", color=color, label=f"{size} latents, {'x'.join(map(str, SIZES[size]))}")
    for place, name in enumerate(SAMPLERS):
        axis.plot([], [], "os^"[place], color="grey", label=name)
    axis.set(xscale="log", yscale="log", xlabel="elements of a round: samples x window x latent")
    axis.set(ylabel="milliseconds a round besides the network")
    axis.set_title(f"Secant, {rows[0]['device']} (benchmarks/overhead.py)", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def smooth(x: Tensor, t: Tensor) -> Tensor:
    """Stand for a network: an elementwise function of states x and times t."""
    return torch.tanh(x * (0.5 + t.view(-1, *(1,) * (x.ndim - 1)).to(x) / 2000))


def profiled(call: Callable[[], object], device: str) -> dict[str, float]:
    """Return what a call launches, copies and waits for, and its milliseconds on the device and on the host."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as recorder:
        begun = time.perf_counter()
        call()
        host = time.perf_counter() - begun
        synchronize(device)
    events = recorder.key_averages()
    counts = {name: float(sum(e.count for e in events if e.key in keys)) for name, keys in COUNTS.items()}
    own = sum(float(getattr(e, "self_device_time_total", 0.0)) for e in events if "cuda" not in e.key)
    on_device = [e for e in events if str(getattr(e, "device_type", "")).endswith("CUDA")]
    if on_device:
        own = sum(float(e.self_device_time_total) for e in on_device)
    return {**counts, "device_ms": own / 1e3, "host_ms": 1e3 * host}


def timed(call: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median milliseconds of a call, waiting for the device at both ends."""
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        begun = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 1e3 * median(seconds)


def rounds(options: argparse.Namespace) -> None:
    """Time and profile the rounds of ``px.sample``, and write ``profile.csv``."""
    device, budget = options.device, Budget(options.seconds)
    key = ("state", "sampler", "solver", "window", "samples")
    results = Results(options.results / "profile.csv", key, device, resume=options.resume)
    for state, count, window, name in product(options.states, options.samples, (16, 8), ("ddim", "ddpm")):
        shape = STATES[state]
        about = {"state": state, "sampler": f"{name}-100", "solver": "Secant", "window": window, "samples": count}
        if results.done(**about) or budget.over():
            continue
        sampler, solver = px.SAMPLERS[name](steps=100), px.Secant(window=window)
        noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        network = cuda_graph(smooth)

        def generator() -> torch.Generator:
            return torch.Generator(device).manual_seed(1)

        def solve() -> px.Solutions:
            return px.sample(network, noise, sampler, solver, generator=generator())  # noqa: B023

        solve()
        turns = solve().rounds
        rows = torch.zeros(count * window, *shape, device=device), torch.zeros(count * window, device=device)
        network_ms = timed(lambda: [smooth(*rows) for _ in range(10)], device, 5) / 10  # noqa: B023
        draw_ms = timed(lambda: drawn(sampler, noise, generator()), device, options.repeats)  # noqa: B023
        solve_ms = timed(solve, device, options.repeats)
        row: dict[str, Any] = {**about, "rounds": turns, "solve_ms": f"{solve_ms:.4g}", "draw_ms": f"{draw_ms:.4g}"}
        row["network_ms"] = f"{network_ms:.4g}"
        row["milliseconds_a_round"] = f"{(solve_ms - draw_ms) / turns - network_ms:.4g}"
        whole, draws = profiled(solve, device), profiled(lambda: drawn(sampler, noise, generator()), device)  # noqa: B023
        alone = profiled(lambda: smooth(*rows), device)  # noqa: B023
        captured = whole["graph_launches"] > 0  # the network's own launches are then inside
        for what, total in whole.items():
            besides = 0.0 if what == "host_ms" or (captured and what != "device_ms") else alone[what]
            row[what] = f"{(total - draws[what]) / turns - besides:.4g}"
        results.add({**row, "captured": captured})


def turn(tree: Path, case: dict[str, Any]) -> Any:
    """Return what a process with the package of this work tree measures of a case."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("overhead_worker.py")), json.dumps(case)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def versions(options: argparse.Namespace) -> None:
    """Measure two versions in turns, and write the table."""
    key = ("state", "sampler", "window", "samples")
    results = Results(options.results / "overhead-versions.csv", key, resume=options.resume)
    budget = Budget(options.seconds)
    cases = [("policy", name, window, count) for name, window, count in product(("ddim", "ddpm"), (8, 16), (1, 16))] + [
        ("SD", name, 16, 1) for name in ("ddim", "ddpm")
    ]
    for state, name, window, count in cases:
        about = {"state": state, "sampler": f"{name}-100", "window": window, "samples": count}
        if results.done(**about) or budget.over():
            continue
        case = {"state": STATES[state], "sampler": name, "window": window, "samples": count}
        case["repeats"] = options.repeats
        pairs = [[turn(tree, case) for tree in (options.against, ROOT)] for _ in range(options.turns)]
        old, new = (median(values) for values in zip(*pairs, strict=True))
        results.add({**about, "old_ms": f"{old:.4g}", "new_ms": f"{new:.4g}", "ratio": f"{new / old:.3f}"})
    for count in (1, 16):
        about = {"state": "policy", "sampler": "ddim-100", "window": "sequential, 2 ms", "samples": count}
        if results.done(**about) or budget.over():
            continue
        case = {"state": STATES["policy"], "sampler": "ddim", "loop": 2.0, "samples": count, "repeats": 5}
        new, hand = (median(values) for values in zip(*(turn(ROOT, case) for _ in range(options.turns)), strict=True))
        results.add({**about, "old_ms": f"{hand:.4g}", "new_ms": f"{new:.4g}", "ratio": f"{new / hand:.3f}"})


def main() -> None:
    """Print and write the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs")
    parser.add_argument("--against", type=Path, help="compare with the version in this work tree, and nothing else")
    parser.add_argument("--turns", type=int, default=5, help="of both versions")
    parser.add_argument("--profile", action="store_true", help="profile px.sample, and nothing else")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES), help="of the profile")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 16], help="of the profile")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="end the profile, or the turns, after so many")
    parser.add_argument("--resume", action="store_true", help="leave out what the table holds already")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.against is not None:
        versions(options)
        return
    if options.profile:
        rounds(options)
        return
    rows = []
    for size, name, steps, solver, count in tqdm(cases(options.sizes)):
        figures = measure(px.SAMPLERS[name](steps=steps), solver, count, shape=SIZES[size], device=options.device)
        about = {"size": size, "sampler": name, "steps": steps, "solver": type(solver).__name__}
        about |= {"width": solver.window, "samples": count}
        rows.append({**about, **{key: round(value, 2) for key, value in figures.items()}, **machine(options.device)})
        print({key: rows[-1][key] for key in list(about) + list(figures)}, flush=True)
    write(options.results / "overhead.csv", rows)
    draw(rows, options.figures / f"overhead-{options.device}.png")


if __name__ == "__main__":
    main()
