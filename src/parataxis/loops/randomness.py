"""The random state that a loop starts from: every pass draws what the unmodified loop draws."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["RandomState", "advanced_generators", "generator_states"]


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
    """The random state of torch, numpy, Python, and of every generator that a loop uses."""

    def __init__(self, seen: Iterable[Any]) -> None:
        """Take the present state; ``seen`` are objects that may be generators, of torch, numpy or Python."""
        super().__init__()
        self._numpy = np.random.get_state()  # noqa: NPY002  # what the loop may use
        self._python = random.getstate()
        self._torch = {id(generator): (generator, state) for generator, state in generator_states()}
        self._others: list[tuple[Any, Any]] = []
        for value in seen:
            if isinstance(value, np.random.Generator):
                self._others.append((value, value.bit_generator.state))
            elif isinstance(value, torch.Generator):
                self._torch[id(value)] = (value, value.get_state())
            elif isinstance(value, random.Random):
                self._others.append((value, value.getstate()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the state of a torch generator at its first use, wherever the loop hides it."""
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            if type(value) is torch.Generator and id(value) not in self._torch:
                self._torch[id(value)] = (value, value.get_state())
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Bring everything back to the state at the beginning."""
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)
        for generator, state in self._torch.values():
            generator.set_state(state)
        for other, state in self._others:
            if isinstance(other, random.Random):
                other.setstate(state)
            else:
                other.bit_generator.state = state
