"""The rows of a network call, and what its outputs must look like."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arrays import Indices, read, upload
from ..checks import OutputError

__all__ = ["EvalBatch", "OutputError", "expect", "rounding_of"]

HALVES = (torch.float16, torch.bfloat16)  # the coarser last
TF32 = 2.0**-11  # its unit roundoff


class EvalBatch(NamedTuple):
    """Rows for the network: x (R, *shape), step (R,) and sample (R,), the last two int64 on the CPU."""

    x: Tensor
    step: Tensor
    sample: Tensor

    def __repr__(self) -> str:
        """Return the sizes, without the tensors."""
        return f"EvalBatch(x={tuple(self.x.shape)} {str(self.x.dtype)[6:]})"

    def take(self, index: Tensor) -> EvalBatch:
        """Return some of the rows; ``index`` is on the CPU."""
        return EvalBatch(self.x[upload(index, self.x.device)], self.step[index], self.sample[index])


def expect(outputs: Any, shape: tuple[int, ...], dtype: torch.dtype, step: Indices) -> Tensor:
    """Return the outputs of the network at these steps, or raise an :class:`OutputError` unless they have this form."""
    if isinstance(outputs, Tensor) and outputs.shape == shape and outputs.dtype == dtype:
        return outputs
    first, last = int(step.min()), int(step.max())
    where = f"at step {first}" if first == last else f"at steps {first} to {last}"
    if not isinstance(outputs, Tensor):
        raise OutputError(
            f"the network returned {type(outputs).__name__}, expected a tensor of shape {shape}, {where}: "
            "return the prediction itself (for a diffusers model, its `.sample`)."
        )
    if tuple(outputs.shape) != shape:
        raise OutputError(
            f"the network returned the shape {tuple(outputs.shape)}, expected that of its input, {shape}, {where}."
        )
    raise OutputError(
        f"the network returned {outputs.dtype}, expected that of its input, {dtype}, {where}: convert it."
    )


def rounding_of(outputs: Tensor) -> float:
    """Return the unit roundoff with which a network seems to have computed these outputs.

    Outputs that all are numbers of a 16-bit type came from a network in that type, whatever type they have now. On a
    GPU, float32 is multiplied as TF32 where torch says so.
    """
    kind, few = outputs.dtype, outputs[:2].detach()
    if kind == torch.float32:  # the one read of a solve beside those of its rounds; float64 is taken at its word
        held = [((few.to(half).to(few) == few).all() & few.any()).to(few) for half in HALVES]
        for half, holds in zip(HALVES, read(torch.stack(held)), strict=True):
            if holds:
                kind = half
    if kind == torch.float32 and outputs.is_cuda:
        kinds: tuple[Any, ...] = (getattr(torch.backends.cudnn, "conv", None), torch.backends.cuda.matmul)
        if any(getattr(kind, "fp32_precision", None) == "tf32" for kind in kinds):
            return TF32
    return torch.finfo(kind).eps / 2
