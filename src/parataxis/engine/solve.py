r"""Solving: a solver asks, a driver answers.

A solver is a generator written for one trajectory. It never touches a tensor: the driver keeps the rows of
its memory (states, outputs, whatever it needs), the solver names them by their slots and yields what is to
be done with them. So the tensor work of all samples of a batch is done at once, and a solver is a
deterministic function of the few numbers that come back.

=====================  ===========================================================  =======================
request                meaning                                                      answer
=====================  ===========================================================  =======================
:class:`Memory`        give me so many rows                                        None
:class:`Load`          put rows of the first guess into slots                      None
:class:`Combine`       put linear combinations of rows (and step noise) into slots  None
:class:`Inner`         inner products of rows, or of differences of rows           (R, k, k) float64
:class:`Distance`      mean absolute difference of rows                             (R,) float64
:class:`Draw`          uniform numbers, and new noise for steps                     (k,) float64
:class:`Query`         evaluate the network at these points, together: one round   (R,) finite or not
:class:`Response`      what trajectory follows from these outputs and slopes?      (R, 2) squared norms
:class:`Settle`        these states are final                                      None
=====================  ==========================================================  =======================

A solver returns the slot of the sample. Only a Query is a round and costs evaluations of the network.

Numbers that come back are read from the device, which has to be waited for. So a solver yields what it can ask at once
as a list: the requests are carried out in their order, and then all their numbers are read together. A Query may only
be the first of a list. If outputs are not finite, what stands behind it is done again once they are replaced; so it
must not write over what it reads, nor draw or settle.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Answering, Read, Slots, upload, uploads
from ..checks import check_generators, check_solver, check_tolerance, check_whole
from ..samplers.coefficients import Coefficients
from ..samplers.recurrence import Part, Recurrence, Response, Steps
from ..samplers.sampler import Sampler
from .rows import EvalBatch, OutputError, expect

__all__ = [
    "Combine",
    "Distance",
    "Draw",
    "Inner",
    "Load",
    "Memory",
    "Pool",
    "Problem",
    "Query",
    "Request",
    "Response",
    "Round",
    "Run",
    "Settle",
    "Solution",
    "Solver",
    "start",
    "drive",
]

Array = NDArray[np.float64]


class Memory(NamedTuple):
    """Give me ``rows`` rows, all zero; asked once, first."""

    rows: int


class Load(NamedTuple):
    """Put the states ``levels`` of the first guess into the slots ``into``; level 0 is the initial state."""

    levels: Slots
    into: Slots


class Combine(NamedTuple):
    """Put sum_a factors[:, a] rows[a] into the slots ``into``, summed from the last a to the first.

    Attributes:
        rows: k arrays of slots, (R,) each.
        factors: (R, k).
        into: (R,) slots; they may be among ``rows``.
        noise: (R,) points whose noise C_i z_i is added, or -1 for none.
    """

    rows: tuple[Slots, ...]
    factors: Array
    into: Slots
    noise: Slots | None = None


class Inner(NamedTuple):
    """Measure all inner products of k vectors, row by row: (R, k, k).

    Vector a is rows[a], or rows[a] - less[a]: differences are taken first, so that small ones keep their digits. The
    sums are the states' own matrix products.

    Attributes:
        rows: k arrays of slots, (R,) each.
        less: As many, or None.
    """

    rows: tuple[Slots, ...]
    less: tuple[Slots, ...] | None = None


class Distance(NamedTuple):
    """Measure the mean of |left - right| of two rows; slots, (R,) each."""

    left: Slots
    right: Slots


class Draw(NamedTuple):
    """Draw from the run's own random stream, which the generator seeds when it is first asked for.

    Attributes:
        uniforms: k, how many numbers in (0, 1] to answer with.
        noise: (R,) points whose noise C_i z_i is drawn anew, for every later request.
    """

    uniforms: int
    noise: Slots


class Query(NamedTuple):
    """Evaluate these points together: one round.

    Attributes:
        point: (R,) which evaluations of the loop.
        states: (R,) slots of the network inputs.
        outputs: (R,) slots that take the outputs.
        settled: How many leading rows have a settled input: a non-finite output there is an error; elsewhere it
            is replaced by the output of the row before and reported.
    """

    point: Slots
    states: Slots
    outputs: Slots
    settled: int


class Settle(NamedTuple):
    """The states up to level ``front`` are final.

    Attributes:
        accepted: The new front.
        states: Slots of the states behind the old front, up to the new one.
        error: Estimated relative error of the final sample that has been accepted so far.
        estimate: Slot of the present guess of the sample; where there is none, (point, state slot, output slot) of the
            farthest evaluation, which predicts it.
    """

    accepted: int
    states: Slots
    error: float
    estimate: int | tuple[int, int, int]


Request = Memory | Load | Combine | Inner | Distance | Draw | Query | Response | Settle

Asking = Generator[Request | list[Request], Any, int]


@dataclass(frozen=True, eq=False)
class Problem:
    """What a solver knows of one trajectory.

    Attributes:
        coefficients: The coefficients of the table, with schedule knowledge where there is any.
        tolerance: Relative error allowed in the final sample.
        dim: Number of elements of a state.
        guessed: Whether :class:`Load` has a trajectory to offer.
        rounding: Unit roundoff of the network's dtype.
        frozen: Level that the guess is settled up to.
        strides: How many points apart the first rounds evaluate; see :class:`parataxis.CoarseToFine`.
        transformed: Whether outputs are transformed (clipped) before they enter the table.
    """

    coefficients: Coefficients
    tolerance: float
    dim: int
    guessed: bool
    rounding: float
    frozen: int = 0
    strides: tuple[int, ...] = ()
    transformed: bool = False

    @property
    def steps(self) -> int:
        """N, the number of levels."""
        return self.coefficients.steps


class Solver(Protocol):
    """A frozen dataclass of options, callable on a problem."""

    def __call__(self, problem: Problem) -> Asking:
        """Solve one trajectory; yield requests, return the slot of the sample."""
        ...

    def refuses(self, local: Coefficients) -> str | None:
        """Return why this solver cannot work on such a table, or None."""
        ...


class Round(NamedTuple):
    """One round of one run: the front before it, its width, and the error accepted so far, inf where it is unknown."""

    accepted: int
    width: int
    error: float


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of one run.

    Attributes:
        x: (*shape) the sample, or the best guess of it if the run ended early.
        converged: Whether the solver's own test was passed.
        reason: Why the run ended: ``converged``, ``interrupted``, ``stopped:`` with the rule that ended it, or ``not
            started``, if it was interrupted before it began.
        rounds: Network calls that waited for one another.
        evaluations: Levels evaluated.
        steps: N.
        solver: How it was solved.
        problem: What was solved.
        peak_width: Most levels of this sample in one round.
        error_estimate: Estimated relative error of ``x`` to the sequential sample; inf unless converged, as nothing is
            known of the error then. Solvers of :data:`parataxis.EXACT_IN_DISTRIBUTION` say 0: ``x`` has exactly the law
            of the sequential loop's samples, but it is another sample than the loop's from the same noise.
        history: One entry a round.
        trajectory: (N + 1, *shape) every state, the sample last; only with ``keep_trajectory=True``, if converged, and
            from solvers that settle every state (not parareal).
    """

    x: Tensor
    converged: bool
    reason: str
    rounds: int
    evaluations: int
    steps: int
    solver: Solver
    problem: Problem
    peak_width: int
    error_estimate: float
    history: tuple[Round, ...]
    trajectory: Tensor | None = None

    @property
    def nfe_ratio(self) -> float:
        """Evaluations over N: 1 for the sequential loop."""
        return self.evaluations / self.steps


