"""A few elements of tensors, as they were: what is written through ``.data`` or an array leaves no other trace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Samples", "sample_of"]

WHOLE = 16  # elements of a tensor that are all looked at
PARTS = 8  # into which a larger one is divided: an element is looked at at every border
# The same, where many tensors are read before every step: each element that is not in the processor's cache costs as
# much as a hundred that are.
FEW_PARTS = 2
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy knows no bfloat16


def sample_of(tensor: Tensor, parts: int = PARTS) -> NDArray[Any] | None:
    """Return a view (n,) of a few elements of a tensor, as integers, evenly along its memory.

    None where that would need a copy: of tensors on another device, sparse or quantized ones.
    """
    if tensor.device.type != "cpu" or type(tensor.data) is not Tensor or not tensor.numel():
        return None
    try:
        integers = tensor.detach().view(INTEGERS[tensor.element_size()]).numpy()
    except (RuntimeError, TypeError, KeyError):
        return None
    memory = integers.transpose(np.argsort(integers.strides)[::-1])
    if not memory.flags.c_contiguous:  # a part of another tensor: what lies in the middle of all dimensions but one
        longest = int(np.argmax(memory.shape))
        memory = memory[tuple(slice(None) if i == longest else size // 2 for i, size in enumerate(memory.shape))]
    flat = memory.reshape(-1)
    # An odd distance: an even one would meet the same columns again and again.
    return flat if len(flat) <= WHOLE else flat[:: (len(flat) - 1) // parts | 1]


class Samples:
    """A few elements of each of many tensors, read together: one by one, the calls would take most of the time."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Find them; nothing is read yet."""
        self._views: dict[Any, list[NDArray[Any]]] = {}  # by dtype
        for tensor in tensors:
            if (view := sample_of(tensor, FEW_PARTS)) is not None:
                self._views.setdefault(view.dtype, []).append(view)

    def read(self) -> list[bytes]:
        """Return the elements as they are now."""
        return [np.concatenate(views).tobytes() for views in self._views.values()]
