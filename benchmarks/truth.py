"""Is the sample right, does the run know it, and what does certainty cost? Thousands of runs against the truth.

    python benchmarks/truth.py [--networks digits hsc-32 ..] [--seconds S]      # fill the table, cheapest cells first
    python benchmarks/truth.py --report                                         # print it, draw it, write docs/truth.md

Secant on shipped models, on networks that somebody else trained (``galaxies.py``), on exact mixtures and on ideal
denoisers of data sets; DDIM, DDPM, DPM-Solver++ 2M, flow and variance-exploding samplers; N = 50 and 100; windows of 8,
16, 32 and all steps. Every run is compared with the sequential loop of the same noise. A *scale* is how many times the
tolerance of 1e-2 the solver's own estimate may be; 1 is the solver as it is.

The *price of certainty* of a run is its rounds over those of the largest scale, 1 to 32, with which its true error
would still have been within the tolerance. *Calibrated* is what :func:`parataxis.calibrate` would choose by the seeds
below 59, on the other seeds; its choice is computed from the same table.

``results/truth.csv`` has a row a run; a block of seeds that it holds is skipped, so the script can be stopped and
started at any time.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import galaxies
import parataxis as px
from parataxis import models
from parataxis.calibration import SCALES, Outcome, choose_setting, relative_errors
from parataxis.guarantees import failure_interval
from parataxis.moments import Moments
from rounds import Problem, problem

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "truth.csv"
COLUMNS = ["network", "sampler", "steps", "window", "guess", "scale", "seed", "rounds", "evaluations", "error"]
COLUMNS += ["estimate", "converged"]
TOLERANCE, CALIBRATION = 1e-2, 59
CHEAP = ("data-0", "data-0.01", "mixture-64")
TRAINED = ("hsc-32", "digits", "digits-flow", "ztf-32", "digits-v", "digits-edm", "hsc-log-32")
LARGE = ("hsc-64", "ztf-64", "hsc-log-64", "lsst-60", "quasar-72")
WINDOWS = (8, 16, 32, None)
Row = dict[str, Any]


class Block(NamedTuple):
    """Runs that are solved in one call: seeds first .. first + count - 1 of a cell."""

    network: str
    sampler: str
    steps: int
    window: int | None
    scale: float
    first: int
    count: int
    guess: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """What tells the block in the table."""
        window, guess = str(self.window or "all"), "moments" if self.guess else "none"
        return self.network, self.sampler, str(self.steps), window, guess, f"{self.scale:g}", str(self.first)


def blocks(networks: Sequence[str] | None) -> Iterator[Block]:
    """Yield all blocks, what tells most for its cost first; those of one reference follow one another."""

    def cells(names: Sequence[str], steps: Sequence[int]) -> Iterator[tuple[str, str, int]]:
        for name in names:
            if name in (networks or here()):
                yield from ((name, sampler, n) for n in steps for sampler in known(name).samplers)

    def each(
        names: Sequence[str], steps: Sequence[int], first: int, count: int, windows: Sequence[int | None] = WINDOWS
    ) -> Iterator[Block]:
        for cell in cells(names, steps):
            yield from (Block(*cell, window, 1.0, first, count) for window in windows)

    def scales(names: Sequence[str], first: int, count: int, windows: Sequence[int] = (8, 16)) -> Iterator[Block]:
        for cell in cells(names, (100,)):
            for window in windows:
                yield from (Block(*cell, window, scale, first, count) for scale in SCALES)

    yield from each(CHEAP, (50, 100), 0, 16)
    # One seed near a tie is flagged with every sampler: shares of a few percent need more than 16.
    yield from each(CHEAP, (50, 100), 16, CALIBRATION - 16, (32, None))
    for name in TRAINED:
        yield from each((name,), (50, 100), 0, 8)
    yield from scales(CHEAP, 0, 16)
    yield from scales(TRAINED, 0, 8)
    for name, sampler, steps in [*cells(("data-0.01", "mixture-64"), (100,))]:
        if sampler in ("ddim", "ddpm"):
            for window in (8, 16):
                for scale in SCALES:
                    yield Block(name, sampler, steps, window, scale, 16, CALIBRATION - 16)
                    yield Block(name, sampler, steps, window, scale, CALIBRATION, 200)
    for name, sampler, steps in [*cells(("hsc-32", "digits"), (100,))]:
        if sampler in ("ddim", "ddpm"):
            window = 8 if sampler == "ddim" else 16
            for scale in SCALES:
                yield Block(name, sampler, steps, window, scale, 8, CALIBRATION - 8)
                yield Block(name, sampler, steps, window, scale, CALIBRATION, 16)
        if sampler == "ddpm":
            for guess in (False, True):
                yield from (Block(name, sampler, steps, None, scale, CALIBRATION, 16, guess) for scale in (1.0, 4.0))
    yield from each(LARGE, (50, 100), 0, 4)


@cache
def here() -> tuple[str, ...]:
    """Return the networks that are installed."""
    return (*CHEAP, *models.available(), *galaxies.available())


@cache
def known(name: str) -> Problem:
    """Return a network by name."""
    return problem(name)


class Runs:
    """Solves blocks of one network and sampler; the sequential samples of the latest block of seeds are kept."""

    def __init__(self) -> None:
        self._key: Any = None
        self._exact: Tensor | None = None

    def solve(self, block: Block, solver: px.Secant | px.Sequential, tolerance: float, **options: Any) -> px.Solutions:
        """Draw the seeds of a block."""
        chosen, seeds = known(block.network), range(block.first, block.first + block.count)
        noise = torch.stack(
            [torch.randn(chosen.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        condition = None if chosen.classes is None else torch.tensor([seed % chosen.classes for seed in seeds])
        generator = [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]
        sampler = chosen.make(block.sampler, block.steps)
        if block.guess and isinstance(solver, px.Secant):
            samples, labels = self._samples(block.network)
            recurrence = sampler.recurrence(noise, [torch.Generator().manual_seed(10_000 + seed) for seed in seeds])
            options["guess"] = Moments.of(samples, labels).trajectory(recurrence, condition)
        return px.sample(
            chosen.denoise,
            noise,
            sampler,
            solver,
            tolerance=tolerance,
            condition=condition,
            generator=generator,
            max_rows=256,
            **options,
        )

    @staticmethod
    @cache
    def _samples(name: str) -> tuple[Tensor, Tensor | None]:
        """Return as many samples as a calibration draws, of other seeds."""
        chosen = known(name)
        generator = torch.Generator().manual_seed(99)
        noise = torch.randn(CALIBRATION, *chosen.shape, generator=generator)
        labels = None if chosen.classes is None else torch.arange(CALIBRATION) % chosen.classes
        drawn = px.sample(
            chosen.denoise, noise, chosen.make("ddim", 25), px.Sequential(), condition=labels, max_rows=256
        )
        return drawn.x, labels

    def rows(self, block: Block) -> Iterator[Row]:
        """Solve a block and yield its rows."""
        key = (*block[:3], block.first, block.count)
        if self._key != key:
            self._key, self._exact = key, self.solve(block, px.Sequential(), 0.0).x
        assert self._exact is not None
        result = self.solve(block, px.Secant(window=block.window), TOLERANCE * block.scale)
        errors = relative_errors(result.x, self._exact)
        for seed, (solution, error) in enumerate(zip(result, errors, strict=True), block.first):
            numbers = [solution.rounds, solution.evaluations, f"{error:.3e}", f"{solution.error_estimate:.3e}"]
            yield dict(zip(COLUMNS, [*block.key[:-1], seed, *numbers, int(solution.converged)], strict=True))


def fill(path: Path, networks: Sequence[str] | None, seconds: float) -> None:
    """Add the blocks that are missing, until the time is over."""
    done = {(*(row[name] for name in COLUMNS[:6]), row["seed"]) for row in read(path, numbers=False)}
    path.parent.mkdir(exist_ok=True)
    begun, runs, fresh = time.monotonic(), Runs(), not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for block in tqdm([block for block in blocks(networks) if block.key not in done], mininterval=20):
            if time.monotonic() - begun > seconds:
                break
            if block.key not in done:
                writer.writerows(runs.rows(block))
                file.flush()
                done.add(block.key)


def read(path: Path, *, numbers: bool = True) -> list[Row]:
    """Return the rows of the table, with numbers as numbers."""
    if not path.exists():
        return []
    with path.open() as file:
        rows: list[Row] = list(csv.DictReader(file))
    if numbers:
        for row in rows:
            for name in ("steps", "seed", "rounds", "evaluations", "converged"):
                row[name] = int(row[name])
            for name in ("scale", "error", "estimate"):
                row[name] = float(row[name])
    return rows


def grouped(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by columns."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def honesty(rows: Sequence[Row]) -> str:
    """Return the table of errors and of what the runs said of them, a line for each window."""
    plain = [row for row in rows if row["scale"] == 1 and row["guess"] == "none"]
    lines = ["| window | runs | above the tolerance | silently | above 10 tolerances | above the estimate | flagged "]
    lines[0] += "| without need | estimate / error, median |"
    lines.append("|---" * 9 + "|")
    for window in ("8", "16", "32", "all", "every"):
        runs = [row for row in plain if window in (row["window"], "every")]
        if not runs:
            continue
        error, estimate = (np.array([row[name] for row in runs]) for name in ("error", "estimate"))
        above, flagged = ~(error <= TOLERANCE), ~(estimate <= TOLERANCE)
        shares = [above, above & ~flagged, ~(error <= 10 * TOLERANCE), error > estimate, flagged, flagged & ~above]
        ratio = np.median((estimate / np.maximum(error, 1e-12))[np.isfinite(estimate)])
        cells = [window, len(runs), *(f"{share.mean():.2%} ({share.sum()})" for share in shares), f"{ratio:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def by_seed(rows: Sequence[Row]) -> dict[int, dict[float, Row]]:
    """Return the runs of a cell by seed and scale."""
    seeds: dict[int, dict[float, Row]] = defaultdict(dict)
    for row in rows:
        seeds[row["seed"]][row["scale"]] = row
    return seeds


def fewest(runs: dict[float, Row]) -> float | None:
    """Return the rounds of the loosest scale, at least 1, with which a run keeps the tolerance; None if none does."""
    kept = [scale for scale, row in runs.items() if scale >= 1 and row["error"] <= TOLERANCE]
    return runs[max(kept)]["rounds"] if kept else None


def certainty(rows: Sequence[Row]) -> str:
    """Return the table of the price of certainty, as the solver is and calibrated."""
    plain = [row for row in rows if row["guess"] == "none"]
    lines = ["| network | sampler | N | window | price | chosen scale | calibrated | rounds | evaluations / N "]
    lines[0] += "| fresh seeds | above | share above, 95 % interval |"
    lines.append("|---" * 12 + "|")
    prices: dict[tuple[str, str], list[float]] = defaultdict(list)
    pooled, total = 0, 0
    for cell, group in sorted(grouped(plain, "network", "sampler", "steps", "window").items()):
        seeds = by_seed(group)
        priced = [runs for runs in seeds.values() if set(SCALES) <= set(runs)]
        ratios = [runs[1.0]["rounds"] / least for runs in priced if (least := fewest(runs)) is not None]
        prices[kind(cell[1]), cell[3]] += ratios
        cells = [*cell, f"{np.mean(ratios):.2f}" if ratios else "-"]
        # Of a dear network some scales only are tried on all seeds: those are the list that is tested.
        common = sorted(set.intersection(*(set(runs) for runs in seeds.values()))) if len(seeds) > CALIBRATION else []
        fresh = [seed for seed in seeds if seed >= CALIBRATION]
        if len(common) > 1 and len(seeds) - len(fresh) == CALIBRATION:
            scale = calibrated(seeds, cell[2], common)
            if scale is None:
                none = "the loop" if common == sorted(SCALES) else f"less than {common[0]:g}"
                lines.append("| " + " | ".join(map(str, [*cells, none, *["-"] * 6])) + " |")
                continue
            runs = [seeds[seed][scale] for seed in fresh]
            ratios = [seeds[s][scale]["rounds"] / least for s in fresh if (least := fewest(seeds[s])) is not None]
            ratios = ratios if common == sorted(SCALES) else []  # of a part of the list there is no loosest
            prices["calibrated " + kind(cell[1]), cell[3]] += ratios
            above = sum(not row["error"] <= TOLERANCE for row in runs)
            pooled, total = pooled + above, total + len(runs)
            low, high = failure_interval(above, len(runs))
            work = np.mean([row["evaluations"] for row in runs]) / cell[2]
            price = f"{np.mean(ratios):.2f}" if ratios else "-"
            cells += [f"{scale:g}", price, f"{np.mean([row['rounds'] for row in runs]):.1f}"]
            cells += [f"{work:.2f}", str(len(runs)), str(above), f"{low:.1%} to {high:.1%}"]
        elif ratios:
            cells += ["-"] * 7
        else:
            continue
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    summary = [
        f"{name}, window {window}: price {np.mean(ratios):.2f} in the mean, {np.median(ratios):.2f} in the median, "
        f"{len(ratios)} runs"
        for (name, window), ratios in sorted(prices.items())
        if ratios
    ]
    if total:
        low, high = failure_interval(pooled, total)
        summary.append(f"calibrated, fresh seeds: {pooled} of {total} above the tolerance ({low:.1%} to {high:.1%})")
    return "\n".join([*lines, "", *summary])


def kind(sampler: str) -> str:
    """Return whether the steps of a sampler add noise."""
    return "stochastic" if sampler in ("ddpm", "euler_ancestral") else "deterministic"


def calibrated(seeds: dict[int, dict[float, Row]], steps: int, scales: Sequence[float]) -> float | None:
    """Return which of the scales a calibration on the first seeds chooses; None for the sequential loop."""

    def outcomes(setting: px.Setting) -> list[Outcome]:
        rows = [seeds[seed][setting.scale] for seed in range(CALIBRATION)]
        return [Outcome(row["error"], row["estimate"], row["rounds"], row["evaluations"] / steps) for row in rows]

    settings = [px.Setting(px.Secant(window=8), scale) for scale in scales]
    chosen, _, trials = choose_setting([settings], outcomes, TOLERANCE, 0.95, 0.95, steps)
    return chosen.scale if any(trial.accepted for trial in trials) else None


def guesses(rows: Sequence[Row]) -> str:
    """Return the table of full width with and without the guess from moments."""
    lines = ["| network | sampler | N | scale | guess | rounds | evaluations / N | error, median | worst |"]
    lines.append("|---" * 9 + "|")
    groups = grouped(
        [row for row in rows if row["window"] == "all" and row["seed"] >= CALIBRATION],
        *("network", "sampler", "steps", "scale", "guess"),
    )
    for cell, group in sorted(groups.items()):
        rounds, work, errors = (np.array([row[name] for row in group]) for name in ("rounds", "evaluations", "error"))
        numbers = [f"{rounds.mean():.1f}", f"{work.mean() / cell[2]:.2f}", f"{np.median(errors):.0e}"]
        lines.append("| " + " | ".join(map(str, [*cell, *numbers, f"{errors.max():.0e}"])) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the estimate against the true error, a panel for each window."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(11, 3), sharex=True, sharey=True)
    for axis, window in zip(axes, ("8", "16", "32", "all"), strict=True):
        runs = [row for row in rows if row["scale"] == 1 and row["guess"] == "none" and row["window"] == window]
        for label, names in (("exact", CHEAP), ("shipped", models_of(runs)), ("galaxies", (*TRAINED, *LARGE))):
            part = [row for row in runs if kind_of(row["network"]) == label and row["network"] in names]
            error = np.maximum([row["error"] for row in part], 1e-8)
            estimate = np.minimum([row["estimate"] for row in part], 1.0)
            axis.loglog(error, np.maximum(estimate, 1e-8), ".", markersize=2.5, label=label)
        axis.axvline(TOLERANCE, color="black", linewidth=0.6)
        axis.axhline(TOLERANCE, color="black", linewidth=0.6)
        axis.plot([1e-8, 1], [1e-8, 1], color="grey", linewidth=0.6)
        axis.set_title(f"window {window}", fontsize=9)
        axis.set_xlabel("true error", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("estimate (1: cannot tell)", fontsize=8)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def kind_of(network: str) -> str:
    """Return what kind of network this is."""
    return "exact" if network in CHEAP else "shipped" if network.startswith("digits") else "galaxies"


def models_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of the shipped models in the table."""
    return sorted({row["network"] for row in rows if kind_of(row["network"]) == "shipped"})


def main() -> None:
    """Fill the table, or report it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", help="default: all that are there")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long; go on another time")
    parser.add_argument("--report", action="store_true", help="print and draw the table instead of filling it")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        fill(options.out, options.networks, options.seconds)
        return
    rows = read(options.out)
    sections: dict[str, Callable[[Sequence[Row]], str]] = {
        "Errors, and what runs said of them": honesty,
        "The price of certainty": certainty,
        "Full width, with a guess from moments": guesses,
    }
    text = "\n\n".join(f"## {title}\n\n{table(rows)}" for title, table in sections.items())
    print(text)
    page, mark = ROOT / "docs" / "truth.md", "<!-- truth: written by benchmarks/truth.py --report -->\n"
    before, rest = page.read_text().split(mark)
    page.write_text(f"{before}{mark}\n{text}\n\n<!-- end -->{rest.split('<!-- end -->')[1]}")
    draw(rows, ROOT / "docs" / "truth.png")


if __name__ == "__main__":
    main()
