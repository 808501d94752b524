"""Between host and device: one upload and one read a round.

Decisions are numpy arrays on the host, states are tensors on the device. A :class:`Packed` holds all numbers of a round
in one block of host memory, so that they cross to the device in one copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Array", "Indices", "Packed", "largest", "read", "upload"]

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def upload(values: NDArray[Any] | Tensor, like: Tensor | torch.device) -> Tensor:
    """Return numbers of the host on the device of ``like``, in its dtype if it is a tensor, without waiting for it."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    device, dtype = (like.device, like.dtype) if isinstance(like, Tensor) else (like, tensor.dtype)
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.to(dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


def read(numbers: Tensor) -> Array:
    """Return numbers of the device as float64 on the host: the one place where a solve waits for the device."""
    return numbers.cpu().double().numpy()


def largest(values: Tensor, out: Tensor | None = None) -> Tensor:
    """Return (..) the largest absolute element of rows (.., dim), NaN if one is; in ``out``, if given.

    On the CPU this is forty times as fast as the norm of infinite order, which is not vectorized.
    """
    return torch.amax(values.abs(), -1, out=out)


class Packed:
    """Named arrays of fixed shapes that go to the device together, in one copy.

    ``numbers[name]`` and ``indices[name]`` are numpy views to write into. After :meth:`send`, ``tensors[name]`` holds
    their values on the device: numbers in its dtype, indices as int64. The tensors stay at the same address, so that a
    CUDA graph can read them. Call :meth:`begin` before writing again: the last copy may still be under way.

    Args:
        numbers: Shapes of the float64 arrays.
        indices: Shapes of the int64 arrays; their tensors have one dimension.
        like: A tensor with the device, and the dtype of the numbers there.
    """

    def __init__(
        self, numbers: Mapping[str, tuple[int, ...]], indices: Mapping[str, tuple[int, ...]], like: Tensor
    ) -> None:
        shapes = {**numbers, **indices}
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        count, total = sum(sizes[name] for name in numbers), sum(sizes.values())
        cuda = like.device.type == "cuda"
        self._host = torch.zeros(total, dtype=torch.float64, device="cpu", pin_memory=cuda)
        # On the CPU the host memory is the device memory; elsewhere it has a twin there.
        self._device = self._host if like.device.type == "cpu" else torch.zeros_like(self._host, device=like.device)
        self._raw = self._device[:count]
        self._casts = bool(count) and like.dtype != torch.float64
        self._cast = self._raw
        if self._casts:
            self._cast = torch.zeros(count, dtype=like.dtype, device=like.device)
        self._sent: torch.cuda.Event | None = None
        self.numbers: dict[str, Array] = {}
        self.indices: dict[str, Indices] = {}
        self.tensors: dict[str, Tensor] = {}
        flat, first = self._host.numpy(), 0
        for name, shape in shapes.items():
            piece = slice(first, first := first + sizes[name])
            if name in numbers:
                self.numbers[name] = flat[piece].reshape(shape)
                self.tensors[name] = self._cast[piece].view(shape)
            else:
                self.indices[name] = flat[piece].view(np.int64).reshape(shape)
                self.tensors[name] = self._device[piece].view(torch.int64)

    def begin(self) -> None:
        """Wait until the last copy is through, which it is if the device has been read since."""
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None

    def send(self) -> None:
        """Copy what has been written to the device; at most two operations."""
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
            # Inside a CUDA graph the host waits by other means.
            if self._device.is_cuda and not torch.cuda.is_current_stream_capturing():
                self._sent = torch.cuda.current_stream(self._device.device).record_event()
        if self._casts:
            self._cast.copy_(self._raw)
