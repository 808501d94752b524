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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LocalForm", "Part", "Read", "Response", "Steps", "Table", "upload"]

Array = NDArray[np.float64]
Slots = NDArray[np.int64]


class Response(NamedTuple):
    """What trajectory follows, if each output were f_q + d_q (u - u_q)?

    All arrays are on the CPU; rows of tensors are named by their slots in the run's memory. From point
    ``start + len(outputs)`` on, the affine model of the last point answers.

    Attributes:
        start: The first point.
        states: (R,) slots of the states u_q of points start, start + 1, ..; with ``measure``, (R + 1,): one
            more for the present state behind the last point.
        outputs: (R,) slots of the outputs f_q.
        slopes: (R,) or longer, d_q; the last one is repeated. None if they are not known yet: then nothing follows, and
            only what does not depend on them is measured, for ``gram``.
        first: The first state wanted, at least start + 1.
        into: Slots that take the states first, first + 1, ..
        history: (L - 1,) slots of the outputs to be used for the points before ``start``, in multistep tables.
        finals: (R,) slots that take f_q + d_q (new_q - u_q), or none.
        measure: Whether to answer with the squared norms of new - old and of the residuals r, (len(into), 2); ``first``
            is then start + 1, and ``into`` reaches to the last of ``states``.
        order: Terms kept of (I - K)^{-1} = I + K + K^2 + ..; None keeps all, 1 is the sequential step of each state.
        origin: Slot of the state of point ``start`` in the trajectory asked for; default: as it was evaluated.
        gram: (R + 1, R + 1) what the same request without slopes was answered with: inner products of the move of the
            origin and of the residuals. The norms follow from it without another look at the device.
    """

    start: int
    states: Slots
    outputs: Slots
    slopes: Array | None
    first: int
    into: Slots
    history: Slots
    finals: Slots | None = None
    measure: bool = True
    order: int | None = None
    origin: int | None = None
    gram: Array | None = None


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

        The data prediction then has slope alpha v / (alpha^2 v + sigma^2) in x. Where
        alpha and sigma are unknown the growth is taken as 1.
        """
        if self.alpha is None or self.sigma is None or self.scale is None or self.data_output is None:
            return self.slopes(np.ones(self.steps))
        assert self.data_input is not None
        alpha, sigma, scale = self.alpha[:-1], self.sigma[:-1], self.scale[:-1]
        target = alpha * variance / (alpha**2 * variance + sigma**2) / scale
        return (target - self.data_input) / self.data_output

    def held_slopes(self) -> Array:
        """Return the (N,) slopes with which later points hold the output of a point.

        0 holds the output itself, which changes least along deterministic samplers; where steps add noise, -p/q holds
        the data prediction p u + q f.
        """
        if not self.noise.any() or self.data_input is None or self.data_output is None:
            return np.zeros(self.steps)
        return -self.data_input / self.data_output

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

    def propagation(self, start: int, count: int, slopes: Array, order: int | None = None) -> Array:
        """Return how changes spread: (count, count), row k for state start + 1 + k, lower triangular.

        Column 0 is the effect of a change of state ``start``, column j that of the residual of state start + j:
        the rows and columns of (I - K)^{-1} - I that are wanted; with ``order`` k, of K + .. + K^{k-1}.
        """
        if self.lags == 0:
            ratio = self.growth(slopes, start)
            below = np.tri(count, dtype=bool)
            spread = np.where(below, np.cumprod(np.where(below, ratio[:, None], 1.0), axis=0), 0.0)
            return spread if order is None else spread - np.tril(spread, 1 - order)
        if order is not None and order <= count:
            step = np.zeros((count + 1, count + 1))
            for k in range(count):
                step[k + 1, k] = self.decay[start + k]
                for lag in range(min(self.lags, k) + 1):
                    step[k + 1, k - lag] += self.weight[start + k, lag] * slopes[k - lag]
            total = np.zeros_like(step)
            for _ in range(order - 1):
                total = step + step @ total
            return total[1:, :count]
        inverse = np.eye(count + 1)
        for k in range(count):
            inverse[k + 1] += self.decay[start + k] * inverse[k]
            for lag in range(min(self.lags, k) + 1):
                inverse[k + 1] += self.weight[start + k, lag] * slopes[k - lag] * inverse[k - lag]
        return (inverse - np.eye(count + 1))[1:, :count]


class Read(NamedTuple):
    """Numbers that are still on the device, and what turns them into answers once they are read, as float64."""

    numbers: Tensor
    answers: Callable[[Array], list[Any]]


class Part(NamedTuple):
    """The Response of one run: its row in the table, and where its slots start in the driver's memory."""

    sample: int
    offset: int
    response: Response


