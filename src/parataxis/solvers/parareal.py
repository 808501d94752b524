r"""Parareal: a coarse and a fine solver, SRDS, plain and pipelined.

Blocks j = 0..M-1 lie between boundaries b_j. F_j is the sampler's own steps through block j, G_j one hop over it from
a single evaluation. With x_j^p the boundary states of iteration p,

    x_{j+1}^0     = G_j(x_j^0)
    x_{p+1}^{p+1} = F_p(x_p^p)                                       the frontier: nothing to correct
    x_{j+1}^{p+1} = F_j(x_j^p) + (G_j(x_j^{p+1}) - G_j(x_j^p)),  j > p

After p iterations the boundaries 0..p are exact, whatever G is. A chain (p, j) starts when x_j^p is known and takes one
step a round; its first evaluation also yields G_j(x_j^p), so hops cost nothing. In the pipeline every chain whose start
is known runs, the frontier first: then no more than N rounds are needed. Without it, all blocks of an iteration run
side by side and wait for one another before the next.

For DPM-Solver++ 2M the state of a boundary is (x, the data prediction before it), and both parts are corrected.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import is_int
from ..engine.solve import Asking, Combine, Distance, Inner, Load, Memory, Problem, Query, Request, Settle
from ..samplers.coefficients import Coefficients

__all__ = ["Parareal"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Parareal:
    """Parareal with hops as the coarse solver: SRDS (2412.08292).

    Attributes:
        blocks: M, from 1 to N; None for round(sqrt(3 N)), where the latency of three iterations is least.
        pipelined: Start each chain as soon as its first state is known.
        coarse: ``hop`` (the data prediction of the first point held over the block) or ``two-step`` (DPM-Solver++ 2M
            over the blocks, from the predictions at this and the previous boundary).
        width: Most levels evaluated in a round; None for all that can run.
        iterations: Most iterations; None for M, after which the sample is exact.
        rule: ``change`` (stop when no boundary changed by more than the tolerance, relative), ``srds`` (as published:
            when the sample changed by less than ``threshold`` a value, on average) or ``none``.
        threshold: Of the published rule: 0.1 of 255, for values in [-1, 1].
    """

    blocks: int | None = None
    pipelined: bool = True
    coarse: Literal["hop", "two-step"] = "hop"
    width: int | None = None
    iterations: int | None = None
    rule: Literal["change", "srds", "none"] = "change"
    threshold: float = 0.2 / 255

    def __post_init__(self) -> None:
        for name in ("blocks", "width", "iterations"):
            value = getattr(self, name)
            if value is not None and not is_int(value):
                raise ValueError(f"{name} must be a whole number of at least 1, or None, got {value!r}.")
        if not isinstance(self.pipelined, bool):
            raise ValueError(f"pipelined must be True or False, got {self.pipelined!r}.")
        if self.coarse not in ("hop", "two-step"):
            raise ValueError(f"coarse must be 'hop' or 'two-step', got {self.coarse!r}.")
        if self.rule not in ("change", "srds", "none"):
            raise ValueError(f"rule must be 'change', 'srds' or 'none', got {self.rule!r}.")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {self.threshold!r}.")

    def refuses(self, local: Coefficients) -> str | None:
        """Refuse multistep tables whose outputs are not data predictions, and more blocks than steps."""
        data = local.x0_from_input is not None and local.x0_from_output is not None
        if local.lags:
            known = data and not np.any(local.x0_from_input) and np.all(local.x0_from_output == 1)
            if local.lags > 1 or not known:
                return (
                    "a hop needs a one-step table, or one earlier output that is a data prediction (dpmpp_2m): choose "
                    "such a sampler, or a windowed solver."
                )
        if self.coarse == "two-step" and not (data and local.alpha is not None):
            return "coarse='two-step' needs alpha and sigma, unknown for this table: use coarse='hop'."
        if self.blocks is not None and self.blocks > local.steps:
            return f"blocks={self.blocks} is more than the {local.steps} steps: ask for at most one block a step."
        return None

    def __call__(self, problem: Problem) -> Asking:
        """Solve one trajectory."""
        yield Memory(_rows(self, problem.steps, problem.coefficients.lags, problem.guessed))
        return (yield from _Pipeline(self, problem).run())


@lru_cache(maxsize=64)
def _rows(solver: Parareal, steps: int, lags: int, guessed: bool) -> int:
    """Return how many rows the schedule needs: run it with nothing behind it."""
    flat = np.ones(steps)
    ends = np.ones(steps + 1)
    local = Coefficients(flat, np.ones((steps, lags + 1)), flat, ends, ends, ends, flat, flat)
    pipeline = _Pipeline(solver, Problem(local, 0.0, 1, guessed, 1e-7))
    requests = pipeline.run()
    answer: Any = None
    try:
        while True:
            request = requests.send(answer)
            answer = list(map(_nothing, request)) if isinstance(request, list) else _nothing(request)
    except StopIteration:
        return pipeline.peak


def _nothing(request: Request) -> Any:
    """Return an answer of the right form."""
    if isinstance(request, Query):
        return np.ones(len(request.point), bool)
    if isinstance(request, Distance):
        return np.ones(len(request.left))
    return np.ones((len(request.rows[0]), 2, 2)) if isinstance(request, Inner) else None


@dataclass(eq=False)
class _Chain:
    """Block j of iteration p on its way.

    Slots: x at ``step``; for multistep samplers the output before it; and, once it is known, the hop from its first
    state with the data prediction there.
    """

    p: int
    j: int
    step: int
    x: int
    before: int
    hop: int = -1
    data: int = -1

    @property
    def slots(self) -> list[int]:
        """The slots that the chain holds."""
        return [slot for slot in (self.x, self.before, self.hop, self.data) if slot >= 0]


class _Boundary(NamedTuple):
    """A boundary state x_j^p that has become known, and for multistep samplers the output before it; slots."""

    p: int
    j: int
    x: int
    before: int


class _Pipeline:
    """The data flow of one trajectory: what is known, what runs, and in which slot everything lies."""

    def __init__(self, solver: Parareal, problem: Problem) -> None:
        self.solver, self.problem, self.coefficients = solver, problem, problem.coefficients
        steps = problem.steps
        self.blocks = min(solver.blocks or max(1, round(np.sqrt(3 * steps))), steps)
        self.bounds = [round(j * steps / self.blocks) for j in range(self.blocks + 1)]
        self.limit = min(solver.iterations or self.blocks, self.blocks)
        self.lagged = self.coefficients.lags > 0
        self.hops = _hops(self.coefficients, self.bounds, two_step=solver.coarse == "two-step")
        self.peak = 0
        self.free: list[int] = []
        self.zero = self.take()
        # Of every block: its folded noise, its newest hop and the data prediction at its start.
        self.noise, self.hop, self.data = ([self.take() for _ in range(self.blocks)] for _ in range(3))
        self.chains: list[_Chain] = []
        self.ended: list[_Chain] = []  # at the end of their block: F_j(x_j^p)
        self.newest = [-1] * self.blocks  # the newest iteration of which each block has made its hop
        self.known: dict[int, int] = {}  # the newest boundary states
        self.accepted = 0
        self.error = float("inf")
        self.changes: list[list[tuple[int, float]]] = [[] for _ in self.bounds]  # (p, relative change) of a boundary
        self.moved = float("inf")  # mean absolute change of the sample
        self.doubtful: set[int] = set()  # iterations that met an output that is not finite

    def take(self) -> int:
        """Return a free slot."""
        if self.free:
            return self.free.pop()
        self.peak += 1
        return self.peak - 1

    def take_two(self) -> tuple[int, int]:
        """Return a slot for a state and, for multistep samplers, one for the output before it."""
        return self.take(), self.take() if self.lagged else -1

    def run(self) -> Asking:
        """Solve; return the slot of the sample."""
        yield from self._fold_noise()
        count = self.blocks if self.problem.guessed else 1
        known = [_Boundary(0, j, *self.take_two()) for j in range(count + int(self.problem.guessed))]
        yield Load(np.array([self.bounds[one.j] for one in known]), np.array([one.x for one in known]))
        slot = yield from self._publish(known)
        while slot < 0:
            running = self._runnable()
            outputs = [self.take() for _ in running]
            yield from self._evaluate(running, outputs)
            yield from self._hop(running, outputs)
            yield from self._step(running, outputs)
            slot = yield from self._publish((yield from self._follow()))
        return slot

    def _fold_noise(self) -> Asking:
        """Fold the noise of every block's steps into one row: what a hop adds to its two factors."""
        if self.coefficients.noise_std.any():
            decay, _ = _held(self.coefficients)
            for k in range(max(np.diff(self.bounds))):
                inside = [j for j in range(self.blocks) if self.bounds[j] + k < self.bounds[j + 1]]
                point = np.array([self.bounds[j] + k for j in inside])
                slots = np.array([self.noise[j] for j in inside])
                yield Combine((slots,), decay[point, None], slots, point)
        return 0

    def _runnable(self) -> list[_Chain]:
        """Return the chains that take a step now: the frontier first, then the oldest iterations."""
        ready = self.chains
        if not self.solver.pipelined:
            # A sweep of hops comes first, then all blocks of the iteration side by side.
            swept = min(self.newest[max(0, min(chain.p for chain in ready)) :])
            ready = [chain for chain in ready if chain.p <= swept or chain.step == self.bounds[chain.j]]
        return sorted(ready, key=lambda chain: (chain.p != chain.j, chain.p, chain.j))[: self.solver.width]

    def _evaluate(self, running: list[_Chain], outputs: list[int]) -> Asking:
        point = np.array([chain.step for chain in running])
        states = np.array([chain.x for chain in running])
        finite = yield Query(point, states, np.array(outputs), settled=int(running[0].p == running[0].j))
        for chain, sound in zip(running, finite, strict=True):
            if not sound:
                self.doubtful.update((chain.p, chain.p + 1))
        return 0

    def _hop(self, running: list[_Chain], outputs: list[int]) -> Asking:
        """Compute G of the chains that made their first evaluation."""
        first = [(c, f) for c, f in zip(running, outputs, strict=True) if c.step == self.bounds[c.j]]
        if not first:
            return 0
        block = np.array([chain.j for chain, _ in first])
        x = np.array([chain.x for chain, _ in first])
        data, hop, noise = (np.array(slots)[block] for slots in (self.data, self.hop, self.noise))
        before = np.array(self.data)[np.maximum(block - 1, 0)]
        yield Combine((x, np.array([f for _, f in first])), self.hops.data[block], data)
        yield Combine((x, data, before, noise), self.hops.factors[block], hop)
        for chain, _ in first:
            self.newest[chain.j] = chain.p
            chain.hop = self.take()
            chain.data = self.take() if self.lagged else -1
        yield self._copies(hop, [chain.hop for chain, _ in first])
        if self.lagged:
            yield self._copies(data, [chain.data for chain, _ in first])
        return 0

    def _copies(self, source: Any, into: list[int]) -> Combine:
        return Combine((np.asarray(source),), np.ones((len(into), 1)), np.array(into))

    def _step(self, running: list[_Chain], outputs: list[int]) -> Asking:
        """Take one step of every running chain; a chain of the last iteration ends after its hop."""
        moving = []
        for chain, output in zip(running, outputs, strict=True):
            # With a limited width the frontier goes on all the same: it alone is through after N rounds.
            if chain.p < self.limit or (self.solver.width is not None and chain.p == chain.j):
                moving.append((chain, output))
            else:
                self.chains.remove(chain)
                self.free += [*chain.slots, output]
        if not moving:
            return 0
        point = np.array([chain.step for chain, _ in moving])
        x = np.array([chain.x for chain, _ in moving])
        rows = [x, np.array([f for _, f in moving])]
        factors = [self.coefficients.state_weight[point], self.coefficients.output_weight[point, 0]]
        if self.lagged:
            rows.append(np.array([chain.before for chain, _ in moving]))
            factors.append(self.coefficients.output_weight[point, 1])
        yield Combine(tuple(rows), np.stack(factors, 1), x, point)
        for chain, output in moving:
            if self.lagged:
                chain.before, output = output, chain.before
            self.free.append(output)
            chain.step += 1
            if chain.step == self.bounds[chain.j + 1]:
                self.chains.remove(chain)
                self.ended.append(chain)
        return 0

    def _follow(self) -> Generator[Request, Any, list[_Boundary]]:
        """Return the boundary states that follow from what is there."""
        known = []
        if not self.problem.guessed:
            for j in range(1, self.blocks + 1):
                if self.newest[j - 1] >= 0 and j not in self.known:
                    x, before = self.take_two()
                    yield self._copies([self.hop[j - 1]], [x])
                    if self.lagged:
                        yield self._copies([self.data[j - 1]], [before])
                    known.append(_Boundary(0, j, x, before))
        corrected = []
        for chain in sorted(self.ended, key=lambda chain: (chain.p, chain.j)):
            through = self.solver.pipelined or not any(other.p == chain.p for other in self.chains)
            if chain.p == chain.j and through:
                self.free += [slot for slot in (chain.hop, chain.data) if slot >= 0]
            elif chain.p != chain.j and self.newest[chain.j] > chain.p:
                corrected.append(chain)
            else:
                continue
            self.ended.remove(chain)
            known.append(_Boundary(chain.p + 1, chain.j + 1, chain.x, chain.before))
        # F + (Gnew - Gold), in this order: equal hops cancel to the bit.
        parts = [("x", "hop", self.hop)] + ([("before", "data", self.data)] if self.lagged else [])
        for end, old, new in parts if corrected else []:
            into = np.array([getattr(chain, end) for chain in corrected])
            gone = np.array([getattr(chain, old) for chain in corrected])
            fresh = np.array([new[chain.j] for chain in corrected])
            yield Combine((into, fresh, gone), np.tile([1.0, 1.0, -1.0], (len(into), 1)), into)
            self.free += gone.tolist()
        return known

    def _retire(self) -> None:
        """Drop what the frontier has overtaken: older chains behind it, and those of its block that only wait."""
        for chains in (self.chains, self.ended):
            for chain in list(chains):
                waiting = chain.j == self.accepted and chain.hop < 0 and chain.p < self.accepted
                if chain.j < self.accepted or waiting:
                    chains.remove(chain)
                    self.free += chain.slots

    def _publish(self, known: list[_Boundary]) -> Asking:
        """Compare new boundary states with the last ones, start their chains; return the sample's slot or -1."""
        if not known:
            return -1
        known = sorted(known, key=lambda one: (one.j, one.p))
        old = [one for one in known if one.j in self.known]
        if old:
            new = np.array([one.x for one in old])
            last = np.array([self.known[one.j] for one in old])
            distance = [Distance(new[-1:], last[-1:])] if self.solver.rule == "srds" else []
            gram, *moved = yield [Inner((new, new), (last, np.full(len(new), self.zero))), *distance]
            for one, own in zip(old, gram, strict=True):
                self._compare(one, own[0, 0], own[1, 1])
            if moved and old[-1].j == self.blocks:
                self.moved = float(moved[0][0])
        for one in known:
            if one.j not in self.known:
                self.known[one.j] = self.take()
        yield self._copies([one.x for one in known], [self.known[one.j] for one in known])
        finished = -1
        for one in known:
            if one.p == one.j:
                self.accepted = max(self.accepted, one.p)
            if one.j < self.blocks:
                self.chains.append(_Chain(one.p, one.j, self.bounds[one.j], one.x, one.before))
                continue
            self.free += [slot for slot in (one.x, one.before) if slot >= 0]
            if one.p >= self.limit or self._passes(one.p):
                finished = self.known[one.j]
            if one.p == self.blocks:
                self.error = 0.0
        self._retire()
        place = self.bounds[self.accepted] if finished < 0 else self.problem.steps
        yield Settle(place, np.zeros(0, np.int64), self.error, self._estimate())
        return finished

    def _estimate(self) -> int:
        """Return the slot of the present guess of the sample: itself, or what the farthest hop held, or its end."""
        farthest = max(self.known)
        if 0 < farthest < self.blocks and self.coefficients.x0_from_input is not None:
            return self.data[farthest - 1]
        return self.known[farthest]

    def _compare(self, one: _Boundary, change: float, size: float) -> None:
        relative = 0.0 if change == 0 else float(np.sqrt(change / size)) if size > 0 else float("inf")
        self.changes[one.j].append((one.p, relative))
        if one.j == self.blocks:
            # Each boundary counts with its newest change that can have reached this sample; before p all are exact.
            reached = [[by for p, by in changes if p <= one.p] for changes in self.changes[one.p :]]
            self.error = relative if self.solver.rule == "srds" else max(some[-1] for some in reached if some)

    def _passes(self, p: int) -> bool:
        """Whether the stop test allows the sample of iteration p."""
        if p == 0 or self.solver.rule == "none" or p in self.doubtful:
            return False
        if self.solver.rule == "srds":
            return self.moved <= self.solver.threshold
        return self.error <= self.problem.tolerance


