"""Plans against what happens: expected and measured seconds, one sample, every shipped model with its samplers.

    python benchmarks/plan.py [--models digits ..] [--steps 50 100]

Of every model, sampler and N, several times over: a plan, then the plain loop, the sequential solver and the best
candidate with each window, all of the same noise and one right after the other, so that what else the machine does
meets all of them. Medians go to ``results/plan.csv`` and, as a table, into ``docs/plan.md``.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import parataxis as px
from parataxis import models
from rounds import Problem, problem

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "plan.csv"
PAGE = ROOT / "docs" / "plan.md"
MARKS = "<!-- table: written by benchmarks/plan.py -->\n", "<!-- end -->\n"
KEYS = ["model", "sampler", "steps", "solver", "window"]
COLUMNS = [*KEYS, "planned_rounds", "rounds", "planned_seconds", "seconds", "seconds_over_planned", "planned_speedup"]
COLUMNS += ["planned_speedup_low", "planned_speedup_high", "speedup", "chosen", "free", "planning_seconds", "device"]
COLUMNS += ["torch", "parataxis"]
WINDOWS = (8, 16, 32, None)
REPEATS = 3


def loop_seconds(chosen: Problem, sampler: px.Sampler, x: Tensor, condition: Any) -> float:
    """Return the seconds of a plain loop over the network, without the sampler's few operations."""
    times = sampler.network_times(x.dtype)
    told = () if condition is None else (condition,)
    begun = time.perf_counter()
    with torch.no_grad():
        for step in range(sampler.steps):
            chosen.denoise(x, times[step, None], *told)
    return time.perf_counter() - begun


def compare(chosen: Problem, name: str, steps: int) -> list[dict[str, Any]]:
    """Return one row for every solver that was run."""
    sampler = chosen.make(name, steps)
    found: dict[Any, list[dict[str, float]]] = {}
    for seed in range(REPEATS):
        noise = torch.randn(1, *chosen.shape, generator=torch.Generator().manual_seed(100 + seed))
        condition = None if chosen.classes is None else torch.tensor([seed % chosen.classes])
        plan = px.plan(chosen.denoise, noise, sampler, condition=condition, windows=WINDOWS)
        if not found:  # the same solvers in every repeat
            best = {getattr(one.solver, "window", 1): one.solver for one in reversed(plan.candidates)}
            found = {solver: [] for solver in best.values()}
        loop = loop_seconds(chosen, sampler, noise, condition)
        for solver, rows in found.items():
            [expected] = [one for one in plan.candidates if one.solver == solver]
            generator = torch.Generator().manual_seed(seed)
            result = px.sample(chosen.denoise, noise, sampler, solver, condition=condition, generator=generator)
            speed = plan.speedup_of(expected)
            rows.append(
                {
                    "planned_rounds": expected.rounds.median,
                    "rounds": result.rounds,
                    "planned_seconds": expected.seconds.median,
                    "seconds": result.seconds,
                    "seconds_over_planned": result.seconds / expected.seconds.median,
                    "planned_speedup": speed.median,
                    "planned_speedup_low": speed.low,
                    "planned_speedup_high": speed.high,
                    "speedup": loop / result.seconds,
                    "chosen": float(plan.solver == solver),
                    "free": plan.latency.batch_headroom,
                    "planning_seconds": plan.planning_seconds,
                }
            )
    about = {"device": f"{platform.machine()} 1 thread", "torch": torch.__version__, "parataxis": px.__version__}
    lines = []
    for solver, rows in found.items():
        window = getattr(solver, "window", 1) or "all"
        key = dict(zip(KEYS, [chosen.name, name, steps, type(solver).__name__, window], strict=True))
        figures = {column: round(float(np.median([row[column] for row in rows])), 4) for column in rows[0]}
        lines.append({**key, **figures, **about})
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """Return the page's table, and in a sentence what it comes to."""
    windows = ["1", *(str(window or "all") for window in WINDOWS)]
    heads = ["model", "sampler", "N", "b*", "fastest as planned", "speed-up, planned", "measured", *windows]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["sampler"], row["steps"]), []).append(row)
    for (model, sampler, steps), own in sorted(cells.items(), key=lambda cell: (*cell[0][:2], int(cell[0][2]))):
        best = max(own, key=lambda row: (float(row["chosen"]), float(row["planned_speedup"])))
        name = best["solver"] if best["window"] == "1" else f"{best['solver']}, {best['window']}"
        planned, low, high, measured, free = (
            float(best[column])
            for column in ("planned_speedup", "planned_speedup_low", "planned_speedup_high", "speedup", "free")
        )
        span = "" if low == high else f" ({low:.2f} to {high:.2f})"
        ratios = {row["window"]: f"{float(row['seconds_over_planned']):.2f}" for row in own}
        shown = [f"{free:.1f}", name, f"{planned:.2f}{span}", f"{measured:.2f}"]
        shown += [ratios.get(window, "-") for window in windows]
        lines.append(f"| {' | '.join([model, sampler, steps, *shown])} |")
    off = np.array([float(row["seconds_over_planned"]) for row in rows])
    inside = [
        float(row["planned_speedup_low"]) <= float(row["speedup"]) <= float(row["planned_speedup_high"])
        for row in rows
        if row["window"] != "1"
    ]
    lines.append(
        f"\nMeasured over planned seconds of {len(rows)} solves: median {np.median(off):.2f}, a tenth below "
        f"{np.quantile(off, 0.1):.2f}, a tenth above {np.quantile(off, 0.9):.2f}; the speed-up was in the planned "
        f"range in {sum(inside)} of {len(inside)} parallel ones. Device: {rows[0]['device']}, torch {rows[0]['torch']}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the file and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=models.available())
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name in options.models:
            chosen = problem(name)
            for sampler in chosen.samplers:
                for steps in options.steps:
                    for row in compare(chosen, sampler, steps):
                        writer.writerow(row)
                        print({column: row[column] for column in COLUMNS[:-3]}, flush=True)
                    file.flush()
    with OUT.open() as file:
        text = table(list(csv.DictReader(file)))
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
