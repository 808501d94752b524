r"""Any sampling loop, unmodified: record, solve, replay.

A loop belongs to someone else: a function, a pipeline. :func:`parallel` runs its Python several times with stubs in
the place of the networks (:mod:`parataxis.loops.passes`), and the networks only where the solver wants them.

1. *Record.* Two passes with outputs at random tell the loop's equation (:mod:`parataxis.loops.recording`), a third
proves
   it and gives what the loop adds along the way.
2. *Solve.* A solver works on that table; the recorded calls of the levels it asks for are merged into few network
   calls (:mod:`parataxis.loops.merge`). Where there is no equation, a pass of the loop answers the solver's Response in
   every round: a stub says f_q + d_q (u - u_q), and the loop itself says what trajectory follows.
3. *Replay.* A last pass with the same stubs decodes and returns as the loop always does. How far its last state U_N
   comes out from the one that was solved for, V_N, is added to the solver's estimate of its error, with a margin:

       certificate = margin estimate + |U_N - V_N| / |U_N|

   The solver is asked for the tolerance divided by that margin, because about one estimate in ten is too small.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..arrays import Array, Indices, upload
from ..checks import check_solver, is_finite
from ..engine.rows import EvalBatch
from ..engine.run import drive, start
from ..solvers.base import Solver
from ..samplers.coefficients import Coefficients
from ..samplers.recurrence import Recurrence
from ..solvers.secant import Secant
from ..solvers.sequential import Sequential
from .merge import Ask, Refused, WholeCalls, equal
from .passes import Loop, Passes
from .recording import Changed, Minded, Stage, Structure, analyse, linearise

if TYPE_CHECKING:
    pass

__all__ = ["Report", "checked", "named", "solved"]


Array = NDArray[np.float64]

SHORT = 8  # levels: shorter loops run sequentially

PROOF = 48  # elements of a level to fit its coefficients to; smaller loops are recorded more often

MORE = 16  # recordings at most, besides two

THIRD = 99  # seed of the pass that tells what the loop adds

ROUNDING = 64  # units of the states' own rounding below which nothing is claimed

LEARNED = 16  # keys of calls whose first stage a loop remembers, the latest ones

ANCHORS = 2  # solves of the equation from the trajectory of a replay, at most

FLOORS = 4  # the floor is measured once, at random: an anchored solution need not be nearer

GRADIENTS = (
    "the loop runs with gradients enabled and its denoiser has parameters that require them, but the result of a "
    "parallel loop carries none: call it within torch.no_grad(), or solve it by Sequential() if they are wanted."
)

MARGINS = 2, 4  # by which errors may exceed the solver's estimate: of an equation, of a loop that answers by itself


@dataclass
class Report:
    """What was done for the latest call of a loop; filled in by each call.

    Attributes:
        mode: ``recurrence`` (the loop's equation was solved), ``replay`` (the loop's Python answered every round),
            ``sequential`` (as it is), or ``none`` before the first call.
        reason: Why so.
        steps: N, over all stages.
        samples: Samples of the loop's batch.
        rounds: Rounds of network calls that waited for one another.
        evaluations: Levels evaluated, over all samples.
        calls: Network calls, those for the form of outputs, the checks of merged layouts and the floor included.
        rows: Rows of these calls.
        peak_width: Most levels of one sample in a round.
        peak_rows: Most rows of one call.
        passes: Runs of the loop's Python.
        error_estimate: Estimate of the relative error of the result to the sequential loop's, with a margin; at least
            the floor, where that is above the tolerance.
        floor: Relative change of the loop's result when every output changes by its rounding: a unit in its last place,
            and what the network makes of one in the last place of its input.
        tolerance: As asked for.
        converged: Whether the certificate is within the tolerance, or the floor where that is larger.
    """

    mode: str = "none"
    reason: str = "not run yet"
    steps: int = 0
    samples: int = 0
    rounds: int = 0
    evaluations: int = 0
    calls: int = 0
    rows: int = 0
    peak_width: int = 0
    peak_rows: int = 0
    passes: int = 0
    error_estimate: float = 0.0
    floor: float = 0.0
    tolerance: float = 0.0
    converged: bool = False

    def __str__(self) -> str:
        """Return one readable line."""
        if self.mode in ("none", "sequential"):
            return f"{self.mode}: {self.reason}"
        work = self.evaluations / max(self.steps * self.samples, 1)
        return (
            f"{self.mode}: {self.steps} steps in {self.rounds} rounds ({work:.2f} evaluations a step, "
            f"{self.calls} network calls of up to {self.peak_rows} rows, {self.passes} passes); error estimate "
            f"{self.error_estimate:.1e} (tolerance {self.tolerance:.1e}, floor {self.floor:.1e})"
            + ("" if self.converged else "; NOT CONVERGED")
            + (f"; {self.reason}" if self.reason else "")
        )


def named(denoisers: Sequence[nn.Module] | None) -> tuple[nn.Module, ...] | None:
    """Return the denoisers that were named, or None for none, or raise."""
    if denoisers is None:
        return None
    found = tuple(denoisers) if isinstance(denoisers, (list, tuple)) else None
    if not found or not all(isinstance(one, nn.Module) for one in found):
        given = type(denoisers).__name__ if found is None else f"[{', '.join(type(one).__name__ for one in found)}]"
        raise TypeError(f"denoisers must be a list of the modules that the loop calls, such as [unet], got {given}.")
    return found


def checked(solver: Solver | None, tolerance: Any) -> tuple[Solver, float]:
    """Return the solver, ``Secant(window=8)`` by default, and the tolerance, or raise."""
    if not (is_finite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be a relative error, finite and at least 0, got {tolerance!r}.")
    solver = Secant(window=8) if solver is None else solver
    check_solver(solver)
    return solver, float(tolerance)


def solved(
    loop: Loop, args: tuple[Any, ...], kwargs: dict[str, Any], solver: Solver, tolerance: float, report: Report
) -> Any:
    """Run a loop once, in parallel if it can be, and fill in the report."""
    report.__init__(tolerance=tolerance)  # type: ignore[misc]
    why = "the solver is Sequential." if isinstance(solver, Sequential) else loop.refuses()
    tried = False
    passes = Passes(loop, args, kwargs)
    try:
        if why is None:
            with passes.replaced():
                value = _Solving(passes, solver, tolerance, report).run()
            if passes.trainable:
                warnings.warn(GRADIENTS, RuntimeWarning, stacklevel=3)
            return value
    except Refused as refusal:
        why, tried = str(refusal), refusal.__cause__ is not None
    finally:
        loop.limit = passes.merger.limit
        _count(passes, report)
        passes.close()
    told = not isinstance(solver, Sequential) and not why.startswith("the loop has only")
    warn = partial(warnings.warn, f"the loop runs sequentially: {why}", RuntimeWarning, stacklevel=3)
    if told and not tried:
        warn()
    value = passes.sequential()  # raises what the loop raises by itself
    if told and tried:
        warn()
    report.mode, report.reason, report.converged, report.passes = "sequential", why, True, passes.count
    report.error_estimate, report.rounds = 0.0, 0
    return value


def _count(passes: Passes, report: Report) -> None:
    merger = passes.merger
    report.calls, report.rows, report.peak_rows, report.passes = (
        merger.calls,
        merger.rows,
        merger.peak_rows,
        passes.count,
    )


class _Solving:
    """One call of a loop, being solved stage by stage."""

    def __init__(self, passes: Passes, solver: Solver, tolerance: float, report: Report) -> None:
        self.passes, self.loop = passes, passes.loop
        self.solver, self.tolerance, self.report = solver, tolerance, report
        self.best = np.inf  # certificate of the stage at hand
        self.attempts = 0
        self.falling = True  # the certificate falls from replay to replay
        self.replayed = False  # a pass answers every round
        self.repeated = False  # the equation is that of an earlier call
        self.stale = False
        self.work: Callable[[], bool] | None = None  # to be done within the next pass

    def run(self) -> Any:
        """Solve every stage, replay, and return what the loop returns."""
        passes = self.passes
        learned = self.loop.learned.pop(passes.key, None)
        if learned is not None:
            self.repeat(learned)
        while True:
            stage = passes.stages[-1] if passes.stages else None
            work, self.work = self.work, None
            done, value = passes.play(certify=self.certified, work=work)
            stage = passes.stages[-1] if passes.stages else None
            if (work is not None and self.replayed) or (stage is not None and stage.nudged is not None):
                continue  # the rounds were passes of their own, or this one was for the floor
            if stage is not None and not stage.settled:
                self.again(stage)
            elif done:
                break
            else:
                self.solve(self.record())
        if not passes.stages:
            names = ", ".join(type(module).__name__ for module in self.loop.denoisers)
            raise Refused(f"it calls none of its denoisers ({names}): name those that it calls with denoisers=[...].")
        self.loop.learned[passes.key] = passes.stages[0].structure
        if len(self.loop.learned) > LEARNED:
            del self.loop.learned[next(iter(self.loop.learned))]
        if passes.always:
            self.report.reason = "a callback changes what the loop does, so it runs in every pass."
        self.certificate_above_the_floor()
        if not passes.always and self.loop.calls_back(passes.kwargs):
            return self.call_back()
        return value

    def certificate_above_the_floor(self) -> None:
        """Claim nothing below what rounding does to the loop's result, where that is more than the tolerance."""
        stages = [stage.structure for stage in self.passes.stages]
        floors = [one.floor for one in stages if one.floor > max(self.tolerance, ROUNDING * torch.finfo(one.dtype).eps)]
        if floors:
            report = self.report
            report.error_estimate = max(report.error_estimate, *floors)
            above = "the rounding of outputs alone moves the result by more than the tolerance (the floor)."
            report.reason = f"{report.reason} {above}".lstrip()

    def call_back(self) -> Any:
        """Replay once more, with callbacks; if they change what the loop does, solve it with them in every pass."""
        passes = self.passes
        for stage in passes.stages:
            stage.expected = stage.inputs
        try:
            return passes.play(loud=True)[1]
        except Minded:
            self.loop.minded.add(passes.key)
            passes.always, passes.stages = True, []
            del self.loop.learned[passes.key]
            self.report.__init__(tolerance=self.tolerance)  # type: ignore[misc]
            return self.run()

    def repeat(self, structure: Structure) -> None:
        """Solve the first stage with what an earlier call has learned: one pass tells what the loop adds."""
        passes = self.passes
        self.repeated = True
        passes.further = None
        stage = Stage(structure, 0, [None] * len(structure.sites))
        passes.stages.append(stage)
        try:
            self.wander(stage)
        except Changed:
            self.repeated = False
            passes.stages.clear()
        else:
            self.solve(stage)

    def record(self) -> Stage:
        """Find the structure of the calls that the latest pass has recorded, by more passes with random outputs."""
        passes = self.passes
        first = passes.stages[-1].stop if passes.stages else 0
        if not first and len(passes.recorded) <= SHORT:
            raise Refused(f"the loop has only {len(passes.recorded)} levels.")
        recordings, endings, called = [passes.recorded], [passes.ending], passes.called_out
        while len(recordings) < 2:
            passes.play(len(recordings))
            recordings.append(passes.recorded)
            endings.append(passes.ending)
            if called and passes.called_out and _alike(*endings[-2:]):
                # A module that the loop calls along the way, with nothing that depends on outputs.
                passes.constant.append(endings[0] or [])
                passes.play(0)
                recordings, endings, called = [passes.recorded], [passes.ending], passes.called_out
        structure, count = analyse(recordings, endings, range(len(recordings)), first)
        elements = structure.groups * structure.dim
        if elements < PROOF:
            for seed in range(2, 2 + min(-(-PROOF // elements), MORE)):
                passes.play(seed)
                recordings.append(passes.recorded)
                endings.append(passes.ending)
            structure, count = analyse(recordings, endings, range(len(recordings)), first)
        if not first and count == len(recordings[0]) and structure.steps <= SHORT:
            raise Refused(f"the loop has only {structure.steps} levels.")
        stage = Stage(structure, first, list(recordings[0][:count]))
        passes.further = count < len(recordings[0])
        passes.stages.append(stage)
        self.wander(stage)
        if structure.linear and not stage.proved():
            structure.linear = False
        structure.proof = None
        if not structure.linear:
            before = replace(stage)
            self.wander(stage, seed=THIRD + 2)
            linearise(structure, before, stage)
            self.wander(stage)
        return stage

    def wander(self, stage: Stage, seed: int = THIRD) -> None:
        """Make the pass that tells what the loop adds along the way."""
        stage.mode, stage.seed = "wander", seed
        self.passes.play()
        stage.anchor()
        stage.mode = "affine"

    def again(self, stage: Stage) -> None:
        """Go on from the trajectory of a replay that was not good enough.

        First with what the loop adds along the way taken from that replay: in the first pass it carried the rounding
        of other states. If that did not help, the equation is not to be trusted, and the loop answers every round.
        """
        if self.stale:
            # What an earlier call has learned is wrong for this one.
            self.repeated = False
            self.passes.stages.clear()
            return
        last = [] if stage.end is None else [stage.end]
        guess = torch.stack([*stage.inputs, *(last or stage.inputs[-1:])])  # (N + 1, G, dim)
        self.attempts += 1
        if stage.structure.linear and not self.replayed and self.falling and self.attempts <= ANCHORS:
            stage.anchor()
        else:
            self.replayed = True
        self.work = partial(self.drive, stage, guess)

    def solve(self, stage: Stage) -> None:
        """Solve a stage, by its equation if it has one."""
        structure = stage.structure
        self.attempts, self.best, self.falling = 0, np.inf, True
        narrow = self.passes.merger.apart = getattr(self.solver, "window", None) == 1
        self.replayed = narrow or not structure.linear
        self.report.reason = ""
        if narrow:
            self.report.reason = "the window is one level."
        elif not structure.linear:
            self.report.reason = "the loop is not linear in what its denoisers return."
        self.work = partial(self.drive, stage, None)

    def drive(self, stage: Stage, guess: Tensor | None) -> bool:
        """Drive the runs of a stage to their ends; return whether that left the pass at hand as it was."""
        while True:
            try:
                self.rounds(stage, guess)
                break
            except WholeCalls:
                stage.structure.joint = True
        if not stage.structure.floor:
            stage.nudge = self.roughness(stage)
        return not self.replayed

    def roughness(self, stage: Stage) -> float:
        """Return the rounding of outputs, relative to them: see the report's floor."""
        structure = stage.structure
        unit, level = float(torch.finfo(structure.network).eps), structure.steps // 2
        given = stage.anchors[level]
        if given is None or not stage.known[level].all():
            return unit
        noise = torch.randn(given.shape, generator=torch.Generator("cpu").manual_seed(THIRD), device="cpu").to(given)
        near = given + unit * given.square().mean(1, keepdim=True).sqrt() * noise
        sites = [(call, structure.sites[call]) for call in structure.levels[level]]
        asks = [
            Ask(call, np.arange(site.rows), near[torch.from_numpy(site.owner).to(near.device)]) for call, site in sites
        ]
        outputs = self.passes.merger.evaluate(stage.recorded, asks)
        return float(np.hypot(unit, stage.roughness(list(zip(structure.levels[level], outputs, strict=True)))))

    def rounds(self, stage: Stage, guess: Tensor | None) -> None:
        """Make the rounds of a solve."""
        structure, passes, report = stage.structure, self.passes, self.report
        report.mode = "replay" if self.replayed or report.mode == "replay" else "recurrence"
        equation: Recurrence = _Replayed.of(stage, passes) if self.replayed else _Solved.of(stage)
        if self.replayed and not hasattr(self.solver, "window"):
            raise ValueError(
                f"{self.solver!r} needs a loop that is linear in what its denoisers return, and this one is not: "
                "choose Secant or Picard."
            )
        rounding = float(torch.finfo(structure.network).eps) / 2
        if guess is not None:
            guess = torch.stack([stage.runs(states) for states in guess], 1)
        margin = MARGINS[self.replayed]
        tolerance = self.tolerance / margin
        half = torch.finfo(structure.network)
        if half.bits < 32:
            # Nothing is claimed below the floor, and where rounding is large a window never passes a stricter test.
            tolerance = max(tolerance, max(structure.floor, half.eps) / 4)
        ranks = self.loop.ranks
        if ranks is not None:
            ranks.compare(
                noise=equation.start,
                added=torch.stack(stage.added),
                tolerance=tolerance,
                solver=self.solver,
                mode=report.mode,
            )
        runs = start(None, equation, self.solver, tolerance=tolerance, guess=guess, rounding=rounding)
        for _ in drive(runs, lambda rows: self.evaluate(stage, rows)):
            self.loop.on_round(min(structure.steps if run.done else run.accepted for run in runs), structure.steps)
        if ranks is not None:
            ranks.end()
        stage.solved = torch.stack([run.solution.x for run in runs]).view(structure.groups, -1)
        stage.estimate = margin * max(run.error for run in runs)
        report.steps = sum(one.structure.steps for one in passes.stages)
        report.samples = structure.groups
        report.rounds += max(run.rounds for run in runs)
        report.evaluations += sum(run.evaluations for run in runs) * structure.groups // len(runs)
        report.peak_width = max(report.peak_width, *(run.peak_width for run in runs))

    def evaluate(self, stage: Stage, rows: EvalBatch) -> Tensor:
        """Evaluate the network at states of runs: (R, dim) to the combined outputs of their levels, (R, dim)."""
        structure = stage.structure
        states = rows.x.reshape(-1, structure.dim)
        level = rows.step.numpy()
        group = rows.sample.numpy()
        if structure.joint:
            level = np.repeat(level, structure.groups)
            group = np.tile(np.arange(structure.groups), len(rows.step))
        asks, places = [], []
        for q in np.unique(level):
            own = np.flatnonzero(level == q)
            item = np.full(structure.groups, -1)
            item[group[own]] = own
            for call in structure.levels[q]:
                owner = structure.sites[call].owner
                wanted = np.flatnonzero(item[owner] >= 0)
                asks.append(Ask(call, wanted, states[upload(item[owner[wanted]], states.device)]))
                places.append((int(q), item[owner[wanted]]))
        outputs = self.passes.merger.evaluate(stage.recorded, asks)
        found: dict[int, list[Tensor]] = {}
        total = torch.empty_like(states)
        for ask, (q, items), output in zip(asks, places, outputs, strict=True):
            site = structure.sites[ask.call]
            stage.learn(ask.call, ask.rows, output)
            answers = site.answers(output, structure.dtype)
            slots = site.slot[ask.rows]
            for k in range(int(slots.max()) + 1):
                row = torch.empty_like(total)
                chosen = np.flatnonzero(slots == k)
                row[upload(items[chosen], row.device)] = answers[upload(chosen, answers.device)]
                found.setdefault(q, []).append(row)
        for q in np.unique(level):
            items = np.flatnonzero(level == q)
            index = upload(items, total.device)
            total[index] = structure.combine(int(q), [row[index] for row in found[int(q)]])
        given = states.to(structure.network).to(structure.dtype)
        finite = torch.isfinite(total).all(1).cpu().numpy()
        for q in np.unique(level):
            items = np.flatnonzero(level == q)
            stage.place(int(q), group[items], given[upload(items, given.device)], finite[items])
        return total.view(rows.x.shape)

    def certified(self, stage: Stage) -> bool:
        """Judge the replay of a stage: is its certificate within the tolerance, or as good as it gets?"""
        structure = stage.structure
        if stage.nudge:
            stage.nudge, stage.nudged = 0.0, stage.last()
            return False
        stage.measure()
        certificate = stage.certificate()
        floor = (FLOORS if self.attempts else 1) * structure.floor
        allowed = max(self.tolerance, floor, ROUNDING * torch.finfo(structure.dtype).eps)
        good = certificate <= allowed
        self.falling = certificate <= 0.5 * self.best
        obeyed = not structure.linear or stage.obeys()
        self.stale = self.repeated and not obeyed
        if not obeyed and not self.stale:
            structure.linear, good = False, False
            self.report.reason = "the loop is linear elsewhere, but not where its solution lies."
        # Near the floor it need not fall any more; elsewhere a replay in every round is still to be tried.
        tried = self.attempts > 0 and not self.falling and certificate <= 4 * allowed
        stage.settled = not self.stale and (good or (obeyed and tried) or (self.attempts > 0 and self.replayed))
        self.best = min(self.best, certificate)
        if stage.settled:
            report = self.report
            first = stage is self.passes.stages[0]
            report.error_estimate = certificate if first else max(report.error_estimate, certificate)
            report.floor = structure.floor if first else max(report.floor, structure.floor)
            report.converged = good if first else good and report.converged
        return stage.settled


def _alike(one: Sequence[Any] | None, two: Sequence[Any] | None) -> bool:
    return one is not None and two is not None and len(one) == len(two) and all(map(equal, one, two))


@dataclass(frozen=True, eq=False)
class _Solved(Recurrence):
    """The loop's equation; a correction leaves its slopes with the stage, for the replay."""

    stage: Stage | None = None

    @classmethod
    def of(cls, stage: Stage) -> _Solved:
        assert stage.start is not None
        noise = torch.stack([stage.runs(added) for added in stage.added], 1)
        return cls(stage.structure.coefficients, stage.runs(stage.start), noise, stage)

    def note_slopes(self, sample: Indices, first: Indices, counts: Indices, slopes: Array) -> None:
        """Keep the slopes for the replay."""
        assert self.stage is not None
        self.stage.note_slopes(sample, first, counts, slopes)


@dataclass(frozen=True, eq=False)
class _Replayed(Recurrence):
    """A loop as its own equation: a pass of its Python says which trajectory follows."""

    stage: Stage | None = None
    passes: Passes | None = None
    replays = True

    @classmethod
    def of(cls, stage: Stage, passes: Passes) -> _Replayed:
        local = stage.structure.coefficients
        # The coefficients only turn slopes into growth and back.
        local = Coefficients(local.state_weight, local.output_weight.sum(1, keepdims=True), np.zeros(local.steps))
        assert stage.start is not None
        return cls(local, stage.runs(stage.start), None, stage, passes)

    def note_slopes(self, sample: Indices, first: Indices, counts: Indices, slopes: Array) -> None:
        """Keep the slopes for the next pass."""
        assert self.stage is not None
        self.stage.note_slopes(sample, first, counts, slopes)

    def run_pass(self, last: int) -> None:
        """Run one pass of the loop for all runs, as far as windows may reach next."""
        assert self.stage is not None
        assert self.passes is not None
        self.stage.reach = last
        self.passes.play()
        self.stage.reach = self.coefficients.steps

    def states(self, sample: int, first: int, last: int) -> Tensor:
        """Return (n, dim) the states first .. last of a run in the last pass."""
        assert self.stage is not None
        return torch.stack([self.stage.state(step, sample) for step in range(first, last + 1)]).flatten(1)
