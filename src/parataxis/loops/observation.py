"""One real step of a loop that steps a scheduler, and what it shows.

The rows of each call are the state times a number, some of them beside other channels; the scheduler's
``model_output`` is a combination of their outputs, m = sum_r g_r f_r (guidance), with g by least squares; and some
arguments are the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .calls import Call
from .deferred import DeferredOutput
from .rows import Box, RowMap, StateSlice, answered_box
from .schedulers import SchedulerStep, unwatched_copy
from .signals import NotParallelizable
from .structure import FEW_BITS, unit_of

__all__ = ["ObservedStep", "StepForm"]

Array = NDArray[np.float64]
ELEMENTS = 4096  # of the least-squares problem
WHOLE = 1e-6  # of the largest weight: how near one must be to a whole number to be that


@dataclass(eq=False)
class ObservedStep:
    """A real step: its calls, their outputs, and the step of the scheduler.

    Attributes:
        calls: In their order, with copies of their arguments.
        outputs: Output leaves of each.
        step: What the scheduler was called with.
        before: A copy of the scheduler before it.
        ahead: Whether some of its calls have been answered by a round of a solve.
    """

    calls: list[Call] = field(default_factory=list)
    outputs: list[list[Any]] = field(default_factory=list)
    step: SchedulerStep | None = None
    before: Any = None
    ahead: bool = False

    @classmethod
    def of(cls, answered: Sequence[tuple[Call, list[Any]]]) -> ObservedStep:
        """Return a step of which these calls have been answered already."""
        ahead = any(not isinstance(leaf, DeferredOutput) for _, outputs in answered for leaf in outputs)
        return cls([call for call, _ in answered], [outputs for _, outputs in answered], ahead=ahead)

    def take(self, step: SchedulerStep) -> None:
        """Take the scheduler's call, which is about to run."""
        self.step, self.before = step, unwatched_copy(step.scheduler)

    def form(self) -> StepForm:
        """Return what the step shows.

        Raises:
            NotParallelizable: If its calls and outputs are not explained by the state.
        """
        assert self.step is not None
        step, sample = self.step, self.step.sample
        half = len(sample) // 2
        if 2 * half == len(sample) and all(
            torch.equal(x[:half], x[half:]) for x in (sample, step.model_output)
        ):  # a pipeline that doubles its states for guidance
            step = self.step = step._replace(sample=sample[:half], model_output=step.model_output[:half])
            sample = step.sample
        if not self.calls:
            raise NotParallelizable("the loop steps its scheduler without a call of its denoisers.")
        if sample.ndim < 2 or self.step.model_output.shape[:1] != sample.shape[:1]:
            raise NotParallelizable(f"the scheduler's sample has the shape {tuple(sample.shape)}, without a batch.")
        twin = unwatched_copy(self.before)
        state = twin.scale_model_input(sample, self.step.t) if hasattr(twin, "scale_model_input") else sample
        feeding = {feeder for call in self.calls for feeder, _ in call.feeds.values()}
        row_maps = [_row_map(call, outputs, state) for call, outputs in zip(self.calls, self.outputs, strict=True)]
        solved = [c for c in range(len(self.calls)) if c not in feeding]
        weights = _weights(self, row_maps, solved)
        wide = torch.promote_types(sample.dtype, torch.float32)
        leaf = self.calls[solved[0]].leaves[row_maps[solved[0]].slices[0].leaf]
        return StepForm(self.calls, self.outputs, row_maps, solved, weights, tuple(sample.shape), wide, leaf.dtype)


@dataclass(frozen=True, eq=False)
class StepForm:
    """What a step shows of all steps like it.

    Attributes:
        calls: As observed.
        outputs: Their output leaves.
        row_maps: How the rows of each call belong to states.
        solved: The calls whose outputs make the step; others feed them.
        weights: g of their rows, in the order of a sample.
        shape: (B, *shape) of the scheduler's sample.
        dtype: Of the states that are solved for.
        network_dtype: Of the network's input.
    """

    calls: list[Call]
    outputs: list[list[Any]]
    row_maps: list[RowMap]
    solved: list[int]
    weights: Array
    shape: tuple[int, ...]
    dtype: torch.dtype
    network_dtype: torch.dtype

    @property
    def few_bits(self) -> bool:
        """Whether a network computes in 16 bits in a call."""
        return any(unit_of(call, row_map) > FEW_BITS for call, row_map in zip(self.calls, self.row_maps, strict=True))

    def inputs(self, call: Call) -> Tensor:
        """Return the states (B, dim) that the first call of a step is given."""
        row_map = self.row_maps[0]
        states = row_map.states(call.leaves, self.dtype)
        return states[row_map.first_rows.to(states.device)]


