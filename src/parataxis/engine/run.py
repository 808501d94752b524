"""Carrying a solve out: one network call a round for all samples that have not ended.

A solver yields the states that it wants evaluated, the engine evaluates them and answers. A sample never depends on its
neighbours, and finished samples stop costing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices, upload
from ..checks import check_errors, check_generators, check_tolerance, check_whole
from ..samplers.recurrence import Recurrence
from ..samplers.sampler import Sampler
from ..solvers import as_solver
from ..solvers.base import Answer, Problem, Query, Solver
from ..solvers.batch import Batch
from .checkpoint import restore_run, run_state
from .rows import EvalBatch, expect, rounding_of
from .solution import Round, Solution

__all__ = ["Group", "Run", "Share", "answer_shares", "drive", "evaluation", "shares_of", "start"]


UNCERTAIN = "uncertain: every step is accepted, but the estimated error is above the tolerance"
NOTHING = Answer(np.zeros(0, np.int64), torch.zeros(0, 0, device="cpu"))  # the solver is to look at its samples again


class Group:
    """Samples that one solver solves side by side, with its pending query.

    Attributes:
        batch: Their tensors.
        runs: By their places.
        slots: (S,) what the samples are called in :class:`EvalBatch`; their places, except in streams.
        partial: Outputs of places whose rows have been evaluated in part.
        changed: Whether samples have ended or have been added since the solver has last looked.
    """

    def __init__(self, sampler: Sampler | None, batch: Batch, solver: Solver, dtype: torch.dtype) -> None:
        self.batch, self.solver, self.dtype = batch, solver, dtype
        self.transform = None if sampler is None else sampler.transform
        self.shape = tuple(batch.recurrence.start.shape[1:])
        self.runs: dict[int, Run] = {}
        self.slots = np.arange(len(batch))
        self.partial: dict[int, list[Tensor]] = {}
        self.changed = False
        self._query: Query | None = None
        self._first: Indices | None = None
        self._queries = solver.solve(batch)

    def ask(self) -> Query:
        """Return what the solver waits for."""
        if self._query is None:
            self._begin_round(next(self._queries))
        elif self.changed:
            self._begin_round(self._queries.send(NOTHING))
        self.changed = False
        assert self._query is not None
        return self._query

    def _begin_round(self, query: Query) -> None:
        if self.transform is not None and query.states is None:  # it needs what the network was given
            query = query._replace(states=query.x.clone())
        self._query, self._first = query, None

    def first_row(self, place: int) -> int:
        """Return where the rows of a place begin in the query."""
        if self._first is None:
            self._first = np.cumsum(self.ask().width) - self.ask().width
        return int(self._first[place])

    def rows_or_all(self, indices: list[Indices]) -> Indices | None:
        """Return the rows, or None if these are all of the query in their order."""
        rows = indices[0] if len(indices) == 1 else np.concatenate(indices)
        count = len(self.ask().step)
        return None if len(rows) == count and bool((rows == np.arange(count)).all()) else rows

    def rows(self, rows: Indices | None) -> EvalBatch:
        """Return rows of the query as the network is given them."""
        query = self.ask()
        x, step, sample = query.x, query.step, query.sample
        if rows is not None:
            x, step, sample = x.index_select(0, upload(rows, x.device)), step[rows], sample[rows]
        x = x.view(-1, *self.shape).to(self.dtype)
        return EvalBatch(x, torch.from_numpy(step), torch.from_numpy(self.slots[sample]))

    def take(self, share: Share, held: list[Tensor]) -> None:
        """Take the outputs of a share, (R, *shape); the solver goes on with the places that are through.

        Args:
            share: What was evaluated.
            held: The outputs, which are taken out: nobody on the way holds them once the solver has copied them.
        """
        query, outputs = self.ask(), held.pop()
        if not self.batch.output_rounding:
            self.batch.output_rounding = rounding_of(outputs)
        outputs = (outputs.detach() if outputs.requires_grad else outputs).to(self.batch.start)
        if self.transform is not None:
            states, step = query.states, query.step
            assert states is not None
            if share.rows is None:  # what the network was given is done with
                self._query = query = query._replace(x=states)
            else:
                states, step = states.index_select(0, upload(share.rows, states.device)), step[share.rows]
            outputs = self.transform(step, states.view(outputs.shape), outputs)
            del states
        outputs, widths = outputs.flatten(1), query.width
        del query
        if share.rows is None and not self.partial:
            answer = Answer(None, outputs)
            del outputs
            self._send(answer, widths)
            return
        through, ready, first = [], [], 0
        for place, count, last in share.parts:
            parts = [*self.partial.pop(place, []), outputs[first : first + count]]
            first += count
            if last:
                through.append(place)
                ready += parts
            else:
                # A copy: what a call returns may lie in memory that the next call writes to.
                self.partial[place] = [*parts[:-1], parts[-1].clone()]
        if through:
            self._send(Answer(np.array(through), torch.cat(ready)), widths)

    def _send(self, answer: Answer, widths: Indices) -> None:
        places, accepted, error = answer.sample, self.batch.accepted.copy(), self.batch.error.copy()
        self._query = None  # so that its rows are gone once the solver makes others
        self._begin_round(self._queries.send(answer))
        answered = np.flatnonzero(widths).tolist() if places is None else places.tolist()
        ended = [place for place in answered if self.batch.finished[place]]
        if ended:
            self.batch.check_results(ended)
        for place in answered:
            self.runs[place].took_round(Round(int(accepted[place]), int(widths[place]), float(error[place])))
        if not self.batch.refilled and all(run.done for run in self.runs.values()):
            self.close()

    def close(self) -> None:
        """Let go of the solver's memory at once, without waiting for the garbage collector."""
        self._queries.close()
        self.batch.memory = None


