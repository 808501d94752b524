"""The random state that a loop starts from: every pass draws what the unmodified loop draws."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .world import World

__all__ = ["RandomState", "advanced_generators", "generator_states"]

OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
WRITES = frozenset({"__setitem__", "__set__", *(f"__i{name}__" for name in OPERATORS)})  # besides names in _


def generator_states(generators: Iterable[torch.Generator] = ()) -> list[tuple[torch.Generator, Tensor]]:
    """Return these generators and the default ones of all devices in use, with their states."""
    used = [torch.default_generator, *torch.cuda.default_generators, *torch.xpu.default_generators, *generators]
    if torch.backends.mps.is_available():
        used.append(torch.mps._get_default_mps_generator())
    return [(generator, generator.get_state()) for generator in used]


def advanced_generators(states: Sequence[tuple[torch.Generator, Tensor]]) -> list[tuple[torch.Generator, Tensor]]:
    """Return the generators that have drawn since, with their present states."""
    now = [(generator, generator.get_state()) for generator, _ in states]
    return [new for new, (_, old) in zip(now, states, strict=True) if not torch.equal(new[1], old)]


class RandomState(TorchFunctionMode):
    """The random state of torch, numpy, Python, and of every generator that a loop uses.

    Attributes:
        worlds: They hear of it before something writes to a tensor.
    """

    def __init__(self, seen: Iterable[Any]) -> None:
        """Take the present state; ``seen`` are objects that may be generators, of torch, numpy or Python."""
        super().__init__()
        self.worlds: list[World] = []
        self._numpy = np.random.get_state()  # noqa: NPY002  # what the loop may use
        self._python = random.getstate()
        self._torch = {id(generator): (generator, state) for generator, state in generator_states()}
        self._others: list[tuple[Any, Any]] = []
        for value in seen:
            if isinstance(value, torch.Generator):
                self._torch[id(value)] = (value, value.get_state())
            elif isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
                self._others.append((value, _state(value)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the state of a torch generator at its first use, wherever the loop hides it, and tensors as they are."""
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if type(value) is torch.Generator and id(value) not in self._torch:
                self._torch[id(value)] = (value, value.get_state())
        name = getattr(func, "__name__", "")
        if (name[-1:] == "_" and name[-2:] != "__") or name in WRITES or "out" in kwargs:
            written = args if name.startswith("_foreach") else (*args[:1], kwargs.get("out"))
            for value in written:
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    for world in self.worlds:
                        world.about_to_write(tensor)
        return func(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look at no torch call for a while, if this looks at present."""
        stack = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        looks = bool(stack) and stack[-1] is self
        if looks:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            if looks:
                self.__enter__()  # type: ignore[no-untyped-call]

    def advanced(self) -> bool:
        """Return whether anything has drawn random numbers since."""
        pairs: list[tuple[Any, Any]] = [(generator.get_state(), state) for generator, state in self._torch.values()]
        pairs += [(_state(other), state) for other, state in self._others]
        pairs += [(random.getstate(), self._python), (np.random.get_state(), self._numpy)]  # noqa: NPY002
        return not all(all(map(np.array_equal, tree_leaves(now), tree_leaves(old))) for now, old in pairs)

    def restore(self) -> None:
        """Bring everything back to the state at the beginning."""
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)
        for generator, state in self._torch.values():
            generator.set_state(state)
        for other, state in self._others:
            if isinstance(other, random.Random):
                other.setstate(state)
            elif isinstance(other, np.random.RandomState):
                other.set_state(state)
            else:
                other.bit_generator.state = state


def _state(generator: Any) -> Any:
    """Return the state of a generator of numpy or Python."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.bit_generator.state
