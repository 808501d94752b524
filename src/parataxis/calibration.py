r"""Calibration: how far the error test may be loosened for this network and sampler, and what that guarantees.

A test with fixed safety factors is too strict for most networks, and for some it is not strict enough. Here n runs of
the user's own are solved in parallel and by the sequential loop, and the true errors decide. A *setting* is a solver
with its window and an acceptance scale: how many times the tolerance its error estimate may be. A run *fails* under a
setting if its true error exceeds the tolerance.

1. *Which setting*: a fixed list is tested from strict to loose, by fixed-sequence testing (Learn then Test,
   2110.01052). A setting is accepted if f failures in n runs are few enough: P(Binomial(n, 1 - coverage) <= f) is at
   most 1 - confidence. The first that is not ends the list. The list may be long at no cost, and errors need not grow
   along it. Of several lists each is tested at its share of 1 - confidence. With probability ``confidence`` over the
   calibration, at least ``coverage`` of all later runs are within the tolerance.
2. *Bound*: split conformal prediction for the chosen setting. With scores s = true error / estimate, and q the
   ceil((n + 1) coverage)-th smallest, q times the estimate bounds the next error with probability ``coverage``. That is
   exact for a setting that was fixed beforehand, a list of one; of a longer list, the same runs choose and bound.

Both hold for runs drawn as those of the calibration were: over all conditions together, not for each of them.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import check_generators, check_solver, check_tolerance, is_finite, is_int, wrap_denoiser
from .engine.executor import Executor, Network, check_inputs, select_condition
from .engine.latency import format_seconds
from .engine.run import drive, start
from .engine.solution import Solution
from .fingerprint import Fingerprint, changes, fingerprint, without_counters
from .guarantees import allowed_failures, conformal_quantile, failure_bound
from .html import preformatted
from .moments import Moments
from .samplers.from_scheduler import as_sampler
from .samplers.recurrence import Recurrence
from .samplers.sampler import Sampler
from .solvers import EXACT_IN_DISTRIBUTION, SOLVERS, as_solver
from .solvers.base import Solver
from .solvers.sequential import Sequential

__all__ = [
    "Calibration",
    "Candidates",
    "Outcome",
    "Setting",
    "Trial",
    "calibrate",
    "certified",
    "choose_setting",
    "relative_errors",
    "sequences",
]

SCALES = (0.25, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # the first for networks of which the test expects too much


@dataclass(frozen=True)
class Setting:
    """A solver and how many times the tolerance its error estimate may be."""

    solver: Solver
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_solver(self.solver)
        if not (is_finite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a positive number of tolerances, got {self.scale!r}.")


Candidates = Solver | Setting | str | Sequence[Solver | str] | Sequence[Setting] | None


class Outcome(NamedTuple):
    """What one run came to: its true relative error, the error estimate, rounds and evaluations over N."""

    error: float
    estimate: float
    rounds: float
    nfe_ratio: float


@dataclass(frozen=True)
class Trial:
    """What the runs of a calibration came to under one setting.

    Attributes:
        setting: That was tried.
        failures: Runs whose error exceeded the tolerance.
        accepted: Whether so few failures prove the coverage.
        rounds: Of a run, in the mean.
        nfe_ratio: Evaluations over N, in the mean.
        error: The ceil((n + 1) coverage)-th smallest error; the largest where there are too few runs.
        worst: Largest error.
    """

    setting: Setting
    failures: int
    accepted: bool
    rounds: float
    nfe_ratio: float
    error: float
    worst: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """Which setting keeps the tolerance for a network and a sampler, and with what guarantee; printed, it is a table.

    Pass it instead of a solver. What it was made of is compared at every use, and a difference is an error.

    Attributes:
        setting: The accepted one with the fewest rounds; ``Sequential()`` where none was accepted.
        tolerance: Relative error that a run should keep.
        coverage: Share of the runs that should.
        confidence: Probability that the calibration is right about that.
        runs: n.
        trials: Every setting that was tried.
        promised: Share of the runs within the tolerance that is proved with this confidence: at least ``coverage``
            with enough runs, less with fewer.
        quantile: q, which times the estimate bounds the error; inf with too few runs.
        fingerprint: What was calibrated.
        evaluations: Steps evaluated for the calibration, those of the sequential loop among them.
        seconds: How long it took.
        moments: Mean and covariance of its samples, for a first guess; None without.
    """

    setting: Setting
    tolerance: float
    coverage: float
    confidence: float
    runs: int
    trials: tuple[Trial, ...]
    promised: float
    quantile: float
    fingerprint: Fingerprint
    evaluations: int
    seconds: float
    moments: Moments | None = None

    @property
    def solver(self) -> Solver:
        """The solver of the chosen setting."""
        return self.setting.solver

    @property
    def solver_tolerance(self) -> float:
        """What the solver's own estimate may be."""
        return self.tolerance * self.setting.scale

    def check(self, now: Fingerprint) -> None:
        """Raise unless this is what was calibrated.

        Raises:
            ValueError: With everything that has changed.
        """
        differences = changes(self.fingerprint, now)
        if differences:
            raise ValueError(
                f"this calibration is of something else, and guarantees nothing here: {'; '.join(differences)}. "
                "Calibrate again, or restore what it was made with."
            )

    def check_use(
        self, network: Callable[..., Any], noise: Tensor, sampler: Sampler, condition: Any, tolerance: float
    ) -> None:
        """Raise unless this is the network, sampler, kind of noise and condition, and tolerance that was calibrated."""
        self.check_tolerance(tolerance)
        self.check(fingerprint(network, noise, sampler, condition))

    def check_tolerance(self, tolerance: float) -> None:
        """Raise unless a tolerance is the default of every function, or the calibration's own."""
        if tolerance not in (1e-2, self.tolerance):
            raise ValueError(
                f"tolerance {tolerance:g} was asked for and {self.tolerance:g} was calibrated: leave it out, or "
                "calibrate for this one."
            )

    def bounded(self, estimate: float) -> float:
        """Return what bounds the error of a run with this estimate; the estimate itself with too few runs."""
        return self.quantile * estimate if math.isfinite(self.quantile) and math.isfinite(estimate) else estimate

    def report(self, solution: Solution) -> Solution:
        """Return a solution whose error estimate is the calibrated bound."""
        return replace(solution, error_estimate=self.bounded(solution.error_estimate))

    def guesses(self, steps: int) -> bool:
        """Return whether solves begin from the moments: at full width, as narrow windows extrapolate better."""
        return self.moments is not None and _is_full(self.solver, steps)

    def guess(self, recurrence: Recurrence, condition: Any = None) -> Tensor:
        """Return trajectories (B, N + 1, *shape) of Gaussian data with the moments of the calibration's samples.

        Raises:
            ValueError: If the calibration has no moments: only solvers of full width gain by a guess.
        """
        if self.moments is None:
            raise ValueError(
                "this calibration has no moments for a guess: calibrate a solver of full width, such as Secant(), on "
                "a sampler that knows its noise levels."
            )
        return self.moments.trajectory(recurrence, condition)

    def save(self, path: str | Path) -> None:
        """Write the calibration as JSON.

        Raises:
            ValueError: If it cannot be written.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["setting"] = _setting_text(self.setting)
        values["trials"] = [{**asdict(trial), "setting": _setting_text(trial.setting)} for trial in self.trials]
        values["moments"] = None if self.moments is None else _moments_text(self.moments)
        try:
            Path(path).write_text(json.dumps(values, indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error}): choose another path.") from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a calibration that :meth:`save` wrote.

        Raises:
            ValueError: If the file cannot be read, or is not a calibration of this version.
        """
        try:
            values = json.loads(Path(path).read_text())
            values["setting"] = _read_setting(values["setting"])
            values["trials"] = tuple(
                Trial(**{**trial, "setting": _read_setting(trial["setting"])}) for trial in values["trials"]
            )
            values["moments"] = None if values["moments"] is None else _read_moments(values["moments"])
            _check_numbers(values)
            return cls(**values)
        # A RuntimeError is of nesting without end, an OverflowError of numbers without.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"{path} cannot be read as a calibration ({type(error).__name__}: {error}): save one with its save()."
            ) from error

    def __repr__(self) -> str:
        """Return the choice, without the table."""
        return (
            f"Calibration({self.setting.solver!r}, scale {self.setting.scale:g}, tolerance {self.tolerance:g}: "
            f"{self.promised:.1%} of runs, {self.runs} runs)"
        )

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        return preformatted(str(self))

    def __str__(self) -> str:
        """Return what was tried as a table, and what is guaranteed."""
        width = max([len(repr(trial.setting.solver)) for trial in self.trials] + [6])
        lines = [f"{'solver':{width}}  scale  rounds  evaluations / N  failures     error     worst"]
        for trial in self.trials:
            mark = " <- chosen" if trial.setting == self.setting else "" if trial.accepted else " rejected"
            failures = f"{trial.failures}/{self.runs}"
            lines.append(
                f"{trial.setting.solver!r:{width}}  {trial.setting.scale:5g}  {trial.rounds:6.1f}  "
                f"{trial.nfe_ratio:15.2f}  {failures:>8}  {trial.error:8.1e}  {trial.worst:8.1e}{mark}"
            )
        if not any(trial.accepted for trial in self.trials):
            lines.append("no setting keeps the tolerance: the sequential loop, which is exact, takes their place.")
        else:
            lines.append(
                f"With a confidence of {self.confidence:.0%}, at least {self.promised:.1%} of runs like these are "
                f"within {self.tolerance:g}."
            )
            if self.promised < self.coverage:
                lines.append(f"For {self.coverage:.0%} it takes {_runs_needed(self.coverage, self.confidence)} runs.")
            if math.isfinite(self.quantile):
                lines.append(
                    f"Reported estimates are {self.quantile:.2g} times the solver's: {self.coverage:.0%} of errors are "
                    "below."
                )
        lines.append(f"It took {self.evaluations} evaluations, {format_seconds(self.seconds)}.")
        return "\n".join(lines)


