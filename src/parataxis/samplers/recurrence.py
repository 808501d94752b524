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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Answering, Read, Slots
from .coefficients import Coefficients

__all__ = ["Part", "Response", "Steps", "Recurrence"]


Array = NDArray[np.float64]

CHUNK = 64  # states whose corrections follow from each other in one matrix product; wider windows take several


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

    @property
    def span(self) -> int:
        """How many steps lead to the last state wanted."""
        return self.first + len(self.into) - 1 - self.start


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
class Recurrence:
    """The equations of a batch of samples: shared coefficients, own start and own noise.

    Attributes:
        coefficients: Of every step.
        start: (B, *shape) the first state u_0 of every sample.
        noise: (B, N, *shape) C_i z_i, or None where no step adds noise.
    """

    coefficients: Coefficients
    start: Tensor
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        expected = (len(self.start), self.coefficients.steps, *self.start.shape[1:])
        if self.noise is not None and tuple(self.noise.shape) != expected:
            raise ValueError(f"noise must have the shape (B, N, *shape) = {expected}, got {tuple(self.noise.shape)}.")

    @classmethod
    def from_dense(cls, weight: Array, base: Tensor) -> Recurrence:
        """Build the table u_p = base_p + sum_q weight[p, q] f_q.

        Args:
            weight: (N + 1, N), strictly lower triangular, float64.
            base: (B, N + 1, *shape), the part that does not depend on outputs.
        """
        local = Coefficients.from_dense(weight)
        if base.shape[1] != local.steps + 1:
            raise ValueError(f"base must be (B, {local.steps + 1}, *shape), got {tuple(base.shape)}.")
        decay = torch.as_tensor(local.state_weight).to(base).view(-1, *(1,) * (base.ndim - 2))
        return cls(local, base[:, 0], base[:, 1:] - decay * base[:, :-1])

    def base(self) -> Tensor:
        """Return base of the dense form, (B, N + 1, *shape)."""
        rows = [self.start]
        for i in range(self.coefficients.steps):
            row = self.coefficients.state_weight[i] * rows[-1]
            rows.append(row if self.noise is None else row + self.noise[:, i])
        return torch.stack(rows, 1)

    def step(self, states: Tensor, outputs: Tensor) -> Tensor:
        """Return step_i(U) for i = 0..N-1, (B, N, *shape), of states (B, N + 1, ..) and outputs (B, N, ..)."""
        shape = (1, -1, *(1,) * (self.start.ndim - 1))
        local, noise = self.coefficients, self.noise

        def column(values: Array) -> Tensor:
            return torch.as_tensor(values).to(states).view(shape)

        result = column(local.state_weight) * states[:, :-1]
        for lag in range(local.lags + 1):
            result[:, lag:] += column(local.output_weight[lag:, lag]) * outputs[:, : local.steps - lag]
        return result if noise is None else result + noise

    def residual(self, states: Tensor, outputs: Tensor) -> Tensor:
        """Return r_i = step_i(U) - u_{i+1}, (B, N, *shape); zero exactly where U is the loop's own trajectory."""
        return self.step(states, outputs) - states[:, 1:]

    def coarse_step(self, first: int, last: int, states: Tensor, outputs: Tensor) -> Tensor:
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
        local = self.coefficients
        if local.lags:
            raise ValueError(
                "coarse_step needs a one-step table, and this one is multistep: choose a one-step sampler."
            )
        if not 0 <= first < last <= local.steps:
            raise ValueError(f"coarse_step must go forward within 0..{local.steps}, got {first} to {last}.")
        decay, weight = local.state_weight[first:last], local.output_weight[first:last, 0]
        held = outputs
        if local.x0_from_input is not None and local.x0_from_output is not None:
            held = local.x0_from_input[first] * states + local.x0_from_output[first] * outputs
            p, q = local.x0_from_input[first:last], local.x0_from_output[first:last]
            decay, weight = decay - weight * p / q, weight / q
        state = states
        for i in range(last - first):
            state = decay[i] * state + weight[i] * held
            if self.noise is not None:
                state = state + self.noise[:, first + i]
        return state

    def steps(self, rows: Tensor, parts: Sequence[Part]) -> Answering[Steps | None]:
        """Take the step of every state of the Responses of several runs: what does not depend on their slopes.

        None stands for a table that cannot tell it before it knows them.

        Args:
            rows: (slots + 1, dim) the driver's memory.
            parts: (sample, offset, response) of each run; the run's slots start at ``offset``.
        """
        return self._take(rows, parts, (yield self._needed(parts)))

    def _needed(self, parts: Sequence[Part]) -> list[Array | Slots]:
        """Return slots of anchors, outputs and origins, points of noise and coefficients, of the steps of Responses."""
        local, lags = self.coefficients, self.coefficients.lags
        spans = [part.response.span for part in parts]
        count, batch, measure = max(spans), len(parts), parts[0].response.measure
        # Shorter parts are padded with rows that enter nothing.
        anchor, drawn = np.zeros((batch, count + measure), np.int64), np.zeros((batch, count), np.int64)
        output = np.zeros((batch, lags + count), np.int64)
        numbers = np.zeros((batch, lags + 2, count, 1))
        for b, (sample, offset, ask) in enumerate(parts):
            points = slice(ask.start, ask.start + spans[b])
            anchor[b] = offset + ask.states[np.minimum(np.arange(count + measure), len(ask.states) - 1)]
            nearest = np.minimum(np.arange(count), len(ask.outputs) - 1)
            output[b, :lags], output[b, lags:] = offset + ask.history, offset + ask.outputs[nearest]
            drawn[b, : spans[b]] = sample * local.steps + np.arange(points.start, points.stop)
            numbers[b, 0, : spans[b], 0], numbers[b, 1:, : spans[b], 0] = (
                local.state_weight[points],
                local.output_weight[points].T,
            )
        origin = np.zeros((batch, 0), np.int64)
        if any(part.response.origin is not None for part in parts):
            moved = [
                first[0] if ask.origin is None else offset + ask.origin
                for first, (_, offset, ask) in zip(anchor, parts, strict=True)
            ]
            origin = np.array(moved, np.int64)[:, None]
        if self.noise is None:
            drawn = drawn[:, :0]
        return [*(slots.reshape(-1) for slots in (anchor, output, origin, drawn)), numbers]

    def _take(self, rows: Tensor, parts: Sequence[Part], needed: Sequence[Tensor]) -> Steps:
        anchor, output, origin, drawn, numbers = needed
        lags, batch, count, columns = self.coefficients.lags, len(numbers), numbers.shape[2], numbers.unbind(1)
        if self.noise is not None:
            step = _gather(self.noise.view(-1, rows.shape[1]), drawn, batch)
        outputs = _gather(rows, output, batch)
        for lag in range(lags + 1):
            entering, by = outputs.narrow(1, lags - lag, count), columns[1 + lag]
            if lag == 0 and self.noise is None:
                step = entering * by
            else:
                step.addcmul_(entering, by)
        del outputs, entering
        states = _gather(rows, anchor, batch)
        step.addcmul_(states.narrow(1, 0, count), columns[0])
        # The residuals take the place of the states: first the move of the origin, then r of every state behind it.
        moved, behind = states.narrow(1, 0, 1), states.narrow(1, 1, states.shape[1] - 1)
        if origin.numel():
            moved.neg_().add_(_gather(rows, origin, batch))
        else:
            moved.zero_()
        torch.sub(step.narrow(1, 0, behind.shape[1]), behind, out=behind)
        return Steps([part.response.span for part in parts], step, states)

    def respond(
        self, rows: Tensor, parts: Sequence[Part], steps: Steps | None = None
    ) -> Answering[list[Array | None] | Read]:
        """Answer one Response of each of several runs, all at once.

        The number of tensor operations depends neither on N nor on the number of runs; of windows, it grows by a few
        for every :data:`CHUNK` levels.

        Args:
            rows: (slots + 1, dim) the driver's memory; results are written into it. The last row takes the waste.
            parts: (sample, offset, response) of each run; the run's slots start at ``offset``.
            steps: Their :meth:`steps`, if they have been taken; used up.

        Returns:
            For each part the squared norms that it asked for, or None; a :class:`Read` if they are still on the device.
        """
        asks, spans = [part.response for part in parts], [part.response.span for part in parts]
        batch, count, wanted = len(parts), max(spans), max(len(ask.into) for ask in asks)
        slope = np.zeros((batch, count))
        into = np.full((batch, wanted), len(rows) - 1)
        for b, (_, offset, ask) in enumerate(parts):
            assert ask.slopes is not None
            slope[b, : spans[b]] = ask.slopes[np.minimum(np.arange(spans[b]), len(ask.slopes) - 1)]
            into[b, : len(ask.into)] = offset + ask.into
        skipped = np.array([span - len(ask.into) for span, ask in zip(spans, asks, strict=True)])
        chosen = np.zeros((0, wanted), np.int64)
        if skipped.any():
            index = np.arange(wanted) + (np.arange(batch) * count + skipped)[:, None]
            chosen = np.minimum(index, batch * count - 1)
        ending = [b for b in range(batch) if asks[b].finals is not None]
        finals = _finals([parts[b] for b in ending], slope[ending])
        carries = _carries(self.coefficients, asks, spans, slope)
        before = [] if steps is not None else self._needed(parts)

        targets, index, *needed = yield [into.reshape(-1), chosen.reshape(-1), *finals, *carries, *before]
        if steps is None:
            steps = self._take(rows, parts, needed[len(finals) + len(carries) :])
        _, step, residual = steps
        del steps
        measure = asks[0].measure
        measured = torch.bmm(residual, residual.mT) if measure and asks[0].gram is None else None
        if len(chosen):
            step = _gather(step.view(batch * count, -1), index, batch)
        lags = self.coefficients.lags
        for chunk, carry in zip(_chunks(carries), needed[len(finals) :], strict=False):
            changed = residual.narrow(1, max(chunk.start - lags, 0), carry.shape[2])
            part = step.narrow(1, chunk.start, carry.shape[1])
            if chunk.stop == wanted:
                part.baddbmm_(carry, changed)
            else:
                carried = torch.bmm(carry, changed)
                part += carried
                # What the next chunk starts from: the whole change of the states before it.
                residual[:, chunk.stop - lags : chunk.stop + 1] += carried[:, -lags - 1 :]
                del carried
            del changed, part
        del residual
        rows.index_copy_(0, targets, step.view(batch * wanted, -1))
        del step
        if ending:
            _finish(rows, *needed[: len(finals)])
        if not measure:
            return [None] * batch
        if measured is not None:
            return Read(measured, lambda found: _norms(carries, lags, found, spans))
        grams = np.zeros((batch, count + 1, count + 1))
        for gram, span, ask in zip(grams, spans, asks, strict=True):
            gram[: span + 1, : span + 1] = ask.gram
        return _norms(carries, lags, grams, spans)


