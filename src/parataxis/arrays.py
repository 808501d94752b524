"""Arrays of the host and tensors of the device: how numbers get there, in one copy and without waiting."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Answering", "Read", "Slots", "packed", "unpacked", "upload", "uploads"]


Array = NDArray[np.float64]


Slots = NDArray[np.int64]


class Read(NamedTuple):
    """Numbers that are still on the device, and what turns them into answers once they are read, as float64."""

    numbers: Tensor
    answers: Callable[[Array], list[Any]]


# Tensor work: it yields the arrays that it needs on the device, is sent them as tensors, and returns its result.
Result = TypeVar("Result")


Answering = Generator[list[Array | Slots], list[Tensor], Result]


def upload(values: Array | Slots | Tensor, like: Tensor | torch.device) -> Tensor:
    """Return numbers of the CPU on the device of ``like``, in its dtype if it is a tensor, without waiting for it."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    device, dtype = (like.device, like.dtype) if isinstance(like, Tensor) else (like, tensor.dtype)
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.to(dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


def uploads(arrays: Sequence[Array | Slots], like: Tensor) -> list[Tensor]:
    """Return arrays on the device of ``like``, with one copy: slots as they are, numbers in its dtype."""
    if like.device.type != "cuda":  # elsewhere many small copies cost no more than views of one
        return [upload(array, like.device if array.dtype == np.int64 else like) for array in arrays]
    return unpacked(upload(packed(arrays), like.device), arrays, like.dtype)


def packed(arrays: Sequence[Array | Slots]) -> Slots:
    """Return arrays one behind the other, slots first, then numbers in float64, all as 64 bits."""
    slots = [array.reshape(-1) for array in arrays if array.dtype == np.int64]
    numbers = [array.reshape(-1).view(np.int64) for array in arrays if array.dtype != np.int64]
    return np.concatenate([*slots, *numbers, np.zeros(1, np.int64)])  # never empty


def unpacked(whole: Tensor, arrays: Sequence[Array | Slots], dtype: torch.dtype) -> list[Tensor]:
    """Return what :func:`packed` made of arrays as tensors again, numbers in a dtype."""
    total = sum(array.size for array in arrays if array.dtype == np.int64)
    slots = torch.split(whole[:total], [array.size for array in arrays if array.dtype == np.int64])
    numbers = whole[total:].view(torch.float64).to(dtype)
    others = torch.split(numbers[:-1], [array.size for array in arrays if array.dtype != np.int64])
    found, values = iter(slots), iter(others)
    flat = (next(found if array.dtype == np.int64 else values) for array in arrays)
    return [one if array.ndim == 1 else one.view(array.shape) for one, array in zip(flat, arrays, strict=True)]