def calibrate(
    denoise: Callable[..., Tensor],
    noise: Tensor,
    sampler: Sampler,
    candidates: Candidates = None,
    *,
    tolerance: float = 1e-2,
    coverage: float = 0.95,
    confidence: float = 0.95,
    condition: Any = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    max_rows: int | None = None,
) -> Calibration:
    """Measure how far the error test may be loosened for a network and a sampler; see :mod:`parataxis.calibration`.

    For a loop or a pipeline of somebody else, see :func:`parataxis.calibrate_loop`.

    Costs one sequential loop for each row of ``noise`` and one solve for each row and setting that is tried. Use other
    noise, and conditions as they will be used: what is guaranteed is about runs like these.

    Args:
        denoise: As in :func:`parataxis.sample`.
        noise: (n, *shape), one run a row: 59 for the defaults, 299 for a coverage of 99 %. Fewer promise less.
        sampler: The equation.
        candidates: A solver with its window, or several, each tried with scales from a quarter to 32; or a list of
            :class:`Setting` in the order in which they are to be tested, from strict to loose. Default
            ``Secant(window=8)``.
        tolerance: Relative error that a run should keep, compared with the sequential loop.
        coverage: Share of the runs that should keep it.
        confidence: Probability, over calibrations, that this share is kept.
        condition: (n, ...) as in :func:`parataxis.sample`.
        generator: Of the noise that steps add: one for the batch, or one for each run.
        max_rows: Most rows of one call of the network.

    Raises:
        TypeError: For candidates that are neither solvers nor settings.
        ValueError: For arguments out of range, or that do not fit together.
        OutputError: See :func:`parataxis.sample`.
    """
    network, begun = wrap_denoiser(denoise), time.perf_counter()
    sampler = as_sampler(sampler)
    check_inputs(noise, condition)
    check_generators(generator, len(noise))
    lists = sequences(candidates, tolerance, coverage, confidence)
    for setting in (setting for settings in lists for setting in settings):
        reason = setting.solver.unsupported(sampler.coefficients)
        if reason is not None:
            raise ValueError(f"{setting.solver!r} does not support this sampler: {reason}")
    before = fingerprint(denoise, noise, sampler, condition)
    states = noise.to(torch.promote_types(noise.dtype, torch.float32))
    recurrence = sampler.recurrence(states, generator, noise.dtype)
    evaluate = Executor(Network(network, sampler.network_times(noise.dtype), condition), max_rows=max_rows)

    def solve(solver: Solver, tolerance: float, guess: Tensor | None = None) -> list[Solution]:
        runs = start(
            sampler, recurrence, solver, tolerance=tolerance, guess=guess, dtype=noise.dtype, generator=generator
        )
        with torch.no_grad():
            for _ in drive(runs, evaluate):
                pass
        return [run.solution for run in runs]

    exact = torch.stack([solution.x for solution in solve(Sequential(), 0.0)])
    moments, guess = None, None
    if any(_is_full(setting.solver, sampler.steps) for settings in lists for setting in settings):
        moments = _moments(exact, condition, sampler)
        guess = None if moments is None else _cross_fitted(exact, recurrence, condition)

    def outcomes(setting: Setting) -> list[Outcome]:
        first = guess if _is_full(setting.solver, sampler.steps) else None
        solutions = solve(setting.solver, tolerance * setting.scale, first)
        errors = relative_errors(torch.stack([solution.x for solution in solutions]), exact)
        return [
            Outcome(error, solution.error_estimate, solution.rounds, solution.nfe_ratio)
            for error, solution in zip(errors, solutions, strict=True)
        ]

    choice = choose_setting(lists, outcomes, tolerance, coverage, confidence, sampler.steps)
    loops = sampler.steps * len(noise)
    return certified(
        lists,
        choice,
        tolerance=tolerance,
        coverage=coverage,
        confidence=confidence,
        runs=len(noise),
        # What counts calls, or changes with them, says nothing of the network.
        fingerprint=without_counters(before, fingerprint(denoise, noise, sampler, condition)),
        evaluations=loops + round(sum(trial.nfe_ratio for trial in choice[2]) * loops),
        seconds=time.perf_counter() - begun,
        moments=moments,
    )


