"""The solver's own work: time, operations and memory a round, without the network.

    python benchmarks/overhead.py

A 4 x 64 x 64 latent, one thread, width 16 unless said otherwise. Memory is what the solve holds besides the
trajectory of noise of a stochastic sampler, in windows (width x latent, float32).
"""

from __future__ import annotations

import csv
import platform
from pathlib import Path

import torch

import parataxis as px
from meter import measure

OUT = Path(__file__).parent / "results" / "overhead.csv"


def main() -> None:
    """Print and write the table."""
    torch.set_num_threads(1)
    cases = [
        (name, steps, solver(window=width), count)
        for solver in (px.Picard, px.Anderson, px.Secant)
        for name in ("ddim", "ddpm", "dpmpp_2m")
        for steps, width, count in ((100, 16, 1), (100, 16, 16), (1000, 16, 1), (100, 8, 1))
    ]
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("w", newline="") as file:
        columns = ["sampler", "steps", "solver", "width", "samples", "rounds"]
        columns += ["operations_a_round", "milliseconds_a_round", "windows", "device", "torch"]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for name, steps, solver, count in cases:
            figures = measure(px.SAMPLERS[name](steps=steps), solver, count)
            row = {"sampler": name, "steps": steps, "solver": type(solver).__name__, "width": solver.window}
            row |= {"samples": count, "device": platform.machine() + " 1 thread", "torch": torch.__version__}
            row |= {key: round(value, 2) for key, value in figures.items()}
            writer.writerow(row)
            print({key: row[key] for key in columns[:-2]}, flush=True)


if __name__ == "__main__":
    main()