def _gather(source: Tensor, index: Tensor, batch: int) -> Tensor:
    return source.index_select(0, index).view(batch, -1, source.shape[1])


def _finals(parts: Sequence[Part], slopes: Array) -> list[Array | Slots]:
    """Return the slots of outputs, of new and old states and of finals of Responses, and the slopes between them."""
    outputs, old, new, finals, by = [], [], [], [], []
    for (_, offset, ask), slope in zip(parts, slopes, strict=True):
        assert ask.finals is not None
        count = len(ask.finals)
        outputs.append(offset + ask.outputs[:count])
        old.append(offset + ask.states[:count])
        new.append(offset + np.append(ask.states[:1], ask.into[: count - 1]))  # the first state does not move
        finals.append(offset + ask.finals)
        by.append(np.append(0.0, slope[1:count]))
    return [] if not parts else [*map(np.concatenate, (outputs, new, old, finals)), np.concatenate(by)[:, None]]


def _finish(rows: Tensor, outputs: Tensor, new: Tensor, old: Tensor, finals: Tensor, slopes: Tensor) -> None:
    """Put f_q + d_q (new_q - u_q) into the finals of Responses whose states have been written."""
    final, moved, before = (rows.index_select(0, slots) for slots in (outputs, new, old))
    rows.index_copy_(0, finals, final.addcmul_(moved.sub_(before), slopes))


