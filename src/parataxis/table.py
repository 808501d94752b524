r"""The table: a sampling loop as a lower triangular system of equations.

Number the evaluations of the network (points) in the order of the sequential loop, 0..N-1. What the network
is given at point i is the state u_i, and u_N is the sample. Every sampler that is linear in states and
outputs is

    table:       u_p = base_p + sum_{q<p} weight[p, q] f_q,            f_q = output at (u_q, q)
    local form:  u_{i+1} = A_i u_i + sum_{l=0..L-1} B_{i,l} f_{i-l} + C_i z_i

``weight`` is strictly lower triangular, so the sequential loop is forward substitution, and any guess of
the whole trajectory is corrected by one question, the response: *which trajectory follows, if each output
were f_q + d_q (u - u_q)?* With r_i = step_i(U) - u_{i+1}, the residual of the guess U,

    delta = K delta + r,   K[i+1, i] = A_i + B_{i,0} d_i,   K[i+1, i-l] = B_{i,l} d_{i-l}
    new_{i+1} = step_i(U) + (K delta)_{i+1} = step_i(U) + (((I - K)^{-1} - I) r)_{i+1}

In the last form rounding errors scale with the correction, and a state whose inputs did not move comes out
as exactly the sequential step.

Coefficients are float64 on the CPU; states and outputs keep their own dtype and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LocalForm", "Plan", "Response", "Table"]

Array = NDArray[np.float64]
Slots = NDArray[np.int64]


class Response(NamedTuple):
    """What trajectory follows, if each output were f_q + d_q (u - u_q)?

    All arrays are on the CPU; rows of tensors are named by their slots in the run's memory. From point
    ``start + len(outputs)`` on, the affine model of the last point answers.

    Attributes:
        start: The first point; its state is taken as it is.
        states: (R,) slots of the states u_q of points start, start + 1, ..; with ``measure``, (R + 1,): one
            more for the present state behind the last point.
        outputs: (R,) slots of the outputs f_q.
        slopes: (R,) or longer, d_q; the last one is repeated.
        first: The first state wanted, at least start + 1.
        into: Slots that take the states first, first + 1, ..
        history: (L - 1,) slots of the final outputs of the points before ``start``, for multistep tables.
        finals: (R,) slots that take f_q + d_q (new_q - u_q), or none.
        measure: Whether to answer with the squared norms of new - old and of new, (len(into), 2).
    """

    start: int
    states: Slots
    outputs: Slots
    slopes: Array
    first: int
    into: Slots
    history: Slots
    finals: Slots | None = None
    measure: bool = True


@dataclass(frozen=True, eq=False)
class LocalForm:
    """The coefficients of a table, step by step, in the coordinates of the network's input.

    Attributes:
        decay: (N,) A_i.
        weight: (N, L) B_{i,l}; L = 1 for one-step samplers.
        noise: (N,) C_i, the standard deviation of the noise that step i adds.
        alpha: (N + 1,) signal level of every state, or None where it is not known.
        sigma: (N + 1,) noise level, likewise.
        scale: (N + 1,) network input over state: u_i = scale_i x_i; the last is 1.
        data_input: (N,) p in the data prediction xhat = p u + q f, or None.
        data_output: (N,) q, likewise.
    """

    decay: Array
    weight: Array
    noise: Array
    alpha: Array | None = None
    sigma: Array | None = None
    scale: Array | None = None
    data_input: Array | None = None
    data_output: Array | None = None

    def __post_init__(self) -> None:
        steps = len(self.decay)
        if self.weight.ndim != 2 or len(self.weight) != steps or len(self.noise) != steps:
            raise ValueError(
                f"decay {self.decay.shape}, weight {self.weight.shape} and noise {self.noise.shape} must be (N,), "
                "(N, L) and (N,) with one N."
            )
        for name in ("decay", "weight", "noise"):
            finite = np.isfinite(getattr(self, name)).reshape(steps, -1).all(1)
            if not finite.all():
                raise ValueError(
                    f"{name} of step {int(np.argmin(finite))} is not finite: this sampler divides by zero there; "
                    "choose another prediction type, spacing or number of steps."
                )

    @property
    def steps(self) -> int:
        """N, the number of evaluations."""
        return len(self.decay)

    @property
    def lags(self) -> int:
        """How many earlier outputs a step uses: 0 for one-step samplers."""
        return self.weight.shape[1] - 1

    @property
    def size(self) -> Array:
        """(N + 1,) expected root mean square of every state for data of unit variance; ones if unknown."""
        if self.alpha is None or self.sigma is None or self.scale is None:
            return np.ones(self.steps + 1)
        return self.scale * np.sqrt(self.alpha**2 + self.sigma**2)

    def growth(self, slopes: Array, start: int = 0) -> Array:
        """Return J_i = A_i + sum_l B_{i,l} d_i for points start, start + 1, ..: the slope of each step."""
        chosen = slice(start, start + len(slopes))
        return self.decay[chosen] + self.weight[chosen].sum(1) * slopes

    def slopes(self, growth: Array, start: int = 0) -> Array:
        """Return the d_i for which :meth:`growth` is ``growth``; 0 where no output enters the step."""
        chosen = slice(start, start + len(growth))
        total = self.weight[chosen].sum(1)
        return np.divide(growth - self.decay[chosen], total, out=np.zeros(len(growth)), where=total != 0)

    def moment_slopes(self, variance: float) -> Array:
        """Return the (N,) output slopes of a network for Gaussian data of this variance v.

        The data prediction then has slope alpha v / (alpha^2 v + sigma^2) in x (methods: moment matching). Where
        alpha and sigma are unknown the growth is taken as 1.
        """
        if self.alpha is None or self.sigma is None or self.scale is None or self.data_output is None:
            return self.slopes(np.ones(self.steps))
        assert self.data_input is not None
        alpha, sigma, scale = self.alpha[:-1], self.sigma[:-1], self.scale[:-1]
        target = alpha * variance / (alpha**2 * variance + sigma**2) / scale
        return (target - self.data_input) / self.data_output

    def gain(self, slopes: Array) -> Array:
        """Return the (N,) effect on the sample of a change of each point's output, later outputs moving with d."""
        gains = np.zeros(self.steps)
        carried = np.zeros(self.steps + 1)  # effect on the sample of a change of each state
        carried[-1] = 1.0
        for i in range(self.steps - 1, -1, -1):
            for lag in range(min(self.lags, i) + 1):
                gains[i - lag] += carried[i + 1] * self.weight[i, lag]
            carried[i] = carried[i + 1] * self.decay[i] + gains[i] * slopes[i]
        return gains

    def dense(self) -> tuple[Array, Array]:
        """Return (start, weight): u_p = start_p u_0 + sum_q weight[p, q] f_q + noise; (N + 1,) and (N + 1, N)."""
        start = np.cumprod(np.append(1.0, self.decay))
        weight = np.zeros((self.steps + 1, self.steps))
        for i in range(self.steps):
            weight[i + 1] = self.decay[i] * weight[i]
            for lag in range(min(self.lags, i) + 1):
                weight[i + 1, i - lag] += self.weight[i, lag]
        return start, weight

    @classmethod
    def from_dense(cls, weight: Array) -> LocalForm:
        """Derive the local form of a dense table.

        A_i = <w_{i+1}, w_i> / <w_i, w_i> over the columns before i, and B the rest of the row; entries below 1e-12
        of the row's largest are dropped. A_0 has no meaning and is 0: the first state is in ``base``.

        Args:
            weight: (N + 1, N), strictly lower triangular; row p holds the weights of the outputs in u_p.

        Raises:
            ValueError: If ``weight`` is not of that form.
        """
        weight = np.asarray(weight, np.float64)
        steps = weight.shape[-1]
        if weight.shape != (steps + 1, steps) or np.triu(weight).any():
            raise ValueError(f"weight must be (N + 1, N) and strictly lower triangular, got shape {weight.shape}.")
        decay = np.zeros(steps)
        rest = np.zeros((steps, steps))  # rest[i, l] belongs to output i - l
        for i in range(steps):
            energy = weight[i, :i] @ weight[i, :i]
            decay[i] = weight[i + 1, :i] @ weight[i, :i] / energy if energy > 0 else 0.0
            row = weight[i + 1] - decay[i] * weight[i]
            row[np.abs(row) < 1e-12 * max(np.abs(weight[i + 1]).max(), 1e-300)] = 0.0
            rest[i, : i + 1] = row[i::-1]
        used = np.flatnonzero(rest.any(0))
        return cls(decay, rest[:, : (used[-1] + 1 if len(used) else 1)].copy(), np.zeros(steps))

    def propagation(self, start: int, count: int, slopes: Array) -> Array:
        """Return (I - K)^{-1} - I of the steps start .. start + count - 1, (count, count), strictly lower."""
        if self.lags == 0:
            ratio = self.growth(slopes, start)
            below = np.tri(count, count, -1, dtype=bool)
            return np.where(below, np.cumprod(np.where(below, ratio[:, None], 1.0), axis=0), 0.0)
        inverse = np.eye(count)
        for k in range(1, count):
            inverse[k] += self.decay[start + k] * inverse[k - 1]
            for lag in range(min(self.lags, k - 1) + 1):
                inverse[k] += self.weight[start + k, lag] * slopes[k - lag] * inverse[k - lag - 1]
        return inverse - np.eye(count)


