"""What stays the same of a stage of a loop from call to call: its steps, its samples, and its recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..samplers.coefficients import Coefficients
from .calls import Call, Output, RecordedCalls
from .rows import RowMap

__all__ = ["FEW_BITS", "MIN_STEPS", "Recording", "Stage", "Structure", "final_state", "random_outputs", "unit_of"]

Array = NDArray[np.float64]
MIN_STEPS = 8  # shorter loops run sequentially
FEW_BITS = 2.0**-20  # unit of a network above which it computes in 16 bits: float32 has 2^-23, float16 2^-10
SAME = 1e-3  # of coefficients: how near those of two recordings are at most
NOT_LINEAR = "the loop is not linear in the denoiser's outputs."
ALTERNATES = "several parts of its state have calls of their own in turn."


class Recording(NamedTuple):
    """What one pass with random outputs saw of the calls behind the stages that are known.

    Attributes:
        calls: The calls.
        ending: Leaves of what the stage ends with: the arguments of the next module, or what the loop returns.
        seed: Of the outputs.
    """

    calls: Sequence[Call]
    ending: Sequence[Any] | None
    seed: int


@dataclass(eq=False)
class Structure:
    """What stays the same of a stage from call to call.

    Attributes:
        signatures: Of every call.
        outputs: Form of every call's output.
        row_maps: How the rows of every call belong to states.
        feeds: Of every call: which arguments are outputs of earlier calls.
        calls_of_step: The calls of every step; feeding calls belong to none.
        step_of_call: Step of every call, that of the fed call for feeding ones.
        samples: Rows of a step with different inputs.
        dim: Elements of a state.
        dtype: Of the states: float32, or float64 where the loop's own is.
        network_dtype: Dtype of the loop's states.
        unit: In the last place of what the network computes, relative: of its input, its output or its autocast.
        coefficients: The recurrence; a heuristic for the slopes where ``linear`` is false.
        linear: Whether the recurrence was verified.
        alternates: Whether there is a recurrence, but its steps do not follow one another.
        guidance_weights: g of every step, for its calls' rows in the order of a sample.
        ends_with_state: Whether the loop ends with a tensor that is one more state.
        slopes: (N,) of outputs with which states keep their size.
        final_scale: How much larger that tensor is than a state: a decoder's input has been scaled for it.
        floor: Relative change of the last state when all outputs change by their rounding, in the latest call; 0 until
            it is measured.
        amplification: The floor over the rounding of outputs.
        rounding: (N,) that, relative to them, once it has been measured.
        precision: Rounding of a step, relative to its terms.
        joint_samples: Samples cannot be evaluated apart: one run for all.
        settings: Of the loop, see :meth:`.world.World.settings`.
        added: (N,) what the loop added at every step when it was recorded, relative to the terms of the step.
        unexplained: Where there is no recurrence, what part of a change of each state the coefficients do not explain.
    """

    signatures: list[Any]
    outputs: list[Output]
    row_maps: list[RowMap]
    feeds: list[dict[int, tuple[int, int]]]
    calls_of_step: list[list[int]]
    step_of_call: list[int]
    samples: int
    dim: int
    dtype: torch.dtype
    network_dtype: torch.dtype
    coefficients: Coefficients
    linear: bool
    guidance_weights: list[Array]
    ends_with_state: bool
    slopes: Array
    unit: float = 0.0
    final_scale: float = 1.0
    floor: float = 0.0
    amplification: float = 0.0
    rounding: Array | None = None
    precision: float = 0.0
    joint_samples: bool = False
    alternates: bool = False
    added: Array | None = None
    unexplained: Array | None = None
    settings: int = 0

    @property
    def steps(self) -> int:
        """N."""
        return len(self.calls_of_step)

    @property
    def no_recurrence(self) -> str:
        """Why there is none to solve by; empty where there is one."""
        if self.linear:
            return ""
        return ALTERNATES if self.alternates else NOT_LINEAR

    def __repr__(self) -> str:
        """Return the sizes."""
        kind = "linear" if self.linear else "not linear"
        return f"Structure({self.steps} steps, {self.samples} samples of {self.dim} elements, {kind})"

    def set_coefficients(self, coefficients: Coefficients) -> None:
        """Take the coefficients; without a last state one is added that equals the one before."""
        state_weight, output_weight = coefficients.state_weight, coefficients.output_weight
        if len(state_weight) < self.steps:
            state_weight = np.append(state_weight, 1.0)
            output_weight = np.append(output_weight, np.zeros((1, output_weight.shape[1])), 0)
        self.coefficients = Coefficients(state_weight, output_weight, np.zeros(self.steps))
        slopes = self.coefficients.slopes(np.ones(self.steps))
        has_effect = np.abs(self.coefficients.output_weight.sum(1)) > 1e-8
        # Without a recurrence they are rough: larger ones would drive a probe pass where no trajectory goes.
        largest = np.inf if self.linear else 1.0
        self.slopes = np.where(has_effect & (np.abs(slopes) < 1e3), np.clip(slopes, -largest, largest), 0.0)

    def has_form_of(self, other: Structure) -> bool:
        """Return whether another structure has as many steps, samples and elements."""
        return (self.steps, self.samples, self.dim) == (other.steps, other.samples, other.dim)

    def has_coefficients_of(self, other: Structure) -> bool:
        """Return whether another structure has the same recurrence, up to how well it can be measured."""
        left, right = (
            [s.coefficients.state_weight, s.coefficients.output_weight, *s.guidance_weights] for s in (self, other)
        )
        return all(a.shape == b.shape and np.allclose(a, b, SAME, SAME) for a, b in zip(left, right, strict=True))

    def combine(self, step: int, rows: Sequence[Tensor]) -> Tensor:
        """Return sum_r g_r f_r of the output rows (n, dim) of a sample's guidance group."""
        weights = self.guidance_weights[step]
        total = rows[0] * float(weights[0])
        for weight, row in zip(weights[1:], rows[1:], strict=True):
            total.add_(row, alpha=float(weight))
        return total

    @property
    def few_bits(self) -> bool:
        """Whether the loop's states have 16 bits."""
        return torch.finfo(self.network_dtype).bits < 32

    def as_runs(self, states: Tensor) -> Tensor:
        """Return states (S, dim) as the solver sees them: a row a run."""
        return states.reshape(1, -1) if self.joint_samples else states


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage of one call of the loop: its structure, and its calls as a pass has recorded them.

    Attributes:
        structure: What it shares with other calls of the same loop.
        first: Number of its first call in a pass.
        calls: As recorded.
    """

    structure: Structure
    first: int
    calls: RecordedCalls

    @property
    def stop(self) -> int:
        """Number of the call behind its last one."""
        return self.first + len(self.structure.row_maps)


def unit_of(call: Call, row_map: RowMap) -> float:
    """Return the unit in the last place of what a network computes in a call: of its input or output.

    Autocast rounds what enters layers, and not what goes around them: half a unit.
    """
    places = row_map.slices[0]
    leaves = [call.leaves[places.leaf], call.output.leaves[places.output]]
    units = [float(torch.finfo(leaf.dtype).eps) for leaf in leaves if isinstance(leaf, Tensor)]
    return max([*units, torch.finfo(call.autocast[1]).eps / 2] if call.autocast else units)


def final_state(leaves: Sequence[Any] | None, samples: int, dim: int, dtype: torch.dtype) -> Tensor | None:
    """Return the tensor that may be the last state of all samples, (S, dim)."""
    for leaf in leaves or ():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.numel() != samples * dim:
            continue
        if samples == 1 or (leaf.ndim and len(leaf) == samples):
            return leaf.detach().reshape(samples, dim).to(dtype)
    return None


def random_outputs(output: Output, *seed: int) -> list[Any]:
    """Return leaves like a denoiser's output, standard normal, from a counter: they can be made again."""
    leaves: list[Any] = []
    for i, leaf in enumerate(output.leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            leaves.append(leaf)
            continue
        mixed = int(np.random.SeedSequence([*seed, i]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        generator = torch.Generator(leaf.device).manual_seed(mixed)
        wide = torch.promote_types(leaf.dtype, torch.float32)
        leaves.append(torch.randn(leaf.shape, generator=generator, device=leaf.device, dtype=wide).to(leaf.dtype))
    return leaves