class Steps(NamedTuple):
    """What Responses of several runs need besides their slopes.

    Attributes:
        spans: How many steps each run takes.
        step: (runs, steps, dim) step_i(U).
        residual: (runs, steps + 1, dim) the move of the origin, then r; with ``measure``, else one less.
    """

    spans: list[int]
    step: Tensor
    residual: Tensor

    def measured(self) -> Read:
        """Return the inner products of the residuals of each run, for :attr:`Response.gram`."""
        spans = self.spans

        def own(grams: Array) -> list[Any]:  # without what shorter runs are padded with
            return [gram[: span + 1, : span + 1] for gram, span in zip(grams, spans, strict=True)]

        return Read(torch.bmm(self.residual, self.residual.mT), own)


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

    def steps(self, rows: Tensor, parts: Sequence[Part]) -> Steps | None:
        """Take the step of every state of the Responses of several runs: what does not depend on their slopes.

        None stands for a table that cannot tell it before it knows them.

        Args:
            rows: (slots + 1, dim) the driver's memory.
            parts: (sample, offset, response) of each run; the run's slots start at ``offset``.
        """
        local, lags = self.local, self.local.lags
        spans = [part.response.first + len(part.response.into) - 1 - part.response.start for part in parts]
        count, batch, measure = max(spans), len(parts), parts[0].response.measure

        # Shorter parts are padded with rows that enter nothing.
        anchor, origin, drawn = (np.zeros((batch, size), np.int64) for size in (count + measure, 1, count))
        output = np.zeros((batch, lags + count), np.int64)
        numbers = np.zeros((batch, lags + 2, count))
        for b, (sample, offset, ask) in enumerate(parts):
            span = spans[b]
            points = slice(ask.start, ask.start + span)
            anchor[b] = offset + ask.states[np.minimum(np.arange(count + measure), len(ask.states) - 1)]
            nearest = np.minimum(np.arange(count), len(ask.outputs) - 1)
            origin[b] = anchor[b, 0] if ask.origin is None else offset + ask.origin
            output[b, :lags], output[b, lags:] = offset + ask.history, offset + ask.outputs[nearest]
            drawn[b, :span] = sample * local.steps + np.arange(points.start, points.stop)
            numbers[b, 0, :span], numbers[b, 1:, :span] = local.decay[points], local.weight[points].T

        columns = upload(numbers[..., None], rows).unbind(1)
        if self.noise is not None:
            step = _gather(self.noise.flatten(0, 1).flatten(1), drawn)
        outputs = _gather(rows, output)
        for lag in range(lags + 1):
            entering, by = outputs[:, lags - lag : lags - lag + count], columns[1 + lag]
            if lag == 0 and self.noise is None:
                step = entering * by
            else:
                step.addcmul_(entering, by)
        del outputs, entering
        states = _gather(rows, anchor)
        step.addcmul_(states[:, :count], columns[0])
        # The residuals take the place of the states: first the move of the origin, then r of every state behind it.
        if any(part.response.origin is not None for part in parts):
            states[:, :1].neg_().add_(_gather(rows, origin))
        else:
            states[:, :1].zero_()
        torch.sub(step[:, : states.shape[1] - 1], states[:, 1:], out=states[:, 1:])
        return Steps(spans, step, states)

    def respond(self, rows: Tensor, parts: Sequence[Part], steps: Steps | None = None) -> list[Array | None] | Read:
        """Answer one Response of each of several runs, all at once.

        The number of tensor operations depends neither on N nor on the number of runs.

        Args:
            rows: (slots + 1, dim) the driver's memory; results are written into it. The last row takes the waste.
            parts: (sample, offset, response) of each run; the run's slots start at ``offset``.
            steps: Their :meth:`steps`, if they have been taken; used up.

        Returns:
            For each part the squared norms that it asked for, or None; a :class:`Read` if they are still on the device.
        """
        local = self.local
        steps = self.steps(rows, parts) if steps is None else steps
        assert steps is not None
        spans, step, residual = steps
        del steps
        batch, count, wanted = len(parts), max(spans), max(len(part.response.into) for part in parts)
        asks = [part.response for part in parts]
        measure = asks[0].measure
        measured = torch.bmm(residual, residual.mT) if measure and asks[0].gram is None else None

        slope, carry = np.zeros((batch, count)), np.zeros((batch, wanted, count))
        into = np.full((batch, wanted), len(rows) - 1)
        for b, (_, offset, ask) in enumerate(parts):
            span, size = spans[b], len(ask.into)
            assert ask.slopes is not None
            slope[b, :span] = ask.slopes[np.minimum(np.arange(span), len(ask.slopes) - 1)]
            spread = local.propagation(ask.start, span, slope[b, :span], ask.order)
            carry[b, :size, :span] = spread[ask.first - ask.start - 1 :]
            into[b, :size] = offset + ask.into
        if wanted < count:
            chosen = [b * count + spans[b] - len(ask.into) for b, ask in enumerate(asks)]
            index = np.minimum(np.array(chosen)[:, None] + np.arange(wanted), batch * count - 1)
            step = _gather(step.view(batch * count, -1), index)
        step.baddbmm_(upload(carry, rows), residual[:, :count])
        del residual
        rows.index_copy_(0, upload(into.reshape(-1), rows.device), step.view(batch * wanted, -1))
        del step
        ending = [b for b, ask in enumerate(asks) if ask.finals is not None]
        if ending:
            _finish(rows, [parts[b] for b in ending], slope[ending])
        if not measure:
            return [None] * batch
        if measured is not None:
            return Read(measured, lambda found: _norms(carry, found, spans))
        grams = np.zeros((batch, count + 1, count + 1))
        for gram, span, ask in zip(grams, spans, asks, strict=True):
            gram[: span + 1, : span + 1] = ask.gram
        return _norms(carry, grams, spans)


