"""Which arguments of a denoiser's call are the time, and what they will be at later steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .calls import Call, equal

__all__ = ["ArgumentRule", "argument_rules", "predicted_calls", "same_argument"]

ArgumentRule = Callable[[int], Any]  # the step to the leaf
ULPS = 4  # by which a time computed here may differ from the loop's own


def argument_rules(first: Call, second: Call, times: Tensor, step: int, states: set[int]) -> dict[int, ArgumentRule]:
    """Return the leaves that change with the step, and how: they are the time, or affine in it.

    Args:
        first: A call of the step before.
        second: The same call at ``step``; the call of the step before again, if it has not been seen yet.
        times: (N,) the scheduler's timesteps.
        step: Which of them.
        states: Leaves that hold the state.
    """
    rules: dict[int, ArgumentRule] = {}
    for i, (before, now) in enumerate(zip(first.leaves, second.leaves, strict=True)):
        if i in states or i in second.feeds or not _is_number(now):
            continue
        at = step - 1 if second is first else step
        for scale in (1, 1000):
            exact = _exact(now, times, scale)
            if equal(exact(at), now) and equal(exact(step - 1), before):
                rules[i] = exact
                break
        else:
            if not equal(before, now):
                rules[i] = _affine(before, now, times, step)
    return rules


def same_argument(expected: Any, actual: Any, *, is_time: bool) -> bool:
    """Return whether an argument is what was expected, to the bit; computed times may differ in the last ones."""
    if equal(expected, actual):
        return True
    if not is_time or type(expected) is not type(actual):
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


def _exact(like: Any, times: Tensor, scale: int) -> ArgumentRule:
    """Return the time itself, or over 1000, in the form of a leaf."""

    def rule(step: int) -> Any:
        if not isinstance(like, Tensor):
            return type(like)(times[step].item() / scale) if scale > 1 else type(like)(times[step].item())
        time = times[step].to(like.device).to(like.dtype)
        return (time / scale if scale > 1 else time).to(like.dtype).expand(like.shape).clone()

    return rule


def _affine(before: Any, now: Any, times: Tensor, step: int) -> ArgumentRule:
    """Return v0 + (v1 - v0) (t - t0) / (t1 - t0)."""
    first, second = float(times[step - 1]), float(times[step])

    def rule(later: int) -> Any:
        share = (float(times[later]) - first) / (second - first) if second != first else 1.0
        if isinstance(now, Tensor):
            wide = before.double() + (now.double() - before.double()) * share
            return (wide if now.is_floating_point() else wide.round()).to(now.dtype)
        value = before + (now - before) * share
        return type(now)(value if isinstance(now, float) else round(value))

    return rule


def predicted_calls(calls: Sequence[Call], rules: Sequence[dict[int, ArgumentRule]], steps: range) -> list[Call]:
    """Return the calls of all these steps, with the arguments that they will have, one step behind the other."""
    predicted = []
    for step in steps:
        for c, call in enumerate(calls):
            leaves = list(call.leaves)
            for i, rule in rules[c].items():
                leaves[i] = rule(step)
            offset = (step - steps.start) * len(calls)
            feeds = {leaf: (feeder + offset, output) for leaf, (feeder, output) in call.feeds.items()}
            predicted.append(Call(call.module, call.spec, leaves, feeds, call.autocast, call.output))
    return predicted
