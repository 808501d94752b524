"""Latency: how long a call of the network takes, by its number of rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .executor import out_of_memory
from .rows import EvalBatch

__all__ = ["Latency", "timings_agree", "format_seconds", "latency", "seconds_of", "synchronize", "timed"]


Array = NDArray[np.float64]
LEAST_BUSY = 0.2  # share of the seconds of a call, the busiest one, that the processor works if the network runs on it
NOISY = 0.1  # interquartile range over median, above which timings are called noisy, as torch.utils.benchmark does
SHORT = 5e-3  # seconds of a call below which a few calls say little
SOME_CALLS, MANY_CALLS = 7, 25  # calls of each size, where calls are short, and where their timing is noisy
LONGEST = 0.5  # seconds that this may take


@dataclass(frozen=True)
class Latency:
    """Seconds of a call of the network against its rows: tau(n), as measured.

    Piecewise linear through the measured points, and beyond the last one with the slope of the last three: exact for a
    cost that is flat and then linear. A disturbance only makes a measurement longer, so a point counts as at most what
    a larger number of rows took.

    Attributes:
        rows: The numbers of rows that were measured, increasing.
        times: Seconds of a call with each: the median, or on a noisy machine the average that follows from the quickest
            quarter of the calls and from how much slower all calls are than those.
        limit: Most rows of one call; more take several calls. None for no limit.
        padded: Whether a call has one of these numbers of rows (buckets), others being padded to the next.
        spread: Interquartile range of calls with the same rows, relative to their median; the median of all numbers of
            rows.
        slowdown: How much what else runs lengthens a call on average; 1 where timing is not noisy.
    """

    rows: tuple[int, ...]
    times: tuple[float, ...]
    limit: int | None = None
    padded: bool = False
    spread: float = 0.0
    slowdown: float = 1.0

    @property
    def noisy(self) -> bool:
        """Whether calls with the same rows differ by much: something else runs on this machine."""
        return self.spread > NOISY

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
        noise = f"; timing is noisy: equal calls differ by {self.spread:.0%}" if self.noisy else ""
        return f"1 row {format_seconds(single)}{multiples}; b* = {self.batch_headroom:.1f}{limit}{noise}"


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
    through the two points before it. Calls of less than 5 ms, and of any length where equal calls differ by more
    than a tenth (interquartile range), are timed again, all numbers of rows in turn, for half a second at most.

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
    taken: list[list[Timing]] = []
    limit = sizes[-1] if buckets else None
    with torch.no_grad():
        for size in sizes:
            times = _medians(taken)
            try:
                taken.append(_time(evaluate, _repeated(rows, size)))
            except (RuntimeError, MemoryError) as error:
                if not times or not out_of_memory(error):
                    raise
                limit = sizes[len(times) - 1]
                break
            times = _medians(taken)
            known = Latency(tuple(sizes[: len(times)]), tuple(times))
            if not buckets and (_straight(known.rows, times) or enough(known)):
                break
        sizes = sizes[: len(taken)]
        spread = _spread(taken)
        if spread > NOISY or min(taken[0]).seconds < SHORT:
            _time_again(evaluate, rows, sizes, taken)
            spread = _spread(taken)
    times, slowdown = _average(taken) if spread > NOISY else (_medians(taken), 1.0)
    return Latency(tuple(sizes), tuple(times), limit, padded=bool(buckets), spread=spread, slowdown=slowdown)


class Timing(NamedTuple):
    """A call: its seconds, and those of the processor."""

    seconds: float
    processor: float


def _timing(call: Callable[[], object], device: torch.device) -> Timing:
    processor = time.process_time()
    seconds = seconds_of(call, device)
    return Timing(seconds, time.process_time() - processor)


def _medians(taken: Sequence[Sequence[Timing]]) -> list[float]:
    return [median(call.seconds for call in calls) for calls in taken]


def _repeated(rows: EvalBatch, size: int) -> EvalBatch:
    return rows.take(torch.arange(size, device="cpu") % len(rows.x))


def _time_again(
    evaluate: Callable[[EvalBatch], Tensor], rows: EvalBatch, sizes: Sequence[int], taken: list[list[Timing]]
) -> None:
    """Time calls of all sizes in turn, so that whatever else runs meets all of them, within half a second."""
    started = time.perf_counter()
    while len(taken[0]) < (MANY_CALLS if _spread(taken) > NOISY else SOME_CALLS):
        if time.perf_counter() - started > LONGEST:
            break
        for size, calls in zip(sizes, taken, strict=True):
            repeated = _repeated(rows, size)
            calls.append(_timing(lambda: evaluate(repeated), rows.x.device))  # noqa: B023


def _spread(taken: Sequence[Sequence[Timing]]) -> float:
    """Return the interquartile range of equal calls, relative to their median; the median of all sizes."""
    spreads = []
    for calls in taken:
        low, middle, high = np.percentile([call.seconds for call in calls], [25, 50, 75])
        if len(calls) > 1 and middle > 0:
            spreads.append(float((high - low) / middle))
    return median(spreads or [0.0])


def _average(taken: Sequence[Sequence[Timing]]) -> tuple[list[float], float]:
    """Return the seconds of a call of every size on average, with what else runs, and how much that slows a call.

    A busy machine slows calls of all sizes alike. How they compare is seen in what does not depend on other work: the
    processor's time, or for networks that run elsewhere the quickest quarter. How much slower they are on average is
    seen in all of them together.
    """
    share = max(call.processor / max(call.seconds, 1e-9) for calls in taken for call in calls)
    undisturbed = [median(call.processor for call in calls) for calls in taken]
    # A clock of the processor may tick too coarsely for calls of microseconds, and then shows 0.
    if share < LEAST_BUSY or min(undisturbed) <= 0:
        undisturbed = [float(np.quantile([call.seconds for call in calls], 0.25)) for calls in taken]
    total = sum(call.seconds for calls in taken for call in calls)
    slower = total / sum(len(calls) * seconds for calls, seconds in zip(taken, undisturbed, strict=True))
    return [slower * seconds for seconds in undisturbed], slower


def _time(evaluate: Callable[[EvalBatch], Tensor], rows: EvalBatch) -> list[Timing]:
    def once() -> Timing:
        return _timing(lambda: evaluate(rows), rows.x.device)

    once()
    taken = [once()]
    while len(taken) < 5 and sum(seconds := [call.seconds for call in taken]) < 0.1:
        if timings_agree(seconds, min(seconds)):
            break
        taken.append(once())
    return taken


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