class _Batch:
    """The tensors of runs that share a table: their rows of memory and their first guess."""

    def __init__(
        self,
        sampler: Sampler | None,
        table: Recurrence,
        guess: Tensor | None,
        dtype: torch.dtype,
        generator: torch.Generator | Sequence[torch.Generator] | None,
    ) -> None:
        self.sampler, self.table, self.dtype = sampler, table, dtype
        self.generator: Any = generator  # one for the batch, or one for each sample
        self.noise = table.noise  # the caller's: replaced by a copy before it is changed
        self.streams: dict[int, np.random.Generator] = {}
        self.shape = tuple(table.start.shape[1:])
        self.start = table.start.detach().reshape(len(table.start), -1)
        self.guess = None if guess is None else guess.reshape(-1, self.start.shape[1])
        self.stride = 0
        self.rows = self.start[:0]
        self.steps: Steps | None = None  # of Responses without slopes
        self.grams: list[Array] = []  # and what these were answered with

    def allocate(self, rows: int) -> None:
        if rows != self.stride:
            self.stride = rows
            self.rows = self.start.new_zeros(len(self.start) * rows + 1, self.start.shape[1])

    def own(self, generator: torch.Generator | None) -> None:
        """Take copies of what the caller owns, as other samples will take its place."""
        self.generator = {0: generator}
        self.start = self.start.clone()
        noise = None if self.table.noise is None else self.table.noise.clone()
        self.table = replace(self.table, start=self.start.view(-1, *self.shape), noise=noise)
        self.noise = None

    def grow(self, count: int) -> None:
        """Make room for so many samples."""
        start, noise, rows = self.start, self.table.noise, self.rows
        self.start = torch.cat([start, start.new_empty(count - len(start), start.shape[1])])
        if noise is not None:
            noise = torch.cat([noise, noise.new_empty(count - len(noise), *noise.shape[1:])])
        self.table = replace(self.table, start=self.start.view(-1, *self.shape), noise=noise)
        self.rows = rows.new_zeros(count * self.stride + 1, rows.shape[1])
        self.rows[: len(rows)] = rows

    def enter(self, place: int, table: Recurrence, generator: torch.Generator | None) -> None:
        """Put the sample of a table of its own into a place that is free."""
        self.rows[place * self.stride : (place + 1) * self.stride] = 0
        self.start[place] = table.start[0].flatten()
        if self.table.noise is not None and table.noise is not None:
            self.table.noise[place] = table.noise[0]
        self.streams.pop(place, None)
        self.generator[place] = generator

    def gather(self, slots: Tensor) -> Tensor:
        return self.rows.index_select(0, slots)

    def taken(self, asks: Sequence[Response]) -> Steps | None:
        """Return the steps that were taken for these Responses, if they were for these and no others."""
        steps, grams, self.steps, self.grams = self.steps, self.grams, None, []
        same = len(grams) == len(asks) and all(ask.gram is gram for ask, gram in zip(asks, grams, strict=True))
        return steps if same else None

    def stream(self, sample: int) -> np.random.Generator:
        if sample not in self.streams:
            given = self.generator
            if given is None or isinstance(given, torch.Generator):
                seeds = _seeds(given, len(self.start))
                self.streams = {index: np.random.default_rng(seed) for index, seed in enumerate(seeds)}
            else:
                self.streams[sample] = np.random.default_rng(_seeds(given[sample], 1)[0])
        return self.streams[sample]

    def renew(self, steps: Tensor, rows: Tensor) -> None:
        noise = self.table.noise
        assert noise is not None
        if noise is self.noise:
            noise = noise.clone()
            self.table = replace(self.table, noise=noise)
        noise.view(-1, rows.shape[1]).index_copy_(0, steps, rows)


