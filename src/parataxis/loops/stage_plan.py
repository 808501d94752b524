"""How a pass answers the calls of one stage, and what it checks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from ..arrays import upload
from .answers import PROBE_SEED, Answers
from .calls import Call, RecordedCalls, equal
from .passes import StageRecord, rows_of_samples
from .signals import CallbackChangedLoop, LoopChanged, PassComplete
from .structure import Structure, random_outputs

__all__ = ["CallbackFree", "StagePlan", "answer_call"]


class CallbackFree(NamedTuple):
    """What a stage was in a pass without callbacks."""

    inputs: list[Tensor]
    calls: RecordedCalls


@dataclass(frozen=True, eq=False)
class StagePlan:
    """How a pass answers the calls of one stage.

    Attributes:
        structure: Of the stage.
        first: Number of its first call.
        answers: What its calls are answered.
        last_step: The pass ends at the first call of a later step; None: it goes through the stage.
        first_step: The first one whose input is kept.
        accepted: Whether the loop may go on behind the stage.
        followed: Whether a call of a denoiser follows the stage at once, if that is known.
        callback_free: What the stage was without callbacks: the pass ends where it differs.
    """

    structure: Structure
    first: int
    answers: Answers
    last_step: int | None = None
    accepted: bool = False
    followed: bool | None = None
    callback_free: CallbackFree | None = None
    first_step: int = 0

    @property
    def stop(self) -> int:
        """Number of the call behind the last one of the stage."""
        return self.first + len(self.structure.row_maps)


def answer_call(
    plan: StagePlan, record: StageRecord, call: int, module: int, spec: TreeSpec, leaves: list[Any]
) -> list[Any]:
    """Return the output leaves of a call of a stage, and take it into the record.

    Args:
        plan: Of the stage.
        record: Of this pass.
        call: Number of the call within the stage.
        module: Which denoiser is called.
        spec: Form of the arguments.
        leaves: Their leaves.

    Raises:
        LoopChanged: If the arguments have another form than in earlier passes.
        PassComplete: Behind the last step that the pass is for.
        CallbackChangedLoop: If the call differs from the one without callbacks.
    """
    structure = plan.structure
    step, row_map = structure.step_of_call[call], structure.row_maps[call]
    same_form = Call(module, spec, leaves, structure.feeds[call], None, structure.outputs[call])
    if same_form.signature() != structure.signatures[call]:
        raise LoopChanged("the arguments of the denoiser change their form from pass to pass.")
    if plan.answers.records_calls:
        record.record_call(same_form)
    if call not in structure.calls_of_step[step]:  # it only goes into another call's arguments
        return random_outputs(structure.outputs[call], PROBE_SEED, call)
    states = row_map.states(leaves, structure.dtype)
    if call == structure.calls_of_step[step][0]:
        if plan.last_step is not None and step > plan.last_step:
            raise PassComplete
        inputs = states[upload(rows_of_samples(structure, call), states.device)]
        record.inputs.append(inputs.new_empty(0) if step < plan.first_step else record.spool.keep(inputs))
        if plan.callback_free is not None and not torch.equal(record.inputs[-1], plan.callback_free.inputs[step]):
            raise CallbackChangedLoop
    if plan.callback_free is not None and not _same_conditioning(structure, plan.callback_free.calls, call, leaves):
        raise CallbackChangedLoop
    outputs = plan.answers.answer(call, step, states)
    if plan.answers.records_calls or structure.linear:
        record.record_answer(call, outputs)
    return outputs


def _same_conditioning(structure: Structure, recorded: RecordedCalls, call: int, leaves: Sequence[Any]) -> bool:
    """Return whether the arguments that are no state are those that were recorded."""
    states = {piece.leaf for piece in structure.row_maps[call].slices} | set(structure.feeds[call])
    pairs = zip(leaves, recorded.calls[call].leaves, strict=True)
    return all(i in states or equal(leaf, before) for i, (leaf, before) in enumerate(pairs))