def _carries(local: Coefficients, asks: Sequence[Response], spans: Sequence[int], slopes: Array) -> list[Array]:
    """Return how changes spread, chunk by chunk: for each (batch, states of the chunk, what changes them).

    The states of a chunk are changed by those before it, as far as the steps look back, and by its own residuals.
    """
    batch, count = slopes.shape
    wanted = max(len(ask.into) for ask in asks)
    if any(ask.order is not None or len(ask.into) < ask.span for ask in asks):
        whole = np.zeros((batch, wanted, count))
        for carry, ask, span, slope in zip(whole, asks, spans, slopes, strict=True):
            spread = local.propagation(ask.start, span, slope[:span], ask.order)
            carry[: len(ask.into), :span] = spread[span - len(ask.into) :]
        return [whole]
    found = []
    for first in range(0, count, CHUNK):
        before = min(local.lags, first)
        carry = np.zeros((batch, min(CHUNK, count - first), before + min(CHUNK, count - first)))
        for own, ask, span, slope in zip(carry, asks, spans, slopes, strict=True):
            size = min(CHUNK, span - first)
            if size > 0:
                around = slope[first - before : first + size]
                own[:size, : before + size] = local.propagation(ask.start + first, size, around, before=before)
        found.append(carry)
    return found


def _chunks(carries: Sequence[Array]) -> Iterator[slice]:
    """Yield which states each of them is for."""
    first = 0
    for carry in carries:
        yield slice(first, first := first + carry.shape[1])


