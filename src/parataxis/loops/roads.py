"""Which road a call of a loop takes: one pass, recorded and replayed, or the loop by itself; and what the user hears.

A loop that steps a scheduler runs in one pass. Where its first steps show that it cannot, it is put back as it was and
recorded within the same call; what cannot be put back goes on by itself, and is recorded from the next call on. What
cannot be solved at all runs as it is, once, from the state at the beginning.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

from ..checks import OutputError
from ..engine.latency import synchronize
from ..solvers.base import Solver
from ..solvers.sequential import Sequential
from .layout import OUT_OF_MEMORY
from .loop import Loop
from .one_pass import NO_CALL, OnePass
from .report import ABOVE_FLOOR, Report
from .runner import LoopRunner
from .signals import NotParallelizable, OnlyThisCall, StartOver
from .solver import LoopSolver

__all__ = ["solve_loop"]

GRADIENTS = (
    "the loop runs with gradients enabled and its denoiser has parameters that require them, but the result of a "
    "parallel loop carries none: call it within torch.no_grad(), or solve it by Sequential() if they are wanted."
)
FLOOR_WARNING = (
    "the result may be {floor:.1e} away from the loop's, more than the tolerance of {tolerance:g}: rounding alone, of "
    "the network's outputs, moves it so far. Run the network in more bits, or pass a larger tolerance. This is said "
    "once."
)


def solve_loop(
    loop: Loop, args: tuple[Any, ...], kwargs: dict[str, Any], solver: Solver, tolerance: float, report: Report
) -> Any:
    """Run a loop once, in parallel if it can be, and fill in the report."""
    started = time.perf_counter()
    report.reset(tolerance)
    reason = "the solver is Sequential." if isinstance(solver, Sequential) else loop.unsupported()
    # In 16 bits the rounding of a batch moves samples by more than their steps show: recording measures that floor.
    recorded = reason is not None or loop.ranks is not None or loop.few_bits
    schedulers = [] if recorded else loop.schedulers(args, kwargs)
    key = loop.key(args, kwargs)
    runner = None if schedulers and key in loop.foreseen else LoopRunner(loop, args, kwargs)
    try:
        if schedulers and key not in loop.recorded:
            beginning = None if runner is None else runner.beginning
            return _run_once(OnePass(loop, schedulers, solver, tolerance, report, beginning), key, args, kwargs)
        assert runner is not None
        return _record(runner, solver, report, reason, started)
    except StartOver:
        assert runner is not None
        loop.recorded.add(key)
        runner.beginning.restore(everything=True)
        return _record(runner, solver, report, None, started)
    finally:
        if runner is not None:
            runner.close()


def _run_once(one_pass: OnePass, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a loop once; say why if that was by itself."""
    started = time.perf_counter()
    loop, report = one_pass.loop, one_pass.report
    value = one_pass.run(args, kwargs)
    synchronize(loop.device)
    report.seconds = time.perf_counter() - started
    if report.mode == "sequential":
        loop.times.add_loop(key, report.seconds)
    _note_sequential_seconds(report, loop, key, one_pass.networks.sequential_seconds(report.seconds))
    if one_pass.refused:
        loop.recorded.add(key)
        loop.foreseen.discard(key)
    elif one_pass.networks.answers:
        loop.foreseen.add(key)
    reason = report.reason if report.mode == "sequential" else one_pass.alone
    if reason == NO_CALL or reason.startswith("the loop has only"):
        reason = ""
    part = "the rest of the loop" if report.mode == "one pass" else "the loop"
    because = [f"{part} runs sequentially: {reason}"] if reason else []
    networks = one_pass.networks
    ahead = networks.answers > networks.real_calls  # what the network has answered for itself carries gradients
    _warn(loop, report, trainable=networks.trainable and ahead, more=because)
    return value


def _record(runner: LoopRunner, solver: Solver, report: Report, reason: str | None, started: float) -> Any:
    """Run a loop by record, solve, replay; or by itself, for this reason or another one."""
    loop = runner.loop
    if reason is None and runner.world.obstacles:
        reason = f"it reaches {runner.world.obstacles[0]}, which cannot be put back between its passes."
    known = reason if reason is not None else loop.known_refusal(runner.key, runner.world.settings)
    raised = False  # by the loop, on trial outputs
    try:
        if known is not None:
            reason = known
        else:
            with runner.installed():
                loop_solver = LoopSolver(runner, solver, report.tolerance, report)
                value = loop_solver.run()
            calls = [signature for stage in loop_solver.stages for signature in stage.structure.signatures]
            synchronize(loop.device)
            report.seconds = time.perf_counter() - started
            _note_sequential_seconds(report, loop, runner.key, loop.times.estimate(calls, runner.other_seconds))
            _warn(loop, report, trainable=runner.trainable)
            return value
    except NotParallelizable as signal:
        reason, raised = str(signal), signal.__cause__ is not None
        only_now = isinstance(signal, OnlyThisCall) or reason == OUT_OF_MEMORY or not runner.merger.calls
        if not only_now:  # there may be room, or a call, the next time
            loop.refuse(runner.key, reason, runner.world.settings())
    except OutputError as error:  # not finite: what the loop makes of it is its own affair
        reason = str(error)
    finally:
        merger = runner.merger
        loop.limit = merger.limit
        report.calls, report.rows = report.calls + merger.calls, report.rows + merger.rows
        report.peak_rows, passes = max(report.peak_rows, merger.peak_rows), report.passes
        report.passes = passes + runner.passes
    if runner.passes and not runner.beginning.restore(everything=True):
        reason = f"{reason} The loop has written to large tensors, so the result may differ."
    return _run_alone(runner, solver, report, reason, started, passes, raised=raised)


def _run_alone(
    runner: LoopRunner, solver: Solver, report: Report, reason: str, started: float, passes: int, *, raised: bool
) -> Any:
    """Run the unmodified loop from the state at the beginning, and say why."""
    expected = isinstance(solver, Sequential) or reason.startswith("the loop has only")
    message = f"the loop runs sequentially: {reason}"
    if not expected and not raised:
        warnings.warn(message, RuntimeWarning, stacklevel=6)
    value = runner.sequential()  # raises what the loop raises by itself
    if not expected and raised:
        warnings.warn(message, RuntimeWarning, stacklevel=6)
    report.mode, report.reason, report.converged = "sequential", reason, True
    report.passes = passes + runner.passes
    report.error_estimate, report.rounds = 0.0, 0
    report.sequential_seconds = runner.loop.times.latest
    report.seconds = time.perf_counter() - started
    return value


def _note_sequential_seconds(report: Report, loop: Loop, key: Any, estimate: float) -> None:
    """Say how long the unmodified loop takes: as measured, else as estimated."""
    measured = loop.times.loops.get(key)
    report.estimated = measured is None
    report.sequential_seconds = estimate if measured is None else measured


def _warn(loop: Loop, report: Report, *, trainable: bool, more: list[str] | None = None) -> None:
    """Warn of what the caller may not expect of a call that was solved in parallel, or that was not."""
    messages = [GRADIENTS] if trainable else []
    if ABOVE_FLOOR in report.reason and not loop.warned_floor:
        loop.warned_floor = True
        messages.append(FLOOR_WARNING.format(floor=report.floor, tolerance=report.tolerance))
    if more:
        messages += more
    elif not loop.warned_slower and (slower := report.slower()) is not None:
        loop.warned_slower = True
        messages.append(slower)
    for message in messages:
        warnings.warn(message, RuntimeWarning, stacklevel=6)
