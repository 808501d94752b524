"""Rounds and evaluations that every solver needs to come within an error of the sequential sample.

    python benchmarks/rounds.py [--models digits mixture-64 ..] [--hours H] [--steps N ..]

Full width: one run a seed with a tolerance of its own set to nothing; after every round the present estimate is
compared with the sequential sample of the same noise, and the first rounds within 1e-1, 1e-2 and 1e-3 are written
(for parareal a round is a tick). Narrow windows settle states for good on the way, so there a run is made for each of
several tolerances, and its end is written with ``target`` = the tolerance and the error that it reached. So is, as
width N, what our own solver takes at full width with its default tolerance, which no error is told to; and of windows
above 32, which only N = 1000 has, that alone.

Cheapest cells first; a cell that ``results/rounds.csv`` already holds is skipped, so the script can be stopped and
started again at any time. ``benchmarks/figures.py`` draws the figures.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import galaxies
import parataxis as px
from parataxis import models
from parataxis.denoisers import empirical, mixture

OUT = Path(__file__).parent / "results" / "rounds.csv"
COLUMNS = ["model", "sampler", "steps", "solver", "options", "width", "seed", "target"]
COLUMNS += ["rounds", "evaluations", "peak_width", "relative_error"]
TARGETS = (1e-1, 1e-2, 1e-3)
STEPS = (25, 50, 100, 250, 1000)
EXACT = {"mixture-64": 64, "mixture-256": 256}
DATA = {"data-0": 0.0, "data-0.01": 0.01}  # ideal denoisers of a data set, by how far its points are blurred
DATA_DIM = 64


def solvers(width: int | None, steps: int) -> Iterator[tuple[str, Any, Sequence[float]]]:
    """Yield name, solver and the tolerances to run it with (published rules have none: their thresholds differ)."""
    full = width is None
    if width is not None and (width == steps or width > 32):
        yield "secant", px.Secant(window=width), (1e-2,)
        return
    tolerances = (1e-6,) if full else (1e-1, 1e-2, 1e-3)
    yield "picard", px.Picard(window=width), tolerances
    yield "parataa", px.Anderson(window=width), tolerances
    yield "secant", px.Secant(window=width), tolerances
    if full:
        yield "paradigms", px.Picard(rule="paradigms", entry="copy", threshold=1e-4), (0.0,)
        yield "fixed-point", px.Anderson(acceleration="none"), tolerances
        yield "srds", px.Parareal(blocks=round(steps**0.5), rule="none"), (0.0,)
        yield "parareal", px.Parareal(coarse="two-step", rule="none"), (0.0,)
        return
    for threshold in (0.2, 0.1, 0.05, 0.02):
        yield "paradigms", px.Picard(window=width, rule="paradigms", entry="copy", threshold=threshold), (0.0,)


@dataclass(frozen=True, eq=False)
class Problem:
    """One model: how to make its sampler and how to call it."""

    name: str
    denoise: Callable[..., Tensor]
    make: Callable[[str, int], px.Sampler]
    samplers: Sequence[str]
    shape: tuple[int, ...]
    classes: int | None
    cost: float


def problem(name: str) -> Problem:
    """Return a shipped model, a network of galaxies, an exact mixture or the ideal denoiser of a data set by name."""
    spacing = {"dpmpp_2m": {"spacing": "trailing"}}
    if name in galaxies.FILES:
        denoise, shape = galaxies.load(name)

        def on_vp(sampler: str, steps: int) -> px.Sampler:
            return px.SAMPLERS[sampler](steps=steps, **spacing.get(sampler, {}))

        return Problem(name, denoise, on_vp, ("ddim", "ddpm", "dpmpp_2m"), shape, None, (shape[-1] / 40) ** 2)
    if name in EXACT or name in DATA:
        dim = EXACT.get(name, DATA_DIM)
        exact = mixture(dim) if name in EXACT else empirical(_data(), DATA[name])
        vp, flow = exact.network(px.vp()), exact.network(px.flow(), "flow")

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return flow(x, t) if t.is_floating_point() else vp(x, t)

        def make(sampler: str, steps: int) -> px.Sampler:
            return px.SAMPLERS[sampler](steps=steps, **spacing.get(sampler, {}))

        return Problem(name, denoise, make, ("ddim", "ddpm", "flow_euler", "dpmpp_2m"), (dim,), None, 0.01)
    model = models.load(name)

    def trained(sampler: str, steps: int) -> px.Sampler:
        return model.sampler(sampler, steps, **spacing.get(sampler, {}))

    exploding = ("euler", "euler_ancestral")
    kinds = {"flow": ("flow_euler",), "edm": exploding}
    names = kinds.get(model.prediction, ("ddim", "ddpm", "dpmpp_2m"))
    return Problem(name, model.denoiser(), trained, names, model.shape, model.classes, 1.0)


def _data() -> Tensor:
    """Return points of a data set as uneven as images: of 40 in 64 dimensions, some lie close together."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(8, DATA_DIM, generator=generator)
    return centres[torch.arange(40) % 8] + 0.3 * torch.randn(40, DATA_DIM, generator=generator)


