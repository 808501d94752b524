"""Evaluates rows of recorded calls in few network calls.

A layout is checked when it is found, and in every later run of the loop by one call, beside those of the first round.
What fails is evaluated in smaller groups: whole calls instead of rows, then call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..engine.executor import out_of_memory
from .batch import KindCalls, Layout, Merging
from .calls import Call, CallKind, RecordedCalls, flatten_output
from .layout import NOTHING_TO_BATCH, OUT_OF_MEMORY, LayoutSearch, compare, random_request, rows_of_sample
from .rows import RowRequest
from .signals import NotParallelizable, RowsInteract
from .times import LoopTimes

if TYPE_CHECKING:
    from ..engine.distributed.ranks import Ranks

__all__ = ["Merger"]


@dataclass(eq=False)
class Merger:
    """Evaluates rows of recorded calls in as few network calls as their layouts allow.

    Attributes:
        denoiser: ``denoiser(module, args, kwargs)`` calls the real denoiser.
        layouts: Layouts of earlier runs of the loop, by kind of call.
        limit: Most rows of one network call, lowered when memory runs out; None for no limit.
        buckets: The numbers of rows that calls for several steps may have; any, where there are none.
        calls: Network calls made.
        rows: Rows evaluated.
        peak_rows: Most rows of one call.
        single: Whether every call is evaluated by itself.
        batched: Whether any calls have been batched.
        ranks: Those that share the calls, each with a merger of its own; None without.
        times: Takes the seconds of single calls.
        checked: The layouts that this merger has found or checked.
        rounds: Rounds that ranks have shared.
    """

    denoiser: Callable[[int, Any, Any], Any]
    layouts: dict[Any, Layout] = field(default_factory=dict)
    limit: int | None = None
    buckets: tuple[int, ...] = ()
    calls: int = 0
    rows: int = 0
    peak_rows: int = 0
    single: bool = False
    batched: bool = False
    ranks: Ranks | None = None
    times: LoopTimes = field(default_factory=LoopTimes)
    checked: dict[Any, Layout] = field(default_factory=dict)
    rounds: int = 0

    def evaluate(self, recorded: RecordedCalls, requests: Sequence[RowRequest]) -> list[list[Any]]:
        """Return the output leaves of every request, its rows only.

        Raises:
            RowsInteract: If rows are requested that cannot be taken from their calls.
            NotParallelizable: If no two calls can be batched, and no other rank takes a share: the loop itself is
                faster then.
        """
        ranks = self.ranks
        if (ranks is None or ranks.size == 1) and not self.single and not self.batched:
            self._require_batching(recorded)
        if ranks is None:
            return self._evaluate(recorded, requests)
        self.rounds += 1
        agrees = (
            self.rounds % ranks.agree_every == 0
        )  # weights may change on one rank after the start, where all were compared
        share = [*requests[ranks.share(len(requests))], *(requests[-1:] if agrees else ())]
        compared: list[Any] = []

        def evaluate_share() -> list[list[Any]]:
            for kind, members in self._kinds(recorded, requests):
                kind.check_layout([requests[i] for i in members])  # the same on all ranks, whatever their shares
            outputs = self._evaluate(recorded, share)
            if agrees:  # the same rows on every rank, in the same calls as its share
                compared.extend(outputs.pop())
            return outputs

        subject = b"".join(np.append(request.rows, request.call).tobytes() for request in requests)
        gathered = ranks.gather_trees(subject, evaluate_share, [recorded.form(request) for request in requests])
        if agrees:
            ranks.agree(next(leaf for leaf in compared if isinstance(leaf, Tensor) and leaf.is_floating_point()))
        return gathered

    def layout_of(self, recorded: RecordedCalls, kind: CallKind) -> Layout:
        """Return how rows of calls of one kind are batched.

        Raises:
            RowsInteract: If rows cannot be taken from calls of several samples.
            NotParallelizable: If no two calls can be batched.
        """
        merger, row_map = self._of_kind(recorded, kind), recorded.row_maps[kind.members[0]]
        layout = merger.find_layout()
        if layout.merging is Merging.SINGLE:
            raise NotParallelizable(layout.reason)
        if self.limit is not None and self.limit < 2 * row_map.rows:
            raise NotParallelizable(OUT_OF_MEMORY)
        if layout.merging is Merging.MAPPED or (layout.merging is Merging.CALLS and row_map.sample_of_row.any()):
            raise RowsInteract
        return layout

    def call(self, call: Call, leaves: Sequence[Any], rows: int) -> list[Any]:
        """Call the network once; its next call may overwrite what it returns (CUDA graphs)."""
        with call.context():
            args, kwargs = call.arguments(leaves)
            evaluate = partial(self.denoiser, call.module, args, kwargs)
            single = all(map(_same_shape, leaves, call.leaves))
            output = self.times.call(call.signature(), evaluate, call.device) if single else evaluate()
        self.calls += 1
        self.rows += rows
        self.peak_rows = max(self.peak_rows, rows)
        return flatten_output(output)[0]

    def _require_batching(self, recorded: RecordedCalls) -> None:
        """Raise :class:`NotParallelizable` unless some calls may be batched."""
        reason = NOTHING_TO_BATCH
        for kind in recorded.repeated_kinds:
            merger = self._of_kind(recorded, kind)
            layout = merger.find_layout()
            if layout.merging is Merging.SINGLE:
                reason = layout.reason
            elif self.limit is not None and self.limit < 2 * recorded.row_maps[kind.members[0]].rows:
                reason = OUT_OF_MEMORY
            else:
                return
        raise NotParallelizable(reason)

    def _evaluate(self, recorded: RecordedCalls, requests: Sequence[RowRequest]) -> list[list[Any]]:
        outputs: list[list[Any]] = [[] for _ in requests]
        for kind, members in self._kinds(recorded, requests):
            for i, output in zip(members, kind.evaluate([requests[i] for i in members]), strict=True):
                outputs[i] = output
        return outputs

    def _kinds(
        self, recorded: RecordedCalls, requests: Sequence[RowRequest]
    ) -> Iterator[tuple[_KindMerger, list[int]]]:
        """Yield the requests of every kind of call, by their places."""
        kinds = recorded.kinds
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(kinds[request.call].key, []).append(i)
        for members in groups.values():
            yield self._of_kind(recorded, kinds[requests[members[0]].call]), members

    def _of_kind(self, recorded: RecordedCalls, kind: CallKind) -> _KindMerger:
        return _KindMerger(self, KindCalls(recorded, kind, self.call, self.buckets))


@dataclass(frozen=True, eq=False)
class _KindMerger:
    """Evaluates the requests of one kind of call in one round."""

    merger: Merger
    calls: KindCalls

    @property
    def name(self) -> Any:
        return self.calls.kind.name

    @property
    def is_checked(self) -> bool:
        """Whether the layout was found or checked since the loop began."""
        return self.name in self.merger.checked

    def evaluate(self, requests: Sequence[RowRequest]) -> list[list[Any]]:
        layout = self.layout(requests)
        if layout.merging is Merging.SINGLE:
            return [self.calls.run_single(request) for request in requests]
        outputs: list[list[Any]] = []
        while len(outputs) < len(requests):
            waiting = requests[len(outputs) :]
            count = self.rows_within_limit(waiting)
            if count == 1 and self.calls.has_all_rows(waiting[:1]):
                outputs.append(self.calls.run_single(waiting[0]))
                continue
            try:
                batch = self.run(waiting[:count], layout)
            except (RuntimeError, MemoryError) as error:
                if count == 1 or not out_of_memory(error):
                    raise
                self.merger.limit = max(1, sum(len(request.rows) for request in waiting[:count]) // 2)
                continue
            if batch is None:  # the network has changed since an earlier run of the loop
                del self.merger.layouts[self.name]
                return self.evaluate(requests)
            outputs += batch
            self.merger.batched |= count > 1
        return outputs

    def check_layout(self, requests: Sequence[RowRequest]) -> None:
        """Find the layout for the requests, or check it."""
        if self.layout(requests).merging is not Merging.SINGLE and not self.is_checked:
            self.evaluate(requests[-2:])
            self.layout(requests)

    def layout(self, requests: Sequence[RowRequest]) -> Layout:
        """Return how to batch the requests, or raise :class:`RowsInteract` if their rows cannot be taken apart."""
        whole = self.calls.has_all_rows(requests)
        if whole and (len(requests) == 1 or self.merger.single):
            return Layout(Merging.SINGLE)
        layout = self.find_layout()
        if layout.merging is not Merging.ROWS and not whole:
            raise RowsInteract
        return layout

    def find_layout(self) -> Layout:
        """Return the layout of this kind of call; if there is none yet, find it."""
        merger = self.merger
        layout = merger.checked.get(self.name) or merger.layouts.get(self.name)
        if layout is None:
            try:
                layout = merger.layouts[self.name] = LayoutSearch(self.calls).find()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                layout = Layout(Merging.SINGLE, reason=OUT_OF_MEMORY)  # for now: there may be room the next time
            merger.checked[self.name] = layout
        return layout

    def run(self, requests: Sequence[RowRequest], layout: Layout) -> list[list[Any]] | None:
        """Evaluate several requests in one network call; None if a layout of an earlier run of the loop fails.

        The states of a first round may be copies of one another, so random ones are evaluated beside them.
        """
        if self.is_checked:
            return self.calls.run_batched(requests, layout)
        other = random_request(self.calls, self.calls.kind.members[-1], torch.Generator("cpu").manual_seed(0))
        part = rows_of_sample(self.calls, other, 0) if layout.merging is Merging.ROWS else other
        answers = [*[None] * len(requests), self.calls.run_single(other)]
        outputs, error = compare(self.calls, [*requests, part], answers, layout)
        if error > layout.bound:
            return None
        self.merger.checked[self.name] = layout
        return outputs[:-1]

    def rows_within_limit(self, requests: Sequence[RowRequest]) -> int:
        """Return how many requests the row limit lets into one call, at least one."""
        if self.merger.limit is None:
            return len(requests)
        total = np.cumsum([len(request.rows) for request in requests])
        if not self.is_checked:
            total += self.calls.row_map(requests[0].call).rows  # of the check
        return max(1, int((total <= self.merger.limit).sum()))


def _same_shape(left: Any, right: Any) -> bool:
    return getattr(left, "shape", None) == getattr(right, "shape", None)