def _seeds(generator: torch.Generator | None, count: int) -> list[int]:
    device = "cpu" if generator is None else generator.device
    seeds: list[int] = torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()
    return seeds


class Run:
    """One trajectory being solved: ask for ``query``, evaluate it, tell the ``answer``, until ``done``.

    Made by :func:`start`. :func:`together` drives many runs with one network call a round; alone, a run serves a loop
    that belongs to someone else::

        while not run.done:
            run.answer(network(run.query.x, times[run.query.point]))
        run.solution.x
    """

    def __init__(
        self, batch: _Batch, index: int, solver: Solver, problem: Problem, *, keep_trajectory: bool = False
    ) -> None:
        """Start the solver; see :func:`start`."""
        self.index = index  # the place in its batch
        self.number = index  # of the sample, or of the job
        self.problem = problem
        self.solver = solver
        self.accepted = 0
        self.rounds = 0
        self.evaluations = 0
        self.peak_width = 0
        self.error = 0.0
        self.history: list[Round] = []
        self.keep_trajectory = keep_trajectory
        self._batch = batch
        self._kept: Tensor | None = None
        if keep_trajectory:
            self._kept = batch.start.new_zeros(problem.steps + 1, batch.start.shape[1])
            self._kept[0] = batch.start[index]
        self._reason = ""
        self._slot: int | None = None
        self._settle: Settle | None = None
        self._finite: list[NDArray[np.bool_]] = []  # which outputs of the pending query are, as far as it is answered
        self._asking = solver(problem)
        self._ask(next(self._asking))

    @property
    def done(self) -> bool:
        """Whether the run has ended."""
        return bool(self._reason)

    @property
    def query(self) -> EvalBatch:
        """The rows that the network is asked for next."""
        _advance([self])
        return _merge(_shares([self]))

    def answer(self, outputs: Tensor) -> None:
        """Tell the network's outputs for ``query``, (R, *shape)."""
        _answer(_shares([self]), outputs)
        _advance([self])

    def stop(self, reason: str) -> None:
        """End the run before its solver does; the solution holds the present estimate."""
        if not self.done:
            self._reason = reason
            self._asking.close()

    @property
    def estimate(self) -> Tensor:
        """(*shape) the present guess of the sample: its row if the window reaches it, else the data prediction.

        Where that is unknown, it is one hop from the farthest evaluation, and in multistep tables the state there.
        """
        batch, table = self._batch, self._batch.table
        found = None if self._settle is None else self._settle.estimate
        if self._slot is not None:
            row = batch.rows[self._offset + self._slot]
        elif found is None:
            row = batch.start[self.index]
        elif isinstance(found, int):
            row = batch.rows[self._offset + found]
        else:
            point, state, output = found
            u, f = batch.rows[self._offset + state], batch.rows[self._offset + output]
            local = table.coefficients
            if local.x0_from_input is not None and local.x0_from_output is not None:
                row = local.x0_from_input[point] * u + local.x0_from_output[point] * f
            elif local.lags:
                row = u
            else:
                one = Recurrence(
                    local, u[None], None if table.noise is None else table.noise[self.index, None].flatten(2)
                )
                row = one.coarse_step(point, local.steps, u[None], f[None])[0]
        return row.view(batch.shape).clone()

    @property
    def solution(self) -> Solution:
        """The result; if the run has not ended, what is known now."""
        converged = self._reason == "converged"
        trajectory = None
        if self._kept is not None and converged:
            trajectory = self._kept.view(-1, *self._batch.shape)
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
            error_estimate=self.error if converged else float("inf"),
            history=tuple(self.history),
            trajectory=trajectory,
        )

    @property
    def _offset(self) -> int:
        return self.index * self._batch.stride

    def _ask(self, request: Request | list[Request]) -> None:
        """Take what the solver asks: a query, if that comes first, and what stands behind it."""
        self._listed = isinstance(request, list)
        self._asked = request if isinstance(request, list) else [request]
        self._query = self._asked[0] if isinstance(self._asked[0], Query) else None
        self._asked = self._asked[self._query is not None :]

    def _send(self, answers: list[Any]) -> None:
        try:
            self._ask(self._asking.send(answers if self._listed else answers[0]))
        except StopIteration as end:
            self._slot, self._query = end.value, None
            self._reason = "converged"

    def _settled(self, request: Settle) -> None:
        if self._kept is not None and len(request.states) != request.accepted - self.accepted:
            self._kept = None  # this solver does not keep every state
        if self._kept is not None and len(request.states):
            levels = slice(self.accepted + 1, request.accepted + 1)
            self._kept[levels] = self._batch.gather(upload(self._offset + request.states, self._kept.device))
        self.accepted, self.error, self._settle = request.accepted, request.error, request