class Run:
    """One sample being solved: ask for ``query``, evaluate it, give the ``answer``, until ``done``.

    Made by :func:`start`. :func:`drive` drives many runs with one network call a round; alone, a run serves a loop that
    belongs to someone else::

        while not run.done:
            run.answer(network(run.query.x, times[run.query.step]))
        run.solution.x
    """

    def __init__(self, group: Group, place: int) -> None:
        """See :func:`start`."""
        self.place = place  # in its batch
        self.number = place  # of the sample, or of the job
        self.rounds = 0
        self.evaluations = 0
        self.peak_width = 0
        self.history: list[Round] = []
        self.group = group
        self._reason = ""
        self._accepted, self._error = 0, 0.0
        self._final: Tensor | None = None
        self._trajectory: Tensor | None = None
        group.runs[place] = self

    def __repr__(self) -> str:
        """Return how far it has come."""
        return f"Run(sample {self.number}: {self.accepted} of {self.problem.steps} steps, {self._reason or 'running'})"

    @property
    def problem(self) -> Problem:
        """What is solved."""
        return self.group.batch.problem

    @property
    def solver(self) -> Solver:
        """How it is solved."""
        return self.group.solver

    @property
    def done(self) -> bool:
        """Whether the run has ended."""
        return bool(self._reason)

    @property
    def accepted(self) -> int:
        """How many steps are accepted."""
        return self._accepted if self.done else int(self.group.batch.accepted[self.place])

    @property
    def error(self) -> float:
        """Estimated relative error of the sample that has been accepted so far."""
        return self._error if self.done else float(self.group.batch.error[self.place])

    @property
    def query(self) -> EvalBatch:
        """The rows that the network is asked for next."""
        return evaluation(shares_of([self]))

    def answer(self, outputs: Tensor) -> None:
        """Give the network's outputs for ``query``, (R, *shape)."""
        answer_shares(shares_of([self]), outputs)

    def stop(self, reason: str) -> None:
        """End the run before its solver does; the solution holds the present estimate."""
        if not self.done:
            self._end(reason, self.estimate)

    @property
    def estimate(self) -> Tensor:
        """(*shape) the present guess of the sample: its state if the window reaches it, else the data prediction.

        Where that is unknown, it is one coarse step from the farthest evaluation, and in multistep samplers the state
        there.
        """
        batch = self.group.batch
        if self._final is not None:
            row = self._final
        else:
            row = batch.start[self.place] if batch.memory is None else batch.memory.estimate(self.place)
        return row.view(self.group.shape).clone()

    @property
    def solution(self) -> Solution:
        """The result; if the run has not ended, what is known now."""
        converged = self._reason == "converged"
        trajectory = self._trajectory
        return Solution(
            x=self.estimate,
            converged=converged,
            reason=self._reason or "running",
            rounds=self.rounds,
            evaluations=self.evaluations,
            steps=self.problem.steps,
            solver=self.solver,
            problem=self.problem,
            peak_width=self.peak_width,
            error_estimate=self.error if converged or self._reason == UNCERTAIN else float("inf"),
            history=tuple(self.history),
            trajectory=None if trajectory is None else trajectory.view(-1, *self.group.shape),
            residuals=self._residuals(),
        )

    def _residuals(self) -> Array | None:
        """Return (rounds, N) what :class:`Solution` says of the residuals, or None if they were not kept."""
        batch, problem = self.group.batch, self.problem
        if batch.residuals is None or not batch.residuals[self.place]:
            return None
        known = batch.residuals[self.place]
        norms = np.full((len(self.history), problem.steps), np.nan)
        # Of a run that went on from a checkpoint, only the rounds since then are known.
        for row, (first, values) in zip(norms[len(norms) - len(known) :], known, strict=True):
            row[first : first + len(values)] = values
        return np.asarray(norms / (problem.coefficients.rms[1:] * np.sqrt(problem.dim)))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the run is between two rounds, to go on with it in another process, to the same bits.

        A few times the window in size, whatever the number of rounds. :func:`parataxis.save_runs` writes all runs of a
        batch to a file.

        Returns:
            Tensors by names, copies; for :meth:`load_state_dict`, or for safetensors.

        Raises:
            ValueError: For runs of a stream or of a recorded loop.
        """
        return run_state(self)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from where a run was when :meth:`state_dict` was called.

        Args:
            state: Of a run that was started with the same arguments.

        Raises:
            ValueError: If it was started with others, with what differs, or if this run has begun already.
        """
        restore_run(self, state)

    @property
    def slot(self) -> int:
        """What the sample is called in :class:`EvalBatch`."""
        return int(self.group.slots[self.place])

    @property
    def shares_memory(self) -> bool:
        """Whether samples that begin later can be solved in the same memory."""
        return bool(getattr(self.solver, "adopts", False))

    def begin_stream(self, number: int, slot: int, generator: torch.Generator | None) -> None:
        """Become the first run of a stream: others will take the places of what the caller owns."""
        self.group.batch.copy_inputs(generator)
        self._name(number, slot)

    def join(self, number: int, slot: int, recurrence: Recurrence, generator: torch.Generator | None, room: int) -> Run:
        """Start a run for one more sample in the same memory, which grows by doubling up to ``room`` places."""
        group = self.group
        batch = group.batch
        free = np.flatnonzero(~batch.active)
        place = int(free[0]) if len(free) else len(batch)
        if place == len(batch):
            batch.grow(min(2 * place, max(room, place + 1)))
            group.slots = np.append(group.slots, np.zeros(len(batch) - len(group.slots), np.int64))
        batch.add(place, recurrence, generator)
        group.changed = True
        run = Run(group, place)
        run._name(number, slot)
        return run

    def _name(self, number: int, slot: int) -> None:
        self.number = self.group.batch.numbers[self.place] = number
        self.group.slots[self.place] = slot

    def took_round(self, entry: Round) -> None:
        """Count a round, and end if the sample is there."""
        batch = self.group.batch
        self.rounds += 1
        self.evaluations += entry.width
        self.peak_width = max(self.peak_width, entry.width)
        self.history.append(entry)
        failure = batch.failures.get(self.place)
        if failure is not None:
            self._end(f"failed: {failure}", batch.results[self.place])
        elif batch.finished[self.place]:
            if batch.trajectory is not None and batch.accepted[self.place] == self.problem.steps:
                self._trajectory = (
                    batch.trajectory[self.place].clone() if batch.refilled else batch.trajectory[self.place]
                )
            self._end("converged" if batch.bounded[self.place] else UNCERTAIN, batch.results[self.place])

    def _end(self, reason: str, sample: Tensor) -> None:
        batch = self.group.batch
        self._accepted, self._error = int(batch.accepted[self.place]), float(batch.error[self.place])
        self._reason, self._final = reason, sample.flatten()
        batch.active[self.place] = False
        self.group.changed = True


