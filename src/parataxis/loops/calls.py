"""Recorded calls of a denoiser: a tree of argument leaves, and which calls can share a network call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .rows import RowMap, RowRequest, has_rows
from .spool import Spool

__all__ = [
    "Call",
    "CallKind",
    "Output",
    "RecordedCalls",
    "Role",
    "autocast_of",
    "copy_call",
    "copy_leaves",
    "equal",
    "feeders_of",
    "flatten_arguments",
    "flatten_output",
]

_LEAF: TreeSpec = tree_flatten(0)[1]
PLAIN = (Tensor, int, float, str, type(None))  # leaves of any tree


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


def copy_leaves(leaves: Sequence[Any], previous: Sequence[Any] | None = None, spool: Spool | None = None) -> list[Any]:
    """Copy tensors, because the loop may write to them; what equals the same leaf of ``previous`` is shared."""
    copies: list[Any] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            before = None if previous is None else previous[i]
            if equal(leaf, before):
                copies.append(before)
            else:
                copies.append(leaf.detach().clone() if spool is None else spool.copy(leaf))
        else:
            copies.append(leaf)
    return copies


def autocast_of(leaves: Sequence[Any]) -> tuple[str, torch.dtype] | None:
    """Return the autocast that a call with these leaves runs under."""
    kind = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


@dataclass(frozen=True, eq=False)
class Output:
    """The form of a denoiser's output.

    Attributes:
        spec: Its tree.
        leaves: Tensors of the right shapes and dtypes.
        shell: An object of somebody's own that holds the tree as its attributes; None for a plain tree.
        writes: Whether the denoiser writes into tensors that it is given.
    """

    spec: TreeSpec
    leaves: list[Any]
    shell: Any = None
    writes: bool = False

    @classmethod
    def of(cls, result: Any, *, writes: bool = False) -> Output:
        """Return the form of what a denoiser returned."""
        leaves, spec, shell = flatten_output(result)
        forms = [leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(spec, forms, shell, writes)

    def tree(self, leaves: Sequence[Any]) -> Any:
        """Return leaves in the form of the output."""
        if self.spec.is_leaf():
            return leaves[0]
        tree = tree_unflatten(list(leaves), self.spec)
        if self.shell is None:
            return tree
        output = copy(self.shell)
        output.__dict__.update(tree)
        return output


def flatten_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    """Return the leaves and the tree of (args, kwargs); plain arguments, of which most calls are made, are fast."""
    leaves = [*args, *kwargs.values()]
    if all(isinstance(leaf, PLAIN) for leaf in leaves):
        return leaves, _plain_spec(len(args), tuple(kwargs))
    return tree_flatten((args, kwargs))


@lru_cache(maxsize=64)
def _plain_spec(count: int, names: tuple[str, ...]) -> TreeSpec:
    spec: TreeSpec = tree_flatten(((0,) * count, dict.fromkeys(names, 0)))[1]
    return spec


def flatten_output(output: Any) -> tuple[list[Any], TreeSpec, Any]:
    """Return the leaves and the tree of a denoiser's output, and the object around them if there is one."""
    if isinstance(output, Tensor):
        return [output], _LEAF, None
    leaves, spec = tree_flatten(output)
    attributes = getattr(output, "__dict__", None)
    if len(leaves) == 1 and leaves[0] is output and not isinstance(output, Tensor) and isinstance(attributes, dict):
        return *tree_flatten(dict(attributes)), output
    return leaves, spec, None


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

    @cached_property
    def _plain(self) -> tuple[int, tuple[str, ...]] | None:
        """How many positional arguments there are, and the names of the others, where each of them is a leaf."""
        places = list(range(self.spec.num_leaves))
        args, kwargs = tree_unflatten(places, self.spec)
        return (len(args), tuple(kwargs)) if [*args, *kwargs.values()] == places else None

    def arguments(self, leaves: Sequence[Any]) -> tuple[Any, Any]:
        """Return (args, kwargs) with these leaves, in new containers."""
        if self._plain is not None:  # as most calls are
            count, names = self._plain
            return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))
        args, kwargs = tree_unflatten(list(leaves), self.spec)
        return args, kwargs

    def context(self) -> AbstractContextManager[Any]:
        """Return the context to evaluate in as the loop did: no gradients, its autocast."""
        return torch.no_grad() if self.autocast is None else self._autocast_context(*self.autocast)

    @contextmanager
    def _autocast_context(self, kind: str, dtype: torch.dtype) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(kind, dtype=dtype):
            yield

    @property
    def device(self) -> torch.device:
        """Where the call runs."""
        return next((leaf.device for leaf in self.leaves if isinstance(leaf, Tensor)), torch.device("cpu"))

    def signature(self) -> tuple[Any, ...]:
        """Return what calls of one kind have in common."""
        shapes = tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else type(v) for v in self.leaves)
        return (self.module, str(self.spec), shapes)

    def __repr__(self) -> str:
        """Return the sizes, without the tensors."""
        return f"Call(module {self.module}, {len(self.leaves)} leaves)"


