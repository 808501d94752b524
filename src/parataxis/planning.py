r"""Planning: whether many steps side by side are faster here, and by which solver.

A call of the network with n rows takes tau(n) seconds, as measured. A solver that needs R rounds for N steps, evaluates
n_k levels in round k and works c seconds a round besides the network, takes

    seconds = sum_{k<R} (tau(n_k) + c),     speed-up = N tau(B) / seconds

for B samples. R and n_k are known beforehand well enough to choose by: windowed solvers were run on the shipped models
and on exact mixtures (``benchmarks/curves.py``), and their rounds follow, with a window of W levels,

    ln R = c0 + c1 x + c2 x^2 + c3 t + c4 x t + c5 n,   x = ln(W/N), t = log10(100 tolerance), n = ln(N/100)
    n_k = min(W, N - front_k),   front_k = N (k/R)^g
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .checks import check_tolerance, check_whole
from .engine.executor import Executor, Network, check_inputs
from .engine.latency import Latency, format_seconds, latency, seconds_of, timings_agree
from .engine.rows import EvalBatch, OutputError
from .engine.run import drive, start
from .engine.solution import Solution
from .samplers.coefficients import Coefficients
from .samplers.recurrence import Recurrence
from .samplers.sampler import Sampler
from .solvers import SOLVERS
from .solvers.base import Solver
from .solvers.sequential import Sequential
from .solvers.window import check_window

__all__ = ["Candidate", "Plan", "Range", "RoundsCurve", "plan"]

Array = NDArray[np.float64]
CURVES = Path(__file__).parent / "rounds_curve.json"


class Range(NamedTuple):
    """An estimate, and where eight of ten cases lie."""

    low: float
    median: float
    high: float

    def text(self, form: Callable[[float], str]) -> str:
        """Return the estimate, and in brackets its range where it has one."""
        one, low, high = form(self.median), form(self.low), form(self.high)
        return one if low == high else f"{one} ({low} to {high})"


def features(steps: ArrayLike, window: ArrayLike, tolerance: ArrayLike) -> Array:
    """Return (.., 6) the terms 1, x, x^2, t, x t, n of the logarithm of the rounds; see the module."""
    x = np.log(np.divide(window, steps))
    t = np.log10(np.maximum(tolerance, 1e-9)) + 2
    return np.stack([np.ones_like(x), x, x**2, t, x * t, np.log(np.divide(steps, 100))], -1)


@dataclass(frozen=True)
class RoundsCurve:
    """The rounds that a windowed solver takes for one kind of sampler, as fitted by ``benchmarks/curves.py``.

    Attributes:
        coefficients: (6,) of :func:`features`.
        spread: Standard deviation of ln R among the samples of one network.
        between: Standard deviation of ln R among networks.
        settling: g, with which the front moves.
    """

    coefficients: tuple[float, ...]
    spread: float
    between: float
    settling: float

    @classmethod
    def load(cls, solver: Solver, local: Coefficients) -> RoundsCurve:
        """Return the curve of a solver with default options for samplers whose steps add noise, or do not.

        Raises:
            ValueError: For other solvers or options.
        """
        kind = _kind(local)
        known = {name: curves[kind] for name, curves in _fitted()["curves"].items() if kind in curves}
        curve = known.get(type(solver).__name__)
        options = [field for field in fields(solver) if field.name != "window"]  # type: ignore[arg-type]
        if curve is None or any(getattr(solver, field.name) != field.default for field in options):
            raise ValueError(
                f"the rounds of {solver!r} are not known beforehand: plan with {', '.join(known)} and their default "
                "options, or sample with this solver without a plan."
            )
        return cls(**{**curve, "coefficients": tuple(curve["coefficients"])})

    def rounds(self, steps: int, window: int, tolerance: float) -> float:
        """Return the rounds of the median case."""
        expected = math.exp(features(steps, window, tolerance) @ np.array(self.coefficients))
        return min(max(expected, steps / window), float(steps))

    def widths(self, rounds: Array, steps: int, window: int) -> Array:
        """Return (rounds of the last, samples) the levels evaluated in every round, of samples with these rounds."""
        k = np.arange(int(rounds.max()))[:, None]
        front = steps * np.minimum(k / rounds, 1.0) ** self.settling
        return np.where(k < rounds, np.clip(np.ceil(steps - front), 1, window), 0.0)


@cache
def _fitted() -> Any:
    return json.loads(CURVES.read_text())


def _kind(local: Coefficients) -> str:
    return "sde" if local.noise_std.any() else "ode"


class Candidate(NamedTuple):
    """What a solver is expected to take.

    Attributes:
        solver: With its window.
        rounds: Of the batch: of its slowest sample.
        seconds: Of the whole solve.
        overhead: Seconds of a round besides the network, measured.
    """

    solver: Solver
    rounds: Range
    seconds: Range
    overhead: float


@dataclass(frozen=True)
class Plan:
    """Which solver is expected to be fastest, and by how much; printed, it is a table.

    Attributes:
        solver: The fastest; ``Sequential()`` where none is faster than the loop.
        reason: Why, in one sentence.
        candidates: All that were compared, the fastest first, ``Sequential()`` among them.
        loop_seconds: What a plain loop takes: N tau(B).
        latency: tau(n) of the network.
        steps: N.
        setting: What was planned for, in words.
        planning_seconds: Seconds that planning took.
    """

    solver: Solver
    reason: str
    candidates: tuple[Candidate, ...]
    loop_seconds: float
    latency: Latency
    steps: int
    setting: str
    planning_seconds: float

    @property
    def chosen(self) -> Candidate:
        """What ``solver`` is expected to take."""
        return next(one for one in self.candidates if one.solver == self.solver)

    @property
    def seconds(self) -> float:
        """Expected seconds of the solve."""
        return self.chosen.seconds.median

    @property
    def speedup(self) -> Range:
        """Seconds of the loop over those of the solve."""
        return self.speedup_of(self.chosen)

    def speedup_of(self, candidate: Candidate) -> Range:
        """Seconds of the loop over those of a candidate."""
        return Range(*(self.loop_seconds / seconds for seconds in reversed(candidate.seconds)))

    def compare(self, seconds: float) -> str:
        """Say what was expected, and how far from it are the seconds that the solve took."""
        one = self.chosen
        return (
            f"planned {one.rounds.median:.0f} rounds, {one.seconds.text(format_seconds)}; "
            f"took {format_seconds(seconds)}, {100 * (seconds / one.seconds.median - 1):+.0f} %"
        )

    def __str__(self) -> str:
        """Return the plan as a table."""
        lines = [self.setting, str(self.latency)]
        lines.append(f"  {'':<12}{'window':>8}{'rounds':>16}{'seconds':>30}{'speed-up':>22}")
        lines.append(f"  {'plain loop':<12}{1:>8}{self.steps:>16}{format_seconds(self.loop_seconds):>30}{'1.00':>22}")
        for one in self.candidates:
            mark, name = ">" if one.solver == self.solver else " ", type(one.solver).__name__
            window = getattr(one.solver, "window", 1) or "all"
            rounds, seconds = one.rounds.text("{:.0f}".format), one.seconds.text(format_seconds)
            speed = self.speedup_of(one).text("{:.2f}".format)
            lines.append(f"{mark} {name:<12}{window:>8}{rounds:>16}{seconds:>30}{speed:>22}")
        return "\n".join([*lines, f"{self.solver!r}: {self.reason}."])


def plan(
    denoise: Callable[..., Tensor],
    noise: Tensor,
    sampler: Sampler,
    *,
    tolerance: float = 1e-2,
    condition: Any = None,
    solvers: Sequence[Solver] | None = None,
    windows: Sequence[int | None] = (8, 16, 32, None),
    devices: int = 1,
    rows_per_level: int = 1,
    max_rows: int | None = None,
    buckets: Sequence[int] | None = None,
    known: Latency | None = None,
    measured: Sequence[Solution] = (),
) -> Plan:
    """Measure what calls of the network cost, and choose the solver that is expected to be fastest.

    Some thirty calls of the network are made; to draw more than one batch, plan once and pass ``plan.solver``.

    Args:
        denoise: As for :func:`parataxis.sample`.
        noise: (B, *shape) as for :func:`parataxis.sample`; any that the network can be given.
        sampler: The equation.
        tolerance: Relative error allowed in each sample.
        condition: As for :func:`parataxis.sample`.
        solvers: Solvers with default options, whose windows are replaced; default all whose rounds are known.
        windows: Levels evaluated in a round; None for all.
        devices: Equal devices that share the rows of a round, and the samples of the loop. What they tell one another
            is taken to cost nothing.
        rows_per_level: Rows of the network that one level takes, if ``denoise`` or ``known`` count rows, not levels.
        max_rows: Most rows of one call.
        buckets: The numbers of rows that a call may have, as for :func:`parataxis.sample`.
        known: tau(n), if it has been measured already.
        measured: Earlier solves with this network: where a solver took more or fewer rounds than expected, it is
            expected to do so again. Other solvers and samplers of the other kind tell nothing.

    Raises:
        OutputError: If the network returns a wrong type, shape or dtype, or NaN or Inf.
        TypeError: If ``sampler`` is not one, or ``measured`` is no list of solutions.
        ValueError: For a solver whose rounds are not known, and inputs that do not fit together or are out of range.
        torch.cuda.OutOfMemoryError: If there is no memory for one row.
    """
    begun = time.perf_counter()
    check_inputs(noise, sampler, condition)
    check_tolerance(tolerance)
    check_whole("devices", devices)
    check_whole("rows_per_level", rows_per_level)
    if not (isinstance(measured, Sequence) and all(isinstance(one, Solution) for one in measured)):
        raise TypeError(
            f"measured must be what parataxis.sample returned, or a list of its solutions, got {measured!r}."
        )
    steps, count, local = sampler.steps, len(noise), sampler.coefficients
    if solvers is None:
        curves_of = _fitted()["curves"]
        every = [cls() for cls in SOLVERS.values() if _kind(local) in curves_of.get(cls.__name__, {})]
        solvers = [solver for solver in every if solver.unsupported(local) is None]
    curves = [RoundsCurve.load(solver, local) for solver in solvers]
    for window in windows:
        check_window(window)
    levels = sorted({steps if window is None else min(window, steps) for window in windows})
    if not solvers or not levels:
        raise ValueError("there is nothing to choose from: give at least one solver and one window.")

    def rows(evaluated: Any) -> Any:
        return np.ceil(np.multiply(evaluated, rows_per_level) / devices)

    foreseen: list[tuple[Solver, list[Array]]] = []  # with the rows of every round: few rounds, median, many
    for solver, curve in zip(solvers, curves, strict=True):
        shifts = _shifts(solver, curve, local, count, measured)
        for window in levels:
            taken = [_rounds(curve, shift, steps, window, tolerance, count) for shift in shifts]
            widths = [rows(curve.widths(one, steps, window).sum(1)) for one in taken]
            foreseen.append((_windowed(solver, window, steps), widths))

    def enough(known: Latency) -> bool:
        """Return whether no solver that makes larger calls can be the fastest, even if they cost no more."""
        largest, best, wide = known.rows[-1], steps * float(known.seconds(rows(count))), math.inf
        for _, (_, median, _) in foreseen:
            seconds = float(known.seconds(np.minimum(median, largest)).sum())
            if median.max() <= largest:
                best = min(best, seconds)
            else:
                wide = min(wide, seconds)
        return wide >= best

    network = Network(denoise, sampler.network_times(noise.dtype), condition)
    example = EvalBatch(
        noise * sampler.start_scale, *(torch.arange(count, device="cpu") % most for most in (steps, count))
    )
    one_row = EvalBatch(*(part[:1] for part in example))
    execute = Executor(network, max_rows=max_rows, buckets=buckets)
    buckets, one_call = execute.buckets or None, partial(execute, one_row)
    with torch.no_grad():
        if not torch.isfinite(one_call()).all():
            raise OutputError(
                f"the network returned NaN or Inf at step 0 of {steps} for the noise that it was given: check the "
                "noise, the network's dtype and its conditioning."
            )
    if known is None:
        most = int(rows(count * levels[-1]))
        most = min(most, max_rows or most)
        known = latency(network, example, most=most, buckets=buckets, enough=enough)
    if max_rows is not None:
        known = replace(known, limit=min(max_rows, known.limit or max_rows))
    states = example.x.to(torch.promote_types(noise.dtype, torch.float32))
    call, scale = float(known.seconds(rows(count))), float(known.seconds(1))

    def overhead(solver: Solver) -> float:
        with torch.no_grad():
            return _overhead(solver, sampler, states, one_call, scale)

    works = {type(solver): overhead(_windowed(solver, levels[0], steps)) for solver in solvers}
    candidates: list[Candidate] = []
    for solver, widths in foreseen:
        own = works[type(solver)]
        calls = [known.seconds(one) for one in widths]
        rounds = Range(*(float(len(one)) for one in calls))
        seconds = Range(*(float(one.sum()) + own * len(one) for one in calls))
        candidates.append(Candidate(solver, rounds, seconds, own))
    best = min(candidates, key=_expected)
    loop, own = steps * call, overhead(Sequential())
    alone = loop + steps * own
    candidates.append(Candidate(Sequential(), Range(steps, steps, steps), Range(alone, alone, alone), own))
    side = rows(count * min(getattr(best.solver, "window", None) or steps, steps))
    cost = f"{side:.0f} rows cost {float(known.seconds(side)) / call:.1f} x "
    cost += "one row" if rows(count) == 1 else f"{rows(count):.0f} rows"
    return Plan(
        solver=best.solver if best.seconds.median < loop else Sequential(),
        reason=_reason(candidates, steps, call, cost),
        candidates=tuple(sorted(candidates, key=_expected)),
        loop_seconds=loop,
        latency=known,
        steps=steps,
        setting=_setting(sampler, noise, tolerance, devices),
        planning_seconds=time.perf_counter() - begun,
    )


def _expected(candidate: Candidate) -> float:
    return candidate.seconds.median


def _reason(candidates: Sequence[Candidate], steps: int, call: float, cost: str) -> str:
    """Say what decides between the loop and the best of the other candidates; the last one is the sequential solver."""
    best, loop = min(candidates[:-1], key=_expected), steps * call
    fewest = min(one.rounds.median for one in candidates)
    if best.seconds.median < loop:
        return f"{best.rounds.median:.0f} rounds take the place of {steps} calls, and {cost}"
    if steps < 1.5 * fewest:
        return f"{steps} steps are few: the fewest rounds are {fewest:.0f}"
    if best.seconds.median - best.rounds.median * best.overhead < loop:
        overhead, one_call = format_seconds(best.overhead), format_seconds(call)
        return f"the solver's own work, {overhead} a round, is too much beside calls of {one_call}"
    return f"the network's batch is not free: {cost}"


def _windowed(solver: Any, window: int, steps: int) -> Solver:
    changed: Solver = replace(solver, window=None if window == steps else window)
    return changed


def _overhead(solver: Solver, sampler: Sampler, states: Tensor, call: Callable[[], object], seconds: float) -> float:
    """Return the seconds of a round besides the network: the median of a few, within a tenth of a second.

    They need to agree to a part of the ``seconds`` of a call, beside which they count. Outputs are zero, but the
    network is called in between: what it leaves of the caches decides what the rest costs.
    """
    runs = start(sampler, Recurrence(sampler.coefficients, states), solver, tolerance=0.0)
    inside = [0.0]

    def nothing(rows: EvalBatch) -> Tensor:
        inside.append(inside[-1] + seconds_of(call, rows.x.device))
        return torch.zeros_like(rows.x)

    ends, taken = [time.perf_counter()], np.zeros(1)
    for _ in drive(runs, nothing):
        ends.append(time.perf_counter())
        taken = np.diff(ends) - np.diff(inside)
        taken = taken[1:] if len(taken) > 1 else taken  # the first one makes room
        if len(ends) == 9 or (len(ends) > 2 and (ends[-1] - ends[0] > 0.1 or timings_agree(taken, seconds))):
            break
    return float(np.median(taken))


def _shifts(
    solver: Solver, curve: RoundsCurve, local: Coefficients, count: int, measured: Sequence[Solution]
) -> list[float]:
    """Return how far the ln R of a batch lies from its curve: low, median and high."""
    found = []
    for one in measured:
        problem, alike = one.problem, _kind(one.problem.coefficients) == _kind(local)
        if type(one.solver) is type(solver) and alike and one.converged and not problem.guessed:
            window = min(getattr(one.solver, "window", None) or one.steps, one.steps)
            found.append(math.log(one.rounds / curve.rounds(one.steps, window, problem.tolerance)))
    if found:  # what networks differ by is known
        median, deviation = statistics.median(found), curve.spread
    else:
        median, deviation = 0.0, math.hypot(curve.between, curve.spread / math.sqrt(count))
    return [median + way * NormalDist().inv_cdf(0.9) * deviation for way in (-1, 0, 1)]


def _rounds(curve: RoundsCurve, shift: float, steps: int, window: int, tolerance: float, count: int) -> Array:
    """Return the rounds of a batch of samples, (count,), spread around the curve as samples are."""
    apart = np.array([NormalDist().inv_cdf((index + 0.5) / count) for index in range(count)])
    expected = np.rint(curve.rounds(steps, min(window, steps), tolerance) * np.exp(shift + curve.spread * apart))
    return np.clip(expected, math.ceil(steps / window), steps)


def _setting(sampler: Sampler, noise: Tensor, tolerance: float, devices: int) -> str:
    """Say what is planned for, and whether the rounds were measured there."""
    where = str(noise.device) if devices == 1 else f"{devices} x {noise.device.type}"
    samples = "1 sample" if len(noise) == 1 else f"{len(noise)} samples"
    text = f"{sampler.name}, N = {sampler.steps}, {samples}, tolerance {tolerance:g}, {where}"
    (fewest, most), (finest, coarsest) = _fitted()["steps"], _fitted()["tolerance"]
    if not (fewest <= sampler.steps <= most and finest <= tolerance <= coarsest):
        text += f"; rounds were measured for N from {fewest} to {most} and tolerances from {finest:g} to {coarsest:g}"
    return text