def start(
    sampler: Sampler | None,
    table: Recurrence,
    solver: Solver,
    *,
    tolerance: float = 1e-2,
    guess: Tensor | None = None,
    dtype: torch.dtype | None = None,
    keep_trajectory: bool = False,
    frozen_steps: int = 0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    rounding: float | None = None,
) -> list[Run]:
    """Start one run for every sample of a table.

    Args:
        sampler: The equation; its ``output`` is applied to what the network returns. None where the table is all.
        table: From ``sampler.recurrence(noise)``; its dtype is that of the states.
        solver: How to solve it.
        tolerance: Relative error allowed in each final sample, >= 0; with 0 it is the sequential sample up to
            rounding.
        guess: (B, N + 1, *shape) trajectories to start from, as ``Solutions.trajectory`` returns them; the first state
            is always the table's.
        frozen_steps: Steps of the guess that stay as they are: windowed solvers start behind them. That is fast, and
            not the sequential sample of the new condition, but a variation between the two (ParaTAA); needs a guess.
        dtype: What the network is given; default the states' own.
        keep_trajectory: Keep every settled state for ``Solution.trajectory``.
        generator: Seeds the random stream of every run, if its solver draws: one for the batch, one for each sample, or
            None for torch's own.
        rounding: Unit roundoff of the network, where it works in another dtype than it is given; default: of ``dtype``.

    Raises:
        ValueError: For a negative tolerance, a guess of the wrong shape or not finite, or a solver that cannot work on
            this table (with the reason).
    """
    check_solver(solver)
    check_tolerance(tolerance)
    check_generators(generator, len(table.start))
    check_whole("frozen_steps", frozen_steps, 0)
    refusal = solver.refuses(table.coefficients)
    if refusal is not None:
        raise ValueError(f"{solver!r} cannot solve this sampler: {refusal}")
    states = table.start
    if guess is not None:
        expected = (len(states), table.coefficients.steps + 1, *states.shape[1:])
        given = tuple(guess.shape) if isinstance(guess, Tensor) else type(guess).__name__
        if given != expected:
            raise ValueError(
                f"guess must have the shape (B, N + 1, *shape) = {expected}, got {given}: pass the "
                "`trajectory` of a run with the same steps and shape, made with keep_trajectory=True."
            )
        guess = guess.to(states).clone()
        guess[:, 0] = states
        if not bool(torch.isfinite(guess).all()):
            raise ValueError("guess holds NaN or Inf: pass a trajectory whose states are all finite.")
    dtype = dtype or states.dtype
    batch = _Batch(sampler, table, guess, dtype, generator)
    if frozen_steps and (guess is None or not 0 < frozen_steps < table.coefficients.steps):
        raise ValueError(
            f"frozen_steps={frozen_steps!r} keeps states of a guess: pass one, and 0 <= frozen_steps < N = "
            f"{table.coefficients.steps}."
        )
    if frozen_steps and (not hasattr(solver, "window") or table.coefficients.lags):
        raise ValueError(
            "frozen_steps needs a solver with a window and a one-step sampler: choose such, or frozen_steps=0."
        )
    rounding = torch.finfo(dtype).eps / 2 if rounding is None else rounding
    problem = Problem(
        table.coefficients,
        float(tolerance),
        states[0].numel(),
        guess is not None,
        rounding,
        frozen_steps,
        transformed=sampler is not None and sampler.transform is not None,
    )
    return [Run(batch, index, solver, problem, keep_trajectory=keep_trajectory) for index in range(len(states))]