def copy_call(
    module: int, spec: TreeSpec, leaves: Sequence[Any], outputs_before: Sequence[Sequence[Any]], output: Output | None
) -> Call:
    """Return a call with copies of its leaves; those that are outputs of calls before it feed it."""
    feeds = {
        i: (c, o)
        for c, outputs in enumerate(outputs_before)
        for o, output_leaf in enumerate(outputs)
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf is output_leaf
    }
    return Call(module, spec, copy_leaves(leaves), feeds, autocast_of(leaves), output or Output(spec, []))


def feeders_of(call: Call) -> dict[int, list[tuple[int, int]]]:
    """Return the calls whose outputs are arguments of this one: feeder to (leaf, output leaf)."""
    feeders: dict[int, list[tuple[int, int]]] = {}
    for leaf, (feeder, output) in call.feeds.items():
        feeders.setdefault(feeder, []).append((leaf, output))
    return feeders


class Role(Enum):
    """What an argument leaf is, over all calls of one kind."""

    STATE = "depends on earlier outputs"
    FEEDER_OUTPUT = "is an output of an earlier call"
    PER_ROW = "has one entry a row"
    REPEATED_PER_ROW = "is the same in all calls and has several entries for each row"
    SCALAR = "is a number that differs between calls"
    SHARED = "is the same in all calls"
    DIFFERS = "differs between calls, which are not batched then"
    MAPPED = "differs between calls, which can only be mapped over"


@dataclass(eq=False)
class CallKind:
    """Calls that may be batched.

    Attributes:
        key: Tells kinds apart.
        name: What a layout depends on.
        roles: Of every leaf.
        members: The calls.
        ambiguous: Whether a leaf with as many rows as the call is the same in all calls: it may be shared.
    """

    key: Any
    name: Any
    roles: list[Role]
    members: list[int]
    ambiguous: bool


@dataclass(eq=False)
class RecordedCalls:
    """The calls of a stage, and how their rows belong to states."""

    calls: Sequence[Call]
    row_maps: Sequence[RowMap]

    @cached_property
    def kinds(self) -> dict[int, CallKind]:
        """The kind of every call."""
        return _kinds(self.calls, self.row_maps)

    @cached_property
    def feeding(self) -> set[int]:
        """The calls whose outputs are arguments of others."""
        return {feeder for call in self.calls for feeder, _ in call.feeds.values()}

    @cached_property
    def repeated_kinds(self) -> list[CallKind]:
        """The kinds of more than one call, without calls that only feed other calls."""
        kinds = {id(kind): kind for call, kind in self.kinds.items() if call not in self.feeding}
        return [kind for kind in kinds.values() if len(kind.members) > 1]

    def form(self, request: RowRequest) -> list[Any]:
        """Return leaves of the shapes that answer a request; the values of tensors mean nothing."""
        rows, leaves = self.row_maps[request.call].rows, self.calls[request.call].output.leaves
        return [leaf[: len(request.rows)] if has_rows(leaf, rows) else leaf for leaf in leaves]


