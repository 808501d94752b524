r"""Parareal: a coarse and a fine solver, SRDS, plain and pipelined.

Blocks j = 0..M-1 lie between boundaries b_j. F_j is the sampler's own steps through block j, G_j one coarse step over
it from a single evaluation. With x_j^p the boundary states of iteration p,

    x_{j+1}^0     = G_j(x_j^0)
    x_{p+1}^{p+1} = F_p(x_p^p)                                       the frontier: nothing to correct
    x_{j+1}^{p+1} = F_j(x_j^p) + (G_j(x_j^{p+1}) - G_j(x_j^p)),  j > p

After p iterations the boundaries 0..p are exact, whatever G is. A run (p, j) of a block starts when x_j^p is known and
takes one step a round; its first evaluation also gives G_j(x_j^p), so coarse steps cost nothing. In the pipeline every
run whose start is known goes on, the frontier first. Without it, all blocks of an iteration run side by side and wait
for one another before the next, and only the frontier goes on meanwhile. Either way N rounds are enough.

For DPM-Solver++ 2M the state of a boundary is (x, the data prediction before it), and both parts are corrected.

Which blocks run does not depend on any number: :mod:`.block_schedule` decides it for all samples that began together,
and this file does the arithmetic for all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Array, Indices, largest, read, upload
from ..checks import is_int
from ..samplers.coefficients import Coefficients
from .base import Queries, Query
from .batch import Batch
from .block_schedule import TICK_INDICES, BlockSchedule, Publication, Tick

__all__ = ["Parareal"]


@dataclass(frozen=True)
class Parareal:
    """Parareal with one coarse step a block: SRDS (2412.08292).

    Attributes:
        blocks: M, from 1 to N; None for round(sqrt(3 N)), where the latency of three iterations is least.
        pipelined: Start each block as soon as its first state is known.
        coarse: ``hop`` (the data prediction of the first state is frozen over the block) or ``two-step``
            (DPM-Solver++ 2M over the blocks, from the predictions at this and the previous boundary).
        width: Most steps evaluated in a round; None for all that can run.
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

    def unsupported(self, coefficients: Coefficients) -> str | None:
        """Refuse multistep samplers whose outputs are not data predictions, and more blocks than steps."""
        p, q = coefficients.x0_from_input, coefficients.x0_from_output
        if coefficients.lags:
            known = p is not None and q is not None and not np.any(p) and bool(np.all(q == 1))
            if coefficients.lags > 1 or not known:
                return (
                    "a coarse step needs a one-step sampler, or one earlier output that is a data prediction "
                    "(dpmpp_2m): choose such a sampler, or a windowed solver."
                )
        if self.coarse == "two-step" and (p is None or q is None or coefficients.alpha is None):
            return "coarse='two-step' needs alpha and sigma, unknown for this sampler: use coarse='hop'."
        if self.blocks is not None and self.blocks > coefficients.steps:
            return (
                f"blocks={self.blocks} is more than the {coefficients.steps} steps: ask for at most one block a step."
            )
        return None

    def solve(self, batch: Batch) -> Queries:
        """Solve the samples of a batch."""
        batch.trajectory = None  # blocks run on from states that are not final, so not every state is accepted once
        return _solve(self, batch)

    def bounds(self, steps: int) -> list[int]:
        """Return (M + 1,) the first step of each block, and N."""
        count = min(self.blocks or max(1, round(np.sqrt(3 * steps))), steps)
        return [round(j * steps / count) for j in range(count + 1)]


def _solve(solver: Parareal, batch: Batch) -> Queries:
    cohorts = batch.memory = _Cohorts(_Cohort(solver, batch))
    while True:
        query, order = cohorts.query(batch)
        answer = yield query
        if answer.sample is None:
            cohorts.advance(answer.outputs, order)
        elif len(answer.sample):
            # Samples that are answered apart go on apart.
            cohorts.separate(answer.sample)
            _, order = cohorts.query(batch, answer.sample)
            cohorts.advance(answer.outputs, order)
        cohorts.drop_ended()


