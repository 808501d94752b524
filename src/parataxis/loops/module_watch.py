"""Whether a loop changes its networks between calls: parameters, hooks, processors, attributes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .content import Samples
from .loop import is_library_object
from .stubs import Stub

__all__ = ["ModuleWatch"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple)  # compared by identity where they are held
VERSION = attrgetter("_version")
STANDARD = frozenset(vars(nn.Module())) - {"training"}  # what every module holds: nobody puts others in their places


class ModuleWatch:
    """Whether modules have changed since they were last looked at: parameters, hooks, processors, attributes.

    It is asked before every call of a loop, so it compares what dictionaries hold by identity, in C, and walks the
    modules only when it is made or something has changed. Reading an object's counter of references is most of the
    cost: before a call, only what a loop may reasonably have changed is read.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Look at the modules."""
        self._modules = modules
        self.take()

    def take(self) -> None:
        """Look at the modules anew."""
        parts = {id(part): part for module in self._modules for part in module.modules()}
        self._roots = [module.__dict__ for module in self._modules]
        places: list[Any] = []  # dicts, and lists
        modules = {id(part.__dict__) for part in parts.values()}
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
                if not any(value is root for root in self._roots):
                    places.append(value)
                stack += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
            elif not isinstance(value, (*PLAIN, nn.Module, type, FunctionType)) and not is_library_object(value):
                seen.add(id(value))
                stack += [(getattr(value, "__dict__", ()), depth + 1)]
        self._tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        self._empty = [place for place in places if not place]
        # Views of dicts show what is in them at any time.
        self._views = [place.values() if isinstance(place, dict) else place for place in places if place]
        self._items, self._root_items = list(chain.from_iterable(self._views)), self._held_by_roots()
        self._versions = list(map(VERSION, self._tensors))
        self._samples = Samples(tensors)
        self._sampled = self._samples.read()
        self._module_dicts = [place for place in places if id(place) in modules and not place.keys() <= STANDARD]
        self._getters = [itemgetter(*(set(place) - STANDARD)) for place in self._module_dicts]
        self._attribute_values, self._lengths = self._attributes(), list(map(len, self._module_dicts))
        others = [place for place in places if place and id(place) not in modules]
        self._contents = [place.values() if isinstance(place, dict) else place for place in others]
        self._content_items = list(chain.from_iterable(self._contents))
        self._handles = RemovableHandle.next_id

    def changed(self, *, thorough: bool = False) -> bool:
        """Return whether anything is different.

        Args:
            thorough: Whether to look at everything; else not at containers that were empty, unless hooks have been
                registered since, nor at what every module holds.
        """
        thorough = thorough or self._handles != RemovableHandle.next_id
        if list(map(VERSION, self._tensors)) != self._versions or (thorough and any(self._empty)):
            return True
        if self._samples.read() != self._sampled:
            return True
        try:
            # Items are compared by identity first; numbers and texts may be replaced by equal ones.
            if self._held_by_roots() != self._root_items:
                return True
            if thorough:
                return list(chain.from_iterable(self._views)) != self._items
            return (
                list(map(len, self._module_dicts)) != self._lengths
                or list(chain.from_iterable(self._contents)) != self._content_items
                or self._attributes() != self._attribute_values
            )
        except Exception:  # what is not the same need not have a comparison
            return True

    def _attributes(self) -> list[Any]:
        """Return what modules hold of their own."""
        return [get(place) for get, place in zip(self._getters, self._module_dicts, strict=True)]

    def _held_by_roots(self) -> list[Any]:
        """Return what the modules themselves hold, with what was there before in the places of stubs."""
        held = chain.from_iterable(root.values() for root in self._roots)
        return [part for value in held for part in (value.held if type(value) is Stub else (value,))]
