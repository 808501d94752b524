"""Every solver with every sampler on every exact problem, N up to 1000: more than `make test` has time for.

    python benchmarks/matrix.py

For each: rounds and error at tolerance 0 and at 1e-2. Writes ``results/matrix.csv`` and goes on where it stopped; ends
with an error if a cell breaks a law.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import problems

OUT = Path(__file__).parent / "results" / "matrix.csv"
COLUMNS = [
    "problem",
    "solver",
    "sampler",
    "steps",
    "dtype",
    "rounds_exact",
    "error_exact",
    "rounds",
    "error",
    "estimate",
]


def main() -> int:
    """Fill the table; return how many cells break a law."""
    torch.set_num_threads(1)
    done, broken = set(), 0
    if OUT.exists():
        with OUT.open() as file:
            done = {tuple(row[name] for name in COLUMNS[:5]) for row in csv.DictReader(file)}
    OUT.parent.mkdir(exist_ok=True)
    cells = [
        (problem, solver, name, steps, dtype)
        for steps in (10, 25, 100, 1000)
        for problem in problems.mixtures()
        for solver in problems.variants()
        for name in problems.px.SAMPLERS
        for dtype in (torch.float32, torch.float64)
        if problems.works(solver, name) and not (steps == 1000 and getattr(solver, "window", 8) is None)
    ]
    with OUT.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not done:
            writer.writeheader()
        for problem, solver, name, steps, dtype in tqdm(cells):
            key = (problem, repr(solver), name, str(steps), str(dtype))
            if key in done:
                continue
            expected = problems.reference(problem, name, steps, count=2, dtype=dtype)
            exact = problems.solve(problem, name, steps, solver, dtype=dtype, tolerance=0)
            loose = problems.solve(problem, name, steps, solver, dtype=dtype, tolerance=1e-2)
            errors = [problems.relative(one.x, expected) for one in (exact, loose)]
            estimate = max(one.error_estimate for one in loose)
            bound = 1e-5 if dtype == torch.float32 else 1e-10
            if errors[0] > bound or exact.rounds > exact[0].steps or errors[1] > max(estimate, bound):
                broken += 1
                tqdm.write(f"breaks a law: {key}: errors {errors}, rounds {exact.rounds}, estimate {estimate:.1e}")
            numbers = [exact.rounds, f"{errors[0]:.2e}", loose.rounds, f"{errors[1]:.2e}", f"{estimate:.2e}"]
            writer.writerow(dict(zip(COLUMNS, [*key, *numbers], strict=True)))
            file.flush()
    return broken


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