class _Order(NamedTuple):
    """Which rows of a query belong to which cohort, in the order of its rows."""

    cohort: _Cohort
    rows: Indices


class _Cohorts:
    """Samples of a batch, in groups that are at the same tick: one group, unless they are answered apart."""

    def __init__(self, cohort: _Cohort) -> None:
        self._members = [cohort]

    def query(self, batch: Batch, places: Indices | None = None) -> tuple[Query, list[_Order]]:
        """Return what is to be evaluated, of these places or of all, and whose rows these are."""
        width = np.zeros(len(batch), np.int64)
        members = [cohort for cohort in self._members if places is None or np.isin(cohort.places, places).all()]
        if not members:
            nothing = np.zeros(0, np.int64)
            return Query(batch.start[:0], nothing, nothing, width), []
        sample = np.concatenate([np.repeat(cohort.places, len(cohort.tick.steps)) for cohort in members])
        step = np.concatenate([np.tile(cohort.tick.steps, len(cohort.places)) for cohort in members])
        x = torch.cat([cohort.states() for cohort in members]) if len(members) > 1 else members[0].states()
        for cohort in members:
            width[cohort.places] = len(cohort.tick.steps)
        place_of_row = np.argsort(sample, kind="stable")
        row_of_place, numbers, first = np.argsort(place_of_row), [], 0
        for cohort in members:
            count = len(cohort.places) * len(cohort.tick.steps)
            numbers.append(_Order(cohort, row_of_place[first : first + count]))
            first += count
        if len(members) > 1:
            x, step, sample = x[upload(place_of_row, x.device)], step[place_of_row], sample[place_of_row]
        return Query(x, step, sample, width), numbers

    def advance(self, outputs: Tensor, order: Sequence[_Order]) -> None:
        """Do one tick of these cohorts."""
        for cohort, rows in order:
            part = outputs if len(order) == 1 else outputs[upload(rows, outputs.device)]
            cohort.advance(part.view(len(cohort.places), -1, outputs.shape[1]))

    def separate(self, places: Indices) -> None:
        """Give those of each cohort that are among these places, and those that are not, cohorts of their own."""
        for cohort in list(self._members):
            among = np.isin(cohort.places, places)
            if among.any() and not among.all():
                self._members.append(cohort.part(np.flatnonzero(among)))
                cohort.keep(np.flatnonzero(~among))

    def drop_ended(self) -> None:
        """Drop the rows of samples that have ended."""
        for cohort in self._members:
            alive = cohort.batch.active[cohort.places] & ~cohort.batch.finished[cohort.places]
            if not alive.all():
                cohort.keep(np.flatnonzero(alive))
        self._members = [cohort for cohort in self._members if len(cohort.places)]

    def estimate(self, place: int) -> Tensor:
        """Return (dim,) the present guess of a sample."""
        return self._of(place).estimate(place)

    def state(self, place: int) -> dict[str, Any]:
        """Return what is known of a sample."""
        return self._of(place).state(place)

    def load(self, place: int, state: dict[str, Tensor]) -> None:
        """Take such a state, into a cohort of its own: samples that were saved may be at different ticks."""
        self.separate(np.array([place]))
        self._of(place).load(state)

    def _of(self, place: int) -> _Cohort:
        return next(cohort for cohort in self._members if place in cohort.places)


