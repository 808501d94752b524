"""Tensors as bytes: outputs of different shapes and dtypes are gathered as one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..fingerprint import as_bytes

__all__ = ["byte_count", "check_forms", "pack", "unpack"]


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
