"""What modules hold: taken before a call or a pass that may change it, to be compared or put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .loop import is_library_object

__all__ = ["ModuleAttributes", "ModuleState"]

PLAIN = (Tensor, bool, int, float, str, tuple, list, dict, type(None))
APART = frozenset({"_parameters", "_modules", "_compiled_call_impl"})  # of a module, no state
SMALL = 1 << 16  # elements of tensors that are copied
USUAL = frozenset({bool, dict, int, list, tuple, type(None), OrderedDict})  # of what modules hold
MISSING = object()


class ModuleAttributes:
    """What a loop may set on its modules and reset at its end, which a pass that ends early does not reach.

    Objects that modules hold (attention processors) and the dtypes of parameters (a decoder cast up).
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        modules = {id(part): part for owner in owners if isinstance(owner, nn.Module) for part in owner.modules()}
        places = [place for part in modules.values() for place in (part.__dict__, part._modules)]
        self._held = [
            (place, {k: v for k, v in place.items() if _held(v) and k != "_compiled_call_impl"}) for place in places
        ]
        self._dtypes = [
            (value, value.dtype)
            for part in modules.values()
            for value in part._parameters.values()
            if value is not None
        ]

    def restore(self) -> None:
        """Put everything back."""
        for place, held in self._held:
            for name, value in held.items():
                if place.get(name) is not value:
                    place[name] = value
        for value, dtype in self._dtypes:
            if value.dtype != dtype:
                value.data = value.data.to(dtype)


def _held(value: Any) -> bool:
    return type(value) not in USUAL and not isinstance(value, PLAIN)


class ModuleState:
    """What a module and the objects among its arguments hold besides parameters: values, tensors, generators."""

    def __init__(self, module: nn.Module, leaves: Sequence[Any]) -> None:
        self._module, self._leaves = module, leaves
        self.generators: list[tuple[torch.Generator, Tensor]] = []  # with their states
        self._tensors: list[tuple[Tensor, int, Tensor | None]] = []  # with their versions, and copies of small ones
        self._places: list[tuple[Any, Any]] = []  # dicts and lists, and what was in them
        plain = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
        stack: list[tuple[Any, int]] = [(part.__dict__, -1) for part in module.modules()]
        for leaf in leaves:
            held = leaf if isinstance(leaf, torch.Generator) else getattr(leaf, "__dict__", None)
            stack += [] if held is None or isinstance(leaf, (Tensor, *plain)) else [(held, -1)]
        while stack:
            value, depth = stack.pop()
            if isinstance(value, Tensor):
                small = value.numel() <= SMALL and not value.is_inference()
                self._tensors.append((value, _version(value), value.detach().clone() if small else None))
            elif isinstance(value, torch.Generator):
                self.generators.append((value, value.get_state()))
            elif isinstance(value, (list, tuple, dict)) and depth < 3:
                content: Any = list(value)
                if isinstance(value, dict):
                    content = {k: v for k, v in value.items() if k not in APART}
                self._places += [] if isinstance(value, tuple) else [(value, content)]
                items = content.values() if isinstance(content, dict) else content
                stack += [(item, depth + 1) for item in items if not isinstance(item, plain)]
            elif not isinstance(value, (nn.Module, type, FunctionType)) and depth < 2 and not is_library_object(value):
                stack += [(getattr(value, "__dict__", ()), depth)]

    def now(self) -> ModuleState:
        """Return what they hold now."""
        return ModuleState(self._module, self._leaves)

    def same_as(self, other: ModuleState) -> bool:
        """Return whether the tensors are those of another state, and nothing was written to them."""
        tensors, other_tensors = (
            [(id(tensor), version) for tensor, version, _ in state._tensors] for state in (self, other)
        )
        return tensors == other_tensors

    def restore(self) -> bool:
        """Put back everything that has not moved to another device; return whether nothing written was lost."""
        for place, held in self._places:
            if isinstance(place, list):
                place[:] = held
                continue
            for name in place.keys() - held.keys() - APART:
                del place[name]
            for name, value in held.items():
                now = place.get(name, MISSING)
                moved = isinstance(value, Tensor) and isinstance(now, Tensor) and value.device != now.device
                if now is not value and not moved:
                    place[name] = value
        for generator, state in self.generators:
            generator.set_state(state)
        whole = True
        for tensor, version, copy in self._tensors:
            if copy is not None and _version(tensor) != version:
                tensor.data.copy_(copy)
            whole &= copy is not None or _version(tensor) == version
        return whole


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
