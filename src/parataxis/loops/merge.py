r"""Recorded calls of a denoiser, evaluated side by side.

A loop calls its denoiser with whatever arguments it likes. Recorded, a call is a tree of leaves, of which few are
*live*: they depend on earlier outputs. With R rows in the live leaf's first dimension, the rows wanted of many calls
become one call by what each other leaf turns out to be over all calls:

- a tensor with R rows, or several for each of them: its rows are taken along,
- a number, or a tensor of one element, that differs between calls (the time): one entry a row,
- anything that is the same in all calls: shared; calls that differ in anything else are not merged.

Rows with equal inputs (guidance) stay apart in blocks, all first ones before all second ones, because some attention
processors split the batch so. Each such layout is checked against single calls, on random inputs: when it is found, and
in every later run of the loop by one call, beside those of the first round. What fails is evaluated in smaller groups:
whole calls instead of rows, then call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..arrays import upload
from ..engine.executor import out_of_memory

if TYPE_CHECKING:
    from ..engine.distributed.ranks import Ranks

__all__ = ["Ask", "Call", "Calls", "Merger", "Output", "Piece", "Refused", "Site", "WholeCalls", "equal"]

RowIndex = NDArray[np.int64]
COARSE = 0.1  # a wrong layout errs by order 1 on random rows
ROUNDINGS = 10  # times the rounding of copies of one call that a layout may differ
UNBATCHED = "the denoiser's input has no dimension for samples, so steps cannot share a call."
UNLIKE = "no two calls of the denoiser can be merged: they differ in more than rows and numbers."
OTHERWISE = (
    "merged calls of the denoiser give other results than single ones: it may look at one time or one sigma only, or "
    "its rows at one another."
)
CRAMPED = "memory has no room for two calls of the denoiser at once."


class Refused(BaseException):
    """The loop cannot be solved in parallel; the argument says why."""


def equal(left: Any, right: Any) -> bool:
    """Return whether two leaves are the same to the bit."""
    if left is right:
        return True
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return (
            isinstance(left, Tensor)
            and isinstance(right, Tensor)
            and left.shape == right.shape
            and left.dtype == right.dtype
            and left.device == right.device
            and torch.equal(left, right)
        )
    if type(left) is not type(right):
        return False
    try:
        return bool(left == right) or (left != left and right != right)
    except (RuntimeError, ValueError, TypeError):
        return False


@dataclass(frozen=True, eq=False)
class Output:
    """What a denoiser returned once: the form of its output, with its leaves."""

    spec: TreeSpec
    leaves: list[Any]

    def tree(self, leaves: Sequence[Any]) -> Any:
        """Return leaves in the form of the output."""
        return tree_unflatten(list(leaves), self.spec)


@dataclass(eq=False)
class Call:
    """One recorded call: which denoiser, its arguments, and under which autocast.

    Attributes:
        module: Number of the denoiser.
        spec: Form of (args, kwargs).
        leaves: Their leaves, tensors copied.
        feeds: Leaves that are outputs of an earlier call (ControlNet): leaf to (call, output leaf).
        autocast: (device type, dtype) if the loop called under autocast.
        output: Form of the output.
    """

    module: int
    spec: TreeSpec
    leaves: list[Any]
    feeds: dict[int, tuple[int, int]]
    autocast: tuple[str, torch.dtype] | None
    output: Output

    def arguments(self, leaves: Sequence[Any]) -> tuple[Any, Any]:
        """Return (args, kwargs) with these leaves, in containers of their own."""
        args, kwargs = tree_unflatten(list(leaves), self.spec)
        return args, kwargs

    @contextmanager
    def context(self) -> Iterator[None]:
        """Evaluate as the loop did: no gradients, its autocast."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.autocast[0], dtype=self.autocast[1]))
            yield

    def signature(self) -> tuple[Any, ...]:
        """Return what calls of one kind have in common."""
        shapes = tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else type(v) for v in self.leaves)
        return (self.module, str(self.spec), shapes)