def _kinds(calls: Sequence[Call], row_maps: Sequence[RowMap]) -> dict[int, CallKind]:
    """Sort the calls of a stage into kinds."""
    alike: dict[Any, list[int]] = {}
    for c, (call, row_map) in enumerate(zip(calls, row_maps, strict=True)):
        alike.setdefault((call.signature(), row_map.slices, tuple(row_map.sample_of_row)), []).append(c)
    kinds: dict[int, CallKind] = {}
    for name, members in alike.items():
        roles, ambiguous = _roles(calls, row_maps[members[0]], members)
        differing = [i for i, role in enumerate(roles) if role is Role.DIFFERS]
        if len(members) > 1 and _all_differ(calls, members, differing):
            mapped: list[Role] = [Role.MAPPED if role is Role.DIFFERS else role for role in roles]
            kinds |= dict.fromkeys(members, CallKind(name, (name, tuple(mapped)), mapped, members, ambiguous))
            continue
        roles = [Role.SHARED if role is Role.DIFFERS else role for role in roles]
        apart: list[tuple[list[Any], CallKind]] = []
        for c in members:
            values = [calls[c].leaves[i] for i in differing]
            kind = next((k for v, k in apart if all(map(equal, v, values))), None)
            if kind is None:
                # A layout that is right on one side of what keeps calls apart need not be right on the other.
                full_name = (name, tuple(roles), *(v if isinstance(v, (str, bool)) else type(v) for v in values))
                kind = CallKind((name, len(apart)), full_name, roles, [], ambiguous)
                apart.append((values, kind))
            kind.members.append(c)
            kinds[c] = kind
    return kinds


def _all_differ(calls: Sequence[Call], members: Sequence[int], leaves: Sequence[int]) -> bool:
    """Return whether no two calls are alike in these leaves, tensors: kept apart, none could be batched."""
    values = [[calls[c].leaves[i] for i in leaves] for c in members]
    if not leaves or not all(isinstance(value, Tensor) for value in values[0]):
        return False
    alike: dict[Any, list[list[Any]]] = {}  # by their sums: two of a thousand calls need not be compared pair by pair
    for value in values:
        before = alike.setdefault(tuple(map(_sum, value)), [])
        if any(all(map(equal, value, other)) for other in before):
            return False
        before.append(value)
    return True


def _sum(value: Any) -> Any:
    """Return the sum of a tensor's elements, or another leaf itself."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return float((torch.view_as_real(value) if value.is_complex() else value).double().sum())


def _roles(calls: Sequence[Call], row_map: RowMap, members: Sequence[int]) -> tuple[list[Role], bool]:
    """Return the role of every leaf of these calls, and whether one of them is ambiguous."""
    first = calls[members[0]]
    states = {piece.leaf for piece in row_map.slices}
    roles, ambiguous = [], False
    for i, leaf in enumerate(first.leaves):
        if i in first.feeds or i in states:
            roles.append(Role.FEEDER_OUTPUT if i in first.feeds else Role.STATE)
            continue
        same = all(equal(calls[c].leaves[i], leaf) for c in members)
        role = _role(leaf, row_map, same)
        ambiguous |= role is Role.PER_ROW and same
        roles.append(role)
    return roles, ambiguous


def _role(leaf: Any, row_map: RowMap, same: bool) -> Role:
    if isinstance(leaf, Tensor) and row_map.batched and leaf.ndim and len(leaf) == row_map.rows:
        return Role.PER_ROW
    if same and isinstance(leaf, Tensor) and row_map.batched and leaf.ndim > 1 and len(leaf) % row_map.rows == 0:
        return Role.REPEATED_PER_ROW
    if same:
        return Role.SHARED
    number = isinstance(leaf, (int, float)) and not isinstance(leaf, bool)
    return Role.SCALAR if number or (isinstance(leaf, Tensor) and leaf.numel() == 1) else Role.DIFFERS
