"""The structure of a loop, from recordings with random outputs: which arguments are states, steps and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..samplers.coefficients import Coefficients
from .calls import Call, equal
from .fit import HeldOutCheck, fit_recurrence
from .rows import Box, RowMap, StateSlice, answered_box
from .signals import NotParallelizable
from .spool import looked_at
from .structure import Recording, Structure, final_state, unit_of

__all__ = ["check_calls", "find_structure"]


def find_structure(recordings: Sequence[Recording], first: int) -> tuple[Structure, HeldOutCheck | None]:
    """Find the steps, samples and state inputs of a loop, and fit its recurrence.

    The structure may have fewer calls than the recordings: later ones are a stage by themselves.

    Args:
        recordings: Of two or more passes with random outputs.
        first: Number of the first call.

    Returns:
        The structure, and what another pass must confirm where the loop is linear.

    Raises:
        NotParallelizable: With the reason.
    """
    calls, other = recordings[0].calls, recordings[1].calls
    row_maps = check_calls(calls, other)
    feeding = {feeder for call in calls for feeder, _ in call.feeds.values()}
    _check_feeders(calls, row_maps)
    calls_of_step = _steps(calls, other, row_maps, feeding)
    row_maps = _with_samples(calls, other, row_maps, calls_of_step)
    samples = int(row_maps[calls_of_step[0][0]].sample_of_row.max()) + 1
    network_dtype = _state_leaf(calls, row_maps, calls_of_step[0][0]).dtype
    dtype = torch.promote_types(network_dtype, torch.float32)

    def states(recorded: Sequence[Call], call: int) -> Tensor:
        return row_maps[call].states(recorded[call].leaves, dtype)

    dim = states(calls, calls_of_step[0][0]).shape[1]
    cut = 0
    for step in calls_of_step:
        counts = {len(np.unique(row_maps[call].sample_of_row)) for call in step}
        if counts != {samples} or states(calls, step[0]).shape[1] != dim:
            break
        cut += 1
    calls_of_step = calls_of_step[:cut]
    count = max(calls_of_step[-1]) + 1
    for recording in recordings:
        for step in calls_of_step:
            inputs = states(recording.calls, step[0])
            looked_at(inputs)
            if not bool(torch.isfinite(inputs).all()):
                raise NotParallelizable(
                    f"the input of call {step[0]} is not finite although every output was: the loop divides by zero "
                    "there, or overflows; for a scheduler, choose another spacing, prediction type or number of steps."
                )
    ending = recordings[0].ending if count == len(calls) else None
    structure = Structure(
        signatures=[call.signature() for call in calls[:count]],
        outputs=[call.output for call in calls[:count]],
        row_maps=row_maps[:count],
        feeds=[call.feeds for call in calls[:count]],
        calls_of_step=calls_of_step,
        step_of_call=[
            next((i for i, step in enumerate(calls_of_step) if max(step) >= c), cut - 1) for c in range(count)
        ],
        samples=samples,
        dim=dim,
        dtype=dtype,
        network_dtype=network_dtype,
        coefficients=Coefficients(np.zeros(cut), np.zeros((cut, 1)), np.zeros(cut)),
        linear=False,
        guidance_weights=[],
        ends_with_state=final_state(ending, samples, dim, dtype) is not None,
        slopes=np.zeros(cut),
        unit=unit_of(calls[calls_of_step[0][0]], row_maps[calls_of_step[0][0]]),
    )
    return structure, fit_recurrence(structure, recordings, first)


def _check_feeders(calls: Sequence[Call], row_maps: Sequence[RowMap]) -> None:
    """Raise where a call feeds another one whose states lie in other rows."""
    for call, row_map in zip(calls, row_maps, strict=True):
        for feeder, _ in call.feeds.values():
            before = row_maps[feeder]
            if before.rows != row_map.rows or sum(p.size for p in before.slices) != sum(p.size for p in row_map.slices):
                raise NotParallelizable(
                    f"one denoiser feeds another with other rows: {before.rows} rows go into {row_map.rows}, as where "
                    "frames are the rows of a ControlNet."
                )


def _state_leaf(calls: Sequence[Call], row_maps: Sequence[RowMap], call: int) -> Tensor:
    leaf = calls[call].leaves[row_maps[call].slices[0].leaf]
    assert isinstance(leaf, Tensor)
    return leaf


def check_calls(calls: Sequence[Call], other: Sequence[Call]) -> list[RowMap]:
    """Return how the rows of calls belong to states, or raise where the calls themselves depend on outputs."""
    if len(calls) != len(other) or any(a.signature() != b.signature() for a, b in zip(calls, other, strict=True)):
        raise NotParallelizable("the number or the form of the denoiser's calls depends on its outputs.")
    return _row_maps(calls, other)


def _row_maps(calls: Sequence[Call], other: Sequence[Call]) -> list[RowMap]:
    """Find the leaves of each kind of call that depend on outputs, and which parts of them do."""
    names = [call.signature() for call in calls]
    changing: dict[Any, dict[int, Tensor]] = {}
    for name, call, same_call in zip(names, calls, other, strict=True):
        for i, (left, right) in enumerate(zip(call.leaves, same_call.leaves, strict=True)):
            if i in call.feeds or equal(left, right):
                continue
            if isinstance(left, (float, int)) or (isinstance(left, Tensor) and not left.ndim):
                raise NotParallelizable("the timesteps depend on the denoiser's outputs: an adaptive solver.")
            if not isinstance(left, Tensor) or not left.is_floating_point():
                raise NotParallelizable(
                    "an argument of the denoiser depends on its outputs and is not a floating-point tensor."
                )
            looked_at(left)
            looked_at(right)
            mask = (left != right).reshape(left.shape)
            masks = changing.setdefault(name, {})
            masks[i] = mask | masks[i] if i in masks else mask
    row_maps: dict[Any, RowMap] = {}
    for name, call in zip(names, calls, strict=True):
        if name not in row_maps:
            masks_of_call = (
                changing.get(name)
                or next((v for k, v in changing.items() if k[:2] == name[:2] and k[2] == name[2]), None)
                or _masks_by_place(changing, call)
            )
            if masks_of_call is None:
                raise NotParallelizable("no argument of the denoiser depends on its earlier outputs.")
            row_maps[name] = _row_map(call, masks_of_call)
    return [row_maps[name] for name in names]


def _masks_by_place(changing: dict[Any, dict[int, Tensor]], call: Call) -> dict[int, Tensor] | None:
    """Take the state leaves of other calls of the same form, for a kind that occurs at the first step only."""
    for name, masks in changing.items():
        leaves = {i: call.leaves[i] for i in masks}
        # A prediction of the step before is None at the first step.
        if name[1] == str(call.spec) and all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves.values()):
            shapes = {i: masks[i].shape if leaf is None else leaf.shape for i, leaf in leaves.items()}
            if any(leaf is not None for leaf in leaves.values()):
                return {i: torch.ones(shape, dtype=torch.bool) for i, shape in shapes.items()}
    return None


def _row_map(call: Call, masks: dict[int, Tensor]) -> RowMap:
    """Return how the rows of a call belong to states, each row a sample, from which elements depend on outputs."""
    leaves = [call.leaves[i] for i in masks if call.leaves[i] is not None]
    batched = all(leaf.ndim > 1 and len(leaf) == len(leaves[0]) for leaf in leaves)
    rows = len(leaves[0]) if batched else 1
    answers = [i for i, leaf in enumerate(call.output.leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    slices = []
    for place, (i, changing) in enumerate(masks.items()):
        mask = changing if batched else changing[None]
        box = []
        for axis in range(1, mask.ndim):
            line = mask.movedim(axis, 0).flatten(1).any(1).nonzero()
            box.append((int(line[0]), int(line[-1]) + 1))
        if place >= len(answers) and not _fits(call.output.leaves[answers[-1]], mask):
            if any(leaf.ndim < 2 for leaf in leaves):
                raise NotParallelizable("the timesteps depend on the denoiser's outputs: an adaptive solver.")
            raise NotParallelizable(
                f"{len(masks)} arguments of the denoiser depend on its earlier outputs, but it returns {len(answers)}."
            )
        # The prediction of the step before, as an input of this one, is answered by the same output as the state.
        answer = _answer_of(call, answers, place, mask, len(masks))
        leaf = call.output.leaves[answer]
        leaf = leaf if batched else leaf[None]
        parts = _parts(tuple(box), tuple(leaf.shape[1:])) if len(masks) == 1 else [tuple(box)]
        for part in parts:
            answered = answered_box(part, mask.shape[1:], leaf.shape[1:]) if len(leaf) == rows else None
            if answered is None:
                sizes = [stop - first for first, stop in box]
                raise NotParallelizable(
                    f"an output of shape {tuple(leaf.shape)} does not match its input, whose state is {(rows, *sizes)}."
                )
            slices.append(StateSlice(i, part, answer, answered))
    return RowMap(tuple(slices), rows, batched, np.arange(rows))


def _parts(box: Box, output: tuple[int, ...]) -> list[Box]:
    """Return the parts of a state: it may hold the prediction of the step before, behind it along its channels.

    That is so where it has a whole multiple of the output's channels, and is of its shape otherwise.
    """
    sizes = [stop - first for first, stop in box]
    if not output or sizes[1:] != list(output[1:]) or sizes[0] <= output[0] or sizes[0] % output[0]:
        return [box]
    first, stop = box[0]
    return [((part, part + output[0]), *box[1:]) for part in range(first, stop, output[0])]


def _answer_of(call: Call, answers: Sequence[int], place: int, mask: Tensor, states: int) -> int:
    """Return which output answers a state: the one in its place, or of several states the next that has its shape."""
    order = [*answers[place:], *answers[:place]]
    if states == 1:  # its output may be larger: a learned variance
        return order[0]
    return next((answer for answer in order if _fits(call.output.leaves[answer], mask)), order[0])


def _fits(output: Tensor, mask: Tensor) -> bool:
    return output.shape == mask.shape


def _steps(
    calls: Sequence[Call], other: Sequence[Call], row_maps: Sequence[RowMap], feeding: set[int]
) -> list[list[int]]:
    """Collect successive calls with the same inputs: they do not wait for one another, so they are one step."""
    steps: list[list[int]] = []
    for c in range(len(row_maps)):
        if c in feeding:
            continue
        if steps and _same_inputs(calls, other, steps[-1][0], c, row_maps):
            steps[-1].append(c)
        else:
            steps.append([c])
    return steps


def _numbered_rows(
    recordings: Sequence[Sequence[Call]], members: Sequence[int], row_maps: Sequence[RowMap]
) -> list[NDArray[np.int64]] | None:
    """Return for each of these calls numbers of its rows: rows that are equal in all recordings have the same one.

    None where their states differ in size. By sorting, as a call may have thousands of rows.
    """
    rows = []
    for c in members:
        dtype = torch.promote_types(_state_leaf(recordings[0], row_maps, c).dtype, torch.float32)
        states = torch.cat([row_maps[c].states(recorded[c].leaves, dtype) for recorded in recordings], 1)
        looked_at(states)
        rows.append((states + 0.0).cpu().numpy())  # -0 is 0
    if len({states.shape[1] for states in rows}) > 1:
        return None
    return _numbered(np.concatenate(rows), [len(states) for states in rows])


def _numbered(rows: NDArray[Any], counts: Sequence[int]) -> list[NDArray[np.int64]]:
    """Return numbers of rows (R, n), the same for equal ones, in pieces of these lengths."""
    bits = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0]
    numbers = np.unique(bits, return_inverse=True)[1].reshape(-1)
    return np.split(numbers, np.cumsum(counts)[:-1])


def _same_inputs(calls: Sequence[Call], other: Sequence[Call], a: int, b: int, row_maps: Sequence[RowMap]) -> bool:
    numbers = _numbered_rows([calls, other], [a, b], row_maps)
    return numbers is not None and bool(np.isin(numbers[1], numbers[0]).all())


def _first_equal(numbers: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each wanted number first stands; 0 where it does not."""
    values, places = np.unique(numbers, return_index=True)
    at = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where(values[at] == wanted, places[at], 0)