@dataclass(frozen=True)
class Piece:
    """A live part of a call's arguments and the part of the output that answers it.

    Attributes:
        leaf: Which argument.
        box: Its live part, (first, last + 1) for every dimension behind the rows.
        output: Which leaf of the output; its leading part of the same shape is the answer.
    """

    leaf: int
    box: tuple[tuple[int, int], ...]
    output: int

    @property
    def live(self) -> tuple[slice, ...]:
        """The live part, with its rows in front."""
        return (slice(None), *(slice(*ends) for ends in self.box))

    @property
    def answer(self) -> tuple[slice, ...]:
        """The answering part of the output, with its rows in front."""
        return (slice(None), *(slice(0, stop - first) for first, stop in self.box))


@dataclass(frozen=True, eq=False)
class Site:
    """How the rows of a call belong to states.

    Attributes:
        pieces: The live parts; a state is all of them, flattened, one behind the other.
        rows: R.
        batched: Whether the leaves' first dimension counts rows; else a leaf is one row.
        owner: (R,) the group of each row: rows of a group have equal inputs.
    """

    pieces: tuple[Piece, ...]
    rows: int
    batched: bool
    owner: RowIndex

    @cached_property
    def slot(self) -> RowIndex:
        """(R,) the place of each row in its group."""
        return np.array([int((self.owner[:r] == own).sum()) for r, own in enumerate(self.owner)])

    def view(self, leaf: Tensor) -> Tensor:
        """Return a leaf with its rows in front."""
        return leaf if self.batched else leaf[None]

    def states(self, leaves: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Return the live parts of arguments, (R, dim)."""
        parts = [self.view(leaves[p.leaf])[p.live].flatten(1) for p in self.pieces]
        return torch.cat(parts, 1).to(dtype)

    def answers(self, leaves: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Return the parts of outputs that answer the states, (R, dim)."""
        parts = [self.view(leaves[p.output])[p.answer].flatten(1) for p in self.pieces]
        return torch.cat(parts, 1).to(dtype)

    def write(self, leaves: Sequence[Any], states: Tensor) -> None:
        """Put states (R, dim) into the live parts of arguments."""
        self._put([(leaves[p.leaf], p.live) for p in self.pieces], states, add=False)

    def add(self, leaves: Sequence[Any], change: Tensor) -> None:
        """Add a change (R, dim) to the answering parts of outputs."""
        self._put([(leaves[p.output], p.answer) for p in self.pieces], change, add=True)

    def _put(self, places: Sequence[tuple[Tensor, tuple[slice, ...]]], rows: Tensor, *, add: bool) -> None:
        first = 0
        for leaf, box in places:
            part = self.view(leaf)[box]
            size = part[0].numel()
            values = rows[:, first : first + size].view(part.shape)
            part.copy_(part.to(rows.dtype) + values if add else values)
            first += size


@dataclass(frozen=True, eq=False)
class Ask:
    """RowIndex wanted of a call: at which states.

    Attributes:
        call: Which call of the stage.
        rows: Which rows of it, in order.
        states: (len(rows), dim) their inputs.
    """

    call: int
    rows: RowIndex
    states: Tensor


@dataclass(frozen=True)
class _Layout:
    """How calls are merged: ``rows`` of calls, whole ``calls``, or each call ``single``."""

    grade: str
    narrow: bool = False  # numbers are given in the dtype of the live leaf
    column: bool = False  # numbers are given as (R, 1, ..) instead of (R,)
    shared: bool = False  # leaves equal in all calls are shared even if they have as many rows as the call
    several: bool = False  # leaves with a multiple of the call's rows have several for each, one behind the other
    bound: float = 0.0  # how far, relative, it may be from single calls
    why: str = ""  # calls stay single


@dataclass(eq=False)
class Merger:
    """Evaluates rows of recorded calls in as few network calls as their layouts allow.

    Attributes:
        network: ``network(module, args, kwargs)`` calls the real denoiser.
        layouts: Layouts found so far, by kind of call.
        limit: Most rows of one network call, lowered when memory runs out; None for no limit.
        calls: Network calls made.
        rows: RowIndex evaluated.
        peak_rows: Most rows of one call.
        apart: Whether nothing is merged.
        merged: Whether any calls have been.
        ranks: Those that share the calls, each with a merger of its own; None for one alone.
        trusted: The layouts that this merger has found or checked.
    """

    network: Callable[[int, Any, Any], Any]
    layouts: dict[Any, _Layout] = field(default_factory=dict)
    limit: int | None = None
    calls: int = 0
    rows: int = 0
    peak_rows: int = 0
    apart: bool = False
    merged: bool = False
    ranks: Ranks | None = None
    trusted: dict[Any, _Layout] = field(default_factory=dict)

    def evaluate(self, recorded: Calls, asks: Sequence[Ask]) -> list[list[Any]]:
        """Return the output leaves of every ask, its rows only.

        Raises:
            WholeCalls: If rows are asked for that cannot be taken from their calls.
            Refused: If no two calls can be merged, and no other rank takes a share: the loop itself is faster then.
        """
        ranks = self.ranks
        if (ranks is None or ranks.size == 1) and not self.apart and not self.merged:
            self._require_merging(recorded)
        if ranks is None:
            return self._evaluate(recorded, asks)
        own = asks[ranks.share(len(asks))]

        def share() -> list[list[Any]]:
            for work, members in self._works(recorded, asks):
                work.settle([asks[i] for i in members])  # the same on all ranks, whatever their shares
            return self._evaluate(recorded, own)

        asked = b"".join(np.append(ask.rows, ask.call).tobytes() for ask in asks)
        return ranks.leaves(asked, share, [recorded.form(ask) for ask in asks])

    def _require_merging(self, recorded: Calls) -> None:
        """Raise :class:`Refused` unless some calls may be merged."""
        why = UNLIKE
        for kind in recorded.several:
            work = _Work(self, recorded, kind)
            layout = work.known()
            if layout.grade == "single":
                why = layout.why
            elif self.limit is not None and self.limit < 2 * work.site(kind.members[0]).rows:
                why = CRAMPED
            else:
                return
        raise Refused(why)

    def _evaluate(self, recorded: Calls, asks: Sequence[Ask]) -> list[list[Any]]:
        outputs: list[list[Any]] = [[] for _ in asks]
        for work, members in self._works(recorded, asks):
            for i, output in zip(members, work.evaluate([asks[i] for i in members]), strict=True):
                outputs[i] = output
        return outputs

    def _works(self, recorded: Calls, asks: Sequence[Ask]) -> Iterator[tuple[_Work, list[int]]]:
        """Yield the asks of every kind of call, by their places."""
        kinds = recorded.kinds
        groups: dict[Any, list[int]] = {}
        for i, ask in enumerate(asks):
            groups.setdefault(kinds[ask.call].key, []).append(i)
        for members in groups.values():
            yield _Work(self, recorded, kinds[asks[members[0]].call]), members

    def run(self, call: Call, leaves: Sequence[Any], rows: int) -> list[Any]:
        """Call the network once; what it returns may be its own, and overwritten by its next call (CUDA graphs)."""
        with call.context():
            args, kwargs = call.arguments(leaves)
            output = self.network(call.module, args, kwargs)
        self.calls += 1
        self.rows += rows
        self.peak_rows = max(self.peak_rows, rows)
        return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_flatten(output)[0]]


