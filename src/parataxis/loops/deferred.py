"""Outputs of a denoiser that nobody may ever look at, because they only go into another one's arguments.

Ahead of the loop, a ControlNet is evaluated together with the network that it feeds, at whatever states the solver
asks for; the loop's own call of it is answered by tensors without content, which the loop hands on. Where the loop does
anything else with one of them, the call is evaluated after all, before that is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["DeferredOutput", "deferred"]


class DeferredOutput(Tensor):
    """A tensor whose content is there once anything is done with it.

    Attributes:
        fill: Puts the content into all outputs of the call; None where it is there.
    """

    fill: Callable[[], None] | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put the content there, unless only the form of a tensor is asked for."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, DeferredOutput) and value.fill is not None:
                    value.fill()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def deferred(forms: Sequence[Any], evaluate: Callable[[], Sequence[Any]]) -> list[Any]:
    """Return output leaves of these forms, which ``evaluate`` gives once one of them is used."""
    leaves = [
        torch.empty_like(form).as_subclass(DeferredOutput) if isinstance(form, Tensor) else form for form in forms
    ]

    def fill() -> None:
        tensors = [leaf for leaf in leaves if isinstance(leaf, DeferredOutput)]
        for leaf in tensors:
            leaf.fill = None  # first, as the content is put there by operations on it
        values = [value for value in evaluate() if isinstance(value, Tensor)]
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for leaf, value in zip(tensors, values, strict=True):
                leaf.copy_(value)

    for leaf in leaves:
        if isinstance(leaf, DeferredOutput):
            leaf.fill = fill
    return leaves