def start(
    sampler: Sampler | None,
    recurrence: Recurrence,
    solver: Solver,
    *,
    tolerance: float = 1e-2,
    guess: Tensor | None = None,
    dtype: torch.dtype | None = None,
    keep_trajectory: bool = False,
    keep_residuals: bool = False,
    frozen_steps: int = 0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    rounding: float | None = None,
    errors: Literal["raise", "return"] = "raise",
) -> list[Run]:
    """Start one run for every sample of a recurrence.

    Args:
        sampler: The equation; its ``output`` is applied to what the network returns. None where the recurrence is all.
        recurrence: From ``sampler.recurrence(noise)``; its dtype is that of the states.
        solver: How to solve it, or its name.
        tolerance: Relative error allowed in each final sample, >= 0; with 0 it is the sequential sample up to rounding.
        guess: (B, N + 1, *shape) trajectories to start from, as ``Solutions.trajectory`` returns them; the first state
            is always the recurrence's.
        frozen_steps: Leading states of the guess that stay as they are: windowed solvers start behind them. That is
            fast, and not the sequential sample of the new condition, but a variation between the two (ParaTAA); needs a
            guess.
        dtype: What the network is given; default the states' own.
        keep_trajectory: Keep every accepted state for ``Solution.trajectory``.
        keep_residuals: Keep the residuals of every round for ``Solution.residuals``.
        generator: Seeds the random stream of every run, if its solver draws: one for the batch, one for each sample, or
            None for torch's own.
        rounding: Unit roundoff of the network, where it works in another dtype than it is given; default: of ``dtype``.
        errors: ``raise``, or ``return`` to end only the sample whose output is not finite: its reason is then
            ``failed:`` with the error.

    Raises:
        ValueError: For a negative tolerance, a guess of the wrong shape or not finite, or a solver that does not
            support this recurrence (with the reason).
    """
    solver = as_solver(solver)
    check_tolerance(tolerance)
    check_errors(errors)
    check_generators(generator, len(recurrence.start))
    check_whole("frozen_steps", frozen_steps, 0)
    local = recurrence.coefficients
    reason = solver.unsupported(local)
    if reason is not None:
        raise ValueError(f"{solver!r} does not support this sampler: {reason}")
    if not getattr(solver, "goes_forward", False):
        recurrence = recurrence.stored()
    states = recurrence.start
    if guess is not None:
        guess = _checked_guess(guess, recurrence)
    if frozen_steps and (guess is None or not 0 < frozen_steps < local.steps):
        raise ValueError(
            f"frozen_steps={frozen_steps!r} keeps states of a guess: pass one, and 0 <= frozen_steps < N = "
            f"{local.steps}."
        )
    if frozen_steps and (not hasattr(solver, "window") or local.lags):
        raise ValueError(
            "frozen_steps needs a solver with a window and a one-step sampler: choose such, or frozen_steps=0."
        )
    dtype = dtype or states.dtype
    problem = Problem(
        local,
        float(tolerance),
        states[0].numel(),
        guess is not None,
        torch.finfo(dtype).eps / 2 if rounding is None else rounding,
        frozen_steps,
        transformed=sampler is not None and sampler.transform is not None,
    )
    batch = Batch(
        problem,
        recurrence,
        guess,
        generator,
        keep_trajectory=keep_trajectory,
        keep_residuals=keep_residuals,
        returns_errors=errors == "return",
    )
    group = Group(sampler, batch, solver, dtype)
    return [Run(group, place) for place in range(len(states))]


