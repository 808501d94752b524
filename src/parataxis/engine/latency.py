"""Latency: how long a call of the network takes, by its number of rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .executor import out_of_memory
from .rows import EvalBatch

__all__ = ["Latency", "timings_agree", "format_seconds", "latency", "seconds_of", "synchronize", "timed"]


Array = NDArray[np.float64]


@dataclass(frozen=True)
class Latency:
    """Seconds of a call of the network against its rows: tau(n), as measured.

    Piecewise linear through the measured points, and beyond the last one with the slope of the last three: exact for a
    cost that is flat and then linear. A disturbance only makes a measurement longer, so a point counts as at most what
    a larger number of rows took.

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
        calls, remainder = np.divmod(count, self.limit)
        last = np.where(remainder > 0, self._call(remainder), 0.0)
        return calls * self._call(np.float64(self.limit)) + last

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
    def batch_headroom(self) -> float:
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
        single = float(self.seconds(1))
        points = [f"{rows} rows {float(self.seconds(rows)) / single:.1f}" for rows in self.rows if rows > 1]
        multiples = f", times that: {', '.join(points)}" if points else ""
        limit = "" if self.limit is None else f", at most {self.limit} rows a call"
        return f"1 row {format_seconds(single)}{multiples}; b* = {self.batch_headroom:.1f}{limit}"


def latency(
    evaluate: Callable[[EvalBatch], Tensor],
    rows: EvalBatch,
    *,
    max_rows: int = 128,
    buckets: Sequence[int] | None = None,
    enough: Callable[[Latency], bool] = lambda known: False,
) -> Latency:
    """Measure the seconds of a call with 1, 2, 4, .. rows.

    Each is the median of one to five calls behind a warm-up call: until the two shortest agree to a twentieth, or for a
    tenth of a second. The clock waits for the device. The measurement ends at ``max_rows`` rows, where memory runs out,
    or where the cost has become a straight line: by half more than the point before, and within a tenth of the line
    through the two points before it.

    Args:
        evaluate: Rows to outputs; not an :class:`Executor`, which hides where memory ends.
        rows: What to evaluate; repeated as often as needed.
        max_rows: Most rows of a call.
        buckets: The numbers of rows to measure instead, all of them.
        enough: Called after every point; true ends the measurement, as larger calls do not matter.

    Raises:
        torch.cuda.OutOfMemoryError: If there is no memory for the smallest call.
    """
    sizes = sorted(buckets) if buckets else sorted({*(2**i for i in range(max_rows.bit_length())), max_rows})
    times: list[float] = []
    limit = sizes[-1] if buckets else None
    with torch.no_grad():
        for size in sizes:
            try:
                times.append(_time(evaluate, rows.take(torch.arange(size, device="cpu") % len(rows.x))))
            except (RuntimeError, MemoryError) as error:
                if not times or not out_of_memory(error):
                    raise
                limit = sizes[len(times) - 1]
                break
            known = Latency(tuple(sizes[: len(times)]), tuple(times))
            if not buckets and (_straight(known.rows, times) or enough(known)):
                break
    return Latency(tuple(sizes[: len(times)]), tuple(times), limit, padded=bool(buckets))


def _time(evaluate: Callable[[EvalBatch], Tensor], rows: EvalBatch) -> float:
    def once() -> float:
        return seconds_of(lambda: evaluate(rows), rows.x.device)

    once()
    taken = [once()]
    while len(taken) < 5 and sum(taken) < 0.1 and not timings_agree(taken, min(taken)):
        taken.append(once())
    return median(taken)


def timings_agree(taken: Iterable[float], size: float) -> bool:
    """Return whether the two shortest times differ by less than a twentieth of a size: neither was disturbed."""
    shortest = sorted(taken)[:2]
    return len(shortest) == 2 and shortest[1] - shortest[0] < size / 20


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes until its work on the device is done."""
    return timed(call, device)[1]


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return what a call returns, and the seconds until its work on the device is done."""
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the work on a device is done, if it is of an asynchronous kind."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is not None:
        wait(*(() if device.type == "mps" else (device,)))  # there is one MPS device, and its function takes none


def _straight(sizes: Sequence[int], times: Sequence[float] | Array) -> bool:
    if len(times) < 3:
        return False
    (a, b, c), (first, second, third) = sizes[-3:], times[-3:]
    expected = second + (second - first) * (c - b) / (b - a)
    return bool(third > 1.5 * second and abs(third - expected) < 0.1 * third)


def format_seconds(seconds: float) -> str:
    """Return seconds in readable units."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