def _held(local: Coefficients) -> tuple[Array, Array]:
    """Return A and B of every step with the data prediction (else the output) in the place of the output."""
    weight = local.output_weight.sum(1)
    if local.x0_from_input is None or local.x0_from_output is None:
        return local.state_weight, weight
    return local.state_weight - weight * local.x0_from_input / local.x0_from_output, weight / local.x0_from_output


@dataclass(frozen=True, eq=False)
class _Hops:
    """Factors of the coarse solver.

    Attributes:
        data: (M, 2) data prediction from (x, output) at the start of each block.
        factors: (M, 4) hop from (x, prediction here, prediction at the boundary before, folded noise).
    """

    data: Array
    factors: Array


def _hops(local: Coefficients, bounds: list[int], *, two_step: bool) -> _Hops:
    decay, weight = _held(local)
    blocks = len(bounds) - 1
    data, factors = np.tile([0.0, 1.0], (blocks, 1)), np.zeros((blocks, 4))
    extrapolate = np.zeros(blocks)
    if two_step:
        assert local.alpha is not None
        assert local.sigma is not None
        with np.errstate(divide="ignore", invalid="ignore"):
            level = np.log(local.alpha[bounds] / local.sigma[bounds])
            extrapolate[1:] = np.diff(level)[1:] / np.diff(level)[:-1] / 2
        extrapolate[~np.isfinite(extrapolate)] = 0.0
    for j in range(blocks):
        first, stop = bounds[j], bounds[j + 1]
        if local.x0_from_input is not None and local.x0_from_output is not None:
            data[j] = local.x0_from_input[first], local.x0_from_output[first]
        a, b = 1.0, 0.0
        for k in range(first, stop):
            a, b = decay[k] * a, decay[k] * b + weight[k]
        factors[j] = a, b * (1 + extrapolate[j]), -b * extrapolate[j], 1.0
    return _Hops(data, factors)