def _with_samples(
    calls: Sequence[Call], other: Sequence[Call], row_maps: Sequence[RowMap], steps: Sequence[Sequence[int]]
) -> list[RowMap]:
    """Find which rows of calls have equal inputs at every step: they belong to one sample."""
    # Equal at all steps, for samples may start from the same noise: rows of the first call of a step, and those of the
    # call in a place behind it, by how many these are.
    numbers: dict[tuple[int, ...], list[NDArray[np.int64]]] = {}
    for step in steps:
        for place, c in enumerate(step):
            pair = _numbered_rows([calls, other], [step[0], c], row_maps)
            assert pair is not None
            counts = [len(part) for part in pair]
            key = (place, *counts)
            before = numbers.get(key, [np.zeros(count, np.int64) for count in counts])
            both = np.stack([np.concatenate(before), np.concatenate(pair)], 1)
            numbers[key] = _numbered(both, counts)
    with_samples = list(row_maps)
    for step in steps:
        for place, c in enumerate(step):
            head, row_map = row_maps[step[0]], row_maps[c]
            within, (first, rows) = numbers[0, head.rows, head.rows][0], numbers[place, head.rows, row_map.rows]
            # The first row that each equals; the first of all where none does.
            labels = np.unique(_first_equal(within, within), return_inverse=True)[1]
            with_samples[c] = RowMap(row_map.slices, row_map.rows, row_map.batched, labels[_first_equal(first, rows)])
    for c, row_map in enumerate(row_maps):
        if not any(c in step for step in steps):  # a feeding call has the rows of the fed one behind it
            fed = next((step[0] for step in steps if step[0] > c), None)
            if fed is not None and row_maps[fed].rows == row_map.rows:
                samples = with_samples[fed].sample_of_row
                with_samples[c] = RowMap(row_map.slices, row_map.rows, row_map.batched, samples)
    return with_samples