def certified(
    lists: Sequence[Sequence[Setting]],
    choice: tuple[Setting, float, tuple[Trial, ...]],
    *,
    confidence: float,
    runs: int,
    **facts: Any,
) -> Calibration:
    """Return the calibration of a choice, with the share of runs that it proves."""
    chosen, quantile, trials = choice
    promised = 1.0
    if not isinstance(chosen.solver, Sequential):
        failures = next(trial.failures for trial in trials if trial.setting == chosen)
        promised -= failure_bound(failures, runs, 1 - (1 - confidence) / len(lists))
    return Calibration(
        chosen, trials=trials, promised=promised, quantile=quantile, confidence=confidence, runs=runs, **facts
    )


def sequences(candidates: Candidates, tolerance: float, coverage: float, confidence: float) -> list[list[Setting]]:
    """Return lists of settings, each from strict to loose, of the candidates, or raise."""
    check_tolerance(tolerance)
    if tolerance == 0:
        raise ValueError("tolerance must be above 0: at 0 every solver returns the sequential sample already.")
    for name, value in (("coverage", coverage), ("confidence", confidence)):
        if not (is_finite(value) and 0 < value < 1):
            raise ValueError(f"{name} must be in (0, 1), such as 0.95, got {value!r}.")
    items = candidates if isinstance(candidates, Iterable) and not isinstance(candidates, str) else [candidates]
    chosen: list[Any] = [item if isinstance(item, Setting) else as_solver(item) for item in items]
    if not chosen:
        raise ValueError("candidates is empty: pass at least one solver, or None for Secant(window=8).")
    if all(isinstance(candidate, Setting) for candidate in chosen):
        return [chosen]
    for candidate in chosen:
        if type(candidate) in EXACT_IN_DISTRIBUTION.values():
            raise ValueError(f"{candidate!r} draws another sample than the loop's: it has no error to calibrate.")
    return [[Setting(solver, scale) for scale in SCALES] for solver in chosen]


