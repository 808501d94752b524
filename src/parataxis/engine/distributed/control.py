"""Small messages between ranks over the CPU: who is there, what each does, who is lost.

Before outputs are gathered, ranks exchange a few numbers: which round this is, what it is about, and whether the
evaluation failed. So a rank that died, hangs, raised or went another way is named, and no rank waits for it.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .plain import from_json, to_json

__all__ = ["ControlChannel", "RankError", "differing"]

LONGEST = 1 << 24  # bytes of a message: a plan takes some thousand


class RankError(RuntimeError):
    """A rank died, hangs, failed, or does something else than the others."""


class ControlChannel:
    """Messages between the ranks of a group.

    Args:
        members: Global numbers of the ranks.
        rank: Place of this one among them.
        timeout: Seconds to wait for another rank before it counts as lost.

    Attributes:
        names: What each rank is called in errors.
        round: Number of the present round, for errors.
        idle: Whether every message has been answered, so that this rank can still say that it ends.
    """

    def __init__(self, members: Sequence[int], rank: int, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self._members = list(members)
        self._group = dist.new_group(
            self._members, timedelta(seconds=timeout), backend="gloo", use_local_synchronization=True
        )
        self.round = 0
        self.idle = True
        self.names: list[str] = []
        self.names = self.all_gather(f"rank {rank} ({socket.gethostname()}, process {os.getpid()})")

    def __repr__(self) -> str:
        """Return which ranks there are."""
        return f"ControlChannel(rank {self.rank} of {len(self._members)})"

    @contextmanager
    def uninterruptible(self) -> Iterator[None]:
        """Exchange something with the other ranks: what ends in between leaves them waiting."""
        self.idle = False
        yield
        self.idle = True

    def exchange_status(self, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        """Send a few numbers to every rank, and return what each sent."""
        message = torch.tensor([int(number) for number in numbers], device="cpu")
        size = len(self._members)
        received = [message if rank == self.rank else torch.empty_like(message) for rank in range(size)]
        others = [rank for rank in range(size) if rank != self.rank]
        deadline = time.monotonic() + self.timeout
        pending: list[tuple[int, Any]] = []
        with self.uninterruptible():
            for transfer, buffers in ((dist.irecv, received), (dist.isend, [message] * size)):
                for rank in others:
                    work = self._or_lost(rank, transfer, buffers[rank], self._members[rank], group=self._group)
                    pending.append((rank, work))
            for rank, work in pending:
                self._or_lost(rank, work.wait, timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
        return [tuple(numbers_of_rank.tolist()) for numbers_of_rank in received]

    def find_lost(self) -> None:
        """Raise if a rank does not come."""
        self.exchange_status([self.round, 0, 0])

    def all_gather(self, value: Any, classes: Iterable[type] = ()) -> list[Any]:
        """Return the values of all ranks, in their order; they are sent as JSON, so what a peer sends is never run.

        Args:
            value: Of this rank; see :func:`.plain.to_json`.
            classes: Of which values may be.
        """
        message = torch.frombuffer(bytearray(to_json(value).encode()), dtype=torch.uint8)
        count = len(self._members)
        try:
            with self.uninterruptible():
                sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(count)]
                dist.all_gather(sizes, torch.tensor([len(message)], device="cpu"), group=self._group)
                lengths = [int(size) for size in sizes]
                if max(lengths) > LONGEST:
                    raise RankError(f"a rank sends a message of {max(lengths)} bytes, expected at most {LONGEST}.")
                padded = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
                padded[: len(message)] = message
                messages = [torch.empty_like(padded) for _ in range(count)]
                dist.all_gather(messages, padded, group=self._group)
        except RankError:
            raise
        except RuntimeError as error:
            if self.names:
                self.find_lost()
            raise RankError(f"not all {count} ranks came within {self.timeout:g} s: {error}") from error
        classes = tuple(classes)
        return [
            from_json(part[:length].numpy().tobytes(), classes) for part, length in zip(messages, lengths, strict=True)
        ]

    def _or_lost(self, rank: int, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Make a call that waits for a rank, or raise that it is lost."""
        try:
            return call(*args, **options)
        except RuntimeError as error:
            raise RankError(
                f"{self.names[rank]} is lost in round {self.round}: it died, or hangs for more than "
                f"{self.timeout:g} s ({str(error).splitlines()[0]})."
            ) from error


def differing(values: Sequence[Any]) -> list[int]:
    """Return the places of those that differ from the majority, or else from the first."""
    majority = Counter(values).most_common(1)[0][0]
    return [place for place, value in enumerate(values) if value != majority]
