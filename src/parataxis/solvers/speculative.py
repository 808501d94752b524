r"""Speculative sampling: many steps a round, exact in law.

A step that adds noise draws its state from a Gaussian, u_{i+1} ~ N(m_i, C_i^2 I) with m_i = A_i u_i + B_i f_i. A
proposal y_{i+1} = mh_i + C_i z_i has a mean that needs no evaluation at y_i: a data prediction that is known already is
held. The proposals of a window are evaluated together, which gives their true means, and each is accepted with the
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
only taken in this way. So every round settles a state, and N rounds are enough.

*Why noise may be proposed with more than once.* Let G_j hold the start and all noise and uniforms of the steps before
j. What is evaluated at level j, in any round, is a function of G_j as long as no proposal uses what is known of later
levels; and so are mh_j, m_j and the round in which step j is decided. Given G_j, the noise z_j is then still standard
normal, and what comes out is a draw from N(m_j, C_j^2 I). So each level can hold its own data prediction of the round
before, which was made with the same noise and is nearly right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..arrays import Slots
from ..engine.solve import Asking, Combine, Draw, Inner, Load, Memory, Problem, Query, Settle
from ..samplers.coefficients import Coefficients
from ..samplers.recurrence import Response
from .window import check_window

__all__ = ["Speculative"]

Array = NDArray[np.float64]
NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Speculative:
    """Speculative sampling: a sample of the sequential loop's law, but not this seed's sequential sample.

    Autospeculative decoding (2505.03983), with the residual coupling (2501.05370) or block verification (2606.13426).
    Network and options change the number of rounds, at most N, and never the law, which is exact up to rounding. A
    tolerance has no meaning here and is not used. The rounds are the fewer, the less the data prediction moves compared
    with the noise of the steps. Needs a one-step sampler that adds noise.

    Attributes:
        window: Levels evaluated in a round; None for all.
        verification: ``reflection``, ``residual`` or ``block``.
        proposal: What proposals hold. ``latest``: the data prediction of the round before at their own level (where
            ``block`` has drawn new noise, at the front's). ``fresh``: the front's own, for which a round of one level
            is spent wherever a proposal was rejected, as published.
    """

    window: int | None = 16
    verification: Literal["reflection", "residual", "block"] = "reflection"
    proposal: Literal["latest", "fresh"] = "latest"

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.verification not in ("reflection", "residual", "block"):
            raise ValueError(f"verification must be 'reflection', 'residual' or 'block', got {self.verification!r}.")
        if self.proposal not in ("latest", "fresh"):
            raise ValueError(f"proposal must be 'latest' or 'fresh', got {self.proposal!r}.")

    def refuses(self, local: Coefficients) -> str | None:
        """Refuse tables without noise, and multistep ones."""
        if not local.noise_std.any():
            return (
                "no step of this table adds noise of a known size, so there is no law to be exact in: choose ddpm, "
                "euler_ancestral or ddim with eta > 0, or another solver."
            )
        if local.lags:
            return "proposals need a one-step table, and this one is multistep: choose a one-step sampler."
        return None

    def __call__(self, problem: Problem) -> Asking:
        """Sample one trajectory."""
        if problem.guessed:
            raise ValueError(
                "Speculative takes no guess and no frozen states, as they may depend on the noise that the steps are "
                "going to add: leave them out, or choose one of parataxis.SOLVERS."
            )
        proposals, block = _Proposals(problem, self.window), self.verification == "block"
        yield from proposals.open()
        while not proposals.done:
            yield from proposals.evaluate()
            ratios, sizes, uniforms = proposals.ratios, proposals.sizes, proposals.uniforms
            count, chance = _accept_block(ratios, sizes, uniforms) if block else (_accept(ratios, uniforms), 1.0)
            rejected, held = count < len(ratios), proposals.hi - 1
            if not rejected:
                yield from proposals.step()
            else:
                if block:
                    yield from proposals.renew(count)
                    held = proposals.lo + count + 1
                if self.verification == "reflection":
                    along = proposals.turn(count) - 1
                else:
                    along = _residual(chance, float(sizes[count]), float(uniforms[-1])) / float(sizes[count])
                yield from proposals.correct(count, along)
            yield from proposals.propose(held, alone=rejected and self.proposal == "fresh")
        return proposals.sample


class _Proposals:
    """The levels lo .. hi - 1 of one trajectory: the front, which is settled, and the proposals behind it.

    Attributes:
        ratios: (L,) of the steps tested, log N(y; m, C^2 I) - log N(y; mh, C^2 I).
        sizes: (L,) |v|.
        uniforms: (L + 1,) or more.
    """

    ratios: Array
    sizes: Array
    uniforms: Array

    def __init__(self, problem: Problem, window: int | None) -> None:
        local, steps = problem.coefficients, problem.steps
        self.lo, self.hi, self.steps = 0, 1, steps
        self._local = local
        self._coefficients = np.stack([local.state_weight, local.output_weight[:, 0]], 1)
        self._data_input = np.zeros(steps) if local.x0_from_input is None else local.x0_from_input
        self._data_output = np.ones(steps) if local.x0_from_output is None else local.x0_from_output
        self._width = min(window or steps, steps)
        # A round goes no farther than behind the next step without noise.
        stops = np.where(local.noise_std == 0, np.arange(1, steps + 1), steps)
        self._stops = np.minimum.accumulate(stops[::-1])[::-1]
        # Two sets of states take turns, so that previews find those of the last round together with their outputs.
        slots = np.arange(5 * self._width).reshape(5, -1)
        self._states, self._next, self._outputs, self._means, self._stepped = slots
        self._spare = np.array([slots.size])
        self._front = 0

    @property
    def done(self) -> bool:
        """Whether every level is settled."""
        return self.lo == self.steps

    @property
    def sample(self) -> int:
        """Slot of the sample."""
        return int(self._states[0])

    def open(self) -> Asking:
        """Start at the initial state, alone."""
        yield Memory(int(self._spare[0]) + 1)
        yield Load(np.zeros(1, np.int64), self._states[:1])
        return 0

    def evaluate(self) -> Asking:
        """Evaluate the window, one round, and measure each proposal against its true mean."""
        lo, hi = self.lo, self.hi
        level, count = np.arange(lo, hi), hi - lo
        states, outputs = self._states[:count], self._outputs[:count]
        means, stepped = self._means[:count], self._stepped[:count]
        self.uniforms = yield Draw(count, NONE)
        self._renewed: Slots | None = None
        self._finite, _, _, self._gram = yield [
            Query(level, states, outputs, settled=1),
            Combine((states, outputs), self._coefficients[lo:hi], means),
            Combine((means,), np.ones((count, 1)), stepped, level),
            # True step less proposal, which is m - mh = -C v; and true step less mean, which is C z.
            Inner((stepped[:-1], stepped[:-1]), (states[1:], means[:-1])),
        ]
        # The last step is not tested, nor is one that is not finite, nor what is behind it.
        tested = self._finite[:-1] & np.isfinite(self._gram).all((1, 2))
        tests = int(np.argmin(np.append(tested, False)))
        noise, gram = self._local.noise_std[lo : lo + tests], self._gram[:tests]
        self.sizes = np.sqrt(gram[:, 0, 0]) / noise
        self.ratios = gram[:, 0, 1] / noise**2 - self.sizes**2 / 2
        return 0

    def turn(self, count: int) -> float:
        """Return -<z, e> / |v| of the proposal behind the first ``count``."""
        return float(self._gram[count, 0, 1] / self._gram[count, 0, 0])

    def renew(self, count: int) -> Asking:
        """Draw the noise of all steps anew that were tested behind the first ``count`` proposals."""
        here = slice(count, count + 1)
        point = np.arange(self.lo + count, self.lo + len(self.ratios))
        self._renewed = self._spare
        yield Draw(0, point)
        yield Combine((self._means[here],), np.ones((1, 1)), self._renewed, point[:1])
        proposal, means = self._states[count + 1 : count + 2], self._means[here]
        self._gram[here] = yield Inner((self._stepped[here], self._renewed), (proposal, means))
        return 0

    def correct(self, count: int, along: float) -> Asking:
        """Accept ``count`` proposals, and correct the next one to the new front, with a = ``along`` |v|."""
        shift = 1 + self.turn(count) + along
        stepped, proposal = self._stepped[count : count + 1], self._states[count + 1 : count + 2]
        renewed = stepped if self._renewed is None else self._renewed
        yield Combine((renewed, stepped, proposal), np.array([[1.0, -shift, shift]]), self._next[:1])
        yield from self._settle(count + 1)
        return 0

    def step(self) -> Asking:
        """Accept all proposals that were tested, and take a true step behind them if its mean is known."""
        last = len(self.ratios)
        source = self._stepped if self._finite[last] else self._states
        yield Combine((source[last : last + 1],), np.ones((1, 1)), self._next[:1])
        yield from self._settle(last + int(self._finite[last]))
        return 0

    def _settle(self, count: int) -> Asking:
        """Settle ``count`` states: accepted proposals, and the new front."""
        self._front = self.lo + count
        point = self.hi - 1
        place = int(self._states[point - self.lo]), int(self._outputs[point - self.lo])
        estimate = int(self._next[0]) if self._front == self.steps else (point, *place)
        yield Settle(self._front, np.append(self._states[1:count], self._next[:1]), 0.0, estimate)
        return 0

    def propose(self, held: int, *, alone: bool) -> Asking:
        """Move to the new front, with proposals behind it unless it is to be evaluated ``alone``.

        A proposal holds the data prediction of its own level, or of ``held`` if it is farther.
        """
        lo, front, p, q = self.lo, self._front, self._data_input, self._data_output
        self.lo = front
        if front < self.steps:
            self.hi = front + 1 if alone else min(front + self._width, int(self._stops[front]))
        if front + 1 < self.hi:
            point = np.arange(front, self.hi - 1)
            source = np.minimum(point, held)
            states, outputs = self._states[source - lo], self._means[: len(point)]
            # The output at the evaluated state that would say the same of the data.
            factors = np.stack([(p[source] - p[point]) / q[point], q[source] / q[point]], 1)
            yield Combine((states, self._outputs[source - lo]), factors, outputs)
            yield Response(
                start=front,
                states=states,
                outputs=outputs,
                slopes=-p[point] / q[point],
                first=front + 1,
                into=self._next[1 : len(point) + 1],
                history=NONE,
                measure=False,
                origin=int(self._next[0]),
            )
        self._states, self._next = self._next, self._states
        return 0


def _accept(ratios: Array, uniforms: Array) -> int:
    """Return how many proposals to accept: those before the first that is rejected."""
    rejected = np.flatnonzero(np.log(uniforms[: len(ratios)]) > ratios)
    return int(rejected[0]) if len(rejected) else len(ratios)


def _accept_block(ratios: Array, sizes: Array, uniforms: Array) -> tuple[int, float]:
    """Return how many proposals to accept of the block, and P behind them."""
    kept = [0.0]  # log P
    for ratio in ratios:
        kept.append(min(0.0, kept[-1] + float(ratio)))
    for count in range(len(ratios), 0, -1):
        chance = math.exp(kept[count])
        if count < len(ratios) and chance < 1:
            size = float(sizes[count])
            mass = _mass(_crossing(chance, size), chance, size)
            chance = mass / (mass + 1 - chance)
        if uniforms[count - 1] <= chance:
            return count, math.exp(kept[count])
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
