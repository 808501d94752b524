"""What one pass of the loop saw: the states and outputs of its stages, and the calls behind them.

A record belongs to one pass; the runner returns it, and nothing of it changes later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import upload
from .calls import Call, autocast_of, copy_leaves
from .spool import Spool, looked_at
from .structure import Recording, Structure, final_state

__all__ = ["PassRecord", "StageRecord", "rows_of_samples"]


@dataclass(eq=False)
class StageRecord:
    """What one pass saw of a stage.

    Attributes:
        structure: Of the stage.
        inputs: States given by the loop, (S, dim) a step.
        final: (S, dim) the last state, if the loop ends with one.
        answers: What its calls were answered, (S, dim) for every row of a sample, where they were recorded.
        calls: The calls, where they were recorded.
        spool: Keeps all these.
    """

    structure: Structure
    inputs: list[Tensor] = field(default_factory=list)
    final: Tensor | None = None
    answers: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    spool: Spool = field(default_factory=Spool)

    @property
    def states(self) -> list[Tensor]:
        """All states that the pass went through, (S, dim) each."""
        return self.inputs if self.final is None else [*self.inputs, self.final]

    @property
    def last_state(self) -> Tensor:
        """The last of them."""
        return self.inputs[-1] if self.final is None else self.final

    def state_of_run(self, step: int, run: int) -> Tensor:
        """Return the state of a run as the solver sees it; behind the last step the last one."""
        return self.structure.as_runs(self.inputs[step] if step < len(self.inputs) else self.last_state)[run]

    def record_call(self, call: Call) -> None:
        """Keep a copy of a call."""
        call.autocast = autocast_of(call.leaves) or call.autocast
        previous = next((before for before in reversed(self.calls) if before.spec == call.spec), None)
        call.leaves = copy_leaves(call.leaves, None if previous is None else previous.leaves, self.spool)
        self.calls.append(call)

    def record_answer(self, call: int, leaves: Sequence[Any]) -> None:
        """Keep what a call was answered."""
        row_map = self.structure.row_maps[call]
        rows = row_map.answers(leaves, self.structure.dtype)
        places = [upload(row_map.rows_of(s), rows.device) for s in range(self.structure.samples)]
        for k in range(len(places[0])):
            self.answers.append(self.spool.keep(torch.stack([rows[place[k]] for place in places])))

    def finish(self, leaves: Sequence[Any] | None) -> None:
        """Take the last state from what the loop ends with."""
        structure = self.structure
        if structure.ends_with_state and leaves is not None:
            final = final_state(leaves, structure.samples, structure.dim, structure.dtype)
            self.final = None if final is None else final / structure.final_scale

    def combined(self) -> Iterator[Tensor]:
        """Yield the combined outputs, (S, dim) a step."""
        first = 0
        for step in range(self.structure.steps):
            count = len(self.structure.guidance_weights[step])
            yield self.structure.combine(step, self.answers[first : first + count])
            first += count

    def noise_terms(self) -> tuple[list[Tensor], list[float]]:
        """Return what the loop added at every step, (S, dim) each, and the sizes; zero behind the last state."""
        pairs = [(self.spool.keep(term), size) for term, size in self.noise_terms_with_sizes()]
        pairs += [(torch.zeros_like(self.inputs[0]), 0.0)] * (self.structure.steps - len(pairs))
        return [term for term, _ in pairs], [size for _, size in pairs]

    def noise_terms_with_sizes(self) -> Iterator[tuple[Tensor, float]]:
        """Yield what the loop added at each step, with the size of the terms that it is the difference of."""
        coefficients, states, combined = self.structure.coefficients, self.states, self.combined()
        outputs: deque[Tensor] = deque(maxlen=coefficients.lags + 1)  # the latest first
        for i in range(len(states) - 1):
            outputs.appendleft(next(combined))
            decay = float(coefficients.state_weight[i])
            term = states[i + 1] - decay * states[i]
            size = float(states[i + 1].norm()) + abs(decay) * float(states[i].norm())
            for lag in range(min(coefficients.lags, i) + 1):
                weight = float(coefficients.output_weight[i, lag])
                term.sub_(outputs[lag], alpha=weight)
                if lag < 2:
                    size += abs(weight) * float(outputs[lag].norm())
            yield term, size
            looked_at(states[i])
            looked_at(outputs[0])

    def __repr__(self) -> str:
        """Return the sizes."""
        return f"StageRecord({len(self.inputs)} of {self.structure.steps} steps)"


@dataclass(eq=False)
class PassRecord:
    """What one pass saw.

    Attributes:
        stages: Of the stages that were known.
        seed: Of the outputs of calls behind them.
        calls: These calls.
        ending: Leaves of what ended them: the arguments of the next module, or what the loop returned.
        ended_at_module: Whether the recording ended with a call of another module.
        followed: Whether a call of a denoiser followed the last stage at once; None if the pass did not get there.
        cut: Whether the recording ended at a bound on the number of calls.
        complete: Whether the loop came to its end, with nothing to record behind its stages.
        value: What the loop returned.
    """

    stages: list[StageRecord]
    seed: int = 0
    calls: list[Call] = field(default_factory=list)
    ending: list[Any] | None = None
    ended_at_module: bool = False
    followed: bool | None = None
    cut: bool = False
    complete: bool = False
    value: Any = None

    @property
    def last(self) -> StageRecord:
        """The last stage."""
        return self.stages[-1]

    @property
    def recording(self) -> Recording:
        """The calls behind the stages."""
        return Recording(self.calls, self.ending, self.seed)

    def __repr__(self) -> str:
        """Return the sizes."""
        return f"PassRecord({self.stages!r}, {len(self.calls)} more calls)"


def rows_of_samples(structure: Structure, call: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the first row of every sample in a call."""
    row_map = structure.row_maps[call]
    return np.array([row_map.rows_of(s)[0] for s in range(structure.samples)])
