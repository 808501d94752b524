"""Which blocks of Parareal run in a round, and where their rows lie. No number enters here, so it is the same for all.

Every row that is kept has a slot in a memory. A schedule says, tick by tick, which slots are evaluated, stepped,
corrected and compared; :mod:`.parareal` does so for all samples at once. A tick is a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

from ..arrays import Indices

__all__ = ["TICK_INDICES", "BlockSchedule", "Boundary", "Publication", "Tick"]


@dataclass(eq=False)
class BlockRun:
    """Block j of iteration p on its way.

    Slots: the state at ``step``; for multistep samplers the output before it; and, once it is known, the coarse step
    from its first state, with the data prediction there.
    """

    p: int
    j: int
    origin: int
    step: int
    x: int
    before: int
    coarse: int = -1
    prediction: int = -1

    @property
    def slots(self) -> list[int]:
        """The slots that the run holds."""
        return [slot for slot in (self.x, self.before, self.coarse, self.prediction) if slot >= 0]

    @property
    def frontier(self) -> bool:
        """Whether its first state is exact, so that its last one will be."""
        return self.p == self.j


class BoundaryState(NamedTuple):
    """A boundary state x_j^p that has become known.

    Attributes:
        origin: It follows from the exact state of this boundary: p, or more where the frontier is ahead of iteration p.
        x, before: Slots of the state and, for multistep samplers, of the output before it.
    """

    p: int
    j: int
    origin: int
    x: int
    before: int


class Boundary(NamedTuple):
    """A boundary state whose change is measured: iteration, boundary, its slot and that of the state known before."""

    p: int
    j: int
    new: int
    last: int


@dataclass(frozen=True, eq=False)
class Publication:
    """The boundary states that become known at the end of a tick.

    Attributes:
        compared: Those that have been known in an earlier iteration.
        source, into: (K,) slots to copy: the latest state of every boundary is kept apart from the runs.
        samples: (p, origin) of the samples, boundary M, that have become known.
        sample: Slot of the latest sample; -1 before the first.
        front: Boundaries 0 .. front are exact.
        farthest: The last boundary that is known.
        farthest_slot: Slot of its state.
    """

    compared: tuple[Boundary, ...]
    source: Indices
    into: Indices
    samples: tuple[tuple[int, int], ...]
    sample: int
    front: int
    farthest: int
    farthest_slot: int


@dataclass(eq=False)
class Tick:
    """What one round does, in this order, by indices.

    Attributes:
        steps, states: (R,) steps evaluated and slots of their states; the frontier comes first.
        iterations: (R,) p of each row.
        frontier: Whether the first row is the frontier: its state is exact.
        first: (F,) rows at the start of their block, which make its coarse step.
        blocks: (F,) their blocks.
        latest, latest_blocks: Which of these F, and of which blocks, are kept for the blocks: of two in one block, one.
        coarse, prediction: (F,) slots of the runs that keep a copy; ``prediction`` is empty for one-step samplers.
        moving: (V,) rows that take a step, in place.
        before: (V,) slots of the output before, which takes the present one; empty for one-step samplers.
        swept: (K,) blocks whose coarse step is the first guess of the boundary behind them.
        swept_x, swept_before: (K,) slots for it.
        corrected: (C,) blocks that have both coarse steps, G of this iteration and of the one before.
        corrected_x, corrected_coarse: (C,) slots of F, which takes F + (G_new - G_old), and of G_old.
        corrected_before, corrected_prediction: (C,) likewise for the output before; empty for one-step samplers.
        published: The boundary states that have become known, or None.
        slots: How many slots the memory needs by now.
    """

    steps: Indices
    states: Indices
    iterations: Indices
    frontier: bool
    first: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    latest: list[int] = field(default_factory=list)
    latest_blocks: list[int] = field(default_factory=list)
    coarse: list[int] = field(default_factory=list)
    prediction: list[int] = field(default_factory=list)
    moving: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    swept: list[int] = field(default_factory=list)
    swept_x: list[int] = field(default_factory=list)
    swept_before: list[int] = field(default_factory=list)
    corrected: list[int] = field(default_factory=list)
    corrected_x: list[int] = field(default_factory=list)
    corrected_coarse: list[int] = field(default_factory=list)
    corrected_before: list[int] = field(default_factory=list)
    corrected_prediction: list[int] = field(default_factory=list)
    published: Publication | None = None
    slots: int = 0

    def add(self, **indices: int) -> None:
        """Append to the lists of these names; -1 is a slot that a one-step sampler does not have."""
        for name, index in indices.items():
            if index >= 0:
                getattr(self, name).append(index)


# Everything of a tick that is indices.
TICK_INDICES = tuple(
    entry.name for entry in fields(Tick) if entry.name not in ("iterations", "frontier", "published", "slots")
)


class BlockSchedule:
    """The data flow of Parareal: what is known, what runs, and in which slot everything lies.

    The first slots belong to the blocks: M for the latest coarse step of each, M for the data prediction it was made
    from, M for its noise. The others are allocated and freed.

    Args:
        bounds: (M + 1,) first step of each block, and N.
        limit: Most iterations.
        width: Most rows of a round; None for all that can run.
        pipelined: Whether a run starts as soon as its first state is known.
        lagged: Whether steps use the output before.
        guessed: Whether all boundaries are known from the beginning.
    """

    def __init__(
        self, bounds: Sequence[int], limit: int, *, width: int | None, pipelined: bool, lagged: bool, guessed: bool
    ) -> None:
        self.bounds, self.blocks = bounds, len(bounds) - 1
        self.limit, self.width, self.pipelined = limit, width, pipelined
        self.lagged = lagged
        # Where runs have to wait, or the frontier overtakes those of blocks of one step, the last iteration may come
        # late or never: then the frontier goes on to the end.
        self._frontier_goes_on = width is not None or not pipelined or min(np.diff(bounds)) == 1
        self.slots = 3 * self.blocks
        self._free: list[int] = []
        self._runs: list[BlockRun] = []
        self._ended: list[BlockRun] = []  # at the end of their block: F_j(x_j^p)
        self._latest_iteration = [-1] * self.blocks  # the latest of which each block has made its coarse step
        self._latest_origin = [0] * self.blocks
        self._known: dict[int, int] = {}  # the latest boundary states
        self.front = 0
        count = self.blocks + 1 if guessed else 1
        #: The boundaries that are known from the beginning, and what they publish.
        self.initial = [BoundaryState(0, j, 0, *self._allocate_pair()) for j in range(count)]
        self.opening = self._publish(self.initial)

    def ticks(self) -> Iterator[Tick]:
        """Yield the rounds, one after another, until the sample of the last iteration is known."""
        while True:
            running = self._runnable()
            tick = Tick(
                np.array([run.step for run in running]),
                np.array([run.x for run in running]),
                np.array([run.p for run in running]),
                running[0].frontier,
            )
            self._coarse_steps(running, tick)
            self._fine_steps(running, tick)
            boundaries = self._sweep(tick) + self._correct(tick)
            if boundaries:
                tick.published = self._publish(boundaries)
            tick.slots = self.slots
            yield tick
            if tick.published is not None and any(p >= self.limit for p, _ in tick.published.samples):
                return

    def _allocate(self) -> int:
        """Return a free slot."""
        if self._free:
            return self._free.pop()
        self.slots += 1
        return self.slots - 1

    def _allocate_pair(self) -> tuple[int, int]:
        """Return a slot for a state and, for multistep samplers, one for the output before it."""
        return self._allocate(), self._allocate() if self.lagged else -1

    def _runnable(self) -> list[BlockRun]:
        """Return the runs that take a step now: the frontier first, then the oldest iterations.

        The frontier takes one in every round, so that it alone is through after N.
        """
        ready = self._runs
        if not self.pipelined:
            # A sweep of coarse steps comes first, then all blocks of the iteration side by side.
            swept = min(self._latest_iteration[self.front :])
            ready = [run for run in ready if run.frontier or run.p <= swept or run.step == self.bounds[run.j]]
        return sorted(ready, key=lambda run: (not run.frontier, run.p, run.j))[: self.width]

    def _coarse_steps(self, running: list[BlockRun], tick: Tick) -> None:
        """Note G of the runs that make their first evaluation."""
        latest: dict[int, int] = {}
        for row, run in enumerate(running):
            if run.step == self.bounds[run.j]:
                run.coarse, run.prediction = self._allocate_pair()
                self._latest_iteration[run.j], self._latest_origin[run.j] = run.p, run.origin
                # Where the width is limited, two iterations of a block may begin at once.
                latest[run.j] = len(tick.first)
                tick.add(first=row, blocks=run.j, coarse=run.coarse, prediction=run.prediction)
        for block, index in latest.items():
            tick.add(latest=index, latest_blocks=block)

    def _fine_steps(self, running: list[BlockRun], tick: Tick) -> None:
        """Take one step of every run; those of the last iteration end after their coarse step."""
        for row, run in enumerate(running):
            if run.p < self.limit or (run.frontier and self._frontier_goes_on):
                tick.add(moving=row, before=run.before)
                run.step += 1
                if run.step == self.bounds[run.j + 1]:
                    self._runs.remove(run)
                    self._ended.append(run)
            else:
                self._runs.remove(run)
                self._free += run.slots

    def _sweep(self, tick: Tick) -> list[BoundaryState]:
        """Return the boundary states of iteration 0: x_{j+1} = G_j(x_j)."""
        known = []
        for j in range(1, self.blocks + 1):
            if self._latest_iteration[j - 1] >= 0 and j not in self._known:
                state = BoundaryState(0, j, self._latest_origin[j - 1], *self._allocate_pair())
                tick.add(swept=j - 1, swept_x=state.x, swept_before=state.before)
                known.append(state)
        return known

    def _correct(self, tick: Tick) -> list[BoundaryState]:
        """Return the boundary states that follow from blocks that have ended."""
        known, freed = [], []
        for run in sorted(self._ended, key=lambda run: (run.p, run.j)):
            if run.frontier:
                freed += [slot for slot in (run.coarse, run.prediction) if slot >= 0]
            elif self._latest_iteration[run.j] > run.p and (self.pipelined or not self._iteration_runs(run.p)):
                tick.add(
                    corrected=run.j, corrected_x=run.x, corrected_coarse=run.coarse,
                    corrected_before=run.before, corrected_prediction=run.prediction,
                )  # fmt: skip
                freed += [slot for slot in (run.coarse, run.prediction) if slot >= 0]
            else:
                continue
            self._ended.remove(run)
            origin = run.j + 1 if run.frontier else self._latest_origin[run.j]
            known.append(BoundaryState(run.p + 1, run.j + 1, origin, run.x, run.before))
        self._free += freed
        return known

    def _iteration_runs(self, p: int) -> bool:
        """Return whether blocks of an iteration are still on their way, the frontier aside."""
        return any(run.p == p and not run.frontier for run in self._runs)

    def _publish(self, boundaries: list[BoundaryState]) -> Publication:
        """Take up boundary states: they are compared with the last ones, and their blocks run."""
        boundaries = sorted(boundaries, key=lambda state: (state.j, state.p))
        compared = tuple(
            Boundary(state.p, state.j, state.x, self._known[state.j]) for state in boundaries if state.j in self._known
        )
        latest = {state.j: state.x for state in boundaries}
        for j in latest:
            if j not in self._known:
                self._known[j] = self._allocate()
        for state in boundaries:
            if state.p == state.j:
                self.front = max(self.front, state.p)
            if state.j < self.blocks:
                self._runs.append(BlockRun(state.p, state.j, state.origin, self.bounds[state.j], state.x, state.before))
            else:
                self._free += [slot for slot in (state.x, state.before) if slot >= 0]
        self._retire()
        farthest = max(self._known)
        return Publication(
            compared,
            np.array(list(latest.values())),
            np.array([self._known[j] for j in latest]),
            # In the pipeline the frontier is hardly ever ahead of an iteration.
            tuple(
                (state.p, state.p if self.pipelined else state.origin) for state in boundaries if state.j == self.blocks
            ),
            self._known.get(self.blocks, -1),
            self.front,
            farthest,
            self._known[farthest],
        )

    def _retire(self) -> None:
        """Drop what the frontier has overtaken: older runs behind it, and those of its block that only wait."""
        for runs in (self._runs, self._ended):
            for run in list(runs):
                waiting = run.j == self.front and run.coarse < 0 and run.p < self.front
                if run.j < self.front or waiting:
                    runs.remove(run)
                    self._free += run.slots