@dataclass(eq=False)
class Calls:
    """The recorded calls of a stage, and how their rows belong to states."""

    calls: Sequence[Call]
    sites: Sequence[Site]

    @cached_property
    def kinds(self) -> dict[int, _Kind]:
        """The kind of every call."""
        return _kinds(self.calls, self.sites)

    @cached_property
    def several(self) -> list[_Kind]:
        """The kinds of several calls, but for those that only feed other calls."""
        feeding = {feeder for call in self.calls for feeder, _ in call.feeds.values()}
        kinds = {id(kind): kind for call, kind in self.kinds.items() if call not in feeding}
        return [kind for kind in kinds.values() if len(kind.members) > 1]

    def form(self, ask: Ask) -> list[Any]:
        """Return leaves of the shapes that answer an ask; of tensors, their values mean nothing."""
        rows, leaves = self.sites[ask.call].rows, self.calls[ask.call].output.leaves
        return [leaf[: len(ask.rows)] if _has_rows(leaf, rows) else leaf for leaf in leaves]


class WholeCalls(Exception):
    """The rows of a call influence one another: samples cannot be evaluated apart."""


@dataclass(eq=False)
class _Kind:
    """Calls that may be merged: what each leaf is over all of them; ``name`` is what a layout depends on."""

    key: Any
    name: Any
    roles: list[str]  # live, feed, row, number, shared, several
    members: list[int]
    ambiguous: bool  # a leaf with as many rows as the call is the same in all calls


