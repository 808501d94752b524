r"""Speculative sampling: many steps a round, exact in distribution.

A step that adds noise draws its state from a Gaussian, u_{i+1} ~ N(m_i, C_i^2 I) with m_i = A_i u_i + B_i f_i. A
proposal y_{i+1} = mh_i + C_i z_i has a mean that needs no evaluation at y_i: a data prediction that is known already is
frozen. The proposals of a window are evaluated together, which gives their true means, and each is accepted with the
probability that makes it a draw from the true Gaussian. With v = (mh - m) / C, e = v / |v| and w uniform in (0, 1],

    accept y if  log w <= log N(y; m, C^2 I) - log N(y; mh, C^2 I) = -<z, v> - |v|^2 / 2
    else         y = mh + C (z + (a - <z, e>) e)

``reflection``  a = -<z, e> - |v|: the noise around mh becomes noise around m, mirrored along v.
``residual``    a from the density (phi(a + |v|) - phi(a))_+, normalised: what the true Gaussian has more of.
``block``       decides on the L proposals of a window at once. P_0 = 1, and P_{q+1} = P_q times the ratio of step q, at
                most 1. The first q are accepted with probability h_q, independently; the largest such q counts:

                    h_q = mass_q / (mass_q + 1 - P_q),  mass_q = int (P_q phi(a + |v_q|) - phi(a))_+ da,  h_L = P_L

                The next state has a from the density under this integral. The decision knows the noise from step q on:
                it is drawn anew, of step q itself what is orthogonal to v.

Behind the last proposal, if it is accepted, comes one true step more, as its mean is known. A step without noise is
only taken in this way. So every round accepts a state, and N rounds are enough.

*Why noise may be proposed with more than once.* Let G_j hold the start and all noise and uniforms of the steps before
j. What is evaluated at step j, in any round, is a function of G_j as long as no proposal uses what is known of later
steps; and so are mh_j, m_j and the round in which step j is decided. Given G_j, the noise z_j is then still standard
normal, and what comes out is a draw from N(m_j, C_j^2 I). So each step can freeze its own data prediction of the round
before, which was made with the same noise and is nearly right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Array, Indices, read, upload
from ..samplers.coefficients import Coefficients
from ..samplers.recurrence import Recurrence
from .base import Queries, Query
from .batch import Batch
from .correction import CHUNK, products
from .window import check_window

__all__ = ["Speculative"]

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Speculative:
    """Speculative sampling: a sample from the sequential loop's distribution, but not this seed's sequential sample.

    Autospeculative decoding (2505.03983), with the residual coupling (2501.05370) or block verification (2606.13426).
    Network and options change the number of rounds, at most N, and never the distribution, which is exact up to
    rounding. A tolerance has no meaning here and is not used. The rounds are the fewer, the less the data prediction
    moves compared with the noise of the steps. Needs a one-step sampler that adds noise.

    Attributes:
        window: Steps evaluated in a round; None for all.
        verification: ``reflection``, ``residual`` or ``block``.
        proposal: What proposals freeze. ``latest``: the data prediction of the round before at their own step (where
            ``block`` has drawn new noise, at the first of them). ``fresh``: that of the accepted state, for which a
            round of one step is spent wherever a proposal was rejected, as published.
    """

    window: int | None = 16
    verification: Literal["reflection", "residual", "block"] = "reflection"
    proposal: Literal["latest", "fresh"] = "latest"

    adopts = True  # samples that begin later join the same windows

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.verification not in ("reflection", "residual", "block"):
            raise ValueError(f"verification must be 'reflection', 'residual' or 'block', got {self.verification!r}.")
        if self.proposal not in ("latest", "fresh"):
            raise ValueError(f"proposal must be 'latest' or 'fresh', got {self.proposal!r}.")

    def unsupported(self, coefficients: Coefficients) -> str | None:
        """Refuse samplers without noise, and multistep ones."""
        if not coefficients.stochastic:
            return (
                "no step of this sampler adds noise of a known size, so there is no distribution to be exact in: "
                "choose ddpm, euler_ancestral or ddim with eta > 0, or another solver."
            )
        if coefficients.lags:
            return "proposals need a one-step sampler, and this one is multistep: choose a one-step sampler."
        return None

    def solve(self, batch: Batch) -> Queries:
        """Draw the samples of a batch."""
        if batch.problem.guessed:
            raise ValueError(
                "Speculative takes no guess and no frozen states, as they may depend on the noise that the steps are "
                "going to add: leave them out, or choose one of parataxis.SOLVERS."
            )
        if batch.recurrence.noise is None:
            raise ValueError(
                "the recurrence has no noise, though its steps add some: make it with sampler.recurrence(noise)."
            )
        return _solve(self, batch)


def _solve(solver: Speculative, batch: Batch) -> Queries:
    proposals = batch.memory = Proposals(batch, min(solver.window or batch.problem.steps, batch.problem.steps))
    while True:
        proposals.adopt()
        query = proposals.query()
        answer = yield query
        if answer.sample is None:
            _round(solver, proposals, np.flatnonzero(query.width), answer.outputs)
        elif len(answer.sample):
            _round(solver, proposals, answer.sample, answer.outputs)


def _round(solver: Speculative, proposals: Proposals, places: Indices, outputs: Tensor) -> None:
    """Accept proposals of some samples, correct the first that is rejected, and propose anew behind it."""
    batch, block = proposals.batch, solver.verification == "block"
    if batch.returns_errors:
        lo, widths = proposals.lo[places], (proposals.hi - proposals.lo)[places]
        failed = batch.fail_broken(places, lo, widths, outputs)
        if failed.any():
            places, outputs = (
                places[~failed],
                outputs[upload(np.flatnonzero(np.repeat(~failed, widths)), outputs.device)],
            )
            if not len(places):
                return
    tested = Tested(proposals, places, outputs)
    rows, width, tests, uniforms = np.arange(len(places)), tested.width, tested.tests, tested.draw_uniforms()
    chance = np.ones(len(places))
    if block:
        for row in rows:
            ratios, sizes = tested.log_ratio[row, : tests[row]], tested.mean_shift[row, : tests[row]]
            tested.count[row], chance[row] = _accept_block(ratios, sizes, uniforms[row])
    else:
        tested.count = _accept(tested.log_ratio, uniforms, tests)
    count, rejected = tested.count, tested.count < tests
    frozen = tested.lo + width - 1
    if block and rejected.any():
        tested.renew_noise(rejected)
        frozen = np.where(rejected, tested.lo + count + 1, frozen)
    shift = np.zeros(len(places))
    if rejected.any():
        coefficient = tested.whitened_offset() - 1
        if solver.verification != "reflection":
            for row in np.flatnonzero(rejected):
                size = float(tested.mean_shift[row, count[row]])
                coefficient[row] = _residual(chance[row], size, float(uniforms[row, width[row] - 1])) / size
        shift = np.where(rejected, 1 + tested.whitened_offset() + coefficient, 0.0)
    front = tested.front(shift)
    accepted = count + np.where(rejected, True, tested.finite[rows, count])
    batch.accept(places, accepted, tested.states(accepted, front), np.zeros(len(places)))
    for row in np.flatnonzero(batch.accepted[places] == batch.problem.steps):
        place = int(places[row])
        batch.finished[place], batch.results[place] = True, front[row].clone()
    proposals.move(tested, front, frozen, alone=rejected & (solver.proposal == "fresh"))


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

        With the prediction p u + q f in the place of the output, u' = (A - B p / q) u + B / q (p u + q f)_source + C z.
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
        noise = self.batch.noise
        values = Recurrence(local, u[None], None if noise is None else noise[place, None])
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
        norms = torch.linalg.vector_norm(outputs, float("inf"), dim=1)
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
        """Return outputs with the last finite one before it in the place of each that is not finite."""
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


def _accept(log_ratio: Array, uniforms: Array, tests: Indices) -> Indices:
    """Return (S,) how many proposals to accept: those before the first that is rejected."""
    accepted = np.log(uniforms[:, : log_ratio.shape[1]]) <= log_ratio
    accepted &= np.arange(log_ratio.shape[1]) < tests[:, None]
    return np.asarray(np.argmin(np.append(accepted, np.zeros((len(tests), 1), bool), 1), 1))


def _accept_block(ratios: Array, sizes: Array, uniforms: Array) -> tuple[int, float]:
    """Return how many proposals to accept of the block, and P behind them."""
    log_probabilities = [0.0]  # log P
    for ratio in ratios:
        log_probabilities.append(min(0.0, log_probabilities[-1] + float(ratio)))
    for count in range(len(ratios), 0, -1):
        chance = math.exp(log_probabilities[count])
        if count < len(ratios) and chance < 1:
            size = float(sizes[count])
            mass = _mass(_crossing(chance, size), chance, size)
            chance = mass / (mass + 1 - chance)
        if uniforms[count - 1] <= chance:
            return count, math.exp(log_probabilities[count])
    return 0, 1.0


def _crossing(chance: float, size: float) -> float:
    """Return the a below which chance phi(a + size) exceeds phi(a)."""
    return math.log(chance) / size - size / 2 if chance > 0 and size > 0 else -math.inf


def _mass(a: float, chance: float, size: float) -> float:
    """Return the integral of chance phi(a + size) - phi(a) up to ``a``."""
    return 0.5 * (chance * math.erfc(-(a + size) / math.sqrt(2)) - math.erfc(-a / math.sqrt(2)))


def _residual(chance: float, size: float, uniform: float) -> float:
    """Return a draw from the density (chance phi(a + size) - phi(a))_+, normalised: its distribution inverted."""
    high = _crossing(chance, size)
    low, share = high - size - 40.0, uniform * _mass(high, chance, size)
    for _ in range(100):
        middle = (low + high) / 2
        if _mass(middle, chance, size) < share:
            low = middle
        else:
            high = middle
    return high