def _checked_guess(guess: Any, recurrence: Recurrence) -> Tensor:
    """Return a guess as (B, N + 1, dim), with the recurrence's own first states."""
    states = recurrence.start
    expected = (len(states), recurrence.coefficients.steps + 1, *states.shape[1:])
    got = tuple(guess.shape) if isinstance(guess, Tensor) else type(guess).__name__
    if got != expected:
        raise ValueError(
            f"guess must have the shape (B, N + 1, *shape) = {expected}, got {got}: pass the `trajectory` of a run "
            "with the same steps and shape, made with keep_trajectory=True."
        )
    copy: Tensor = guess.to(states).clone()
    copy[:, 0] = states
    if not bool(torch.isfinite(copy).all()):
        raise ValueError("guess holds NaN or Inf: pass a trajectory whose states are all finite.")
    return copy.flatten(2)


class Share(NamedTuple):
    """Rows of a group's pending query that are evaluated now.

    Attributes:
        group: Whose query.
        rows: Their numbers in the query; None for all.
        parts: (place, rows now, whether the place is through then) in the order of the rows; not looked at for all.
    """

    group: Group
    rows: Indices | None
    parts: list[tuple[int, int, bool]]

    @property
    def steps(self) -> Indices:
        """(R,) the steps of the rows."""
        steps = self.group.ask().step
        return steps if self.rows is None else steps[self.rows]

    @classmethod
    def whole(cls, group: Group) -> Share:
        """Return all of a pending query, of whose rows none has been evaluated."""
        return cls(group, None, [])