def choose_setting(
    lists: Sequence[Sequence[Setting]],
    outcomes: Callable[[Setting], Sequence[Outcome]],
    tolerance: float,
    coverage: float,
    confidence: float,
    steps: int,
) -> tuple[Setting, float, tuple[Trial, ...]]:
    """Test every list up to its first rejection; return the accepted setting with the fewest rounds, q and the trials.

    Where there are too few runs for the coverage, a setting is accepted if none fails.
    """
    trials: list[Trial] = []
    chosen: tuple[float, Setting, float] = (float(steps), Setting(Sequential()), 0.0)
    for settings in lists:
        for setting in settings:
            ran = outcomes(setting)
            errors = [outcome.error if math.isfinite(outcome.error) else math.inf for outcome in ran]
            failures = sum(error > tolerance for error in errors)
            allowed = max(allowed_failures(len(ran), coverage, 1 - (1 - confidence) / len(lists)), 0)
            quantile = conformal_quantile(errors, coverage)
            trial = Trial(
                setting,
                failures,
                failures <= allowed,
                float(np.mean([outcome.rounds for outcome in ran])),
                float(np.mean([outcome.nfe_ratio for outcome in ran])),
                quantile if math.isfinite(quantile) else max(errors),
                max(errors),
            )
            trials.append(trial)
            if not trial.accepted:
                break
            if trial.rounds < chosen[0]:
                scores = [_score(error, outcome.estimate) for error, outcome in zip(errors, ran, strict=True)]
                chosen = trial.rounds, setting, conformal_quantile(scores, coverage)
    return chosen[1], chosen[2], tuple(trials)


