"""Short texts that are the same for the same values: how two processes see that they hold the same."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["as_bytes", "fingerprint"]


def as_bytes(leaf: Tensor) -> Tensor:
    """Return the bits of a tensor, (bytes,) uint8."""
    return leaf.contiguous().view(-1).view(torch.uint8)


def fingerprint(value: Any) -> str:
    """Return a short text that is the same for the same value: of tensors and arrays a digest of their bits."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]} {tuple(value.shape)} on {value.device.type}, bits {_digest(value)}"
    if isinstance(value, np.ndarray):
        return fingerprint(torch.from_numpy(np.ascontiguousarray(value)))
    if is_dataclass(value) and any(isinstance(getattr(value, field.name), np.ndarray) for field in fields(value)):
        return " ".join(fingerprint(getattr(value, field.name)) for field in fields(value))
    leaves = tree_leaves(value)
    return repr(value) if leaves == [value] or not leaves else " ".join(fingerprint(leaf) for leaf in leaves)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha1(as_bytes(tensor.detach().cpu()).numpy().tobytes(), usedforsecurity=False).hexdigest()[:8]
