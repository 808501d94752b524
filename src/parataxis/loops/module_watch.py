"""Whether a loop changes its networks between calls: parameters, hooks, processors, attributes."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from .loop import is_library_object

__all__ = ["ModuleWatch"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple)  # compared by identity where they are held
DICTS = (dict, OrderedDict)


class ModuleWatch:
    """Whether modules have changed since they were last looked at: parameters, hooks, processors, attributes.

    It is asked before every call of a loop, so it compares what dictionaries hold by identity, in C, and walks the
    modules only when it is made or something has changed.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Look at the modules."""
        self._modules = modules
        self.take()

    def take(self) -> None:
        """Look at the modules anew."""
        parts = {id(part): part for module in self._modules for part in module.modules()}
        self._places: list[Any] = []  # dicts, and lists
        seen: set[int] = set()
        stack: list[tuple[Any, int]] = [(part.__dict__, 0) for part in parts.values()]
        tensors: list[Tensor] = []
        while stack:
            value, depth = stack.pop()
            if isinstance(value, Tensor):
                tensors.append(value)
            elif id(value) in seen or depth > 3:
                continue
            elif isinstance(value, (dict, list)):
                seen.add(id(value))
                self._places.append(value)
                stack += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
            elif not isinstance(value, (*PLAIN, nn.Module, type, FunctionType)) and not is_library_object(value):
                seen.add(id(value))
                stack += [(getattr(value, "__dict__", ()), depth + 1)]
        self._tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        self._items = list(self._all_items())
        self._versions = self._all_versions()

    def changed(self) -> bool:
        """Return whether anything is different."""
        items = self._items
        same = all(map(operator.is_, self._all_items(), items)) and sum(map(len, self._places)) == len(items)
        return not same or self._all_versions() != self._versions

    def _all_items(self) -> Iterator[Any]:
        return chain.from_iterable(place.values() if type(place) in DICTS else place for place in self._places)

    def _all_versions(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]