def _offsets(runs: Sequence[Run], slots: Sequence[Slots]) -> Slots:
    return np.concatenate([run._offset + some for run, some in zip(runs, slots, strict=True)])


def _read(tensors: Sequence[Tensor]) -> list[Array]:
    """Return numbers of the device as float64 on the CPU: the one place where a solve waits for the device."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu().double().numpy()
    found, first = [], 0
    for tensor in tensors:
        found.append(flat[first : first + tensor.numel()].reshape(tensor.shape))
        first += tensor.numel()
    return found


def _memory(batch: _Batch, runs: Sequence[Run], asks: Sequence[Any]) -> Answering[list[Any]]:
    yield []
    for ask in asks:
        batch.allocate(ask.rows)
    return [None] * len(runs)


def _load(batch: _Batch, runs: Sequence[Run], asks: Sequence[Any]) -> Answering[list[Any]]:
    rows, levels = batch.start, [np.zeros(1, np.int64)] * len(runs)
    if batch.guess is not None:
        rows, levels = batch.guess, [ask.levels for ask in asks]
    stride = len(rows) // len(batch.start)
    source = np.concatenate([run.index * stride + own for run, own in zip(runs, levels, strict=True)])
    into, chosen = yield [_offsets(runs, [ask.into for ask in asks]), source]
    batch.rows.index_copy_(0, into, rows.index_select(0, chosen))
    return [None] * len(runs)


def _combine(batch: _Batch, runs: Sequence[Run], asks: Sequence[Any]) -> Answering[list[Any]]:
    numbers = np.concatenate([ask.factors for ask in asks])
    terms = [_offsets(runs, [ask.rows[term] for ask in asks]) for term in range(numbers.shape[1])]
    plain = len(terms) == 1 and bool((numbers == 1).all())
    factors = [] if plain else [numbers[..., None]]
    noise, drawn = batch.table.noise, []
    if noise is not None and asks[0].noise is not None:
        point = np.concatenate([ask.noise for ask in asks])
        first = np.repeat([run.index * batch.table.coefficients.steps for run in runs], [len(ask.into) for ask in asks])
        places = np.flatnonzero(point >= 0)
        drawn = [places, (first + point)[places]] if len(places) else []

    into, *needed = yield [_offsets(runs, [ask.into for ask in asks]), *terms, *factors, *drawn]
    total = batch.gather(needed[len(terms) - 1])
    if factors:
        by = needed[len(terms)].unbind(1)
        total *= by[-1]
        for term in range(len(terms) - 2, -1, -1):
            total.addcmul_(batch.gather(needed[term]), by[term])
    if drawn:
        assert noise is not None
        total.index_add_(0, needed[-2], noise.view(-1, total.shape[1]).index_select(0, needed[-1]))
    batch.rows.index_copy_(0, into, total)
    return [None] * len(runs)


def _inner(batch: _Batch, runs: Sequence[Run], asks: Sequence[Any]) -> Answering[list[Any] | Read]:
    vectors = len(asks[0].rows)

    def slots(which: str) -> Slots:
        every = [_offsets(runs, [getattr(ask, which)[vector] for ask in asks]) for vector in range(vectors)]
        return np.stack(every, 1)

    stops = np.cumsum([len(ask.rows[0]) for ask in asks])
    count = int(stops[-1])
    # In two parts, so that the differences take no more than one window for each two vectors.
    parts = (slice(0, (count + 1) // 2), slice((count + 1) // 2, count))[: min(count, 2)]
    which = [slots("rows")] if asks[0].less is None else [slots("rows"), slots("less")]
    needed = yield [every[part].reshape(-1) for part in parts for every in which]
    if not count:
        return [np.zeros((0, vectors, vectors))] * len(runs)
    grams, given = [], iter(needed)
    for _ in parts:
        chosen = batch.gather(next(given))
        if len(which) == 2:
            chosen -= batch.gather(next(given))
        chosen = chosen.view(-1, vectors, chosen.shape[1])
        grams.append(torch.bmm(chosen, chosen.mT))
    return Read(torch.cat(grams), lambda found: np.split(found, stops[:-1]))


def _distance(batch: _Batch, runs: Sequence[Run], asks: Sequence[Any]) -> Answering[Read]:
    stops = np.cumsum([len(ask.left) for ask in asks])[:-1]
    left, right = yield [_offsets(runs, [ask.left for ask in asks]), _offsets(runs, [ask.right for ask in asks])]
    away = batch.gather(left)
    away -= batch.gather(right)
    return Read(away.abs_().mean(1), lambda found: np.split(found, stops))


def _draw(batch: _Batch, runs: Sequence[Run], asks: Sequence[Any]) -> Answering[list[Any]]:
    if batch.table.noise is None:
        raise ValueError("the table has no noise, though its steps add some: make it with sampler.recurrence(noise).")
    points = np.concatenate([ask.noise for ask in asks])
    if len(points):
        shapes = [(len(ask.noise), batch.rows.shape[1]) for ask in asks]
        drawn = [batch.stream(run.index).standard_normal(shape) for run, shape in zip(runs, shapes, strict=True)]
        first = np.repeat(
            [run.index * batch.table.coefficients.steps for run in runs], [len(ask.noise) for ask in asks]
        )
        batch.renew(*(yield [first + points, np.concatenate(drawn) * batch.table.coefficients.noise_std[points, None]]))
    else:
        yield []
    return [1 - batch.stream(run.index).random(ask.uniforms) for run, ask in zip(runs, asks, strict=True)]


def _response(batch: _Batch, runs: Sequence[Run], asks: Sequence[Any]) -> Answering[list[Any] | Read]:
    parts = [Part(run.index, run._offset, ask) for run, ask in zip(runs, asks, strict=True)]
    if asks[0].slopes is not None:
        return (yield from batch.table.respond(batch.rows, parts, batch.taken(asks)))
    batch.steps = None
    steps = yield from batch.table.steps(batch.rows, parts)
    if steps is None:
        return [None] * len(runs)
    batch.steps, measured = steps, steps.measured()

    def answers(found: Array) -> list[Any]:
        batch.grams = measured.answers(found)
        return batch.grams

    return Read(measured.numbers, answers)


def _settle(batch: _Batch, runs: Sequence[Run], asks: Sequence[Any]) -> Answering[list[Any]]:
    yield []
    for run, ask in zip(runs, asks, strict=True):
        run._settled(ask)
    return [None] * len(runs)


_ANSWERS: dict[type, Callable[[_Batch, Sequence[Run], Sequence[Any]], Answering[Any]]] = {
    Memory: _memory,
    Load: _load,
    Combine: _combine,
    Inner: _inner,
    Distance: _distance,
    Draw: _draw,
    Response: _response,
    Settle: _settle,
}


def _kind(request: Any) -> tuple[Any, ...]:
    """Return what requests must have in common to be answered at once."""
    if isinstance(request, Response):
        return (Response, request.measure, request.slopes is None, request.gram is None)
    if isinstance(request, Inner):
        return (Inner, len(request.rows), request.less is None)
    if isinstance(request, Combine):
        return (Combine, len(request.rows), request.noise is None)
    return (type(request),)


def _finish(work: Answering[Any], needed: list[Tensor], like: Tensor) -> Any:
    while True:
        try:
            needed = uploads(work.send(needed), like)
        except StopIteration as end:
            return end.value


def _answers(batch: _Batch, runs: Sequence[Run], *others: Answering[Read]) -> tuple[list[list[Any]], list[Any]]:
    """Do ``others``, then answer what runs have asked, but for queries: all with one upload and one read.

    Runs that ask the same are answered together.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(tuple(map(_kind, run._asked)), []).append(place)
    work: list[tuple[list[int], Answering[Any]]] = [([], other) for other in others]
    for places in groups.values():
        group = [runs[place] for place in places]
        for same in zip(*(run._asked for run in group), strict=True):
            work.append((places, _ANSWERS[type(same[0])](batch, group, same)))
    needed = [next(one) for _, one in work]
    tensors = iter(uploads([array for arrays in needed for array in arrays], batch.rows))
    found = [
        _finish(one, [next(tensors) for _ in arrays], batch.rows) for (_, one), arrays in zip(work, needed, strict=True)
    ]
    late = [one.numbers for one in found if isinstance(one, Read)]
    read = iter(_read(late) if late else [])
    told = [one.answers(next(read)) if isinstance(one, Read) else one for one in found]
    answers: list[list[Any]] = [[] for _ in runs]
    for (places, _), own in zip(work[len(others) :], told[len(others) :], strict=True):
        for place, answer in zip(places, own, strict=True):
            answers[place].append(answer)
    return answers, told[: len(others)]