def seeds_of(steps: int, most: int = 16) -> int:
    """Return how many seeds a cell has."""
    return min(most, 16 if steps <= 100 else 4 if steps <= 250 else 2)


def cells(names: Sequence[str], chosen_steps: Sequence[int], kinds: Sequence[str] | None) -> list[tuple[Any, ...]]:
    """Return all cells, cheapest first."""
    found = []
    for name in names:
        chosen = problem(name)
        for sampler in [sampler for sampler in chosen.samplers if kinds is None or sampler in kinds]:
            for steps in chosen_steps:
                widths = (None, 16, 64, 256, steps) if steps == 1000 else (None, 8, 16, 32, steps)
                for width in [width for width in widths if width is None or width <= steps]:
                    for label, solver, tolerances in solvers(width, steps):
                        for tolerance in tolerances:
                            rows = steps * seeds_of(steps) * (8 if width in (None, steps) else 2)
                            found.append((chosen.cost * rows, chosen, sampler, steps, width, label, solver, tolerance))
    return sorted(found, key=lambda cell: cell[0])


def run(
    chosen: Problem,
    sampler: px.Sampler,
    solver: Any,
    tolerance: float,
    reference: dict[Any, Tensor],
    *,
    seeds: int = 16,
    least: float = TARGETS[-1],
) -> Any:
    """Solve one cell; yield (seed, target, rounds, evaluations, peak width, error)."""
    count = seeds_of(sampler.steps, seeds)
    noise = torch.stack(
        [torch.randn(chosen.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    )
    condition = None if chosen.classes is None else torch.arange(count) % chosen.classes

    def solve(with_solver: Any, **options: Any) -> px.Solutions:
        generator = [torch.Generator().manual_seed(10_000 + seed) for seed in range(count)]
        given = {"condition": condition, "generator": generator, "max_rows": 64, **options}
        return px.sample(chosen.denoise, noise, sampler, with_solver, **given)

    key = (chosen.name, sampler.name, sampler.steps)
    if key not in reference:
        reference.clear()
        reference[key] = solve(px.Sequential()).x
    exact = reference[key]

    def error(x: Tensor, index: int) -> float:
        return float((x - exact[index]).norm() / exact[index].norm())

    full = getattr(solver, "window", None) is None
    reached: dict[tuple[int, float], tuple[int, int, int, float]] = {}

    numbers: dict[px.Run, int] = {}  # of runs, in the order of the batch

    def watch(runs: Sequence[px.Run]) -> None:
        for index, run in enumerate(runs):
            numbers[run] = index
            if full and (index, least) not in reached:
                now = error(run.estimate, index)
                for target in TARGETS:
                    if now <= target:
                        reached.setdefault((index, target), (run.rounds, run.evaluations, run.peak_width, now))

    def enough(run: px.Run) -> bool:
        return full and (numbers[run], least) in reached

    result = solve(solver, tolerance=tolerance, on_round=watch, stop=enough)
    if full:
        return [(*key, *value) for key, value in sorted(reached.items())]
    return [
        (seed, tolerance, one.rounds, one.evaluations, one.peak_width, error(one.x, seed))
        for seed, one in enumerate(result)
    ]


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*EXACT, *models.available()])
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--solvers", nargs="+", help="names in the table; default: all")
    parser.add_argument("--samplers", nargs="+", help="default: all that a model admits")
    parser.add_argument("--widths", nargs="+", help="of windows, or full; default: all")
    parser.add_argument("--seeds", type=int, default=16, help="most seeds of a cell")
    parser.add_argument("--least", type=float, default=TARGETS[-1], help="error at which runs of full width stop")
    parser.add_argument("--hours", type=float, default=100.0, help="stop after this long; go on another time")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if options.out.exists():
        with options.out.open() as file:
            done = {(r["model"], r["sampler"], r["steps"], r["options"], r["target"]) for r in csv.DictReader(file)}
    options.out.parent.mkdir(exist_ok=True)
    fresh = not options.out.exists()
    begun = time.monotonic()
    reference: dict[Any, Tensor] = {}
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for _, chosen, name, steps, width, label, solver, tolerance in tqdm(
            cells(options.models, options.steps, options.samplers)
        ):
            if time.monotonic() - begun > options.hours * 3600:
                break
            first = str(TARGETS[0] if width is None else tolerance)
            if (chosen.name, name, str(steps), repr(solver), first) in done:
                continue
            if options.solvers is not None and label not in options.solvers:
                continue
            if options.widths is not None and str(width or "full") not in options.widths:
                continue
            sampler = chosen.make(name, steps)
            if solver.unsupported(sampler.coefficients) is not None:
                continue
            rows = run(chosen, sampler, solver, tolerance, reference, seeds=options.seeds, least=options.least)
            for seed, target, rounds, evaluations, peak, error in rows:
                cell = [chosen.name, name, steps, label, repr(solver), width or "full", seed, target]
                writer.writerow(dict(zip(COLUMNS, [*cell, rounds, evaluations, peak, f"{error:.3e}"], strict=True)))
            file.flush()


if __name__ == "__main__":
    main()
