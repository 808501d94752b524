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

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from ..arrays import Indices, upload
from ..samplers.coefficients import Coefficients
from .base import Queries
from .batch import Batch
from .coupling import accept, accept_block, residual_draw
from .proposals import Proposals, Tested
from .window import check_window

__all__ = ["Speculative"]


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
            tested.count[row], chance[row] = accept_block(ratios, sizes, uniforms[row])
    else:
        tested.count = accept(tested.log_ratio, uniforms, tests)
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
                coefficient[row] = residual_draw(chance[row], size, float(uniforms[row, width[row] - 1])) / size
        shift = np.where(rejected, 1 + tested.whitened_offset() + coefficient, 0.0)
    front = tested.front(shift)
    accepted = count + np.where(rejected, True, tested.finite[rows, count])
    batch.accept(places, accepted, tested.states(accepted, front), np.zeros(len(places)))
    for row in np.flatnonzero(batch.accepted[places] == batch.problem.steps):
        place = int(places[row])
        batch.finished[place], batch.results[place] = True, front[row].clone()
    proposals.move(tested, front, frozen, alone=rejected & (solver.proposal == "fresh"))
