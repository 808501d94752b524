"""Tensors as bytes: outputs of different shapes and dtypes are gathered as one message, and states are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["as_bytes", "byte_count", "check_forms", "fingerprint", "pack", "unpack"]


def as_bytes(leaf: Tensor) -> Tensor:
    """Return the bits of a tensor, (bytes,) uint8."""
    return leaf.contiguous().view(-1).view(torch.uint8)


def byte_count(leaf: Any) -> int:
    """Return how many bytes a leaf takes; 0 for what is no tensor."""
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


def pack(outputs: Sequence[Sequence[Any]], like: Tensor) -> Tensor:
    """Return the tensors among output leaves as one message on the device of ``like``."""
    parts = [as_bytes(leaf) for output in outputs for leaf in output if isinstance(leaf, Tensor)]
    return torch.cat(parts) if parts else like.new_empty(0, dtype=torch.uint8)


def unpack(message: Tensor, forms: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return leaves of these forms from the messages of all ranks; what is no tensor is taken from the forms."""
    parts = iter(torch.split(message, [byte_count(leaf) for form in forms for leaf in form]))
    return [list(_leaves(form, parts)) for form in forms]


def _leaves(form: Sequence[Any], parts: Iterator[Tensor]) -> Iterator[Any]:
    for leaf in form:
        part = next(parts)
        # A copy, because a tensor starts where its dtype may.
        yield part.clone().view(leaf.dtype).view(leaf.shape) if isinstance(leaf, Tensor) else leaf


def check_forms(outputs: list[list[Any]], forms: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return the outputs, or raise unless they have these forms."""
    for output, form in zip(outputs, forms, strict=True):
        for leaf, like in zip(output, form, strict=True):
            if isinstance(like, Tensor) and (leaf.shape, leaf.dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"the network returned {leaf.dtype} {tuple(leaf.shape)} for batched calls, and {like.dtype} "
                    f"{tuple(like.shape)} for single ones: ranks cannot share its calls."
                )
    return outputs


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