class Plan(NamedTuple):
    """The Response of one run: its row in the table, and where its slots start in the driver's memory."""

    sample: int
    offset: int
    response: Response


@dataclass(frozen=True, eq=False)
class Table:
    """The equations of a batch of samples: shared coefficients, own start and own noise.

    Attributes:
        local: The coefficients.
        start: (B, *shape) the first state u_0 of every sample.
        noise: (B, N, *shape) C_i z_i, or None where no step adds noise.
    """

    local: LocalForm
    start: Tensor
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        expected = (len(self.start), self.local.steps, *self.start.shape[1:])
        if self.noise is not None and tuple(self.noise.shape) != expected:
            raise ValueError(f"noise must have the shape (B, N, *shape) = {expected}, got {tuple(self.noise.shape)}.")

    @classmethod
    def from_dense(cls, weight: Array, base: Tensor) -> Table:
        """Build the table u_p = base_p + sum_q weight[p, q] f_q.

        Args:
            weight: (N + 1, N), strictly lower triangular, float64.
            base: (B, N + 1, *shape), the part that does not depend on outputs.
        """
        local = LocalForm.from_dense(weight)
        if base.shape[1] != local.steps + 1:
            raise ValueError(f"base must be (B, {local.steps + 1}, *shape), got {tuple(base.shape)}.")
        decay = torch.as_tensor(local.decay).to(base).view(-1, *(1,) * (base.ndim - 2))
        return cls(local, base[:, 0], base[:, 1:] - decay * base[:, :-1])

    def base(self) -> Tensor:
        """Return base of the dense form, (B, N + 1, *shape)."""
        rows = [self.start]
        for i in range(self.local.steps):
            row = self.local.decay[i] * rows[-1]
            rows.append(row if self.noise is None else row + self.noise[:, i])
        return torch.stack(rows, 1)

    def step(self, states: Tensor, outputs: Tensor) -> Tensor:
        """Return step_i(U) for i = 0..N-1, (B, N, *shape), of states (B, N + 1, ..) and outputs (B, N, ..)."""
        shape = (1, -1, *(1,) * (self.start.ndim - 1))
        local, noise = self.local, self.noise

        def column(values: Array) -> Tensor:
            return torch.as_tensor(values).to(states).view(shape)

        result = column(local.decay) * states[:, :-1]
        for lag in range(local.lags + 1):
            result[:, lag:] += column(local.weight[lag:, lag]) * outputs[:, : local.steps - lag]
        return result if noise is None else result + noise

    def residual(self, states: Tensor, outputs: Tensor) -> Tensor:
        """Return r_i = step_i(U) - u_{i+1}, (B, N, *shape); zero exactly where U is the loop's own trajectory."""
        return self.step(states, outputs) - states[:, 1:]

    def hop(self, first: int, last: int, states: Tensor, outputs: Tensor) -> Tensor:
        """Go from state ``first`` to state ``last`` with one evaluation over the whole way.

        The data prediction of the evaluation is held over the steps (their own noise is added); where alpha and
        sigma are unknown, the output is held instead. One-step tables only.

        Args:
            first: Index of the state that was evaluated.
            last: Index of the state wanted, first < last <= N.
            states: (B, *shape) u_first.
            outputs: (B, *shape) the output there.

        Raises:
            ValueError: For multistep tables, or a hop that does not go forward.
        """
        local = self.local
        if local.lags:
            raise ValueError("hop needs a one-step table, and this one is multistep: choose a one-step sampler.")
        if not 0 <= first < last <= local.steps:
            raise ValueError(f"hop must go forward within 0..{local.steps}, got {first} to {last}.")
        decay, weight = local.decay[first:last], local.weight[first:last, 0]
        held = outputs
        if local.data_input is not None and local.data_output is not None:
            held = local.data_input[first] * states + local.data_output[first] * outputs
            p, q = local.data_input[first:last], local.data_output[first:last]
            decay, weight = decay - weight * p / q, weight / q
        state = states
        for i in range(last - first):
            state = decay[i] * state + weight[i] * held
            if self.noise is not None:
                state = state + self.noise[:, first + i]
        return state

    def respond(self, rows: Tensor, plans: Sequence[Plan]) -> list[Array | None]:
        """Answer one Response of each of several runs, all at once.

        The number of tensor operations depends neither on N nor on the number of runs.

        Args:
            rows: (slots, dim) the driver's memory; results are written into it.
            plans: (sample, offset, response) of each run; the run's slots start at ``offset``.

        Returns:
            For each plan the (len(into), 2) squared norms of new - old and of new, or None without ``measure``.
        """
        local, lags = self.local, self.local.lags
        spans = [plan.response.first + len(plan.response.into) - 1 - plan.response.start for plan in plans]
        count, wanted = max(spans), max(len(plan.response.into) for plan in plans)
        measure = plans[0].response.measure
        batch = len(plans)
        extra = 1 if measure else 0

        anchor = np.zeros((batch, count + extra), np.int64)
        output = np.zeros((batch, lags + count), np.int64)
        drawn = np.zeros((batch, count), np.int64)
        decay = np.zeros((batch, count))
        weight = np.zeros((batch, count, lags + 1))
        slope = np.zeros((batch, count))
        carry = np.zeros((batch, wanted, max(count - 1, 0)))
        chosen = np.zeros((batch, wanted), np.int64)
        for b, (sample, offset, ask) in enumerate(plans):
            span, known = spans[b], len(ask.outputs)
            points = np.arange(ask.start, ask.start + span)
            nearest = np.minimum(np.arange(count), known - 1)
            anchor[b, :count] = offset + ask.states[nearest]
            if measure:
                anchor[b, span] = offset + ask.states[known]
            output[b, lags:] = offset + ask.outputs[nearest]
            output[b, :lags] = offset + ask.history
            drawn[b, :span] = sample * local.steps + points
            decay[b, :span] = local.decay[points]
            weight[b, :span] = local.weight[points]
            slope[b, :span] = ask.slopes[np.minimum(np.arange(span), len(ask.slopes) - 1)]
            size = len(ask.into)
            skip = ask.first - ask.start - 1
            carry[b, :size, : span - 1] = local.propagation(ask.start, span, slope[b, :span])[skip:, : span - 1]
            chosen[b, :size] = b * count + skip + np.arange(size)

        def column(values: Array) -> Tensor:
            return torch.from_numpy(values).to(rows.device, rows.dtype).unsqueeze(-1)

        def gather(source: Tensor, index: Slots) -> Tensor:
            flat = torch.from_numpy(index.reshape(-1)).to(rows.device)
            return source.index_select(0, flat).view(*index.shape, -1)

        states = gather(rows, anchor)
        outputs = gather(rows, output)
        weights = column(weight.reshape(batch, -1)).view(batch, count, lags + 1, 1)
        step = outputs[:, lags:] * weights[:, :, 0]
        for lag in range(1, lags + 1):
            step.addcmul_(outputs[:, lags - lag : lags - lag + count], weights[:, :, lag])
        step.addcmul_(states[:, :count], column(decay))
        if self.noise is not None:
            step += gather(self.noise.view(batch_rows(self.noise), -1), drawn)
        keep_all = wanted == count
        new = step if keep_all else gather(step.view(batch * count, -1), chosen)
        if count > 1:
            residual = step[:, : count - 1] - states[:, 1:count]
            new = torch.baddbmm(new, torch.from_numpy(carry).to(rows.device, rows.dtype), residual)
            del residual
        del step

        into = np.concatenate([offset + ask.into for _, offset, ask in plans])
        flat = new.view(batch * wanted, -1)
        full = all(len(plan.response.into) == wanted for plan in plans)
        valid = np.concatenate([b * wanted + np.arange(len(plan.response.into)) for b, plan in enumerate(plans)])
        rows.index_copy_(0, torch.from_numpy(into).to(rows.device), flat if full else gather(flat, valid))

        if any(plan.response.finals is not None for plan in plans):
            final = outputs[:, lags:]
            if count > 1:
                moved = new[:, : count - 1] - states[:, 1:count]
                final[:, 1:].addcmul_(moved, column(slope)[:, 1:])
            slots = [(b, p.offset, p.response.finals) for b, p in enumerate(plans) if p.response.finals is not None]
            target = np.concatenate([offset + finals for _, offset, finals in slots])
            source = np.concatenate([b * count + np.arange(len(finals)) for b, _, finals in slots])
            final = final.reshape(batch * count, -1)
            rows.index_copy_(0, torch.from_numpy(target).to(rows.device), gather(final, source))
        if not measure:
            return [None] * batch
        norms = torch.stack([square(new - states[:, 1:]), square(new)], -1).cpu().numpy()
        return [own[: len(plan.response.into)] for own, plan in zip(norms, plans, strict=True)]


def batch_rows(noise: Tensor) -> int:
    """Return B N of noise (B, N, *shape)."""
    return noise.shape[0] * noise.shape[1]


def square(rows: Tensor) -> Tensor:
    """Return the squared norm of every row, (.., dim) to (..), in float64 (float32 on MPS, which has none)."""
    exact = torch.float32 if rows.device.type == "mps" else torch.float64
    return (rows * rows).sum(-1, dtype=exact)
