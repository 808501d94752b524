"""500 loops at random, each by one of six solvers: is the error within the tolerance, or does the estimate say so?

``python benchmarks/loops_at_random.py`` goes on where it stopped; a row of ``results/loops_at_random.csv`` is a loop.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import parataxis as px

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import random_loops
from parataxis.parallel import parallel

RESULTS = Path(__file__).parent / "results" / "loops_at_random.csv"
TOLERANCE = 1e-2
SOLVERS = {
    "Secant(8)": px.Secant(window=8),
    "Secant(16)": px.Secant(window=16),
    "Secant()": px.Secant(),
    "Picard(8)": px.Picard(window=8),
    "Picard()": px.Picard(),
    "Anderson(8)": px.Anderson(window=8),
}
FIELDS = ["seed", "solver", "mode", "rounds", "steps", "error", "estimate", "floor", "converged", "verdict", "loop"]


def seeded(loop: Callable[[], Tensor]) -> Tensor:
    """Return what a loop gives from the same random state every time."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # what loops may use
    return loop()


def attempt(seed: int) -> list[Any]:
    """Return the row of one loop."""
    spec, name = random_loops.draw(seed), list(SOLVERS)[seed % len(SOLVERS)]
    nets, loop = random_loops.make(spec)
    expected = seeded(loop)
    run = parallel(loop, SOLVERS[name], tolerance=TOLERANCE, denoisers=nets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = seeded(run)
    report, error = run.report, relative(result, expected)
    says_so = report.error_estimate >= error or not report.converged
    verdict = "right" if error <= TOLERANCE else "says so" if says_so else "WRONG"
    if report.rounds > report.steps:
        verdict += ", more rounds than steps"
    numbers = f"{error:.1e}", f"{report.error_estimate:.1e}", f"{report.floor:.1e}"
    return [seed, name, report.mode, report.rounds, report.steps, *numbers, report.converged, verdict, spec]


def relative(x: Tensor, y: Tensor) -> float:
    """Return the largest relative distance of two samples; 0 where both diverge alike."""
    distance = (x - y).norm(dim=1) / y.norm(dim=1)
    return 0.0 if torch.equal(x.nan_to_num(), y.nan_to_num()) else float(distance.max())


def main() -> None:
    """Make the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    count = parser.parse_args().count
    torch.set_num_threads(1)
    known = RESULTS.exists()
    done = {int(row["seed"]) for row in csv.DictReader(RESULTS.open())} if known else set()
    with RESULTS.open("a", newline="") as file:
        table = csv.writer(file)
        if not known:
            table.writerow(FIELDS)
        for seed in sorted(set(range(count)) - done):
            table.writerow(attempt(seed))
            file.flush()
    verdicts = [row["verdict"] for row in csv.DictReader(RESULTS.open())]
    for verdict in sorted(set(verdicts)):
        print(f"{verdicts.count(verdict)} {verdict}")


if __name__ == "__main__":
    main()
