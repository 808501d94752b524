"""The solver's own work: time, operations and memory a round, without the network.

    python benchmarks/overhead.py [--device cuda] [--sizes SD SDXL ..]

For latents of the usual sizes, one and 16 samples, several widths and N; on the CPU with one thread. The network is one
elementwise operation, and its time is not counted (on CUDA, where it runs asynchronously, it is). Memory is what the
solve holds besides the trajectory of noise of a stochastic sampler, in windows (width x latent, float32). Writes
``overhead.csv`` and ``overhead.png``.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import parataxis as px
from meter import machine, measure, write

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"SD": (4, 64, 64), "SDXL": (4, 128, 128), "Flux": (16, 128, 128), "video": (16, 21, 60, 104)}
SOLVERS = (px.Picard, px.Anderson, px.Secant)
SAMPLERS = ("ddim", "ddpm", "dpmpp_2m")


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
    for place, size in enumerate(dict.fromkeys(row["size"] for row in rows)):
        axis.plot([], [], "o", color=f"C{place}", label=f"{size} {'x'.join(map(str, SIZES[size]))}")
    axis.set(xscale="log", yscale="log", xlabel="elements of a round", ylabel="milliseconds a round, Secant")
    axis.set_title(rows[0]["device"], fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print and write the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
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