def _advance(runs: Sequence[Run]) -> None:
    """Answer everything but queries, for all runs at once, until each run asks the network or has ended."""
    while asking := [run for run in runs if not run.done and run._query is None]:
        for run, answers in zip(asking, _answers(asking[0]._batch, asking)[0], strict=True):
            run._send(answers)


class _Share(NamedTuple):
    """Rows ``own`` of a run's pending query."""

    run: Run
    query: Query
    own: slice

    @property
    def point(self) -> Slots:
        return self.query.point[self.own]

    @property
    def states(self) -> Slots:
        return self.query.states[self.own]

    @property
    def outputs(self) -> Slots:
        return self.query.outputs[self.own]


def _shares(runs: Sequence[Run], rows: int | None = None) -> list[_Share]:
    """Return what is left of the pending queries of runs, in their order, but no more than ``rows`` in all."""
    found: list[_Share] = []
    left = float("inf") if rows is None else rows
    for run in runs:
        if (query := run._query) is not None and left > 0:
            first = sum(map(len, run._finite))
            stop = int(min(len(query.point), first + left))
            found.append(_Share(run, query, slice(first, stop)))
            left -= stop - first
    return found


def _asked(runs: Sequence[Run]) -> int:
    """Return how many rows are left of the pending queries of runs."""
    return sum(share.own.stop - share.own.start for share in _shares(runs))


