r"""The recurrence of a batch: shared coefficients, own start and own noise.

Number the evaluations of the network (steps) in the order of the sequential loop, 0..N-1. What the network is given at
step i is the state u_i, and u_N is the sample. Every sampler that is linear in states and outputs is

    u_{i+1} = step_i(U) = A_i u_i + sum_{l=0..L} B_{i,l} f_{i-l} + C_i z_i

so the sequential loop is forward substitution, and the residual r_i = step_i(U) - u_{i+1} of a guessed trajectory U is
zero exactly where U is the loop's own trajectory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..arrays import Array, Indices
from .coefficients import Coefficients
from .redrawn import RedrawnNoise

__all__ = ["Recurrence"]


@dataclass(frozen=True, eq=False)
class Recurrence:
    """The equations of a batch of samples.

    Attributes:
        coefficients: A, B, C and what is known of the noise schedule.
        start: (B, *shape) the first state u_0 of every sample.
        noise: (B, N, *shape) C_i z_i, or None where no step adds noise.
        redrawn: The same, of a long chain, if it is not held but drawn again; ``noise`` is None then.
    """

    coefficients: Coefficients
    start: Tensor
    noise: Tensor | None = None
    redrawn: RedrawnNoise | None = field(default=None, kw_only=True)

    replays = False  # whether a trajectory follows by one pass of somebody's loop instead; see loops/

    def __post_init__(self) -> None:
        expected = (len(self.start), self.coefficients.steps, *self.start.shape[1:])
        if self.noise is not None and tuple(self.noise.shape) != expected:
            raise ValueError(f"noise must have the shape (B, N, *shape) = {expected}, got {tuple(self.noise.shape)}.")

    def __repr__(self) -> str:
        """Return the sizes, without the tensors."""
        return f"Recurrence({self.coefficients!r}, start={tuple(self.start.shape)} {str(self.start.dtype)[6:]})"

    def stored(self) -> Recurrence:
        """Return the same with all of its noise held."""
        return self if self.redrawn is None else replace(self, noise=self.redrawn.whole(), redrawn=None)

    def added(self, step: int) -> Tensor | None:
        """Return (B, *shape) C_i z_i of a step, or None where no step adds noise."""
        if self.redrawn is not None:
            return self.redrawn.step(step).view(self.start.shape)
        return None if self.noise is None else self.noise[:, step]

    def note_slopes(self, sample: Indices, first: Indices, counts: Indices, slopes: Array) -> None:
        """Called at each correction with the slopes of the steps first .. first + count - 1; recorded loops keep them.

        Args:
            sample: (S,) which samples.
            first: (S,) their first steps.
            counts: (S,) how many steps.
            slopes: (S, W) d_i; entries beyond a count are to be ignored.
        """

    def note_growth(
        self, sample: Indices, first: Indices, counts: Indices, measured: Callable[[], tuple[Array, Array]]
    ) -> None:
        """Called at each correction likewise, with the largest growth of an error that the moves so far have shown.

        Args:
            sample: (S,) which samples.
            first: (S,) their first steps.
            counts: (S,) how many steps.
            measured: Returns (S, W) |du_{i+1}| / |du_i|, NaN where unknown, and (S, W) the size of the largest of these
                moves, over the expected size of a state; entries beyond a count are to be ignored.
        """

    @classmethod
    def from_dense(cls, weight: Array, base: Tensor) -> Recurrence:
        """Build u_p = base_p + sum_q weight[p, q] f_q.

        Args:
            weight: (N + 1, N), strictly lower triangular, float64.
            base: (B, N + 1, *shape), the part that does not depend on outputs.
        """
        coefficients = Coefficients.from_dense(weight)
        if base.shape[1] != coefficients.steps + 1:
            raise ValueError(f"base must be (B, {coefficients.steps + 1}, *shape), got {tuple(base.shape)}.")
        state_weight = torch.as_tensor(coefficients.state_weight).to(base).view(-1, *(1,) * (base.ndim - 2))
        return cls(coefficients, base[:, 0], base[:, 1:] - state_weight * base[:, :-1])

    def base(self) -> Tensor:
        """Return base of the dense form, (B, N + 1, *shape)."""
        rows = [self.start]
        for i in range(self.coefficients.steps):
            row = self.coefficients.state_weight[i] * rows[-1]
            added = self.added(i)
            rows.append(row if added is None else row + added)
        return torch.stack(rows, 1)

    def step(self, states: Tensor, outputs: Tensor) -> Tensor:
        """Return step_i(U) for i = 0..N-1, (B, N, *shape), of states (B, N + 1, ..) and outputs (B, N, ..)."""
        shape = (1, -1, *(1,) * (self.start.ndim - 1))
        coefficients, noise = self.coefficients, self.stored().noise

        def column(values: Array) -> Tensor:
            return torch.as_tensor(values).to(states).view(shape)

        result = column(coefficients.state_weight) * states[:, :-1]
        for lag in range(coefficients.lags + 1):
            weight = column(coefficients.output_weight[lag:, lag])
            result[:, lag:] += weight * outputs[:, : coefficients.steps - lag]
        return result if noise is None else result + noise

    def residual(self, states: Tensor, outputs: Tensor) -> Tensor:
        """Return r_i = step_i(U) - u_{i+1}, (B, N, *shape)."""
        return self.step(states, outputs) - states[:, 1:]

    def coarse_step(self, first: int, last: int, states: Tensor, outputs: Tensor) -> Tensor:
        """Go from state ``first`` to state ``last`` with one evaluation over the whole way.

        The data prediction of the evaluation is frozen over the steps (their own noise is added); where alpha and
        sigma are unknown, the output is frozen instead. One-step samplers only.

        Args:
            first: Index of the state that was evaluated.
            last: Index of the state wanted, first < last <= N.
            states: (B, *shape) u_first.
            outputs: (B, *shape) the output there.

        Raises:
            ValueError: For multistep samplers, or a coarse step that does not go forward.
        """
        local = self.coefficients
        if local.lags:
            raise ValueError("a coarse step needs a one-step sampler, and this one is multistep: choose another.")
        if not 0 <= first < last <= local.steps:
            raise ValueError(f"a coarse step must go forward within 0..{local.steps}, got {first} to {last}.")
        state_weight, output_weight = local.state_weight[first:last], local.output_weight[first:last, 0]
        prediction = outputs
        if local.x0_from_input is not None and local.x0_from_output is not None:
            prediction = local.x0_from_input[first] * states + local.x0_from_output[first] * outputs
            p, q = local.x0_from_input[first:last], local.x0_from_output[first:last]
            state_weight, output_weight = state_weight - output_weight * p / q, output_weight / q
        state = states
        for i in range(last - first):
            state = state_weight[i] * state + output_weight[i] * prediction
            added = self.added(first + i)
            if added is not None:
                state = state + added
        return state