def _kinds(calls: Sequence[Call], sites: Sequence[Site]) -> dict[int, _Kind]:
    """Sort the calls of a stage into kinds."""
    alike: dict[Any, list[int]] = {}
    for c, (call, site) in enumerate(zip(calls, sites, strict=True)):
        alike.setdefault((call.signature(), site.pieces, tuple(site.owner)), []).append(c)
    kinds: dict[int, _Kind] = {}
    for name, members in alike.items():
        first, site = calls[members[0]], sites[members[0]]
        live = {piece.leaf for piece in site.pieces}
        roles, ambiguous, differing = [], False, []
        for i, leaf in enumerate(first.leaves):
            same = all(equal(calls[c].leaves[i], leaf) for c in members)
            role = _role(leaf, site, same)
            if i in first.feeds:
                role = "feed"
            elif i in live:
                role = "live"
            elif role == "apart":
                differing.append(i)
                role = "shared"
            ambiguous |= role == "row" and same
            roles.append(role)
        apart: list[tuple[list[Any], _Kind]] = []
        for c in members:
            values = [calls[c].leaves[i] for i in differing]
            kind = next((k for v, k in apart if all(map(equal, v, values))), None)
            if kind is None:
                # A layout that is right on one side of what keeps calls apart need not be right on the other.
                named = (name, tuple(roles), *(v if isinstance(v, (str, bool)) else type(v) for v in values))
                kind = _Kind((name, len(apart)), named, roles, [], ambiguous)
                apart.append((values, kind))
            kind.members.append(c)
            kinds[c] = kind
    return kinds


def _role(leaf: Any, site: Site, same: bool) -> str:
    if isinstance(leaf, Tensor) and site.batched and leaf.ndim and len(leaf) == site.rows:
        return "row"
    if same and isinstance(leaf, Tensor) and site.batched and leaf.ndim > 1 and len(leaf) % site.rows == 0:
        return "several"
    if same:
        return "shared"
    number = isinstance(leaf, (int, float)) and not isinstance(leaf, bool)
    return "number" if number or (isinstance(leaf, Tensor) and leaf.numel() == 1) else "apart"


