"""Planning: whether many steps side by side are faster here, and by which solver.

A call of the network with n rows takes tau(n) seconds, as measured. A solver that needs R rounds for N steps, evaluates
n_k steps in round k and takes c seconds a round besides the network, needs

    seconds = sum_{k<R} (tau(n_k) + c),     speed-up = N tau(B) / seconds

for B samples. R and n_k are forecast (:mod:`.rounds_curve`); what takes well under a second is tried
(:mod:`.trials`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import plots
from ..calibration import Calibration
from ..calibration import calibrate as calibration_of
from ..checks import check_tolerance, check_whole
from ..engine.executor import Executor, Network, check_inputs, select_condition
from ..engine.latency import Latency, format_seconds, latency, seconds_of, timings_agree
from ..engine.rows import EvalBatch, OutputError
from ..engine.run import drive, start
from ..engine.solution import Solution
from ..html import preformatted
from ..samplers.coefficients import Coefficients
from ..samplers.from_scheduler import as_sampler
from ..samplers.recurrence import Recurrence
from ..samplers.sampler import Sampler
from ..solvers import SOLVERS
from ..solvers.base import Solver
from ..solvers.sequential import Sequential
from ..solvers.window import check_window
from .candidates import Candidate, Range, choose, expected_seconds
from .rounds_curve import RoundsCurve, fitted, kind_of
from .trials import try_candidates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PLAN_CLASSES", "Plan", "plan"]

Array = NDArray[np.float64]
LONGEST_TRIAL = 0.9  # seconds of a loop beside which trial solves count for nothing
CALIBRATION_SEED = 2**40  # of noise that nobody chooses by a seed


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
        calibration: Of that solver, to be passed in its place; None unless it was asked for.
    """

    solver: Solver
    reason: str
    candidates: tuple[Candidate, ...]
    loop_seconds: float
    latency: Latency
    steps: int
    setting: str
    planning_seconds: float
    calibration: Calibration | None = None

    @property
    def chosen(self) -> Candidate:
        """What ``solver`` is expected to take."""
        return next(candidate for candidate in self.candidates if candidate.solver == self.solver)

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
        """Return what was expected, and how far from it the seconds are that the solve took."""
        chosen = self.chosen
        return (
            f"planned {chosen.rounds.median:.0f} rounds, {chosen.seconds.text(format_seconds)}; "
            f"took {format_seconds(seconds)}, {100 * (seconds / chosen.seconds.median - 1):+.0f} %"
        )

    def __repr__(self) -> str:
        """Return the choice, without the table."""
        return f"Plan({self.solver!r}, {self.speedup.text('{:.2f}'.format)} times as fast as the loop)"

    def plot(self) -> Figure:
        """Return a figure of the seconds of a call by its rows; see :func:`parataxis.plots.latency`."""
        return plots.latency(self.latency)

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        return preformatted(str(self))

    def __str__(self) -> str:
        """Return the plan as a table."""
        lines = [self.setting, str(self.latency)]
        lines.append(f"  {'':<12}{'window':>8}{'rounds':>16}{'seconds':>30}{'speed-up':>22}")
        lines.append(f"  {'plain loop':<12}{1:>8}{self.steps:>16}{format_seconds(self.loop_seconds):>30}{'1.00':>22}")
        for candidate in self.candidates:
            solver = candidate.solver
            mark, name = ">" if solver == self.solver else " ", type(solver).__name__
            window = getattr(solver, "window", 1) or "all"
            rounds, seconds = candidate.rounds.text("{:.0f}".format), candidate.seconds.text(format_seconds)
            speed = self.speedup_of(candidate).text("{:.2f}".format)
            lines.append(f"{mark} {name:<12}{window:>8}{rounds:>16}{seconds:>30}{speed:>22}")
        lines.append(f"{self.solver!r}: {self.reason}.")
        return "\n".join(lines if self.calibration is None else [*lines, str(self.calibration)])


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
    rows_per_step: int = 1,
    max_rows: int | None = None,
    buckets: Sequence[int] | None = None,
    known: Latency | None = None,
    measured: Sequence[Solution] = (),
    trials: bool = True,
    calibrate: int = 0,
) -> Plan:
    """Measure what calls of the network cost, and choose the solver that is expected to be fastest.

    Some thirty calls of the network are made; to draw more than one batch, plan once and pass ``plan.solver``.

    Args:
        denoise: As for :func:`parataxis.sample`.
        noise: (B, *shape) as for :func:`parataxis.sample`; any input of the network will do.
        sampler: The equation: a sampler, or a diffusers scheduler whose timesteps are set.
        tolerance: Relative error allowed in each sample.
        condition: As for :func:`parataxis.sample`.
        solvers: Solvers with default options, whose windows are replaced; default all that there are forecasts for.
        windows: Steps evaluated in a round; None for all.
        devices: Equal devices that share the rows of a round, and the samples of the loop. Communication between them
            is counted as free.
        rows_per_step: Rows of the network that one step takes, if ``denoise`` or ``known`` count rows, not steps.
        max_rows: Most rows of one call.
        buckets: The numbers of rows that a call may have, as for :func:`parataxis.sample`.
        known: tau(n), if it has been measured already.
        measured: Earlier solves with this network: where a solver took more or fewer rounds than forecast, the new
            forecast follows. Solves with other solvers or with samplers of the other kind are ignored.
        trials: Where a loop takes less than a second, run it and the best solvers a few times, from this noise, and
            plan by what they take, unless something has been measured already.
        calibrate: Runs to calibrate the chosen solver by, such as 59, with noise of their own and the conditions of the
            batch in turn: pass ``plan.calibration`` to :func:`parataxis.sample` then. See :func:`parataxis.calibrate`.

    Raises:
        OutputError: If the network returns a wrong type, shape or dtype, or NaN or Inf.
        TypeError: If ``sampler`` is not one, or ``measured`` is not a list of solutions.
        ValueError: For a solver without a forecast, and inputs that do not fit together or are out of range.
        torch.cuda.OutOfMemoryError: If there is no memory for one row.
    """
    started = time.perf_counter()
    sampler = as_sampler(sampler)
    check_inputs(noise, condition)
    check_tolerance(tolerance)
    check_whole("devices", devices)
    check_whole("rows_per_step", rows_per_step)
    check_whole("calibrate", calibrate, 0)
    if not (isinstance(measured, Sequence) and all(isinstance(solution, Solution) for solution in measured)):
        raise TypeError(
            f"measured must be what parataxis.sample returned, or a list of its solutions, got {measured!r}."
        )
    setting = _Setting(sampler, len(noise), tolerance, devices, rows_per_step)
    forecasts = setting.forecast(_solvers(sampler, solvers), windows, measured)
    network = Network(denoise, sampler.network_times(noise.dtype), condition)
    execute = Executor(network, max_rows=max_rows, buckets=buckets)
    example, single_row = _examples(noise, sampler)
    call = partial(execute, single_row)
    with torch.no_grad():
        if not torch.isfinite(call()).all():
            raise OutputError(
                f"the network returned NaN or Inf at step 0 of {sampler.steps} for the noise: check the noise, the "
                "network's dtype and its conditioning."
            )
        # What is planned for runs here, and nothing of it has been measured yet.
        trials = trials and known is None and not measured and devices == 1 and rows_per_step == 1
        known = _measure_latency(network, example, setting, forecasts, max_rows, execute.buckets, known)
        states = example.x.to(torch.promote_types(noise.dtype, torch.float32))
        overheads = _measure_overheads(forecasts, sampler, states, call, float(known.seconds(1)))
        candidates = setting.candidates(forecasts, known, overheads)
        loop = sampler.steps * float(known.seconds(setting.rows(len(noise))))
        if trials and loop < LONGEST_TRIAL * known.slowdown:
            execute = Executor(network, max_rows=known.limit, buckets=buckets)
            candidates = try_candidates(candidates, sampler, noise, tolerance, execute)
            loop = candidates[-1].seconds.median
    chosen = choose(candidates, loop)
    calibration = None
    if calibrate and not isinstance(chosen.solver, Sequential):
        calibration = _calibrate(denoise, noise, sampler, chosen.solver, tolerance, condition, calibrate, max_rows)
    return Plan(
        solver=chosen.solver,
        reason=setting.reason(candidates, known, loop),
        candidates=tuple(sorted(candidates, key=expected_seconds)),
        loop_seconds=loop,
        latency=known,
        steps=sampler.steps,
        setting=_description(sampler, noise, tolerance, devices),
        planning_seconds=time.perf_counter() - started,
        calibration=calibration,
    )


