"""How the rows of a round reach the network: in calls of a bounded number of rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from ..arrays import upload
from ..checks import check_rows, describe
from .rows import EvalBatch, expect

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .distributed.ranks import Ranks

__all__ = [
    "Executor",
    "Network",
    "call_size",
    "check_inputs",
    "out_of_memory",
    "row_limits",
    "select_condition",
    "ranks_of",
]


FEW = 64  # elements, of which the root mean square says nothing
# Root mean square of noise that somebody has scaled; with 64 elements that of standard normal noise is below 1.5.
LARGE_NOISE = 3.0

# What allocators say, besides raising torch's own error: those of the CPU, of MPS and of CUDA's libraries.
_ALLOCATION = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Network:
    """The user's callable as the engine sees it: rows to outputs.

    Attributes:
        denoise: ``denoise(x, t)``, or ``denoise(x, t, condition)`` with a condition; see :func:`parataxis.sample`.
        times: (N,) timesteps.
        condition: Tensors (B, ...), one entry a sample, or dicts, lists, tuples of them, or None.
    """

    denoise: Callable[..., Tensor]
    times: Tensor
    condition: Any = None

    def __call__(self, rows: EvalBatch) -> Tensor:
        """Evaluate the rows in one call."""
        t = upload(self.times.index_select(0, rows.step), rows.x.device)
        if self.condition is None:
            return self.denoise(rows.x, t)
        return self.denoise(rows.x, t, select_condition(self.condition, rows.sample))


def select_condition(condition: Any, index: Tensor) -> Any:
    """Return the condition of some samples."""
    if isinstance(condition, Tensor):
        return condition[upload(index, condition.device)]
    if isinstance(condition, dict):
        return {name: select_condition(value, index) for name, value in condition.items()}
    if isinstance(condition, (list, tuple)):
        parts = [select_condition(value, index) for value in condition]
        return condition._make(parts) if hasattr(condition, "_make") else type(condition)(parts)
    return condition


def check_inputs(noise: Tensor, condition: Any) -> None:
    """Raise unless a batch can be drawn from these; see :func:`parataxis.sample`."""
    if not isinstance(noise, Tensor) or noise.ndim < 2 or not noise.is_floating_point():
        raise ValueError(
            f"noise must be a floating-point tensor (B, *shape) of at least 2 dimensions, got {describe(noise)}."
        )
    if noise.numel() == 0:
        raise ValueError(
            f"noise has the shape {tuple(noise.shape)}, expected at least one sample of at least one element."
        )
    if noise.layout != torch.strided or noise.is_meta:
        raise ValueError(f"noise must be a dense tensor with values, got layout {noise.layout} on {noise.device}.")
    if _is_transformed(noise):
        raise ValueError(
            "noise is inside a transform (vmap, jvp or grad of torch.func, or forward-mode derivatives), which cannot "
            "follow a parallel solve, as it reads numbers in every round: call parataxis outside of it, with all "
            "samples in one batch."
        )
    wide = torch.promote_types(noise.dtype, torch.float32)
    size = float(torch.linalg.vector_norm(noise.detach(), dtype=wide))
    if not np.isfinite(size):
        raise ValueError("noise has NaN or Inf: draw it by torch.randn.")
    if (rms := size / noise.numel() ** 0.5) > LARGE_NOISE and noise.numel() >= FEW:
        warnings.warn(
            f"noise has a root mean square of {rms:.3g}, expected about 1: pass standard normal noise, which the "
            "sampler scales by itself (by init_noise_sigma, where it is a diffusers scheduler).",
            RuntimeWarning,
            stacklevel=3,
        )
    if condition is not None and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(condition)):
        raise ValueError(
            f"condition must have tensors ({len(noise)}, ...), one entry a sample, got {describe(condition)}: make it "
            "one, or leave it to the network if it is the same for all samples."
        )
    _check_condition(condition, len(noise))


def _is_transformed(x: Tensor) -> bool:
    """Return whether a tensor belongs to a transform of torch.func, or carries a forward-mode derivative."""
    level = getattr(torch._C._functorch, "maybe_get_level", None)  # torch has no public question for this
    tangent = forward_ad.unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    return tangent is not None or (level is not None and level(x) != -1)


def _check_condition(condition: Any, batch: int) -> None:
    if isinstance(condition, np.ndarray):
        raise ValueError("condition has a NumPy array: make it a tensor.")
    if isinstance(condition, Tensor) and (condition.ndim == 0 or len(condition) != batch):
        raise ValueError(
            f"condition must have one row a sample, ({batch}, ...), got shape {tuple(condition.shape)}: expand it."
        )
    parts = condition.values() if isinstance(condition, dict) else condition
    if isinstance(condition, (dict, list, tuple)):
        for value in parts:
            _check_condition(value, batch)


class Executor:
    """Evaluate rows in calls of a bounded number of rows; the outputs are those of one call.

    A call that runs out of memory is made again with half as many rows, which is the limit from then on. With
    ``buckets`` a call has one of these numbers of rows, so that a compiled network or a CUDA graph sees few shapes: the
    last row is repeated, and its outputs are cut off. What a call returns may lie in memory that the next call writes
    to, as a CUDA graph's outputs do.

    Args:
        evaluate: Rows to outputs of the same shape and dtype.
        max_rows: Most rows of one call; None for no limit.
        buckets: The numbers of rows that a call may have, such as (1, 2, 4, 8); the largest is a limit as well.

    Raises:
        ValueError: If a number of rows is not an integer of at least 1.
        OutputError: When called, if a call returns a wrong type, shape or dtype.
        torch.cuda.OutOfMemoryError: When called, if there is no memory for the smallest call.
    """

    def __init__(
        self,
        evaluate: Callable[[EvalBatch], Tensor],
        *,
        max_rows: int | None = None,
        buckets: Sequence[int] | None = None,
    ) -> None:
        self.limit, self.buckets = row_limits(max_rows, buckets)
        self._evaluate = evaluate

    def __call__(self, rows: EvalBatch) -> Tensor:
        """Evaluate the rows."""
        # shape[0], not len(): the length of a tensor takes as long as a small operation on it.
        count, first = rows.x.shape[0], 0
        all_outputs = rows.x
        while first < count:
            taken = min(self.limit or count, count - first)
            size = call_size(taken, self.buckets)
            part = _padded(rows, first, taken, size)
            try:
                outputs: Any = self._evaluate(part)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._back_off(size, rows.x, error)
            else:
                outputs = expect(outputs, tuple(part.x.shape), part.x.dtype, part.step.numpy())
                if taken < size:
                    outputs = outputs[:taken]
                if taken == count:
                    return outputs
                if first == 0:
                    all_outputs = outputs.new_empty(rows.x.shape)
                all_outputs[first : first + taken] = outputs
                first += taken
                continue
            # Only here, behind the handler, is the error gone, and with it the tensors of the call that failed.
            if rows.x.is_cuda:
                torch.cuda.empty_cache()
        return all_outputs

    def _back_off(self, size: int, x: Tensor, error: Exception) -> None:
        """Allow fewer rows than the ``size`` for which there is no memory."""
        smaller = [bucket for bucket in self.buckets if bucket < size]
        self.limit = (smaller[-1] if smaller else 0) if self.buckets else size // 2
        if self.limit == 0:
            rows = "a single row" if size == 1 else f"the smallest bucket, {size} rows,"
            raise torch.cuda.OutOfMemoryError(
                f"the network runs out of memory with {rows} of shape {tuple(x.shape[1:])} and {x.dtype} on "
                f"{x.device}: free memory, or use a smaller network, shape or dtype."
            ) from error


def row_limits(max_rows: int | None, buckets: Sequence[int] | None) -> tuple[int | None, tuple[int, ...]]:
    """Return the most rows of a call, None for no limit, and the numbers of rows that a call may have, in order.

    Raises:
        ValueError: If a number of rows is not an integer of at least 1.
    """
    check_rows(max_rows, buckets)
    sizes = tuple(size for size in sorted(set(buckets or ())) if max_rows is None or size <= max_rows)
    return sizes[-1] if sizes else max_rows, sizes


def call_size(rows: int, buckets: Sequence[int], multiple: int = 1) -> int:
    """Return how many rows a call for so many has: the next bucket that is a multiple of this; without one, as many."""
    return next((size for size in buckets if size >= rows and size % multiple == 0), rows)


def _padded(rows: EvalBatch, first: int, count: int, size: int) -> EvalBatch:
    """Return ``count`` rows from ``first`` on and, up to ``size``, the last of them again."""
    if size == count:
        return rows if count == rows.x.shape[0] else EvalBatch(*(field[first : first + count] for field in rows))
    return rows.take(torch.arange(first, first + size, device="cpu").clamp(max=first + count - 1))


def ranks_of(mesh: DeviceMesh | Ranks | None) -> Ranks | None:
    """Return the ranks of a mesh, if there is one."""
    if mesh is None:
        return None
    from .distributed.ranks import Ranks

    return Ranks.of(mesh)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _ALLOCATION)
