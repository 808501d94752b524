"""How far the error estimate can be trusted: estimate against the true error, run by run.

    python benchmarks/estimates.py

Secant at the default tolerance on every shipped model and on two exact mixtures, full and narrow windows. Writes
``results/estimates.csv`` and prints, for each window, how often the true error is below the estimate, how often the
estimate is within a factor of it, and every run whose error exceeds ten tolerances (near-ties: a small difference early
decides between two samples).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import parataxis as px
from rounds import Problem, problem

OUT = Path(__file__).parent / "results" / "estimates.csv"
CELLS = [
    *[("digits", sampler) for sampler in ("ddim", "ddpm")],
    ("digits-flow", "flow_euler"),
    ("digits-unconditional", "ddim"),
    *[(name, sampler) for name in ("mixture-64", "mixture-256") for sampler in ("ddim", "ddpm", "flow_euler")],
]
STEPS, SEEDS, TOLERANCE = 50, 24, 1e-2


def rows(name: str, sampler_name: str, window: int | None) -> list[dict[str, Any]]:
    """Solve all seeds of one cell."""
    chosen: Problem = problem(name)
    sampler = chosen.make(sampler_name, STEPS)
    noise = torch.stack(
        [torch.randn(chosen.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(SEEDS)]
    )
    condition = None if chosen.classes is None else torch.arange(SEEDS) % chosen.classes

    def solve(solver: Any) -> px.Solutions:
        generators = [torch.Generator().manual_seed(10_000 + seed) for seed in range(SEEDS)]
        return px.sample(
            chosen.denoise, noise, sampler, solver, condition=condition, generator=generators, tolerance=TOLERANCE
        )

    exact, result = solve(px.Sequential()).x.flatten(1), solve(px.Secant(window=window))
    errors = (result.x.flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)
    return [
        {
            "model": name,
            "sampler": sampler_name,
            "window": window or "full",
            "seed": seed,
            "rounds": one.rounds,
            "error_estimate": f"{one.error_estimate:.3e}",
            "relative_error": f"{error:.3e}",
        }
        for seed, (one, error) in enumerate(zip(result, errors.tolist(), strict=True))
    ]


def report(table: Sequence[dict[str, Any]]) -> str:
    """Return the summary of a table, a line for each kind of model and window."""
    lines = []
    kinds: list[tuple[str, Callable[[str], bool]]] = [
        ("trained", lambda name: not name.startswith("mixture")),
        ("exact mixtures", lambda name: name.startswith("mixture")),
    ]
    for kind, belongs in kinds:
        for window in ("full", "8", "16"):
            chosen = [row for row in table if belongs(row["model"]) and str(row["window"]) == window]
            estimate, error = (
                np.array([float(row[name]) for row in chosen]) for name in ("error_estimate", "relative_error")
            )
            within = [np.mean(estimate <= factor * error) for factor in (10, 30)]
            lines.append(
                f"{kind}, window {window}: {len(chosen)} runs, error below estimate {np.mean(error <= estimate):.1%}, "
                f"estimate at most 10x the error {within[0]:.1%}, 30x {within[1]:.1%}, "
                f"error above 10 tolerances {np.mean(error > 10 * TOLERANCE):.1%}"
            )
    for row in table:
        if float(row["relative_error"]) > 10 * TOLERANCE:
            lines.append(f"above: {row}")
    return "\n".join(lines)


def main() -> None:
    """Fill the table and print the summary."""
    torch.set_num_threads(1)
    table = []
    for name, sampler in tqdm(CELLS):
        for window in (None, 8, 16):
            table += rows(name, sampler, window)
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print(report(table))


if __name__ == "__main__":
    main()