def _calibrate(
    denoise: Callable[..., Tensor],
    noise: Tensor,
    sampler: Sampler,
    solver: Solver,
    tolerance: float,
    condition: Any,
    runs: int,
    max_rows: int | None,
) -> Calibration:
    """Calibrate a solver by runs with other noise than that of the batch, and its conditions in turn."""
    source = torch.Generator().manual_seed(CALIBRATION_SEED)
    drawn = torch.randn(runs, *noise.shape[1:], generator=source).to(noise)
    return calibration_of(
        denoise,
        drawn,
        sampler,
        [solver],
        tolerance=tolerance,
        condition=select_condition(condition, torch.arange(runs, device="cpu") % len(noise)),
        generator=[torch.Generator().manual_seed(CALIBRATION_SEED + 1 + run) for run in range(runs)],
        max_rows=max_rows,
    )


def _measure_latency(
    network: Network,
    example: EvalBatch,
    setting: _Setting,
    forecasts: Sequence[_Forecast],
    max_rows: int | None,
    buckets: Sequence[int],
    known: Latency | None,
) -> Latency:
    """Return tau(n), measured as far as it can matter unless it is known."""
    if known is None:
        largest = setting.rows(setting.samples * max(forecast.window for forecast in forecasts))
        limit = min(int(largest), max_rows or int(largest))
        enough = partial(setting.is_enough, forecasts)
        known = latency(network, example, max_rows=limit, buckets=buckets or None, enough=enough)
    return known if max_rows is None else replace(known, limit=min(max_rows, known.limit or max_rows))


