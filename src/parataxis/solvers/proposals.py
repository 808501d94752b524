"""Proposals of speculative sampling, and how they compare with the true steps: the tensors of :mod:`.speculative`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Array, Indices, largest, read, upload
from .base import Query
from .batch import Batch
from .correction import CHUNK, products

__all__ = ["Proposals", "Tested"]

Flags = NDArray[np.bool_]


class Proposals:
    """The steps lo .. hi - 1 of every sample: the accepted state, and the proposals behind it.

    Attributes:
        lo, hi: (S,) first step, whose state is accepted, and the step behind the last.
        x: (S, W, dim) states of these steps; what is behind them is meaningless.
    """

    def __init__(self, batch: Batch, window: int) -> None:
        local, count, like = batch.problem.coefficients, len(batch), batch.start
        self.batch, self.local, self.steps, self.window = batch, local, local.steps, window
        self.p = np.zeros(self.steps) if local.x0_from_input is None else local.x0_from_input
        self.q = np.ones(self.steps) if local.x0_from_output is None else local.x0_from_output
        self.weights = upload(np.stack([local.state_weight, local.output_weight[:, 0]])[..., None], like)
        # A round goes no farther than behind the next step without noise.
        stops = np.where(local.noise_std == 0, np.arange(1, self.steps + 1), self.steps)
        self._stops = np.minimum.accumulate(stops[::-1])[::-1]
        self.lo, self.hi = np.zeros(count, np.int64), np.ones(count, np.int64)
        self.x = like.new_zeros(count, window, like.shape[1])
        self.x[:, 0] = like
        # The farthest evaluation of the last round, which predicts the sample; step -1 before the first.
        self._last_step, self._last_x, self._last_f = np.full(count, -1), like.clone(), torch.zeros_like(like)

    def adopt(self) -> None:
        """Take up the samples that have been added."""
        batch, extra = self.batch, len(self.batch) - len(self.lo)
        if extra:
            more = np.zeros(extra, np.int64)
            self.lo, self.hi, self._last_step = (
                np.append(values, more) for values in (self.lo, self.hi, self._last_step)
            )
            self.x, self._last_x, self._last_f = (
                torch.cat([values, values.new_zeros(extra, *values.shape[1:])])
                for values in (self.x, self._last_x, self._last_f)
            )
        for place in batch.added:
            self.lo[place], self.hi[place], self._last_step[place] = 0, 1, -1
            self.x[place, 0] = self._last_x[place] = batch.start[place]
        batch.added.clear()

    def query(self) -> Query:
        """Return the states to be evaluated."""
        active = self.batch.active & ~self.batch.finished
        width = np.where(active, self.hi - self.lo, 0)
        sample, offset = np.nonzero(np.arange(self.window) < width[:, None])
        index = upload(sample * self.window + offset, self.x.device)
        return Query(self.x.flatten(0, 1).index_select(0, index), self.lo[sample] + offset, sample, width)

    def move(self, tested: Tested, front: Tensor, frozen: Indices, *, alone: Flags) -> None:
        """Go on from the new accepted states ``front`` (S, dim), with proposals behind them unless they are ``alone``.

        A proposal freezes the data prediction of its own step, or of step ``frozen`` (S,) if it is farther.
        """
        places, lo = tested.places, self.batch.accepted[tested.places]
        going = lo < self.steps
        stop = np.minimum(lo + self.window, self._stops[np.minimum(lo, self.steps - 1)])
        hi = np.where(going, np.where(alone, lo + 1, stop), lo)
        self.lo[places], self.hi[places] = lo, hi
        last, index = tested.row(tested.width - 1), upload(places, front.device)
        self._last_step[places] = tested.lo + tested.width - 1
        self._last_x.index_copy_(0, index, tested.x.flatten(0, 1).index_select(0, last))
        self._last_f.index_copy_(0, index, tested.f.flatten(0, 1).index_select(0, last))
        states, count = front[:, None], int((hi - lo).max()) - 1
        if count > 0:
            step = np.minimum(lo[:, None] + np.arange(count), self.steps - 1)
            source = np.minimum(np.minimum(step, frozen[:, None]), self._last_step[places][:, None])
            states = torch.cat([states, self._propose(tested, front, step, source)], 1)
        self.x[:, : states.shape[1]].index_copy_(0, index, states)

    def _propose(self, tested: Tested, front: Tensor, step: Indices, source: Indices) -> Tensor:
        """Return (S, n, dim) the states behind ``front`` if predictions of ``source`` hold at ``step``, (S, n) both.

        With the prediction p u + q f instead of the output, u' = (A - B p / q) u + B / q (p u + q f)_source + C z.
        """
        row = tested.row(source - tested.lo[:, None])
        x, f = (
            values.flatten(0, 1).index_select(0, row.view(-1)).view(*step.shape, -1) for values in (tested.x, tested.f)
        )
        weight = (self.local.output_weight[:, 0] / self.q)[step]
        factors = upload(np.stack([weight * self.p[source], weight * self.q[source]])[..., None], front)
        added = tested.noise(step).addcmul_(f, factors[1]).addcmul_(x, factors[0])
        growth = (self.local.state_weight - self.local.output_weight[:, 0] * self.p / self.q)[step]
        states = [front[:, None]]
        for first in range(0, step.shape[1], CHUNK):
            part = products(growth[:, first : first + CHUNK])
            # Each state is carried on from the one before the chunk and from what the steps of the chunk add.
            carried = np.concatenate([part, np.zeros((*part.shape[:2], 1))], 2)
            diagonal = np.arange(part.shape[1])
            carried[:, diagonal, diagonal + 1] = 1.0
            terms = torch.cat([states[-1][:, -1:], added[:, first : first + CHUNK]], 1)
            states.append(torch.bmm(upload(carried, front), terms))
        return torch.cat(states[1:], 1)

    def estimate(self, place: int) -> Tensor:
        """Return (dim,) the data prediction of the farthest evaluation, or one coarse step where it is unknown."""
        local, step, u, f = self.local, int(self._last_step[place]), self._last_x[place], self._last_f[place]
        if step < 0:
            return u
        if local.x0_from_input is not None and local.x0_from_output is not None:
            return local.x0_from_input[step] * u + local.x0_from_output[step] * f
        values = self.batch.recurrence_of(place, u)
        return values.coarse_step(step, self.steps, u[None], f[None])[0]

    def state(self, place: int) -> dict[str, Any]:
        """Return what is known of a sample."""
        return {name.strip("_"): getattr(self, name)[place] for name in STATE}

    def load(self, place: int, state: dict[str, Tensor]) -> None:
        """Take such a state."""
        for name in STATE:
            getattr(self, name)[place] = state[name.strip("_")]


STATE = ("lo", "hi", "x", "_last_step", "_last_x", "_last_f")


class Tested:
    """The evaluated steps of some samples, and their proposals measured against the true means.

    Arrays have entries for the widest of the samples; those beyond a sample's own are meaningless.

    Attributes:
        places: (S,) of the samples in the batch.
        lo, width: (S,) first of their L steps, and how many.
        x, f: (S, L, dim) states and outputs.
        finite: (S, L) whether the outputs were finite.
        tests: (S,) how many proposals are tested: all but what is not finite, and what is behind that.
        count: (S,) how many of these are accepted.
        mean_shift: (S, L - 1) |v| of each step.
        log_ratio: (S, L - 1) log N(y; m, C^2 I) - log N(y; mh, C^2 I).
    """

    def __init__(self, proposals: Proposals, places: Indices, outputs: Tensor) -> None:
        self.batch, self.places = proposals.batch, places
        self.lo, self.width = proposals.lo[places], proposals.hi[places] - proposals.lo[places]
        self.length = int(self.width.max())
        self.count = np.zeros(len(places), np.int64)
        self._steps, self._weights = proposals.steps, proposals.weights
        inside = np.arange(self.length) < self.width[:, None]
        self._inside, self._all = inside, bool(inside.all())
        if len(places) == len(proposals.x):
            self.x = proposals.x[:, : self.length]
        else:
            self.x = proposals.x[upload(places, outputs.device), : self.length]
        step = np.minimum(self.lo[:, None] + np.arange(self.length), self._steps - 1)
        self._noise_std = self.batch.problem.coefficients.noise_std[step]
        self._step = step
        self._renewed: Tensor | None = None
        norms = largest(outputs)
        numbers = self._measure(outputs, norms)
        if not np.isfinite(numbers).all():
            numbers = self._measure(self._repair(outputs, np.isfinite(numbers)), norms)
        self.finite = np.ones(inside.shape, bool)
        self.finite[inside] = np.isfinite(numbers)
        tested = self.finite[:, :-1] & inside[:, 1:] & np.isfinite(self._square) & np.isfinite(self._product)
        self.tests = np.argmin(np.append(tested, np.zeros((len(places), 1), bool), 1), 1)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            self.mean_shift = np.sqrt(self._square) / self._noise_std[:, :-1]
            self.log_ratio = self._product / self._noise_std[:, :-1] ** 2 - self.mean_shift**2 / 2

    def _measure(self, outputs: Tensor, norms: Tensor) -> Array:
        """Take the true steps from outputs (R, dim), and measure the proposals; return the norms of the outputs."""
        if self._all:
            self.f = outputs.view(self.x.shape)
        else:
            self.f = torch.zeros_like(self.x)
            inside = upload(np.flatnonzero(self._inside), outputs.device)
            self.f.view(-1, outputs.shape[1]).index_copy_(0, inside, outputs)
        weights = self._weights.index_select(1, upload(self._step.reshape(-1), outputs.device))
        a, b = weights.view(2, *self._step.shape, 1)
        self._means = (self.f * b).addcmul_(self.x, a)
        self._stepped = self._means + self.noise(self._step)
        # True step less proposal, which is m - mh = -C v; and true step less mean, which is C z.
        offset, added = self._stepped[:, :-1] - self.x[:, 1:], self._stepped[:, :-1] - self._means[:, :-1]
        inner = torch.stack([torch.linalg.vecdot(offset, offset), torch.linalg.vecdot(offset, added)])
        numbers = read(torch.cat([norms, inner.view(-1)]))
        # _square is |C v|^2, _product is -<C z, C v>
        self._square, self._product = numbers[len(norms) :].reshape(inner.shape).copy()
        return numbers[: len(norms)]

    def _repair(self, outputs: Tensor, finite: Flags) -> Tensor:
        """Return outputs, each that is not finite replaced by the last finite one before it."""
        first = np.cumsum(self.width) - self.width
        if not finite[first].all():
            row = int(np.argmin(finite[first]))
            raise self.batch.output_error(int(self.places[row]), int(self.lo[row]))
        nearest = np.maximum.accumulate(np.where(finite, np.arange(len(finite)), -1))
        return outputs.index_select(0, upload(nearest, outputs.device))

    def noise(self, step: Indices) -> Tensor:
        """Return (S, n, dim) a copy of what these steps (S, n) of the samples add."""
        noise = self.batch.noise
        assert noise is not None
        index = upload((self.places[:, None] * self._steps + step).reshape(-1), noise.device)
        return noise.view(-1, noise.shape[2]).index_select(0, index).view(*step.shape, -1)

    def row(self, offset: Indices) -> Tensor:
        """Return where the steps lo + offset of the samples, (S, ..), are in (S L, dim)."""
        first = np.arange(len(self.places)).reshape(-1, *(1,) * (offset.ndim - 1)) * self.length
        return upload(first + offset, self.x.device)

    def draw_uniforms(self) -> Array:
        """Return (S, L) numbers in (0, 1] of the samples' own random streams, one for each of their steps; else 1."""
        uniforms = np.ones(self._inside.shape)
        for row, (place, width) in enumerate(zip(self.places.tolist(), self.width.tolist(), strict=True)):
            uniforms[row, :width] = 1 - self.batch.stream(place).random(width)
        return uniforms

    def whitened_offset(self) -> Array:
        """Return (S,) -<z, e> / |v| of the proposal behind the accepted ones; NaN where all have been."""
        index = np.minimum(self.count, max(self.length - 2, 0))
        rows = np.arange(len(index))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = self._product[rows, index] / self._square[rows, index]
        return np.where(self.count < self.tests, ratio, np.nan)

    def renew_noise(self, rejected: Flags) -> None:
        """Draw the noise of all steps anew that were tested behind the accepted proposals of these samples."""
        drawn, index, dim = [], [], self.x.shape[2]
        for row in np.flatnonzero(rejected):
            place, steps = int(self.places[row]), self._step[row, self.count[row] : self.tests[row]]
            std = self._noise_std[row, self.count[row] : self.tests[row], None]
            drawn.append(self.batch.stream(place).standard_normal((len(steps), dim)) * std)
            index.append(place * self._steps + steps)
        self.batch.replace_noise(upload(np.concatenate(index), self.x.device), upload(np.concatenate(drawn), self.x))
        # The true step behind the accepted proposals now has other noise, so -<C z, C v> is another.
        step = self._step[np.arange(len(rejected)), self.count, None]
        means, (stepped, proposal) = self._pick(self._means, self.count), self._ends()
        self._renewed = means + self.noise(step)[:, 0]
        product = read(torch.linalg.vecdot(stepped - proposal, self._renewed - means))
        rows = np.flatnonzero(rejected)
        self._product[rows, self.count[rows]] = product[rows]

    def _pick(self, states: Tensor, offset: Indices) -> Tensor:
        """Return (S, dim) one row of each sample."""
        return states.flatten(0, 1).index_select(0, self.row(offset))

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Return (S, dim) the true step behind the accepted proposals, and the proposal for it."""
        proposal = np.minimum(self.count + 1, self.length - 1)
        return self._pick(self._stepped, self.count), self._pick(self.x, proposal)

    def front(self, shift: Array) -> Tensor:
        """Return (S, dim) the new accepted states.

        Where a proposal is rejected, this is the true step, with its present noise, moved by ``shift`` (S,) of the way
        from the true step with the noise of the proposal to the proposal. Elsewhere it is the true step behind the
        proposals, or the last of them if its output is not finite.
        """
        stepped, proposal = self._ends()
        front = stepped.clone() if self._renewed is None else self._renewed
        rows = np.arange(len(shift))
        unknown = np.flatnonzero((self.count == self.tests) & ~self.finite[rows, self.count])
        if len(unknown):
            at = upload(unknown, front.device)
            front[at] = self._pick(self.x, self.count)[at]
        moved = np.flatnonzero(self.count < self.tests)
        if len(moved):
            at = upload(moved, front.device)
            front.index_add_(0, at, (proposal - stepped)[at] * upload(shift[moved, None], front))
        return front

    def states(self, accepted: Indices, front: Tensor) -> Tensor:
        """Return (S, n, dim) the states that are accepted, ``front`` the last of each sample."""
        if self.batch.trajectory is None:
            return front[:, None]  # nobody wants them
        states = torch.cat([self.x[:, 1:], front[:, None]], 1)
        states.view(-1, front.shape[1]).index_copy_(0, self.row(accepted - 1), front)
        return states
