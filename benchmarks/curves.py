r"""Fit how many rounds each windowed solver takes, and write it into the package for :func:`parataxis.plan`.

    python benchmarks/curves.py [--hours H]

A run that ends by its tolerance takes, with N steps and a window of W steps (at most N),

    ln rounds = c0 + c1 x + c2 x^2 + c3 t + c4 x t + c5 n,   x = ln(W / N), t = log10(100 tolerance), n = ln(N / 100)

and N (k / rounds)^g steps are accepted after k of them. A window that covers a given share of the trajectory needs a
given number of rounds, whatever N is, once the steps are short: hence W / N, and a small c5. One curve for each solver
and kind of sampler (``ode``: steps add no noise; ``sde``: they do). The slopes c1..c5 are common to all networks and
samplers, with the same weight each; c0 is that of the trained networks, as exact mixtures are easier. What networks
differ by is taken from the trained ones, too few for one solver alone: one number for all curves.

Narrow windows come from ``results/rounds.csv``, as far as it has them. Its runs of full width do not end by a
tolerance: those, and narrow ones that it lacks, are made here, into ``results/ends.csv``. What is there already is not
made again, so delete that file when a solver has changed. Then fits whatever there is.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import parataxis as px
import rounds
from parataxis.planning import CURVES, RoundsCurve, features

ENDS = Path(__file__).parent / "results" / "ends.csv"
COLUMNS = ["model", "sampler", "steps", "solver", "options", "width", "seed", "target", "rounds", "evaluations"]
NUMBERS = ("steps", "width", "target", "rounds", "evaluations")
SOLVERS = {"picard": px.Picard, "parataa": px.Anderson, "secant": px.Secant}
MODELS = ("mixture-64", "digits", "digits-flow")
SEEDS = 4


def runs() -> Iterator[dict[str, Any]]:
    """Yield the runs that ended by their tolerance, of the solvers with their present options."""
    for path in (rounds.OUT, ENDS):
        if path.exists():
            with path.open() as file:
                for row in csv.DictReader(file):
                    if row["solver"] in SOLVERS and row["width"] != "full":
                        window = None if row["width"] == row["steps"] else int(row["width"])
                        if row["options"] == repr(make(row["solver"], window)):
                            yield {**row, **{name: float(row[name]) for name in NUMBERS}}


def make(label: str, window: int | None) -> Any:
    """Return a solver by the name that the tables give it."""
    solver: Any = SOLVERS[label]
    return solver(window=window)


def measure(seconds: float) -> None:
    """Make the runs that are missing, the shortest first, until so many seconds have passed."""
    begun = time.monotonic()
    done = {(row["model"], row["sampler"], row["options"], *(row[name] for name in NUMBERS[:3])) for row in runs()}
    problems = [rounds.problem(name) for name in MODELS]
    cells = [
        (problem, name, steps, label, window, tolerance)
        for steps in (25, 50, 100)
        for problem in problems
        for tolerance in (1e-1, 1e-2, 1e-3)
        for window in (8, 16, 32, None)
        for label in SOLVERS
        for name in problem.samplers
        if window is None or window < steps
    ]
    with ENDS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        for problem, name, steps, label, window, tolerance in cells:
            solver = make(label, window)
            if (problem.name, name, repr(solver), float(steps), float(window or steps), tolerance) in done:
                continue
            if time.monotonic() - begun > seconds:
                break
            normal = [torch.randn(problem.shape, generator=torch.Generator().manual_seed(i)) for i in range(SEEDS)]
            result = px.sample(
                problem.denoise,
                torch.stack(normal),
                problem.make(name, steps),
                solver,
                tolerance=tolerance,
                condition=None if problem.classes is None else torch.arange(SEEDS) % problem.classes,
                generator=[torch.Generator().manual_seed(10_000 + i) for i in range(SEEDS)],
                max_rows=64,
            )
            cell = [problem.name, name, steps, label, repr(solver), window or steps]
            for seed, one in enumerate(result):
                row = [*cell, seed, tolerance, one.rounds, one.evaluations]
                writer.writerow(dict(zip(COLUMNS, row, strict=True)))
            file.flush()
            print(*cell[:4], cell[5], tolerance, [one.rounds for one in result], flush=True)


def fit(chosen: list[dict[str, Any]]) -> tuple[RoundsCurve, list[float], str]:
    """Fit one solver and kind of sampler; return the curve, how far trained networks are off it, and all that in words.

    The curve's ``between`` is still to be filled in.
    """
    networks = sorted({(row["model"], row["sampler"]) for row in chosen})
    own = np.array([networks.index((row["model"], row["sampler"])) for row in chosen])
    steps, window, target, taken, evaluations = np.array([[row[name] for name in NUMBERS] for row in chosen]).T
    terms = features(steps, window, target)[:, 1:]
    weights = np.bincount(own)[own, None] ** -0.5
    system = np.concatenate([np.eye(len(networks))[own], terms], 1)
    found = np.linalg.lstsq(weights * system, weights[:, 0] * np.log(taken), rcond=None)[0]
    levels, slopes = found[: len(networks)], found[len(networks) :]

    left = np.log(taken) - system @ found
    trained = [i for i, (model, _) in enumerate(networks) if model not in rounds.EXACT] or list(range(len(networks)))
    spread = np.sqrt(np.mean([np.var(left[own == i]) for i in trained]))
    level = np.mean(levels[trained])
    coefficients = tuple(round(float(number), 4) for number in (level, *slopes))

    def curve(acceptance: float) -> RoundsCurve:
        return RoundsCurve(coefficients, round(float(spread), 4), 0.0, round(float(acceptance), 2))

    # The evaluations of one run of every cell, against those that its rounds lead to expect.
    _, first = np.unique(np.stack([own, steps, window, target, taken]), axis=1, return_index=True)

    def mismatch(acceptance: float) -> float:
        expected = [curve(acceptance).widths(taken[i, None], int(steps[i]), int(window[i])).sum() for i in first]
        return float(np.sqrt(np.mean(np.log(np.array(expected) / evaluations[first]) ** 2)))

    best = curve(min(np.arange(0.4, 1.41, 0.05), key=mismatch))
    off = [f"{' '.join(network)} {own:+.2f}" for network, own in zip(networks, levels - level, strict=True)]
    said = (
        f"{len(chosen)} runs, evaluations within {mismatch(best.acceptance):.0%}; ln R off the curve: {', '.join(off)}"
    )
    return best, [float(levels[i] - level) for i in trained], said


def main() -> None:
    """Measure what is missing, fit, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=100.0, help="stop measuring after this long; 0 only fits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(3600 * options.hours)
    every = list(runs())
    curves: dict[str, dict[str, RoundsCurve]] = {}
    squares, free = 0.0, 0
    for label, solver in SOLVERS.items():
        for kind in ("ode", "sde"):
            chosen = [row for row in every if row["solver"] == label and (row["sampler"] == "ddpm") == (kind == "sde")]
            if chosen:
                curve, off, said = fit(chosen)
                curves.setdefault(solver.__name__, {})[kind] = curve
                squares, free = squares + float(np.square(off).sum()), free + len(off) - 1
                print(f"{solver.__name__} {kind}: {curve}\n  {said}")
    between = round(float(np.sqrt(squares / free)), 4)
    print(f"standard deviation of ln R between trained networks: {between:.3f}")
    known = {
        "steps": [int(min(row["steps"] for row in every)), int(max(row["steps"] for row in every))],
        "tolerance": [min(row["target"] for row in every), max(row["target"] for row in every)],
        "curves": {
            name: {kind: {**vars(curve), "between": between} for kind, curve in own.items()}
            for name, own in curves.items()
        },
    }
    CURVES.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