def _merge(shares: Sequence[_Share]) -> EvalBatch:
    """Return all rows, in their order; the runs share one batch."""
    batch, runs = shares[0].run._batch, [share.run for share in shares]
    states = upload(_offsets(runs, [share.states for share in shares]), batch.rows.device)
    u = batch.gather(states).view(-1, *batch.shape)
    point = torch.from_numpy(np.concatenate([share.point for share in shares]))
    index = np.repeat([run.index for run in runs], [len(share.point) for share in shares])
    return EvalBatch(u.to(batch.dtype), point, torch.from_numpy(index))


def _keep(shares: Sequence[_Share], outputs: Any) -> Answering[Read]:
    """Check the network's outputs, apply the sampler's output transform and keep them; tell which are finite."""
    batch, runs = shares[0].run._batch, [share.run for share in shares]
    point = np.concatenate([share.point for share in shares])
    expected = (len(point), *batch.shape)
    outputs = expect(outputs, expected, batch.dtype, point).detach().to(batch.rows)
    transform = None if batch.sampler is None else batch.sampler.transform
    slots = [[share.outputs for share in shares]]
    if transform is not None:
        slots.append([share.states for share in shares])
    into, *states = yield [_offsets(runs, own) for own in slots]
    if transform is not None:
        outputs = transform(torch.from_numpy(point), batch.gather(*states).view(expected), outputs)
    rows = outputs.reshape(len(point), -1)
    batch.rows.index_copy_(0, into, rows)
    return Read(torch.isfinite(rows.sum(1)), lambda found: [found == 1])


def _answer(shares: Sequence[_Share], outputs: Any) -> None:
    """Keep the network's outputs, and tell each run whose last output is there what it asked."""
    batch = shares[0].run._batch
    through = [share for share in shares if share.own.stop == len(share.query.point)]
    kept = _keep(shares, outputs)
    del outputs  # so that it is gone once it has been kept
    answers, [[finite]] = _answers(batch, [share.run for share in through], kept)
    for run, _, own in shares:
        run._finite.append(finite[: own.stop - own.start])
        finite = finite[own.stop - own.start :]
    broken = []
    for run, ask, _ in through:
        run.rounds += 1
        run.evaluations += len(ask.point)
        run.peak_width = max(run.peak_width, len(ask.point))
        run.history.append(Round(run.accepted, len(ask.point), run.error))
        run._finite = [np.concatenate(run._finite)]
        if not run._finite[0].all():
            _replace(run, ask, run._finite[0])
            broken.append(run)
    if broken:
        again = dict(zip(broken, _answers(batch, broken)[0], strict=True))
        answers = [again.get(share.run, own) for share, own in zip(through, answers, strict=True)]
    for (run, _, _), rest in zip(through, answers, strict=True):
        [every], run._finite = run._finite, []
        run._send([every, *rest])


