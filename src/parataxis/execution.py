"""Execution: how the rows of a round reach the network, and what a call costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .checks import check_rows
from .samplers import Sampler
from .solve import Rows, expect
from .table import upload

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .distributed import Ranks

__all__ = [
    "Executor",
    "Latency",
    "Network",
    "agree",
    "check",
    "duration",
    "latency",
    "out_of_memory",
    "pick",
    "ranks_of",
    "seconds_of",
]

Array = NDArray[np.float64]

# What allocators say, besides raising torch's own error: those of the CPU, of MPS and of CUDA's libraries.
_ALLOCATION = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Network:
    """The user's callable as a driver sees it: rows to outputs.

    Attributes:
        denoise: ``denoise(x, t)``, or ``denoise(x, t, condition)`` with a condition; see :func:`parataxis.sample`.
        times: (N,) what the network is told at every point.
        condition: Tensors (B, ...) of what it is told of every sample, or dicts, lists, tuples of them, or None.
    """

    denoise: Callable[..., Tensor]
    times: Tensor
    condition: Any = None

    def __call__(self, rows: Rows) -> Tensor:
        """Evaluate the rows in one call."""
        t = upload(self.times[rows.point], rows.u.device)
        if self.condition is None:
            return self.denoise(rows.u, t)
        return self.denoise(rows.u, t, pick(self.condition, rows.sample))


def pick(condition: Any, index: Tensor) -> Any:
    """Return what the network is told of some samples."""
    if isinstance(condition, Tensor):
        return condition[upload(index, condition.device)]
    if isinstance(condition, dict):
        return {name: pick(value, index) for name, value in condition.items()}
    if isinstance(condition, (list, tuple)):
        parts = [pick(value, index) for value in condition]
        return condition._make(parts) if hasattr(condition, "_make") else type(condition)(parts)
    return condition


def check(noise: Tensor, sampler: Sampler, condition: Any) -> None:
    """Raise unless a batch can be drawn from these; see :func:`parataxis.sample`."""
    if not isinstance(sampler, Sampler):
        raise TypeError(
            f"sampler must be a sampler with its steps, such as parataxis.samplers.ddim(steps=50), got {sampler!r}: "
            "parataxis.SAMPLERS has them by name."
        )
    if not isinstance(noise, Tensor) or noise.ndim < 2 or not noise.is_floating_point():
        given = f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise must be a floating-point tensor (B, *shape) of at least 2 dimensions, got {given}.")
    if noise.numel() == 0:
        raise ValueError(
            f"noise holds no sample, or no number: all its dimensions {tuple(noise.shape)} must be at least 1."
        )
    if noise.layout != torch.strided or noise.is_meta:
        raise ValueError(f"noise must be dense and hold numbers, got layout {noise.layout} on {noise.device}.")
    if not bool(torch.isfinite(noise).all()):
        raise ValueError("noise holds NaN or Inf: draw it standard normal, as by torch.randn.")
    if condition is not None and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(condition)):
        raise ValueError(
            f"condition must hold tensors ({len(noise)}, ...) of what each sample is told, got {condition!r}: make it "
            "one, or let the network itself know what is the same for all samples."
        )
    _check_condition(condition, len(noise))


def _check_condition(condition: Any, batch: int) -> None:
    if isinstance(condition, np.ndarray):
        raise ValueError("condition holds a NumPy array, which no sample could be given its part of: make it a tensor.")
    if isinstance(condition, Tensor) and (condition.ndim == 0 or len(condition) != batch):
        raise ValueError(
            f"condition must have one row a sample, ({batch}, ...), got shape {tuple(condition.shape)}: expand it."
        )
    parts = condition.values() if isinstance(condition, dict) else condition
    if isinstance(condition, (dict, list, tuple)):
        for value in parts:
            _check_condition(value, batch)


class Executor:
    """Evaluate rows in calls of a bounded number of rows; what comes back is the same as from one call.

    A call that runs out of memory is made again with half as many rows, and with no more from then on. With
    ``buckets`` a call has one of these numbers of rows, so that a compiled network or a CUDA graph sees few shapes: the
    last row is repeated, and what it gives is cut off. What a call returns may lie in memory that the next call writes
    to, as a CUDA graph's outputs do.

    Args:
        evaluate: Rows to outputs of the same shape and dtype.
        max_rows: Most rows of one call; None for no limit.
        buckets: The numbers of rows that a call may have, such as (1, 2, 4, 8); the largest is a limit as well.

    Raises:
        ValueError: If a number of rows is not a whole one of at least 1.
        OutputError: When called, if a call returns a wrong type, shape or dtype.
        torch.cuda.OutOfMemoryError: When called, if there is no memory for the smallest call.
    """

    def __init__(
        self,
        evaluate: Callable[[Rows], Tensor],
        *,
        max_rows: int | None = None,
        buckets: Sequence[int] | None = None,
    ) -> None:
        check_rows(max_rows, buckets)
        self.buckets = [size for size in sorted(set(buckets or ())) if max_rows is None or size <= max_rows]
        self.limit = self.buckets[-1] if self.buckets else max_rows
        self._evaluate = evaluate

    def __call__(self, rows: Rows) -> Tensor:
        """Evaluate the rows."""
        count, first = len(rows.u), 0
        every = rows.u.new_empty(0)
        while first < count:
            own = min(self.limit or count, count - first)
            size = next((bucket for bucket in self.buckets if bucket >= own), own)
            part = _padded(rows, first, own, size)
            try:
                outputs: Any = self._evaluate(part)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._back_off(size, rows.u, error)
            else:
                outputs = expect(outputs, tuple(part.u.shape), part.u.dtype, part.point.numpy())[:own]
                if own == count:
                    return outputs
                if first == 0:
                    every = outputs.new_empty(rows.u.shape)
                every[first : first + own] = outputs
                first += own
                continue
            if rows.u.is_cuda:  # here the error is gone, and with it the tensors of the call that failed
                torch.cuda.empty_cache()
        return every

    def _back_off(self, size: int, u: Tensor, error: Exception) -> None:
        """Allow fewer rows than the ``size`` for which there is no memory."""
        smaller = [bucket for bucket in self.buckets if bucket < size]
        self.limit = (smaller[-1] if smaller else 0) if self.buckets else size // 2
        if self.limit == 0:
            rows = "a single row" if size == 1 else f"the smallest bucket, {size} rows,"
            raise torch.cuda.OutOfMemoryError(
                f"the network runs out of memory with {rows} of shape {tuple(u.shape[1:])} and {u.dtype} on "
                f"{u.device}: free memory, or use a smaller network, shape or dtype."
            ) from error


def _padded(rows: Rows, first: int, own: int, size: int) -> Rows:
    """Return ``own`` rows from ``first`` on and, up to ``size``, the last of them again."""
    if size == own:
        return Rows(*(one[first : first + own] for one in rows))
    return rows.take(torch.arange(first, first + size, device="cpu").clamp(max=first + own - 1))


def ranks_of(mesh: DeviceMesh | Ranks | None) -> Ranks | None:
    """Return the ranks of a mesh, if there is one."""
    if mesh is None:
        return None
    from .distributed import Ranks

    return Ranks.of(mesh)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _ALLOCATION)


@dataclass(frozen=True)
class Latency:
    """Seconds of a call of the network against its rows: tau(n), as measured.

    Piecewise linear through the measured points, and behind the last one on with the slope of the last three: exact
    for a cost that is flat and then linear, or linear above a constant, which a multiple of one row is not. Whatever
    disturbs a measurement makes it longer, so a point counts as at most what a larger number of rows was measured at.

    Attributes:
        rows: The numbers of rows that were measured, increasing.
        times: Median seconds of a call with each.
        limit: Most rows of one call; more take several calls. None for no limit.
        padded: Whether a call has one of these numbers of rows (buckets), others being padded to the next.
    """

    rows: tuple[int, ...]
    times: tuple[float, ...]
    limit: int | None = None
    padded: bool = False

    def seconds(self, rows: ArrayLike) -> Array:
        """Return the seconds that so many rows take, in the same shape."""
        count = np.asarray(rows, np.float64)
        if self.limit is None:
            return self._call(count)
        calls, rest = np.divmod(count, self.limit)
        return calls * self._call(np.float64(self.limit)) + np.where(rest > 0, self._call(rest), 0.0)

    def _call(self, count: Any) -> Any:
        sizes, times = np.array(self.rows, np.float64), self._times
        if self.padded:
            count = sizes[np.minimum(np.searchsorted(sizes, count), len(sizes) - 1)]
        return np.interp(count, sizes, times) + self._slope * np.maximum(count - sizes[-1], 0.0)

    @property
    def _times(self) -> Array:
        return np.minimum.accumulate(np.array(self.times)[::-1])[::-1]

    @property
    def _slope(self) -> float:
        if len(self.rows) == 1:
            return self.times[0] / self.rows[0]
        first = max(len(self.rows) - 3, 0)
        return float((self._times[-1] - self._times[first]) / (self.rows[-1] - self.rows[first]))

    @property
    def free(self) -> float:
        """b*: rows a second in the best call, over rows a second one by one.

        No solver is faster than the loop by more. For tau(n) = tau(1) max(1, n / b*) it is the number of rows that
        cost as much as one. Calls may have as many rows as the limit allows, measured or not.
        """
        sizes = np.array([*self.rows, self.limit or self.rows[-1]])
        best = float(np.max(sizes / self.seconds(sizes)))
        if self.limit is None and _straight(self.rows, self._times):
            best = max(best, 1 / self._slope)
        return best * float(self.seconds(1))

    def __str__(self) -> str:
        """Return the measured points and b*, on one line."""
        one = float(self.seconds(1))
        points = [f"{rows} rows {float(self.seconds(rows)) / one:.1f}" for rows in self.rows if rows > 1]
        multiples = f", times that: {', '.join(points)}" if points else ""
        limit = "" if self.limit is None else f", at most {self.limit} rows a call"
        return f"1 row {duration(one)}{multiples}; b* = {self.free:.1f}{limit}"


def latency(
    evaluate: Callable[[Rows], Tensor],
    rows: Rows,
    *,
    most: int = 128,
    buckets: Sequence[int] | None = None,
    enough: Callable[[Latency], bool] = lambda known: False,
) -> Latency:
    """Measure the seconds of a call with 1, 2, 4, .. rows.

    Of each, one call to warm up and the median of more, until the two shortest agree to a twentieth: at most five,
    within a tenth of a second, at least one; the clock waits for the device. Ends at ``most`` rows, where memory runs
    out, or where the cost has plainly become a straight line: by half more than the point before, and within a tenth of
    where the two points before it lead.

    Args:
        evaluate: Rows to outputs, as a driver calls it; not an :class:`Executor`, which hides where memory ends.
        rows: What to evaluate; repeated as often as needed.
        most: Most rows of a call.
        buckets: The numbers of rows to measure instead, all of them.
        enough: Asked after every point whether larger calls still matter.

    Raises:
        torch.cuda.OutOfMemoryError: If there is no memory for the smallest call.
    """
    sizes = sorted(buckets) if buckets else sorted({*(2**i for i in range(most.bit_length())), most})
    times: list[float] = []
    limit = sizes[-1] if buckets else None
    with torch.no_grad():
        for size in sizes:
            try:
                times.append(_time(evaluate, rows.take(torch.arange(size, device="cpu") % len(rows.u))))
            except (RuntimeError, MemoryError) as error:
                if not times or not out_of_memory(error):
                    raise
                limit = sizes[len(times) - 1]
                break
            known = Latency(tuple(sizes[: len(times)]), tuple(times))
            if not buckets and (_straight(known.rows, times) or enough(known)):
                break
    return Latency(tuple(sizes[: len(times)]), tuple(times), limit, padded=bool(buckets))


def _time(evaluate: Callable[[Rows], Tensor], rows: Rows) -> float:
    def once() -> float:
        return seconds_of(lambda: evaluate(rows), rows.u.device)

    once()
    taken = [once()]
    while len(taken) < 5 and sum(taken) < 0.1 and not agree(taken, min(taken)):
        taken.append(once())
    return median(taken)


def agree(taken: Iterable[float], size: float) -> bool:
    """Return whether the two shortest times differ by less than a twentieth of a size: what disturbs is in neither."""
    shortest = sorted(taken)[:2]
    return len(shortest) == 2 and shortest[1] - shortest[0] < size / 20


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes until its work on the device is done."""
    _wait(device)
    begun = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    """Wait until the work on a device is done, if it is of a kind that works on its own."""
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
    if synchronize is not None:
        synchronize(*(() if device.type == "mps" else (device,)))  # there is one MPS, which is not named


def _straight(sizes: Sequence[int], times: Sequence[float] | Array) -> bool:
    if len(times) < 3:
        return False
    (a, b, c), (first, second, third) = sizes[-3:], times[-3:]
    expected = second + (second - first) * (c - b) / (b - a)
    return bool(third > 1.5 * second and abs(third - expected) < 0.1 * third)


def duration(seconds: float) -> str:
    """Return seconds as a person reads them."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
