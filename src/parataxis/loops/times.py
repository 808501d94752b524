"""What the unmodified loop takes: measured where it ran, else estimated from single calls of its networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from ..engine.latency import timed

__all__ = ["LoopTimes"]

TIMED_CALLS = 5  # single calls of each kind that are timed: on a GPU each of them waits for the device
MIN_CALLS = 8  # calls in a pass whose own Python is timed


@dataclass(eq=False)
class LoopTimes:
    """Seconds of single network calls, of the loop's own Python, and of whole loops; kept from call to call.

    Of single calls the median counts: on a busy machine the loop would not have had the quickest call every time. Of
    the loop's own Python, which passes slow down by watching it, and of whole loops the smallest time does.

    Attributes:
        calls: Seconds of single calls, a few by kind of call.
        python: Seconds of the loop's own Python, by call of a network.
        loops: Seconds of the unmodified loop, by :meth:`Loop.key`, where it ran.
        latest: Seconds of the latest of these runs.
    """

    calls: dict[Any, list[float]] = field(default_factory=dict)
    python: float = float("inf")
    loops: dict[Any, float] = field(default_factory=dict)
    latest: float = 0.0

    def call(self, kind: Any, call: Callable[[], Any], device: torch.device) -> Any:
        """Make a single call of a network, and time it if few of its kind have been."""
        seconds = self.calls.setdefault(kind, [])
        if len(seconds) >= TIMED_CALLS:
            return call()
        result, taken = timed(call, device)
        seconds.append(taken)
        return result

    def add_pass(self, calls: int, seconds: float) -> None:
        """Take in a pass of the loop's own Python, without its networks."""
        if calls >= MIN_CALLS:
            self.python = min(self.python, seconds / calls)

    def add_loop(self, key: Any, seconds: float) -> None:
        """Take in a run of the unmodified loop."""
        self.latest = seconds
        self.loops[key] = min(seconds, self.loops.get(key, float("inf")))

    def estimate(self, kinds: Iterable[Any], other: float = 0.0) -> float:
        """Return the seconds of a loop of these kinds of calls; 0 if one of them has not been timed.

        Args:
            kinds: Of every call of a network.
            other: Seconds of the other networks that it calls, such as text encoder and decoder.
        """
        kinds = list(kinds)
        if not all(self.calls.get(kind) for kind in kinds):
            return 0.0
        python = self.python if self.python < float("inf") else 0.0
        return sum(median(self.calls[kind]) for kind in kinds) + len(kinds) * python + other