def relative_errors(x: Tensor, exact: Tensor) -> list[float]:
    """Return |x - y| / |y| of every sample, in float64; where y is 0, |x - y|."""
    x, exact = x.detach().cpu().flatten(1).double(), exact.detach().cpu().flatten(1).double()
    size = exact.norm(dim=1)
    errors: list[float] = ((x - exact).norm(dim=1) / torch.where(size > 0, size, 1.0)).tolist()
    return errors


def _score(error: float, estimate: float) -> float:
    """Return error / estimate; an estimate that says nothing bounds every error."""
    if error == 0 or math.isinf(estimate):
        return 0.0
    return error / estimate if estimate > 0 else math.inf


def _runs_needed(coverage: float, confidence: float) -> int:
    return math.ceil(math.log(1 - confidence) / math.log(coverage) - 1e-9)


def _is_full(solver: Solver, steps: int) -> bool:
    """Return whether all steps of a loop are evaluated in the first round, so that a guess of them all is of use."""
    window = getattr(solver, "window", 0)
    return window is None or window >= steps


def _moments(samples: Tensor, condition: Any, sampler: Sampler) -> Moments | None:
    """Return the moments of samples, where there are enough and the sampler can use them."""
    if len(samples) < 4 or not Moments.supports(sampler.coefficients):
        return None
    return Moments.of(samples, condition)


def _cross_fitted(samples: Tensor, recurrence: Recurrence, condition: Any) -> Tensor:
    """Return a guess for each sample from the moments of the half that it is not in: its own sample would help it."""
    count = len(samples)
    parts = torch.arange(count, device="cpu") % 2
    guess = samples.new_zeros(count, recurrence.coefficients.steps + 1, *samples.shape[1:])
    for part in (0, 1):
        rows, others = torch.nonzero(parts == part).flatten(), torch.nonzero(parts != part).flatten()
        noise = None if recurrence.noise is None else recurrence.noise[rows]
        mine = Recurrence(recurrence.coefficients, recurrence.start[rows], noise)
        moments = Moments.of(samples[others], select_condition(condition, others))
        guess[rows] = moments.trajectory(mine, select_condition(condition, rows))
    return guess


def _setting_text(setting: Setting) -> dict[str, Any]:
    solver: Any = setting.solver
    options = {field.name: getattr(solver, field.name) for field in fields(solver)}
    return {"solver": type(solver).__name__, "options": options, "scale": setting.scale}


def _check_numbers(values: dict[str, Any]) -> None:
    """Raise unless the numbers of a file can be those of a calibration: what they promise is printed and relied on."""
    for trial in values["trials"]:
        if not is_int(trial.failures, 0) or not isinstance(trial.accepted, bool):
            raise ValueError(f"a trial has {trial.failures!r} failures, accepted {trial.accepted!r}")
    at_most = {"coverage": 1.0, "confidence": 1.0, "promised": 1.0}
    numbers = [(name, values[name]) for name in (*at_most, "tolerance", "quantile", "seconds")]
    numbers += [
        (name, getattr(trial, name)) for trial in values["trials"] for name in ("rounds", "nfe_ratio", "error", "worst")
    ]
    for name, value in numbers:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= at_most.get(name, math.inf):  # NaN is none of these
            raise ValueError(f"{name} is {value!r}")
    for name, minimum in (("runs", 1), ("evaluations", 0)):
        if not is_int(values[name], minimum):
            raise ValueError(f"{name} is {values[name]!r}")


def _read_setting(values: dict[str, Any]) -> Setting:
    by_name = {cls.__name__: cls for cls in [*SOLVERS.values(), Sequential]}
    return Setting(by_name[values["solver"]](**values["options"]), values["scale"])


def _moments_text(moments: Moments) -> dict[str, Any]:
    values: dict[str, Any] = {"remainder": moments.remainder}
    for name in ("means", "basis", "variances", "classes"):
        tensor = getattr(moments, name)
        if tensor is not None:
            kind = np.int64 if name == "classes" else np.float16 if name == "basis" else np.float32
            array = tensor.numpy().astype(kind)
            values[name] = [list(array.shape), array.dtype.str, base64.b64encode(array.tobytes()).decode()]
    return values


def _read_moments(values: dict[str, Any]) -> Moments:
    tensors: dict[str, Any] = {}
    for name in ("means", "basis", "variances", "classes"):
        if name in values:
            shape, kind, text = values[name]
            array = np.frombuffer(base64.b64decode(text), kind).reshape(shape)
            tensors[name] = torch.from_numpy(array.astype(np.int64 if name == "classes" else np.float32))
    return Moments(remainder=values["remainder"], **tensors)
