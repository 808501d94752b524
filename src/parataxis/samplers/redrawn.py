"""The noise of a long chain, drawn again a block of steps at a time instead of being stored.

A loop draws its noise from one generator, step after step, so what a step gets depends on all draws before it. The
generators are therefore run through once, which leaves them as the loop does, and their states before every block are
kept: some kilobytes each. From such a state a block can be drawn again, to the same bits.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, upload

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RedrawnNoise", "draw_steps", "own_generator", "rows_of"]

KEPT = 2  # blocks at a time: samples of a batch seldom stand farther apart


def draw_steps(drawn: Tensor, wanted: Sequence[int], source: torch.Generator | None, dtype: torch.dtype) -> None:
    """Draw standard normal numbers into some steps of (B, N, *shape), one step after another, as the loop draws.

    Args:
        drawn: Where they go.
        wanted: The steps.
        source: None for torch's own generator.
        dtype: What the loop draws in.
    """
    device = drawn.device if source is None else source.device
    buffer: Tensor | None = None
    for step in wanted:
        target = drawn[:, step]
        if target.is_contiguous() and (target.device, target.dtype) == (device, dtype):
            target.normal_(generator=source)
            continue
        if buffer is None:
            buffer = torch.empty(target.shape, device=device, dtype=dtype)
        target.copy_(buffer.normal_(generator=source))


def rows_of(sources: Sequence[object]) -> list[slice]:
    """Return the rows of a batch that each source draws: one all, or each one."""
    if len(sources) == 1:
        return [slice(None)]
    return [slice(row, row + 1) for row in range(len(sources))]


def own_generator(device: torch.device) -> torch.Generator | None:
    """Return torch's own generator of a device, or None where it has none to be read."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return None


class RedrawnNoise:
    """What the steps of a batch add, (B, N, dim), of which only some blocks of steps are held at a time.

    Args:
        like: (B, *shape) a tensor with the shape, the dtype and the device of one step.
        factors: (N,) C_i, the standard deviation of the noise of every step.
        wanted: The steps that draw, increasing.
        sources: One generator for the batch, or one for each sample. They are run through.
        dtype: What the loop draws in.
        size: Steps of a block.
    """

    def __init__(
        self,
        like: Tensor,
        factors: Array,
        wanted: Sequence[int],
        sources: Sequence[torch.Generator],
        dtype: torch.dtype,
        size: int,
    ) -> None:
        self.size, self.steps = size, len(factors)
        self._like, self._factors, self._dtype = like, factors, dtype
        self._rows = slice(None)
        self._recent: OrderedDict[int, Tensor] = OrderedDict()
        self._wanted = [
            [step - first for step in wanted if first <= step < first + size] for first in range(0, len(factors), size)
        ]
        self._devices = [source.device for source in sources]
        # The states before every block, of every source.
        self._states: list[list[Tensor]] = []
        for row, source in zip(rows_of(sources), sources, strict=True):
            buffer = torch.empty(like[row].shape, device=source.device, dtype=dtype)
            states = []
            for steps in self._wanted:
                states.append(source.get_state())
                for _ in steps:
                    buffer.normal_(generator=source)
            self._states.append(states)

    def __repr__(self) -> str:
        """Return the sizes."""
        return f"RedrawnNoise(steps={self.steps}, size={self.size})"

    def block(self, number: int) -> Tensor:
        """Return (B, n, dim) what the steps number size .. number size + n - 1 add."""
        if number not in self._recent:
            self._recent[number] = self._drawn(number)
            while len(self._recent) > KEPT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(number)
        return self._recent[number][self._rows]

    def _drawn(self, number: int) -> Tensor:
        first = number * self.size
        factors = self._factors[first : first + self.size]
        drawn = self._like.new_zeros(len(self._like), len(factors), *self._like.shape[1:])
        for rows, states, device in zip(rows_of(self._devices), self._states, self._devices, strict=True):
            generator = torch.Generator(device)
            generator.set_state(states[number])
            draw_steps(drawn[rows], self._wanted[number], generator, self._dtype)
        drawn *= upload(factors, drawn).view(-1, *(1,) * (drawn.ndim - 2))
        return drawn.flatten(2)

    def step(self, number: int) -> Tensor:
        """Return (B, dim) what a step adds."""
        return self.block(number // self.size)[:, number % self.size]

    def whole(self) -> Tensor:
        """Return (B, N, *shape) all of it."""
        parts = [self._drawn(number)[self._rows] for number in range(len(self._wanted))]
        whole = torch.cat(parts, 1)
        return whole.view(*whole.shape[:2], *self._like.shape[1:])

    def sample(self, row: int) -> Self:
        """Return the noise of one sample of the batch, B = 1."""
        part = copy.copy(self)
        part._rows = slice(row, row + 1)
        return part

    def identity(self, row: int) -> Tensor:
        """Return bytes that differ where the noise of a sample does."""
        states = self._states[row if len(self._states) > 1 else 0]
        about = np.array([row, self.size, self._like[0].numel(), len(self._like)])
        return torch.cat([states[0].cpu(), torch.from_numpy(about).view(torch.uint8)])