def _norms(carries: Sequence[Array], lags: int, grams: Array, spans: Sequence[int]) -> list[Any]:
    """Return the squared norms (R, 2) of the change and the residual of every state of each run.

    The change of a state is its residual and what is carried on of the others: all norms are in one Gram matrix.
    """
    batch = len(grams)
    lost = ~np.isfinite(np.diagonal(grams, axis1=1, axis2=2))
    if lost.any():  # a residual that overflowed: nothing is known of the states that it changes
        grams = np.where(lost[:, :, None] | lost[:, None], 0, grams)
    before = np.zeros((batch, 1, grams.shape[1]))  # the changes of the states before a chunk, as sums of residuals
    before[:, :, 0] = 1
    products = before @ grams  # and their inner products with all residuals
    squares = []
    for chunk, carry in zip(_chunks(carries), carries, strict=True):
        own, known, size = slice(chunk.start + 1, chunk.stop + 1), before.shape[1], carry.shape[1]
        change = np.zeros((batch, size, known + size)) + np.eye(size, known + size, known)
        change[:, :, :-1] += carry
        gram = np.empty((batch, known + size, known + size))
        gram[:, :known, :known] = products @ before.transpose(0, 2, 1)
        gram[:, :known, known:] = products[:, :, own]
        gram[:, known:, :known] = products[:, :, own].transpose(0, 2, 1)
        gram[:, known:, known:] = grams[:, own, own]
        squares.append(((change @ gram) * change).sum(2))
        if chunk.stop < len(grams[0]) - 1:
            last = change[:, -lags - 1 :]
            before = last[:, :, :known] @ before
            before[:, :, own] += last[:, :, known:]
            products = last[:, :, :known] @ products + last[:, :, known:] @ grams[:, own]
    residuals = np.diagonal(grams, axis1=1, axis2=2)[:, 1:]
    norms = np.maximum(np.stack([np.concatenate(squares, 1), residuals], -1), 0)
    norms[np.logical_or.accumulate(lost, 1)[:, 1:]] = np.inf
    return [own[:span] for own, span in zip(norms, spans, strict=True)]
