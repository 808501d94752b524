"""What is checked of arguments before anything runs: errors say what was given, and what was expected."""

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
    "check_generators",
    "check_rows",
    "check_solver",
    "check_tolerance",
    "check_whole",
    "is_finite",
    "is_int",
]


class OutputError(ValueError):
    """The network returned something that is not an output: a wrong type, shape or dtype, NaN or Inf."""


def is_finite(value: Any) -> bool:
    """Return whether this is a number, and a finite one; flags are none."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def is_int(value: Any, least: int = 1) -> bool:
    """Return whether this is a whole number, and not too small; flags are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= least


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise unless a number is whole and not too small."""
    if not is_int(value, least):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


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


def check_solver(solver: Any) -> None:
    """Raise unless this is a solver."""
    if isinstance(solver, type) or not hasattr(solver, "unsupported"):
        raise TypeError(
            f"solver must be a solver with its options, such as parataxis.Picard(window=8), got {solver!r}: "
            "parataxis.SOLVERS has them by name."
        )


def check_generators(generator: Any, count: int) -> None:
    """Raise unless this is a generator, or one for each of ``count`` samples, or None."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    every = list(generator) if isinstance(generator, Sequence) else [generator]
    if not all(isinstance(one, torch.Generator) for one in every):
        raise TypeError(
            f"generator must be a torch.Generator, one for each sample, or None, got {generator!r}: make it of a seed "
            "by torch.Generator().manual_seed(seed)."
        )
    if len(every) != count:
        raise ValueError(f"pass one generator a sample: {count} samples, {len(every)} generators.")


def wrap_denoiser(denoise: Any) -> Callable[..., Any]:
    """Return a network whose call says, if its arguments do not fit, what decides how many there are.

    Raises:
        TypeError: If ``denoise`` is not callable.
    """
    if not callable(denoise):
        raise TypeError(f"denoise must be a network that can be called as denoise(x, t), got {denoise!r}.")

    def call(*told: Any) -> Any:
        try:
            return denoise(*told)
        except TypeError as error:
            if _accepts(denoise, told):
                raise
            given = "denoise(x, t, condition), as there is a" if len(told) > 2 else "denoise(x, t), as there is no"
            raise TypeError(f"the network is called as {given} condition=, which it does not admit: {error}") from error

    return call


def _accepts(function: Any, told: Sequence[Any]) -> bool:
    """Return whether a call fits the function's signature, as far as that is known."""
    try:
        inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function).bind(*told)
    except TypeError:
        return False
    except ValueError:
        pass
    return True