@dataclass(eq=False)
class _Work:
    """The asks of one kind of call in one round."""

    merger: Merger
    recorded: Calls
    kind: _Kind

    def site(self, call: int) -> Site:
        return self.recorded.sites[call]

    def evaluate(self, asks: Sequence[Ask]) -> list[list[Any]]:
        layout = self.layout(asks)
        if layout.grade == "single":
            return [self.single(ask) for ask in asks]
        outputs: list[list[Any]] = []
        while len(outputs) < len(asks):
            rest = asks[len(outputs) :]
            count = self.fitting(rest)
            if count == 1 and self.whole(rest[:1]):
                outputs.append(self.single(rest[0]))
                continue
            try:
                merged = self.merged(rest[:count], layout) if self.trusted else self.checked(rest[:count], layout)
            except (RuntimeError, MemoryError) as error:
                if count == 1 or not out_of_memory(error):
                    raise
                self.merger.limit = max(1, sum(len(ask.rows) for ask in rest[:count]) // 2)
                continue
            if merged is None:
                del self.merger.layouts[self.kind.name]
                return self.evaluate(asks)
            outputs += merged
            self.merger.merged |= count > 1
        return outputs

    def settle(self, asks: Sequence[Ask]) -> None:
        """Find the layout for the asks, or check it."""
        if self.layout(asks).grade != "single" and not self.trusted:
            self.evaluate(asks[-2:])
            self.layout(asks)

    def layout(self, asks: Sequence[Ask]) -> _Layout:
        """Return how to merge the asks, or raise :class:`WholeCalls` if their rows cannot be taken apart."""
        whole = self.whole(asks)
        if whole and (len(asks) == 1 or self.merger.apart):
            return _Layout("single")
        layout = self.known()
        if layout.grade != "rows" and not whole:
            raise WholeCalls
        return layout

    def known(self) -> _Layout:
        """Return the layout of this kind of call; if there is none yet, find it."""
        merger, name = self.merger, self.kind.name
        layout = merger.trusted.get(name) or merger.layouts.get(name)
        if layout is None:
            try:
                layout = merger.layouts[name] = self.find()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                layout = _Layout("single", why=CRAMPED)  # for now: there may be room the next time
            merger.trusted[name] = layout
        return layout

    @property
    def trusted(self) -> bool:
        """Whether the layout was found or checked since the loop began."""
        return self.kind.name in self.merger.trusted

    def checked(self, asks: Sequence[Ask], layout: _Layout) -> list[list[Any]] | None:
        """Evaluate several asks by a layout of an earlier run of the loop; None if the network has changed too much.

        The states of a first round may be copies of one another, so random ones are evaluated beside them.
        """
        other = self.random(self.kind.members[-1], torch.Generator("cpu").manual_seed(0))
        part = self.group(other, 0) if layout.grade == "rows" else other
        outputs, error = self.compared([*asks, part], [*[None] * len(asks), self.single(other)], layout)
        if error > layout.bound:
            return None
        self.merger.trusted[self.kind.name] = layout
        return outputs[:-1]

    def whole(self, asks: Sequence[Ask]) -> bool:
        """Return whether all rows of every call are asked for."""
        return all(len(ask.rows) == self.site(ask.call).rows for ask in asks)

    def fitting(self, asks: Sequence[Ask]) -> int:
        """Return how many asks the row limit lets into one call, at least one."""
        if self.merger.limit is None:
            return len(asks)
        total = np.cumsum([len(ask.rows) for ask in asks])
        if not self.trusted:
            total += self.site(asks[0].call).rows  # of the check
        return max(1, int((total <= self.merger.limit).sum()))

    def single(self, ask: Ask) -> list[Any]:
        """Evaluate one whole call with exactly the arguments that the loop gave."""
        call, site = self.recorded.calls[ask.call], self.site(ask.call)
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
        site.write(leaves, ask.states)
        for feeder, used in _feeders(call).items():
            fed = self.fed(feeder, [ask])
            for leaf, output in used:
                leaves[leaf] = fed[output]
        return self.merger.run(call, leaves, site.rows)

    def fed(self, feeder: int, asks: Sequence[Ask], layout: _Layout | None = None) -> list[Any]:
        """Evaluate the calls whose outputs are arguments of the asked ones, in front of them."""
        offset = asks[0].call - feeder
        work = _Work(self.merger, self.recorded, self.recorded.kinds[feeder])
        before = [Ask(ask.call - offset, ask.rows, ask.states) for ask in asks]
        return work.single(before[0]) if layout is None else work.joined(before, layout)

    def merged(self, asks: Sequence[Ask], layout: _Layout) -> list[list[Any]]:
        """Evaluate several asks in one network call."""
        leaves = self.joined(asks, layout)
        order = self.order(asks)
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        outputs, first = [], 0
        for ask in asks:
            index = back[first : first + len(ask.rows)]
            first += len(ask.rows)
            outputs.append([_take(leaf, index, len(order)) for leaf in leaves])
        return outputs

    def order(self, asks: Sequence[Ask]) -> RowIndex:
        """Return the order of all rows in the merged batch: all first rows of groups, then all second ones."""
        slots = np.concatenate([self.site(ask.call).slot[ask.rows] for ask in asks])
        return np.argsort(slots, kind="stable")

    def joined(self, asks: Sequence[Ask], layout: _Layout) -> list[Any]:
        """Call the network on the rows of all asks, in :meth:`order`, and return the output leaves."""
        order = self.order(asks)
        calls = [self.recorded.calls[ask.call] for ask in asks]
        site = self.site(asks[0].call)
        counts = [len(ask.rows) for ask in asks]
        leaves: list[Any] = []
        for i, role in enumerate(self.kind.roles):
            values = [call.leaves[i] for call in calls]
            if role == "row" and layout.shared and all(equal(values[0], value) for value in values):
                role = "shared"
            if role in ("row", "live"):
                parts = [value[_index(ask.rows, value)] for ask, value in zip(asks, values, strict=True)]
                leaves.append(torch.cat(parts)[_index(order, parts[0])])
            elif role == "several" and layout.several:
                parts = [value.unflatten(0, (site.rows, -1)) for value in values]
                parts = [part[_index(ask.rows, part)] for ask, part in zip(asks, parts, strict=True)]
                leaves.append(torch.cat(parts)[_index(order, parts[0])].flatten(0, 1))
            elif role == "number":
                column = _numbers(values, counts, order, asks[0].states)
                if layout.narrow and column.is_floating_point():
                    column = column.to(self.dtype)
                leaves.append(column.view(-1, *(1,) * len(site.pieces[0].box)) if layout.column else column)
            else:
                leaves.append(values[0].clone() if isinstance(values[0], Tensor) else values[0])
        states = torch.cat([ask.states for ask in asks])
        site.write(leaves, states[_index(order, states)])
        for feeder, used in _feeders(calls[0]).items():
            fed = self.fed(feeder, asks, layout)
            for leaf, output in used:
                leaves[leaf] = fed[output]
        return self.merger.run(calls[0], leaves, len(order))

    def find(self) -> _Layout:
        """Find the freest layout that gives what single calls give, on random inputs.

        Raises an error that :func:`out_of_memory` knows where there is no room to try.
        """
        site = self.site(self.kind.members[0])
        if not site.batched:
            return _Layout("single", why=UNBATCHED)
        members = [self.kind.members[i] for i in sorted({0, len(self.kind.members) // 2, len(self.kind.members) - 1})]
        trial = self if torch.finfo(self.dtype).bits >= 32 else self.shaken(members)
        generator = torch.Generator("cpu").manual_seed(0)
        scales = (1.0, 0.5, 2.0)
        whole = [self.random(c, generator, scale) for c, scale in zip(members, scales, strict=False)]
        answers = [trial.single(ask) for ask in whole]
        some = [self.group(ask, g) for ask, g in zip(whole, (int(site.owner.max()), 0), strict=False)] + whole[2:]
        try:
            return trial.freest(some, whole, answers)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        return trial.freest(some[:2], whole[:2], answers[:2])

    def random(self, call: int, generator: torch.Generator, scale: float = 1.0) -> Ask:
        """Ask for a whole call at random states."""
        site, dtype = self.site(call), torch.promote_types(self.dtype, torch.float32)
        like = site.states(self.recorded.calls[call].leaves, dtype)
        shape = int(site.owner.max()) + 1, like.shape[1]
        states = (torch.randn(shape, generator=generator, device="cpu") * scale).to(like)
        return Ask(call, np.arange(site.rows), states[_index(site.owner, states)])

    def group(self, ask: Ask, number: int) -> Ask:
        """Ask for the rows of one sample of a whole call."""
        rows = np.flatnonzero(self.site(ask.call).owner == number)
        return Ask(ask.call, rows, ask.states[_index(rows, ask.states)])

    def freest(self, some: Sequence[Ask], whole: Sequence[Ask], answers: Sequence[list[Any]]) -> _Layout:
        """Return the freest layout that gives the answers of single calls: for some of their rows, or whole calls."""
        precise = torch.finfo(self.dtype).bits >= 32
        least = max(2e-5, 2 * torch.finfo(self.dtype).eps)
        bound, measured = (least, False) if precise else (COARSE, True)
        leaves = self.recorded.calls[whole[0].call].leaves
        numbers = [leaf for leaf, role in zip(leaves, self.kind.roles, strict=True) if role == "number"]
        narrows = (False, True) if any(_wider(number, self.dtype) for number in numbers) else (False,)
        columns = (False, True) if numbers else (False,)
        shares = (False, True) if self.kind.ambiguous else (False,)
        severals = (False, True) if "several" in self.kind.roles else (False,)
        for grade, asks in (("rows", some), ("calls", whole)):
            for narrow, column, shared, several in product(narrows, columns, shares, severals):
                layout = _Layout(grade, narrow, column, shared, several)
                error = self.compared(asks, answers, layout)[1]
                if bound < error <= COARSE and not measured:
                    # A network may compute in fewer bits than it is given: copies of one call tell its rounding.
                    rounding = self.compared([whole[0]] * 2, [answers[0]] * 2, layout)[1]
                    bound, measured = min(max(bound, ROUNDINGS * rounding), COARSE), True
                if error <= bound:
                    return replace(layout, bound=min(max(least, ROUNDINGS * error), COARSE))
        return _Layout("single", why=OTHERWISE)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the live part of the arguments."""
        call = self.kind.members[0]
        dtype: torch.dtype = self.recorded.calls[call].leaves[self.site(call).pieces[0].leaf].dtype
        return dtype

    def shaken(self, members: Sequence[int]) -> _Work:
        """Return the same work with conditioning at random, so that a wrong layout errs by order 1."""
        generator = torch.Generator("cpu").manual_seed(1)
        calls = list(self.recorded.calls)
        for c in members:
            leaves = list(calls[c].leaves)
            for i, role in enumerate(self.kind.roles):
                if role == "row" and leaves[i].is_floating_point() and leaves[i].ndim > 1:
                    size = leaves[i].float().square().mean().sqrt().nan_to_num(1.0, 1.0)
                    drawn = torch.randn(leaves[i].shape, generator=generator, device="cpu")
                    leaves[i] = (drawn.to(size.device) * size).to(leaves[i])
            old = calls[c]
            calls[c] = Call(old.module, old.spec, leaves, old.feeds, old.autocast, old.output)
        return _Work(self.merger, Calls(calls, self.recorded.sites), self.kind)

    def compared(
        self, asks: Sequence[Ask], answers: Sequence[list[Any] | None], layout: _Layout
    ) -> tuple[list[list[Any]], float]:
        """Evaluate several asks in one network call, and compare it with the answers of single calls that are known.

        Returns:
            The output leaves, and how far they are from the answers, relative; infinite where there are none.
        """
        site = self.site(asks[0].call)
        try:
            merged = self.merged(asks, layout)
        except Exception as error:  # whatever a network says to a batch that it cannot take
            if out_of_memory(error):
                raise
            return [], float("inf")
        worst = 0.0
        for ask, output, answer in zip(asks, merged, answers, strict=True):
            if answer is None:
                continue
            got, wanted = (site.answers(leaves, ask.states.dtype).cpu().double() for leaves in (output, answer))
            wanted = wanted[_index(ask.rows, got)]
            if got.shape != wanted.shape:
                return merged, float("inf")
            told = torch.isfinite(wanted)  # what is not finite tells nothing
            away, size = float((got - wanted)[told].norm()), float(wanted[told].norm())
            if away != 0:  # or not a number
                worst = max(worst, away / size) if size > 0 and np.isfinite(away) else float("inf")
        return merged, worst


def _feeders(call: Call) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for leaf, (feeder, output) in call.feeds.items():
        found.setdefault(feeder, []).append((leaf, output))
    return found


def _index(rows: RowIndex, like: Tensor) -> Tensor:
    return upload(np.asarray(rows, np.int64), like.device)


def _take(leaf: Any, rows: RowIndex, total: int) -> Any:
    return leaf[_index(rows, leaf)] if _has_rows(leaf, total) else leaf


def _has_rows(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows


def _wider(number: Any, dtype: torch.dtype) -> bool:
    """Return whether a number, given one entry a row, has another floating-point dtype than the state."""
    if isinstance(number, Tensor):
        return number.is_floating_point() and number.dtype != dtype
    return isinstance(number, float) and torch.promote_types(dtype, torch.float32) != dtype


def _numbers(values: Sequence[Any], counts: Sequence[int], order: RowIndex, like: Tensor) -> Tensor:
    """Return one entry a row of a number that differs between calls."""
    if isinstance(values[0], Tensor):
        column = torch.stack([value.reshape(()) for value in values])
    else:
        column = upload(np.array(values), like if isinstance(values[0], float) else like.device)
    return column[_index(np.repeat(np.arange(len(counts)), counts)[order], column)]
