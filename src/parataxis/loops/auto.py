"""Which solver a loop is given, if any: by what its networks cost within it, and by how its calls went.

One pass of the loop with stubs instead of its networks shows how many calls it makes, with which arguments, and
what its own Python takes. One of these calls is then timed with its rows repeated: that is what a round costs. Values
do not matter for it, so no recurrence is needed. Rounds are forecast as those of DDPM with as many steps, which takes
more of them than samplers without noise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..planning import Candidate, Plan, Range, plan
from ..samplers.one_step import ddpm
from ..samplers.schedules import vp
from ..solvers.base import Solver
from ..solvers.secant import Secant
from ..solvers.sequential import Sequential
from .calls import Call
from .loop import Loop
from .report import SLOWER, Report
from .roads import solve_loop
from .runner import LoopRunner
from .signals import NotParallelizable

__all__ = ["AUTO", "plan_loop", "run_loop"]

AUTO = "auto"
MIN_STEPS = 8  # shorter loops run sequentially
MAX_CHOICES = 16  # keys of calls whose solver a loop remembers, the latest ones


class Choice(NamedTuple):
    """The solver of calls of one key, why, how many there have been, and how many took longer than the loop."""

    solver: Solver
    reason: str
    calls: int = 0
    slower: int = 0


def run_loop(
    loop: Loop, args: tuple[Any, ...], kwargs: dict[str, Any], solver: Solver | str, tolerance: float, report: Report
) -> Any:
    """Run a loop once, by the solver or by the one that is chosen for it, and fill in the report."""
    if not isinstance(solver, str):
        return solve_loop(loop, args, kwargs, solver, tolerance, report)
    key = loop.key(args, kwargs)
    choice: Choice | None = loop.choices.pop(key, None)
    if choice is None:
        try:
            planned = plan_loop(loop, args, kwargs, tolerance)
            choice = Choice(planned.solver, planned.reason)
        except ValueError:
            choice = Choice(Secant(window=8), "")  # the solve says why it cannot be, and runs the loop
    loop.warned_slower = True  # what to do about it is done here
    value = solve_loop(loop, args, kwargs, choice.solver, tolerance, report)
    if isinstance(choice.solver, Sequential):
        report.reason = f"{choice.reason}."
    else:
        slower = choice.calls > 0 and report.speedup < SLOWER  # the first call learns the loop
        choice = choice._replace(calls=choice.calls + 1, slower=choice.slower + slower)
        if choice.slower == 2:  # once may be chance
            choice = Choice(Sequential(), f"calls by {choice.solver!r} took longer than the loop")
    loop.choices[key] = choice
    if len(loop.choices) > MAX_CHOICES:
        del loop.choices[next(iter(loop.choices))]
    return value


def plan_loop(loop: Loop, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: float) -> Plan:
    """Return the plan of a call of a loop; its networks are called some thirty times.

    Raises:
        ValueError: If the loop cannot be solved in parallel, with the reason.
    """
    reason = loop.unsupported()
    runner = LoopRunner(loop, args, kwargs)
    passes = 1 if loop.schedulers(args, kwargs) else 2  # of its own Python, once it is known
    if reason is None and runner.world.obstacles:
        reason = f"it reaches {runner.world.obstacles[0]}, which cannot be put back between its passes."
    try:
        if reason is None:
            with runner.installed():
                return _plan_calls(runner, runner.run().calls, tolerance, passes)
    except NotParallelizable as signal:
        reason = str(signal)
    finally:
        if runner.passes:
            runner.beginning.restore(everything=True)
        runner.close()
    raise ValueError(f"the loop cannot be solved in parallel: {reason}")


def _plan_calls(runner: LoopRunner, calls: list[Call], tolerance: float, passes: int) -> Plan:
    """Return the plan of a loop that makes these calls."""
    if len(calls) <= MIN_STEPS:
        raise NotParallelizable(f"the loop has only {len(calls)} steps.")
    commonest, _ = Counter(call.signature() for call in calls).most_common(1)[0]
    call = next(call for call in calls if call.signature() == commonest)
    state = _state(call)
    rows, steps = len(state), len(calls)
    sampler = ddpm(vp(max(1000, steps)), steps)
    noise = torch.randn(state.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(state)
    loop = runner.loop
    buckets = [size for size in loop.buckets if loop.limit is None or size <= loop.limit]
    limits: dict[str, Any] = {"max_rows": loop.limit, "buckets": buckets or None}
    planned = plan(_repeating(runner, call, rows), noise, sampler, tolerance=tolerance, trials=False, **limits)
    python = steps * loop.times.python if math.isfinite(loop.times.python) else 0.0
    whole = planned.loop_seconds + python
    candidates = [_with_passes(candidate, passes * python, python) for candidate in planned.candidates]
    solver, reason = planned.solver, planned.reason
    chosen = next(candidate for candidate in candidates if candidate.solver == solver)
    if chosen.seconds.median >= whole and not isinstance(solver, Sequential):
        solver, reason = Sequential(), "passes of the loop's own Python take what fewer rounds would save"
    setting = f"a loop of {steps} calls of {rows} rows, tolerance {tolerance:g}, {noise.device}; rounds as of DDPM"
    return replace(
        planned, solver=solver, reason=reason, candidates=tuple(candidates), loop_seconds=whole, setting=setting
    )


def _with_passes(candidate: Candidate, parallel: float, sequential: float) -> Candidate:
    """Return what a candidate takes with the loop's own Python."""
    python = sequential if isinstance(candidate.solver, Sequential) else parallel
    return candidate._replace(seconds=Range(*(seconds + python for seconds in candidate.seconds)))


def _state(call: Call) -> Tensor:
    """Return the argument that is most likely the state: a tensor of the output's shape, else the first one."""
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1]
    shapes = [leaf.shape for leaf in call.output.leaves if isinstance(leaf, Tensor)]
    states = [leaf for leaf in tensors if leaf.shape in shapes] or tensors
    if not states:
        raise NotParallelizable("no argument of its network is a batch of states.")
    return states[0]


def _repeating(runner: LoopRunner, call: Call, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a network that calls the denoiser with so many rows as it is given, all those of one call."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        count = -(-len(x) // rows)
        leaves = [_repeat(leaf, rows, count) for leaf in call.leaves]
        arguments, keywords = call.arguments(leaves)
        with call.context():
            runner.evaluate(call.module, arguments, keywords)
        return torch.zeros_like(x)

    return network


def _repeat(leaf: Any, rows: int, count: int) -> Any:
    if count == 1 or not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != rows:
        return leaf
    return torch.cat([leaf] * count)