def _measure_overheads(
    forecasts: Sequence[_Forecast], sampler: Sampler, states: Tensor, call: Callable[[], object], scale: float
) -> dict[type[Solver], float]:
    """Return the seconds of a round besides the network, of every kind of solver and of the sequential one."""
    overheads: dict[type[Solver], float] = {}
    for solver in [*(forecast.solver for forecast in forecasts), Sequential()]:
        if type(solver) not in overheads:
            overheads[type(solver)] = _overhead(solver, sampler, states, call, scale)
    return overheads


PLAN_CLASSES = (Plan, Candidate, Range, Latency)  # that a plan is made of, besides solvers


class _Forecast(NamedTuple):
    """What a solver is expected to evaluate: the rows of every round, with few rounds, in the median, with many."""

    solver: Solver
    window: int
    rows: list[Array]


@dataclass(frozen=True)
class _Setting:
    """What is planned for."""

    sampler: Sampler
    samples: int
    tolerance: float
    devices: int
    rows_per_step: int

    def rows(self, evaluations: Any) -> Any:
        """Return the rows of each device for so many evaluations."""
        return np.ceil(np.multiply(evaluations, self.rows_per_step) / self.devices)

    def forecast(
        self, solvers: Sequence[Solver], windows: Sequence[int | None], measured: Sequence[Solution]
    ) -> list[_Forecast]:
        """Return a forecast for every solver with every window."""
        steps, local = self.sampler.steps, self.sampler.coefficients
        curves = [RoundsCurve.load(solver, local) for solver in solvers]
        for window in windows:
            check_window(window)
        sizes = sorted({steps if window is None else min(window, steps) for window in windows})
        if not solvers or not sizes:
            raise ValueError("there is nothing to choose from: pass at least one solver and one window.")
        forecasts = []
        for solver, curve in zip(solvers, curves, strict=True):
            shifts = _shifts(solver, curve, local, self.samples, measured)
            for window in sizes:
                rounds = [_rounds(curve, shift, steps, window, self.tolerance, self.samples) for shift in shifts]
                rows = [self.rows(curve.widths(case, steps, window).sum(1)) for case in rounds]
                forecasts.append(_Forecast(_windowed(solver, window, steps), window, rows))
        return forecasts

    def is_enough(self, forecasts: Sequence[_Forecast], known: Latency) -> bool:
        """Return whether no solver that makes larger calls can be the fastest, even if they cost no more."""
        largest, wide = known.rows[-1], math.inf
        best = self.sampler.steps * float(known.seconds(self.rows(self.samples)))
        for _, _, (_, median_rows, _) in forecasts:
            seconds = float(known.seconds(np.minimum(median_rows, largest)).sum())
            if median_rows.max() <= largest:
                best = min(best, seconds)
            else:
                wide = min(wide, seconds)
        return wide >= best

    def candidates(
        self, forecasts: Sequence[_Forecast], known: Latency, overheads: dict[type[Solver], float]
    ) -> list[Candidate]:
        """Return what every forecast costs, and last what the sequential solver does."""
        candidates = []
        for solver, _, cases in forecasts:
            overhead = overheads[type(solver)]
            calls = [known.seconds(rows) for rows in cases]
            rounds = Range(*(float(len(seconds)) for seconds in calls))
            total = Range(*(float(seconds.sum()) + overhead * len(seconds) for seconds in calls))
            candidates.append(Candidate(solver, rounds, total, overhead))
        steps, overhead = self.sampler.steps, overheads[Sequential]
        seconds = steps * (float(known.seconds(self.rows(self.samples))) + overhead)
        sequential = Candidate(Sequential(), Range(steps, steps, steps), Range(seconds, seconds, seconds), overhead)
        return [*candidates, sequential]

    def reason(self, candidates: Sequence[Candidate], known: Latency, loop: float) -> str:
        """Return what decides between the loop and the best of the other candidates; the last one is sequential."""
        chosen, steps = choose(candidates, loop), self.sampler.steps
        best = min(candidates[:-1], key=expected_seconds) if chosen is candidates[-1] else chosen
        samples_rows = self.rows(self.samples)
        call = float(known.seconds(samples_rows))
        fewest = min(candidate.rounds.median for candidate in candidates)
        rows = self.rows(self.samples * min(getattr(best.solver, "window", None) or steps, steps))
        cost = f"{rows:.0f} rows cost {float(known.seconds(rows)) / call:.1f} x "
        cost += "one row" if samples_rows == 1 else f"{samples_rows:.0f} rows"
        if best is chosen:
            return f"{best.rounds.median:.0f} rounds instead of {steps} calls, and {cost}"
        if steps < 1.5 * fewest:
            return f"{steps} steps are few: the fewest rounds are {fewest:.0f}"
        # What is not the network's is the solver's own: the overhead as estimated, or as a trial has shown it.
        inside = best.rounds.median * float(known.seconds(rows))
        if inside < loop:
            overhead = format_seconds((best.seconds.median - inside) / best.rounds.median)
            return f"the solver's own work, {overhead} a round, is too much beside calls of {format_seconds(call)}"
        return f"the network's batch is not free: {cost}"


