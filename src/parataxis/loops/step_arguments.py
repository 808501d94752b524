"""What the calls of the steps to come are: the same as now, except for the state and for what follows the time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from .calls import Call, equal
from .rows import RowMap

__all__ = ["ExpectedCall", "argument_tables", "same_argument"]

Table = Sequence[Any]  # an argument at every timestep of a scheduler
ULPS = 4  # by which a time computed here may differ from the loop's own


class ExpectedCall:
    """What a call of every step is expected to be, except for its state.

    Attributes:
        call: With the arguments of the present step.
        row_map: How its rows belong to states.
        tables: Its leaves that change with the step, at all timesteps of the scheduler.
        whole: Whether all of the argument with the state is state.
    """

    def __init__(self, call: Call, row_map: RowMap, tables: dict[int, Table]) -> None:
        self.call, self.row_map, self.tables = call, row_map, tables
        place = row_map.slices[0]
        state = call.leaves[place.leaf]
        self._state, self._shape, self._dtype = place.leaf, state.shape, state.dtype
        self.whole = state.numel() == len(state) * place.size
        self._kind = next((leaf.device.type for leaf in call.leaves if isinstance(leaf, Tensor)), "cpu")
        others = [i for i in range(len(call.leaves)) if i != place.leaf and i not in call.feeds]
        self._constant = [(i, call.leaves[i]) for i in others if i not in tables]
        self._varying = [(i, tables[i]) for i in others if i in tables]

    def difference(self, step: int, module: int, spec: TreeSpec, leaves: Sequence[Any]) -> str | None:
        """Return what of a call at a step is not as it was expected, except the state; None if nothing is."""
        call = self.call
        if module != call.module or not (spec is call.spec or spec == call.spec) or not self._same_autocast():
            return "the denoiser is called in another form"
        for i, then in self._constant:
            if not equal(then, leaves[i]):
                return _unknown(leaves[i])
        for i, table in self._varying:
            if not same_argument(table[step], leaves[i]):
                return _unknown(leaves[i])
        state = leaves[self._state]
        same = isinstance(state, Tensor) and state.shape == self._shape and state.dtype == self._dtype
        if not same or not (self.whole or self._same_beside(state)):
            return "what stands beside the state in the denoiser's input changes"
        return None

    def at(self, step: int, first_call: int = 0) -> Call:
        """Return the call of a step; calls that feed it are counted from ``first_call`` on."""
        call, leaves = self.call, list(self.call.leaves)
        for i, table in self.tables.items():
            leaves[i] = table[step]
        feeds = {leaf: (feeder + first_call, output) for leaf, (feeder, output) in call.feeds.items()}
        return Call(call.module, call.spec, leaves, feeds, call.autocast, call.output)

    def with_state(self, step: int, leaves: Sequence[Any]) -> Call:
        """Return the call of a step with a copy of the state that is among these leaves."""
        call = self.at(step)
        call.leaves[self._state] = leaves[self._state].detach().clone()
        return call

    def _same_autocast(self) -> bool:
        enabled, autocast = torch.is_autocast_enabled(self._kind), self.call.autocast
        return not enabled if autocast is None else enabled and torch.get_autocast_dtype(self._kind) == autocast[1]

    @cached_property
    def _beside(self) -> Tensor:
        state = self.call.leaves[self._state]
        beside = torch.ones(state.shape, dtype=torch.bool, device=state.device)
        beside[self.row_map.slices[0].state] = False
        return beside

    def _same_beside(self, state: Tensor) -> bool:
        """Return whether everything but the state is the same."""
        return torch.equal(state[self._beside], self.call.leaves[self._state][self._beside])


def _unknown(leaf: Any) -> str:
    return f"an argument of the denoiser changes in a way that is not known ({type(leaf).__name__})"


def argument_tables(first: Call, second: Call, times: Tensor, step: int, states: set[int]) -> dict[int, Table]:
    """Return the leaves that change with the step, at all timesteps: they are the time, or affine in it.

    Args:
        first: A call of the step before.
        second: The same call at ``step``; the call of the step before again, if it has not been seen yet.
        times: (N,) the scheduler's timesteps.
        step: Which of them.
        states: Leaves that hold the state.
    """
    tables: dict[int, Table] = {}
    at = step - 1 if second is first else step
    for i, (before, now) in enumerate(zip(first.leaves, second.leaves, strict=True)):
        if i in states or i in second.feeds or not _is_number(now):
            continue
        for scale in (1, 1000):
            exact = _times(now, times, scale)
            if equal(exact[at], now) and equal(exact[step - 1], before):
                tables[i] = exact
                break
        else:
            if not equal(before, now):
                tables[i] = _affine(before, now, times, step)
    return tables


def same_argument(expected: Any, actual: Any) -> bool:
    """Return whether a time is what was expected; computed ones may differ in the last bits."""
    if equal(expected, actual):
        return True
    if type(expected) is not type(actual):
        return False
    if isinstance(expected, Tensor):
        if expected.shape != actual.shape or expected.dtype != actual.dtype or not expected.is_floating_point():
            return False
        bound = ULPS * torch.finfo(expected.dtype).eps
        return bool(((expected - actual).abs() <= bound * actual.abs().max()).all())
    return isinstance(expected, float) and abs(expected - actual) <= ULPS * np.finfo(np.float64).eps * abs(actual)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (int, float, Tensor)) and not isinstance(leaf, bool) and not _is_mask(leaf)


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.dtype == torch.bool or leaf.is_complex() or not leaf.numel())


def _times(like: Any, times: Tensor, scale: int) -> Table:
    """Return the times themselves, or over 1000, in the form of a leaf."""
    if not isinstance(like, Tensor):
        return [type(like)(time / scale if scale > 1 else time) for time in times.tolist()]
    values = times.to(like.device).to(like.dtype)
    values = (values / scale if scale > 1 else values).to(like.dtype)
    return values.view(-1, *(1,) * like.ndim).expand(-1, *like.shape).unbind()


def _affine(before: Any, now: Any, times: Tensor, step: int) -> Table:
    """Return v0 + (v1 - v0) (t - t0) / (t1 - t0)."""
    first, second = float(times[step - 1]), float(times[step])
    shares = (times.double() - first) / (second - first) if second != first else torch.ones_like(times.double())
    if isinstance(now, Tensor):
        shares = shares.to(now.device).view(-1, *(1,) * now.ndim)
        values = before.double() + (now.double() - before.double()) * shares
        return (values if now.is_floating_point() else values.round()).to(now.dtype).unbind()
    numbers = [before + (now - before) * share for share in shares.tolist()]
    return [type(now)(value if isinstance(now, float) else round(value)) for value in numbers]