def _replace(run: Run, ask: Query, finite: NDArray[np.bool_]) -> None:
    """Put the last finite output before it in the place of each output that is not finite."""
    if not finite[: ask.settled].all():
        step = int(ask.point[int(np.argmin(finite))])
        raise OutputError(
            f"the network returned NaN or Inf at step {step} of {run.problem.steps}, sample {run.number}, round "
            f"{run.rounds}, for an input that is final, so the sequential loop meets it too: check the network at that "
            "time, its dtype and its conditioning."
        )
    nearest = np.maximum.accumulate(np.where(finite, np.arange(len(finite)), -1))
    batch, slots = run._batch, run._offset + ask.outputs
    into, source, none = uploads([slots, slots[np.maximum(nearest, 0)], np.flatnonzero(nearest < 0)], batch.rows)
    batch.rows.index_copy_(0, into, batch.gather(source).index_fill_(0, none, 0))


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
        evaluate: The network: rows to outputs of the same shape and dtype as ``rows.x``.
        on_round: Called after every round with all runs; ``run.estimate`` is the present guess of its sample.
        stop: Asked after every round for each unfinished run; true ends it with its present estimate.

    Yields:
        The number of rounds so far, after each round.

    Raises:
        ValueError: For runs of several calls.
        OutputError: If the network returns a wrong type, shape or dtype, or NaN or Inf for a final input.
    """
    if any(run._batch is not runs[0]._batch for run in runs):
        raise ValueError("runs that are driven together must be of one call of start: make one table of all samples.")
    rounds = 0
    _advance(runs)
    while active := [run for run in runs if not run.done]:
        shares = _shares(active)
        _answer(shares, evaluate(_merge(shares)))
        _advance(active)
        rounds += 1
        if on_round is not None:
            on_round(runs)
        for run in active:
            if stop is not None and not run.done and stop(run):
                run.stop(f"stopped: {getattr(stop, '__name__', '') or repr(stop)}")
        yield rounds


class Pool:
    """Runs of one equation that come and go, with one memory for as many as are there at a time.

    Args:
        begin: Starts the first run for the one sample of a table, as :func:`start` does.
        rows: Most rows of a round; there are never more runs, as each asks for one at least.
    """

    def __init__(self, begin: Callable[[Recurrence], Run], rows: int) -> None:
        self.runs: list[Run] = []
        self._begin, self._rows = begin, rows
        self._free: list[int] = []
        self._places = 0
        self._last: Run | None = None

    def enter(self, number: int, table: Recurrence, generator: torch.Generator | None = None) -> Run:
        """Start a run for the one sample of a table; ``generator`` seeds its random stream, if its solver draws."""
        if self._last is None:
            run = self._begin(table)
            run._batch.own(generator)
            self._places = 1
        else:
            batch, place = self._last._batch, self._free.pop() if self._free else self._places
            self._places = max(self._places, place + 1)
            if place == len(batch.start):
                batch.grow(min(2 * place, self._rows))
            batch.enter(place, table, generator)
            run = Run(batch, place, self._last.solver, self._last.problem, keep_trajectory=self._last.keep_trajectory)
        run.number = number
        self._last = run
        self.runs.append(run)
        return run

    def rounds(self, evaluate: Callable[[EvalBatch], Tensor], admit: Callable[[], bool]) -> Iterator[list[Run]]:
        """Drive the runs: one call of ``evaluate`` a round, with all its rows as long as there is so much to do.

        The oldest runs are served first. What does not fit of a run's query waits for the next round; where there is
        room, ``admit`` is asked to :meth:`enter` another run.

        Args:
            evaluate: The network.
            admit: Enters a run, or returns that there is none left.

        Yields:
            After each round the runs that have ended.
        """
        more = True
        while True:
            _advance(self.runs)
            ended = [run for run in self.runs if run.done]
            self.runs = [run for run in self.runs if not run.done]
            yield ended
            self._free += [run.index for run in ended]
            room = self._rows - _asked(self.runs)
            while more and room > 0:
                before = len(self.runs)
                more = admit()
                entered = self.runs[before:]
                _advance(entered)
                room -= _asked(entered)
            if not self.runs:
                return
            shares = _shares(self.runs, self._rows)
            _answer(shares, evaluate(_merge(shares)))
