"""What a denoiser writes at every call: harmless where it never reads it again, as counters of calls are.

A number or a list is replaced, for one call, by something that notices when it is read; the memory of a tensor is
filled with NaN, which shows in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .world import Change, World

__all__ = ["is_counter", "keeps_data", "watch"]


class _Watched:
    """In the place of a number or a list: it can be added to, and says whether anything else was done with it."""

    def __init__(self, reads: list[str]) -> None:
        self.__dict__["reads"] = reads

    def __add__(self, other: Any) -> _Watched:
        return self

    __radd__ = __iadd__ = __sub__ = __isub__ = __add__

    def append(self, item: Any) -> None:
        """Take an item."""

    extend = append

    def __getattr__(self, name: str) -> Any:
        self.reads.append(name)
        raise AttributeError(name)


def _reading(name: str) -> Callable[..., Any]:
    def read(self: _Watched, *args: Any) -> Any:
        self.reads.append(name)
        raise TypeError(f"{name} of a counter")

    return read


for _name in [
    "bool",
    "int",
    "float",
    "index",
    "str",
    "repr",
    "format",
    "hash",
    "len",
    "iter",
    "getitem",
    "setitem",
    "delitem",
    "contains",
    "call",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "floordiv",
    "rfloordiv",
    "mod",
    "rmod",
    "pow",
    "rpow",
    "rsub",
    "neg",
    "abs",
    "round",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "matmul",
    "rmatmul",
]:
    setattr(_Watched, f"__{_name}__", _reading(f"__{_name}__"))


@contextmanager
def watch(changes: Sequence[Change], world: World) -> Iterator[list[str] | None]:
    """Watch numbers that count, lists that grow and tensors that are written to, for a call of the network.

    Args:
        changes: Between two calls of the network: such numbers, lists and tensors.
        world: In which they are.

    Yields:
        What has been done with them besides adding; None if they cannot be watched.
    """
    reads: list[str] = []
    tensors = [change.place.owner for change in changes if isinstance(change.place.owner, Tensor)]
    holders = [_holders(change, world) for change in changes if not isinstance(change.place.owner, Tensor)]
    if not all(holders):
        yield None
        return
    places = [(place, key, place.get(key)) for pairs in holders for place, key in pairs]
    contents = [tensor.detach().clone() for tensor in tensors]
    try:
        for place, key, _ in places:
            place.set(key, _Watched(reads))
        for tensor in tensors:
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else 1)
        yield reads
    except (AttributeError, TypeError):
        if not reads:
            raise
    finally:
        for place, key, value in places:
            place.set(key, value)
        for tensor, content in zip(tensors, contents, strict=True):
            tensor.data.copy_(content)


def _holders(change: Change, world: World) -> list[tuple[Any, Any]]:
    """Return the (place, key) where a number or a list is held; none if it cannot be watched."""
    if change.key is None:
        return world.holders(change.place.owner) if isinstance(change.place.owner, list) else []
    return [(change.place, change.key)]


def is_counter(change: Change) -> bool:
    """Return whether a change is of a number, of a list, or of a tensor that can be put back."""
    if isinstance(change.place.owner, Tensor):
        return change.place.copy is not None
    if change.key is None:
        return isinstance(change.place.owner, list)
    values = change.place.get(change.key), change.place.before.get(change.key)
    return all(type(value) in (int, float) for value in values)


def keeps_data(change: Change, outputs: Sequence[Any]) -> bool:
    """Return whether what is written are results, as running statistics and collected outputs are, and no count.

    The memory in which a network returns its outputs is none: the next call may write to it, as CUDA graphs do.
    """
    owner = change.place.owner
    if isinstance(owner, Tensor):
        returned = {leaf.untyped_storage().data_ptr() for leaf in outputs if type(leaf) is Tensor}
        return owner.is_floating_point() and owner.untyped_storage().data_ptr() not in returned
    added = owner[len(change.place.before) :] if change.key is None and isinstance(owner, list) else []
    return any(isinstance(leaf, (Tensor, np.ndarray)) for leaf in tree_leaves(added))