def _solvers(sampler: Sampler, solvers: Sequence[Solver] | None) -> Sequence[Solver]:
    """Return the solvers to choose from: by default all that there are forecasts for."""
    if solvers is not None:
        return solvers
    local, curves = sampler.coefficients, fitted()["curves"]
    with_forecast = [cls() for cls in SOLVERS.values() if kind_of(local) in curves.get(cls.__name__, {})]
    return [solver for solver in with_forecast if solver.unsupported(local) is None]


def _examples(noise: Tensor, sampler: Sampler) -> tuple[EvalBatch, EvalBatch]:
    """Return rows to time the network with, and a single one of them."""
    count = len(noise)
    step, sample = (torch.arange(count, device="cpu") % size for size in (sampler.steps, count))
    example = EvalBatch(noise * sampler.start_scale, step, sample)
    return example, EvalBatch(*(field[:1] for field in example))


def _windowed(solver: Any, window: int, steps: int) -> Solver:
    changed: Solver = replace(solver, window=None if window == steps else window)
    return changed


def _overhead(solver: Solver, sampler: Sampler, states: Tensor, call: Callable[[], object], seconds: float) -> float:
    """Return the seconds of a round besides the network: the median of a few, within a tenth of a second.

    They need to agree to a part of the ``seconds`` of a call, beside which they count. Outputs are zero, but the
    network is called in between: what it leaves in the processor's caches decides how long the solver takes.
    """
    runs = start(sampler, Recurrence(sampler.coefficients, states), solver, tolerance=0.0)
    inside = [0.0]

    def zeros(rows: EvalBatch) -> Tensor:
        inside.append(inside[-1] + seconds_of(call, rows.x.device))
        return torch.zeros_like(rows.x)

    ends, taken = [time.perf_counter()], np.zeros(1)
    for _ in drive(runs, zeros):
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
    shifts = []
    for solution in measured:
        problem, steps = solution.problem, solution.steps
        comparable = type(solution.solver) is type(solver) and kind_of(problem.coefficients) == kind_of(local)
        if comparable and solution.converged and not problem.guessed:
            window = min(getattr(solution.solver, "window", None) or steps, steps)
            shifts.append(math.log(solution.rounds / curve.rounds(steps, window, problem.tolerance)))
    if shifts:  # how this network differs from others has been measured
        median, deviation = statistics.median(shifts), curve.spread
    else:
        median, deviation = 0.0, math.hypot(curve.between, curve.spread / math.sqrt(count))
    return [median + sign * NormalDist().inv_cdf(0.9) * deviation for sign in (-1, 0, 1)]


def _rounds(curve: RoundsCurve, shift: float, steps: int, window: int, tolerance: float, count: int) -> Array:
    """Return the rounds of a batch of samples, (count,), spread around the curve as samples are."""
    quantiles = np.array([NormalDist().inv_cdf((index + 0.5) / count) for index in range(count)])
    expected = np.rint(curve.rounds(steps, min(window, steps), tolerance) * np.exp(shift + curve.spread * quantiles))
    return np.clip(expected, math.ceil(steps / window), steps)


def _description(sampler: Sampler, noise: Tensor, tolerance: float, devices: int) -> str:
    """Return what is planned for, and whether the rounds were measured there."""
    where = str(noise.device) if devices == 1 else f"{devices} x {noise.device.type}"
    samples = "1 sample" if len(noise) == 1 else f"{len(noise)} samples"
    text = f"{sampler.name}, N = {sampler.steps}, {samples}, tolerance {tolerance:g}, {where}"
    (fewest, largest), (finest, coarsest) = fitted()["steps"], fitted()["tolerance"]
    if not (fewest <= sampler.steps <= largest and finest <= tolerance <= coarsest):
        text += (
            f"; rounds were measured for N from {fewest} to {largest} and tolerances from {finest:g} to {coarsest:g}"
        )
    return text
