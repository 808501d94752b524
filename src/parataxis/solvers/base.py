"""What every solver is: a frozen dataclass of options that solves a batch of samples and asks for network outputs.

A solver never calls a network. Its :meth:`Solver.solve` is a generator which yields one thing, a :class:`Query`: the
states that it wants evaluated together. The engine answers with their outputs. So a solver knows nothing of devices,
row limits, pipelines or ranks, and is a deterministic function of the numbers that come back.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from ..arrays import Indices
from ..samplers.coefficients import Coefficients

if TYPE_CHECKING:
    from .batch import Batch

__all__ = ["Answer", "Problem", "Query", "Queries", "Solver"]


class Query(NamedTuple):
    """Evaluate these states together: one round.

    Rows of one sample stand side by side, in the order of their steps.

    Attributes:
        x: (R, dim) network inputs. The network may write into them.
        step: (R,) which evaluation of the loop each row is.
        sample: (R,) place of its sample in the batch.
        width: (S,) how many rows each place has; 0 for places that are free or finished.
        states: (R, dim) the same as ``x``, in memory of the solver that nobody writes to before the answer; or None.
    """

    x: Tensor
    step: Indices
    sample: Indices
    width: Indices
    states: Tensor | None = None


@dataclass(eq=False)
class Answer:
    """The outputs of those samples of a query whose rows have all been evaluated.

    Attributes:
        sample: Places, increasing; None for all that the query has rows of.
        outputs: (R, dim) their rows in the order of the query.
    """

    sample: Indices | None
    outputs: Tensor

    def take(self) -> Tensor:
        """Return the outputs, and let go of them: they are as large as the states of all windows."""
        outputs = self.outputs
        del self.outputs
        return outputs


Queries = Generator[Query, Answer, None]


@dataclass(frozen=True, eq=False)
class Problem:
    """What a solver knows of a sample besides its tensors.

    Attributes:
        coefficients: The recurrence, with the noise schedule where there is one.
        tolerance: Relative error allowed in the final sample.
        dim: Number of elements of a state.
        guessed: Whether there is a trajectory to start from.
        rounding: Unit roundoff of the network's dtype.
        frozen_steps: Leading states of the guess that stay as they are.
        strides: How many steps apart the first rounds evaluate; see :class:`parataxis.CoarseToFine`.
        transformed: Whether outputs are transformed (clipped) before they enter the recurrence.
    """

    coefficients: Coefficients
    tolerance: float
    dim: int
    guessed: bool = False
    rounding: float = 2.0**-24
    frozen_steps: int = 0
    strides: tuple[int, ...] = ()
    transformed: bool = False

    @property
    def steps(self) -> int:
        """N."""
        return self.coefficients.steps


class Solver(Protocol):
    """A frozen dataclass of options."""

    def solve(self, batch: Batch) -> Queries:
        """Solve the samples of a batch; yield queries for as long as there are samples."""
        ...

    def unsupported(self, coefficients: Coefficients) -> str | None:
        """Return why this solver cannot solve such a recurrence, or None."""
        ...
