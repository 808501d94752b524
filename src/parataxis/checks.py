"""Checks of arguments, before anything runs: errors say what was passed and what was expected."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch

__all__ = [
    "OutputError",
    "wrap_denoiser",
    "check_errors",
    "check_generators",
    "check_rows",
    "check_solver",
    "check_tolerance",
    "check_whole",
    "describe",
    "is_finite",
    "is_int",
]


class OutputError(ValueError):
    """The network returned something that is not an output: a wrong type, shape or dtype, NaN or Inf."""


def is_finite(value: Any) -> bool:
    """Return whether this is a finite number; booleans are not numbers."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def is_int(value: Any, minimum: int = 1) -> bool:
    """Return whether this is an integer of at least ``minimum``; booleans are not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= minimum


def check_whole(name: str, value: Any, minimum: int = 1) -> None:
    """Raise unless a number is an integer of at least ``minimum``."""
    if not is_int(value, minimum):
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}.")


def check_rows(max_rows: Any, buckets: Any) -> None:
    """Raise unless these limit the rows of a call; see :func:`parataxis.sample`."""
    if max_rows is not None:
        check_whole("max_rows", max_rows)
    if buckets is not None and not (isinstance(buckets, Sequence) and buckets and all(map(is_int, buckets))):
        raise ValueError(f"buckets must be numbers of rows of at least 1, such as (1, 2, 4, 8), got {buckets!r}.")
    if buckets is not None and max_rows is not None and min(buckets) > max_rows:
        raise ValueError(f"the smallest of buckets={buckets!r} must be at most max_rows={max_rows}: add a smaller one.")


def check_tolerance(tolerance: Any) -> None:
    """Raise unless this is a relative error."""
    if not (is_finite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be a relative error of at least 0, got {tolerance!r}.")


def check_errors(errors: Any) -> None:
    """Raise unless this says what is done with the errors of samples."""
    if errors not in ("raise", "return"):
        raise ValueError(f"errors must be 'raise', or 'return' to end only the samples that meet one, got {errors!r}.")


def describe(value: Any) -> str:
    """Return what a value is, in a few words: no tensor, no configuration and no tree of modules."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype)[6:]}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', 'without a name')}"
    return f"{'an' if type(value).__name__[0] in 'AEIOU' else 'a'} {type(value).__name__}"


def check_solver(solver: Any) -> None:
    """Raise unless this is a solver."""
    if isinstance(solver, type) and hasattr(solver, "unsupported"):
        raise TypeError(f"solver is the class {solver.__name__}: make one, {solver.__name__}().")
    if not hasattr(solver, "unsupported"):
        raise TypeError(
            "solver must be a name such as 'secant', or a solver with its options, such as "
            f"parataxis.Picard(window=8), got {describe(solver)}."
        )


def check_generators(generator: Any, count: int) -> None:
    """Raise unless this is a generator, or one for each of ``count`` samples, or None."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    if not all(isinstance(source, torch.Generator) for source in generators):
        raise TypeError(
            f"generator must be a torch.Generator, one for each sample, or None, got {describe(generator)}: make "
            "one by torch.Generator().manual_seed(seed)."
        )
    if len(generators) != count:
        raise ValueError(f"pass one generator a sample: {count} samples, {len(generators)} generators.")


def wrap_denoiser(denoise: Any) -> Callable[..., Any]:
    """Return a network that says, if its arguments do not fit, why it is called with two or with three.

    Raises:
        TypeError: If ``denoise`` is not a network.
    """
    _check_denoiser(denoise)

    def call(*arguments: Any) -> Any:
        try:
            return denoise(*arguments)
        except TypeError as error:
            if _accepts(denoise, arguments):
                raise
            signature, article = ("denoise(x, t, condition)", "a") if len(arguments) > 2 else ("denoise(x, t)", "no")
            raise TypeError(
                f"the network is called as {signature}, as there is {article} condition=, and does not accept that: "
                f"{error}"
            ) from error

    return call


def _check_denoiser(denoise: Any) -> None:
    """Raise unless this is a network, with the line to write for the usual slips."""
    if isinstance(denoise, type):
        name = denoise.__name__
        raise TypeError(f"denoise is the class {name}: make a network of it first, network = {name}(...).")
    if not callable(denoise):
        raise TypeError(f"denoise must be a network that can be called as denoise(x, t), got {describe(denoise)}.")
    code = denoise if inspect.isroutine(denoise) else type(denoise).__call__
    if inspect.isgeneratorfunction(code) or inspect.iscoroutinefunction(code):
        raise TypeError(f"denoise must return its prediction, and {describe(denoise)} yields or awaits: use `return`.")
    if getattr(denoise, "__name__", "") == "forward_with_cfg":
        raise TypeError(
            "forward_with_cfg reads both halves of its batch, and the rows of a round are independent: pass "
            "parataxis.denoisers.guided(model.forward, scale, null_label) with condition=labels."
        )


def _accepts(function: Any, arguments: Sequence[Any]) -> bool:
    """Return whether a call fits the function's signature, as far as that is known."""
    try:
        inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        pass
    return True