def _row_map(call: Call, outputs: Sequence[Any], state: Tensor) -> RowMap:
    """Find the state within the arguments of a call, and what answers it in the output."""
    for i, leaf in enumerate(call.leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or i in call.feeds:
            continue
        for box in _boxes(tuple(leaf.shape), tuple(state.shape)):
            rows = leaf[(slice(None), *(slice(*ends) for ends in box))]
            samples = _samples_of_rows(rows, state)
            if samples is None:
                continue
            answer = _answer(leaf, box, outputs)
            if answer is not None:
                return RowMap((StateSlice(i, box, *answer),), len(leaf), True, samples)
    raise NotParallelizable(
        f"no argument of the denoiser is the scheduler's sample, of shape {tuple(state.shape)}: the loop changes its "
        "shape or its values in between."
    )


def _answer(leaf: Tensor, box: Box, outputs: Sequence[Any]) -> tuple[int, Box | None] | None:
    """Return the output leaf that answers a part of an argument, and which part of it; None if there is none."""
    tensors = [o for o, output in enumerate(outputs) if isinstance(output, Tensor)]
    for o in tensors:
        output = outputs[o]
        if output.is_floating_point() and output.ndim == leaf.ndim and len(output) == len(leaf):
            answered = answered_box(box, leaf.shape[1:], output.shape[1:])
            if answered is not None:
                return o, answered
    # Only an argument of other calls (the residuals of a ControlNet): any leaf will do.
    return (tensors[0], None) if tensors else None


def _boxes(shape: tuple[int, ...], state: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield the parts of a leaf, behind its rows, that have the shape of a state: others may stand beside it."""
    if not shape or shape[0] % state[0]:
        return
    if shape[1:] != state[1:] and math.prod(shape[1:]) == math.prod(state[1:]):  # in another shape
        yield tuple((0, size) for size in shape[1:])
    if len(shape) != len(state):
        return
    larger = [axis for axis in range(1, len(shape)) if shape[axis] != state[axis]]
    if len(larger) > 1 or any(shape[axis] < state[axis] for axis in larger):
        return
    whole = [(0, size) for size in state[1:]]
    if not larger:
        yield tuple(whole)
        return
    axis = larger[0]
    for first in range(shape[axis] - state[axis] + 1):
        box = list(whole)
        box[axis - 1] = (first, first + state[axis])
        yield tuple(box)


def _samples_of_rows(rows: Tensor, state: Tensor) -> NDArray[np.int64] | None:
    """Return which sample each row is, (R,), or None: repeated as a whole, or each of them side by side."""
    batch, count = len(state), len(rows)
    wide = torch.promote_types(rows.dtype, torch.float32)
    bound = (
        8 * torch.finfo(torch.promote_types(rows.dtype, state.dtype) if rows.dtype == state.dtype else rows.dtype).eps
    )
    target, actual = state.to(wide).flatten(1), rows.to(wide).flatten(1)
    for samples in (np.arange(count) % batch, np.arange(count) // (count // batch)):
        expected = target[torch.from_numpy(samples).to(target.device)]
        if float((actual - expected).norm()) <= bound * float(expected.norm()):
            return samples
    return None


def _weights(step: ObservedStep, row_maps: Sequence[RowMap], solved: Sequence[int]) -> Array:
    """Return g in model_output = sum_r g_r f_r over the rows of each sample."""
    assert step.step is not None
    target = step.step.model_output
    samples, dim = len(target), step.step.sample[0].numel()
    if target.shape[1:] != step.step.sample.shape[1:]:
        raise NotParallelizable(
            f"the scheduler's model_output has the shape {tuple(target.shape)}, not that of its sample "
            f"{tuple(step.step.sample.shape)}."
        )
    elements = _elements(samples * dim).to(target.device)
    columns = []
    for c in solved:
        row_map = row_maps[c]
        rows = row_map.answers(step.outputs[c], torch.float64 if target.device.type != "mps" else torch.float32)
        if rows.shape[1] != dim:
            raise NotParallelizable("an output of the denoiser does not match its input.")
        places = [row_map.rows_of(s) for s in range(samples)]
        if len({len(place) for place in places}) > 1:
            raise NotParallelizable("the denoiser evaluates some samples more often than others.")
        for k in range(len(places[0])):
            index = torch.tensor([int(place[k]) for place in places], device=rows.device)
            columns.append(rows[index].reshape(-1)[elements].cpu().double().numpy())
    matrix = np.stack(columns, 1)
    right = target.detach().reshape(-1)[elements].cpu().double().numpy()
    scale = np.maximum(np.sqrt((matrix**2).mean(0)), 1e-150)
    solution = np.linalg.lstsq(matrix / scale, right, rcond=1e-9)[0]
    residual = float(np.sqrt(np.mean((matrix / scale @ solution - right) ** 2)))
    weights = np.asarray(solution / scale)
    whole = np.round(weights)  # as most are: an output by itself, guidance by a whole number
    weights = np.where(np.abs(weights - whole) <= WHOLE * np.abs(weights).max(initial=0.0), whole, weights)
    size = float(np.abs(solution).max(initial=0.0)) + float(np.sqrt(np.mean(right**2)))
    eps = max(torch.finfo(target.dtype).eps, *(torch.finfo(_answering(step, row_maps, c).dtype).eps for c in solved))
    if not residual <= 8 * eps * size:  # or not a number
        raise NotParallelizable(
            "what the scheduler is given is not a combination of the denoiser's outputs in fixed proportions: the loop "
            "rescales, clips or mixes them by their values."
        )
    if abs(weights.sum()) <= 1e-3 * np.abs(weights).max(initial=0.0) or not weights.any():
        raise NotParallelizable("the outputs of the denoiser cancel in what the scheduler is given.")
    return weights


def _answering(step: ObservedStep, row_maps: Sequence[RowMap], call: int) -> Tensor:
    answer: Tensor = step.outputs[call][row_maps[call].slices[0].output]
    return answer


def _elements(total: int) -> Tensor:
    chosen = np.arange(total) if total <= ELEMENTS else np.random.default_rng(0).choice(total, ELEMENTS, replace=False)
    return torch.from_numpy(chosen)