def shares_of(runs: Sequence[Run], limit: int | None = None) -> list[Share]:
    """Return what is left to evaluate of the pending queries of runs, in their order, but at most ``limit`` rows."""
    left = np.inf if limit is None else limit
    shares: dict[int, Share] = {}
    indices: dict[int, list[Indices]] = {}
    for run in runs:
        group, query = run.group, run.group.ask()
        width = int(query.width[run.place])
        evaluated = sum(len(part) for part in group.partial.get(run.place, []))
        count = int(min(width - evaluated, left))
        if count <= 0:
            continue
        left -= count
        share = shares.setdefault(id(group), Share(group, None, []))
        share.parts.append((run.place, count, evaluated + count == width))
        first = group.first_row(run.place) + evaluated
        indices.setdefault(id(group), []).append(np.arange(first, first + count))
    return [share._replace(rows=share.group.rows_or_all(indices[key])) for key, share in shares.items()]


def evaluation(shares: Sequence[Share]) -> EvalBatch:
    """Return the rows of shares, in their order."""
    batches = [share.group.rows(share.rows) for share in shares]
    if len(batches) == 1:
        return batches[0]
    return EvalBatch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def answer_shares(shares: Sequence[Share], outputs: Tensor) -> None:
    """Give the network's outputs for the rows of shares, and let their solvers go on where a sample is through."""
    group, steps = shares[0].group, [share.steps for share in shares]
    if len(shares) == 1:
        held = [expect(outputs, (len(steps[0]), *group.shape), group.dtype, steps[0])]
        del outputs
        group.take(shares[0], held)
        return
    counts = [len(part) for part in steps]
    outputs = expect(outputs, (sum(counts), *group.shape), group.dtype, np.concatenate(steps))
    for share, part in zip(shares, torch.split(outputs, counts), strict=True):
        share.group.take(share, [part])


def drive(
    runs: Sequence[Run],
    evaluate: Callable[[EvalBatch], Tensor],
    *,
    on_round: Callable[[Sequence[Run]], None] | None = None,
    stop: Callable[[Run], bool] | None = None,
) -> Iterator[int]:
    """Drive many runs side by side: one call of ``evaluate`` a round for all that have not ended.

    A sample never depends on its neighbours; finished samples stop costing.

    Args:
        runs: From :func:`start`; all of one call.
        evaluate: The network: rows to outputs of the same shape and dtype as ``batch.x``.
        on_round: Called after every round with all runs; ``run.estimate`` is the present guess of its sample.
        stop: Asked after every round for each unfinished run; true ends it with its present estimate.

    Yields:
        The number of rounds so far, after each round.

    Raises:
        ValueError: For runs of several calls.
        OutputError: If the network returns a wrong type, shape or dtype, or NaN or Inf for an accepted input.
    """
    if len({run.group for run in runs}) > 1:
        raise ValueError("runs that are driven together must be of one call of start: make one recurrence of all.")
    rounds, complete = 0, len(runs) > 0 and len(set(runs)) == len(runs[0].group.runs)
    while active := [run for run in runs if not run.done]:
        group = active[0].group
        # All rows of a query are wanted, unless somebody else holds runs of the call, or has answered some in part.
        shares = [Share.whole(group)] if complete and not group.partial else shares_of(active)
        answer_shares(shares, evaluate(evaluation(shares)))
        rounds += 1
        if on_round is not None:
            on_round(runs)
        for run in active:
            if stop is not None and not run.done and stop(run):
                run.stop(f"stopped: {getattr(stop, '__name__', '') or repr(stop)}")
        yield rounds