def upload(values: Array | Slots | Tensor, like: Tensor | torch.device) -> Tensor:
    """Return numbers of the CPU on the device of ``like``, in its dtype if it is a tensor, without waiting for it."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    device, dtype = (like.device, like.dtype) if isinstance(like, Tensor) else (like, tensor.dtype)
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.to(dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


def _gather(source: Tensor, index: Slots) -> Tensor:
    return source.index_select(0, upload(index.reshape(-1), source.device)).view(*index.shape, -1)


def _finish(rows: Tensor, parts: Sequence[Part], slopes: Array) -> None:
    """Put f_q + d_q (new_q - u_q) into the finals of Responses whose states have been written."""
    outputs, old, new, finals, by = [], [], [], [], []
    for (_, offset, ask), slope in zip(parts, slopes, strict=True):
        assert ask.finals is not None
        count = len(ask.finals)
        outputs.append(offset + ask.outputs[:count])
        old.append(offset + ask.states[:count])
        new.append(offset + np.append(ask.states[:1], ask.into[: count - 1]))  # the first state does not move
        finals.append(offset + ask.finals)
        by.append(np.append(0.0, slope[1:count]))
    final, moved, before = (_gather(rows, np.concatenate(slots)) for slots in (outputs, new, old))
    final.addcmul_(moved.sub_(before), upload(np.concatenate(by)[:, None], rows))
    rows.index_copy_(0, upload(np.concatenate(finals), rows.device), final)


def _norms(carry: Array, grams: Array, spans: Sequence[int]) -> list[Any]:
    """Return the squared norms (R, 2) of the change and the residual of every state of each run.

    The change of a state is its residual and what is carried on of the others: all norms are in one Gram matrix.
    """
    count = carry.shape[1]
    change = np.zeros((len(carry), count, count + 1)) + np.eye(count, count + 1, 1)
    change[:, :, :count] += carry
    squares = ((change @ grams) * change).sum(2), np.diagonal(grams, axis1=1, axis2=2)[:, 1:]
    norms = np.maximum(np.stack(squares, -1), 0)
    return [own[:span] for own, span in zip(norms, spans, strict=True)]