class _Rows:
    """The rows of samples that move in step: (S, slots, dim). All operations are on all samples."""

    def __init__(self, like: Tensor, slots: int) -> None:
        self.rows = like.new_zeros(len(like), slots, like.shape[1])

    def __getitem__(self, slots: Tensor) -> Tensor:
        """Return (S, R, dim) a copy of these rows."""
        return self.rows.index_select(1, slots)

    def __setitem__(self, slots: Tensor, values: Tensor) -> None:
        """Put rows (S, R, dim) into these slots."""
        self.rows.index_copy_(1, slots, values)

    def of(self, samples: Tensor) -> _Rows:
        """Return the rows of some of the samples, a copy."""
        part: _Rows = object.__new__(_Rows)
        part.rows = self.rows.index_select(0, samples)
        return part

    def grow(self, slots: int) -> None:
        """Make room for so many slots."""
        have = self.rows.shape[1]
        if slots > have:
            more = max(slots, have + have // 2) - have
            self.rows = torch.cat([self.rows, self.rows.new_zeros(len(self.rows), more, self.rows.shape[2])], 1)


def combine(factors: Tensor, *rows: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return sum_k factors[:, k] rows_k, (S, R, dim), and noise; summed as the sequential loop does, last to first."""
    by = factors[..., None].unbind(1)
    total = rows[-1] * by[-1] if noise is None else noise.addcmul(rows[-1], by[-1])
    for row, factor in zip(rows[-2::-1], by[-2::-1], strict=True):
        total.addcmul_(row, factor)
    return total


class _StopTest:
    """What is known of the error of samples that move in step.

    Attributes:
        error: (S,) estimated relative error of the latest sample.
        moved: (S,) mean absolute change of the latest sample.
        changes: For every boundary (p, (S,) relative change by iteration p), as far as they still count.
        nonfinite_iterations: (S, M + 2) iterations that have met an output that was not finite.
    """

    def __init__(self, solver: Parareal, tolerance: float, samples: int, blocks: int) -> None:
        self.solver, self.tolerance = solver, tolerance
        self.error, self.moved = np.full(samples, np.inf), np.full(samples, np.inf)
        self.changes: list[list[tuple[int, Array]]] = [[] for _ in range(blocks + 1)]
        self.nonfinite_iterations = np.zeros((samples, blocks + 2), bool)

    def of(self, rows: Indices) -> _StopTest:
        """Return the same of some of the samples."""
        part: _StopTest = object.__new__(_StopTest)
        part.solver, part.tolerance = self.solver, self.tolerance
        part.error, part.moved = self.error[rows], self.moved[rows]
        part.changes = [[(p, change[rows]) for p, change in changes] for changes in self.changes]
        part.nonfinite_iterations = self.nonfinite_iterations[rows]
        return part

    def state(self, row: int) -> dict[str, Any]:
        """Return what is known of one sample; ``changes`` has a row (boundary, p, change) for each."""
        changes = [(j, p, by[row]) for j, entries in enumerate(self.changes) for p, by in entries]
        return {
            "error": self.error[row],
            "moved": self.moved[row],
            "changes": np.array(changes, np.float64).reshape(-1, 3),
            "nonfinite_iterations": self.nonfinite_iterations[row],
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take what was known of the only sample."""
        self.error, self.moved = (np.array([float(state[name])]) for name in ("error", "moved"))
        self.nonfinite_iterations = state["nonfinite_iterations"].numpy()[None].copy()
        self.changes = [[] for _ in self.changes]
        for j, p, change in state["changes"].tolist():
            self.changes[int(j)].append((int(p), np.array([change])))

    def compare(self, published: Publication, numbers: Array) -> None:
        """Take up the changes of boundaries that have been known before; see :meth:`_Cohort._changes`."""
        count = len(published.compared)
        change, size = numbers[:, :count], numbers[:, count : 2 * count]
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(change == 0, 0.0, np.where(size > 0, change / size, np.inf))
        relative[np.isnan(relative)] = np.inf
        for boundary, by in zip(published.compared, relative.T, strict=True):
            self.changes[boundary.j].append((boundary.p, by))
        if count and published.compared[-1].j == len(self.changes) - 1:
            if self.solver.rule == "srds":
                self.error, self.moved = relative[:, -1], numbers[:, -1]
            else:
                self._estimate_error(*published.samples[-1])

    def _estimate_error(self, p: int, origin: int) -> None:
        """Estimate the error of sample p: the largest newest change of a boundary that can have reached it.

        The boundaries before its origin are exact.
        """
        newest = []
        for j in range(origin, len(self.changes)):
            reached = [i for i, (other, _) in enumerate(self.changes[j]) if other <= p or other == j == origin]
            if reached:
                self.changes[j] = self.changes[j][reached[-1] :]  # earlier ones count no more
                newest.append(self.changes[j][0][1])
        self.error = np.max(newest, axis=0)

    def passed(self, p: int) -> NDArray[np.bool_]:
        """Return (S,) whether the stop test allows the sample of iteration p."""
        if p == 0 or self.solver.rule == "none":
            return np.zeros(len(self.error), bool)
        passed = self.moved <= self.solver.threshold if self.solver.rule == "srds" else self.error <= self.tolerance
        return np.asarray(passed & ~self.nonfinite_iterations[:, p])


class _Cohort:
    """Samples at the same tick of a schedule: their rows, and the arithmetic.

    Attributes:
        places: (S,) of the samples in the batch, increasing.
        tick: What the next round does.
        ticks: How many rounds there have been.
        published: The latest boundary states.
        memory: Rows by slots.
        test: What is known of the error.
    """

    def __init__(self, solver: Parareal, batch: Batch) -> None:
        local, like = batch.problem.coefficients, batch.start
        self.solver, self.batch, self.bounds = solver, batch, solver.bounds(local.steps)
        self.blocks, self.lagged = len(self.bounds) - 1, local.lags > 0
        self.places, self.ticks = np.arange(len(batch)), 0
        schedule, self._schedule = self._new_schedule()
        self.limit, self.published = schedule.limit, schedule.opening
        self._factors = _Factors(local, self.bounds, like, two_step=solver.coarse == "two-step")
        self.memory = _Rows(like, schedule.slots)
        self.test = _StopTest(solver, batch.problem.tolerance, len(batch), self.blocks)
        if batch.noise is not None:
            noise_slots = upload(2 * self.blocks + np.arange(self.blocks), like.device)
            self.memory[noise_slots] = folded_noise(local, self.bounds, batch.noise)
        slots = np.array([state.x for state in schedule.initial])
        levels = np.array([self.bounds[state.j] for state in schedule.initial])
        states = like[:, None] if batch.guess is None else batch.guess[:, upload(levels, like.device)]
        self.memory[upload(slots, like.device)] = states
        self.memory[upload(self.published.into, like.device)] = self.memory[upload(self.published.source, like.device)]
        batch.accept(self.places, np.zeros(len(batch), np.int64), like[:, None], self.test.error)
        self.tick = next(self._schedule)

    def _new_schedule(self) -> tuple[BlockSchedule, Iterator[Tick]]:
        solver, limit = self.solver, min(self.solver.iterations or self.blocks, self.blocks)
        schedule = BlockSchedule(
            self.bounds,
            limit,
            width=solver.width,
            pipelined=solver.pipelined,
            lagged=self.lagged,
            guessed=self.batch.guess is not None,
        )
        return schedule, schedule.ticks()

    # -- which samples ---------------------------------------------------------------------------------------------

    def keep(self, rows: Indices) -> None:
        """Go on with these of the samples only."""
        self.memory = self.memory.of(upload(rows, self.memory.rows.device))
        self.places, self.test = self.places[rows], self.test.of(rows)

    def part(self, rows: Indices) -> _Cohort:
        """Return a cohort of some of the samples."""
        part: _Cohort = object.__new__(_Cohort)
        part.__dict__.update(self.__dict__)
        part.keep(rows)
        _, part._schedule = self._new_schedule()
        part.tick = next(islice(part._schedule, self.ticks, None))
        return part

    # -- a round ---------------------------------------------------------------------------------------------------

    def states(self) -> Tensor:
        """Return (S R, dim) the states to be evaluated, sample by sample."""
        states = upload(self.tick.states, self.memory.rows.device)
        return self.memory[states].flatten(0, 1)

    def advance(self, outputs: Tensor) -> None:
        """Do one tick with the outputs (S, R, dim) of its states."""
        if self.batch.returns_errors and self.tick.frontier:
            count, rows = outputs.shape[:2]
            steps, widths = np.full(count, self.tick.steps[0]), np.full(count, rows)
            failed = self.batch.fail_broken(self.places, steps, widths, outputs.flatten(0, 1))
            if failed.any():
                outputs = outputs[upload(np.flatnonzero(~failed), outputs.device)]
                self.keep(np.flatnonzero(~failed))
                if not len(self.places):
                    return
        tick, published, memory = self.tick, self.tick.published, self.memory
        memory.grow(tick.slots)
        at = self._upload(tick)
        sizes = largest(outputs)
        outputs = repaired(outputs, torch.isfinite(sizes))
        measured = [sizes]
        self._coarse_steps(at, memory[at["states"]], outputs)
        self._fine_steps(at, memory[at["states"]], outputs)
        self._boundaries(at)
        if published is not None:
            measured += self._changes(at, published)
            memory[at["into"]] = memory[at["source"]]
        numbers = read(torch.cat(measured, 1))
        self._check(np.isfinite(numbers[:, : len(tick.steps)]))
        if published is not None:
            self.published = published
            self.test.compare(published, numbers[:, len(tick.steps) :])
            self._accept(published)
        self.ticks += 1
        following = next(self._schedule, None)
        if following is not None:  # else all samples have ended
            self.tick = following

    def _upload(self, tick: Tick) -> dict[str, Tensor]:
        """Return all indices of a tick on the device."""
        steps, published = tick.steps[tick.moving], tick.published
        arrays = {name: np.array(getattr(tick, name), np.int64) for name in TICK_INDICES}
        arrays["moving_steps"] = steps
        if self.batch.recurrence.noise is not None:
            arrays["noise"] = (self.places[:, None] * self.batch.problem.steps + steps).reshape(-1)
        if published is not None:
            arrays |= {"source": published.source, "into": published.into}
            arrays["new"] = np.array([pair.new for pair in published.compared], np.int64)
            arrays["last"] = np.array([pair.last for pair in published.compared], np.int64)
        flat = upload(np.concatenate(list(arrays.values())), self.memory.rows.device)
        stops = np.cumsum([len(array) for array in arrays.values()])[:-1]
        return dict(zip(arrays, flat.tensor_split(stops.tolist()), strict=True))

    def _coarse_steps(self, at: dict[str, Tensor], x: Tensor, outputs: Tensor) -> None:
        """Put G of the runs that are at the start of their block into the slots of the blocks and of the runs."""
        first, block, memory, factors = at["first"], at["blocks"], self.memory, self._factors
        if not len(first):
            return
        x, outputs = x.index_select(1, first), outputs.index_select(1, first)
        prediction = combine(factors.prediction[block], x, outputs)
        memory[self.blocks + at["latest_blocks"]] = prediction.index_select(1, at["latest"])
        rows = [x, prediction]
        if self.solver.coarse == "two-step":
            rows.append(memory[self.blocks + (block - 1).clamp_(min=0)])
        noise = None if self.batch.recurrence.noise is None else memory[2 * self.blocks + block]
        coarse = combine(factors.coarse[block], *rows, noise=noise)
        memory[at["coarse"]] = coarse
        memory[at["latest_blocks"]] = coarse.index_select(1, at["latest"])
        if self.lagged:
            memory[at["prediction"]] = prediction

    def _fine_steps(self, at: dict[str, Tensor], x: Tensor, outputs: Tensor) -> None:
        """Take one step of the runs that go on, in place."""
        moving, memory = at["moving"], self.memory
        if not len(moving):
            return
        x, outputs = x.index_select(1, moving), outputs.index_select(1, moving)
        rows = [x, memory[at["before"]], outputs] if self.lagged else [x, outputs]
        noise = self.batch.noise
        if noise is not None:
            noise = noise.view(-1, noise.shape[2]).index_select(0, at["noise"]).view(x.shape)
        memory[at["states"].index_select(0, moving)] = combine(
            self._factors.step[at["moving_steps"]], *rows, noise=noise
        )
        if self.lagged:
            memory[at["before"]] = outputs

    def _boundaries(self, at: dict[str, Tensor]) -> None:
        """Put the boundary states in place that become known by a coarse step, or by a fine one and two coarse ones."""
        memory, swept, block = self.memory, at["swept"], at["corrected"]
        parts = [("swept_x", "corrected_x", "corrected_coarse", 0)]
        if self.lagged:
            parts.append(("swept_before", "corrected_before", "corrected_prediction", self.blocks))
        for sweep, end, coarse, first in parts:
            if len(swept):
                memory[at[sweep]] = memory[first + swept]
            if len(block):
                # F + (G_new - G_old), in this order: equal coarse steps cancel to the bit.
                memory[at[end]] = memory[at[end]] + (memory[first + block] - memory[at[coarse]])

    def _changes(self, at: dict[str, Tensor], published: Publication) -> list[Tensor]:
        """Return norms of changes (S, C), of what they lead to (S, C), and the mean absolute change of the sample."""
        if not published.compared:
            return []
        new, last = self.memory[at["new"]], self.memory[at["last"]]
        change = new - last
        sample = [change[:, -1:].abs().mean(2)] if self.solver.rule == "srds" else []
        return [torch.linalg.vector_norm(change, dim=2), torch.linalg.vector_norm(new, dim=2), *sample]

    # -- decide ----------------------------------------------------------------------------------------------------

    def _check(self, finite: NDArray[np.bool_]) -> None:
        """Raise if an output (S, R) at the frontier is not finite; elsewhere note it."""
        if finite.all():
            return
        if self.tick.frontier and not finite[:, 0].all():
            raise self.batch.output_error(int(self.places[np.argmin(finite[:, 0])]), int(self.tick.steps[0]))
        for row, p in enumerate(self.tick.iterations):
            self.test.nonfinite_iterations[:, p : p + 2] |= ~finite[:, row, None]

    def _accept(self, published: Publication) -> None:
        """Accept what is exact by now, and the sample if it passes the stop test."""
        batch, places, finished = self.batch, self.places, np.zeros(len(self.places), bool)
        for p, _ in published.samples:
            finished |= (p >= self.limit) | self.test.passed(p)
            if p == self.blocks:
                self.test.error = np.zeros(len(places))
        accepted = np.where(finished, batch.problem.steps, self.bounds[published.front])
        batch.accept(places, accepted - batch.accepted[places], self.memory.rows[:, :1], self.test.error)
        for row in np.flatnonzero(finished):
            place = int(places[row])
            batch.finished[place], batch.results[place] = True, self.memory.rows[row, published.sample].clone()

    def estimate(self, place: int) -> Tensor:
        """Return (dim,) the latest sample; before the first, the prediction of the farthest coarse step, or its end."""
        farthest, slot = self.published.farthest, self.published.farthest_slot
        if 0 < farthest < self.blocks and self.batch.problem.coefficients.x0_from_input is not None:
            slot = self.blocks + farthest - 1
        return self.memory.rows[int(np.searchsorted(self.places, place)), slot]

    # -- stop and resume -------------------------------------------------------------------------------------------

    def state(self, place: int) -> dict[str, Any]:
        """Return the rows of a sample, and what is known of its error."""
        row = int(np.searchsorted(self.places, place))
        return {"ticks": np.array(self.ticks), "rows": self.memory.rows[row], **self.test.state(row)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the state of the only sample: its schedule follows from the number of ticks."""
        self.ticks = int(state["ticks"])
        self.memory.rows = state["rows"].to(self.memory.rows)[None].clone()
        self.test.load(state)
        schedule, self._schedule = self._new_schedule()
        self.published = schedule.opening
        for tick in islice(self._schedule, self.ticks):
            self.published = tick.published or self.published
        self.tick = next(self._schedule)


def repaired(outputs: Tensor, finite: Tensor) -> Tensor:
    """Return outputs (S, R, dim) where the last finite row before it replaces each that is not (S, R).

    Zeros stand where there is none. The device does it without being read, so that a round is read only once.
    """
    samples, rows, dim = outputs.shape
    number = torch.arange(samples * rows, device=outputs.device).view(samples, rows)
    nearest = torch.where(finite, number, -1).cummax(1).values
    chosen = outputs.reshape(-1, dim).index_select(0, nearest.clamp(min=0).view(-1)).view(outputs.shape)
    return chosen.masked_fill_((nearest < 0)[..., None], 0)


def folded_noise(local: Coefficients, bounds: Sequence[int], noise: Tensor) -> Tensor:
    """Return (S, M, dim) what a coarse step over each block adds, from the noise (S, N, dim) of its steps."""
    weight, _ = frozen_coefficients(local)
    first, lengths = np.array(bounds[:-1]), np.diff(bounds)
    folded = noise.new_zeros(len(noise), len(lengths), noise.shape[2])
    for offset in range(max(lengths)):
        block = np.flatnonzero(offset < lengths)
        step, at = first[block] + offset, upload(block, noise.device)
        added = noise.index_select(1, upload(step, noise.device))
        folded[:, at] = combine(upload(weight[step, None], noise), folded[:, at], noise=added)
    return folded


def frozen_coefficients(local: Coefficients) -> tuple[Array, Array]:
    """Return A and B of every step with the data prediction (else the output) instead of the output."""
    weight = local.output_weight.sum(1)
    if local.x0_from_input is None or local.x0_from_output is None:
        return local.state_weight, weight
    return local.state_weight - weight * local.x0_from_input / local.x0_from_output, weight / local.x0_from_output


class _Factors:
    """Factors of the fine and the coarse solver, on the device.

    Attributes:
        step: (N, 2 or 3) a step from (x, the output before in multistep samplers, the output).
        prediction: (M, 2) data prediction at the start of each block from (x, output).
        coarse: (M, 2 or 3) coarse step from (x, prediction here, with two steps also that at the boundary before).
    """

    def __init__(self, local: Coefficients, bounds: list[int], like: Tensor, *, two_step: bool) -> None:
        blocks, first = len(bounds) - 1, bounds[:-1]
        step = np.concatenate([local.state_weight[:, None], local.output_weight[:, ::-1]], 1)
        prediction = np.tile([0.0, 1.0], (blocks, 1))
        if local.x0_from_input is not None and local.x0_from_output is not None:
            prediction = np.stack([local.x0_from_input[first], local.x0_from_output[first]], 1)
        a, b = np.ones(blocks), np.zeros(blocks)
        state_weight, weight = frozen_coefficients(local)
        for j in range(blocks):
            for k in range(bounds[j], bounds[j + 1]):
                a[j], b[j] = state_weight[k] * a[j], state_weight[k] * b[j] + weight[k]
        coarse = np.stack([a, b], 1)
        if two_step:
            extrapolate = _extrapolation(local, bounds)
            coarse = np.stack([a, b * (1 + extrapolate), -b * extrapolate], 1)
        self.step, self.prediction, self.coarse = (upload(array, like) for array in (step, prediction, coarse))


def _extrapolation(local: Coefficients, bounds: list[int]) -> Array:
    """Return (M,) how far DPM-Solver++ 2M over the blocks extrapolates the prediction from the boundary before."""
    assert local.alpha is not None
    assert local.sigma is not None
    factors = np.zeros(len(bounds) - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        length = np.diff(np.log(local.alpha[bounds] / local.sigma[bounds]))
        factors[1:] = length[1:] / length[:-1] / 2
    factors[~np.isfinite(factors)] = 0.0
    return factors
