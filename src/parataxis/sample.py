"""The driver for a network of one's own: it draws a batch of samples, with a solver of choice or with the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from .arrays import upload
from .checks import check_generators, check_rows, check_solver, check_tolerance, check_whole, wrap_denoiser
from .engine.captured import GraphedNetwork
from .engine.executor import Executor, Network, check_inputs, ranks_of, select_condition
from .engine.pool import Pool
from .engine.rows import EvalBatch
from .engine.run import Run, drive, start
from .engine.solution import Solution, Solutions
from .planning import plan
from .samplers.recurrence import Recurrence
from .samplers.sampler import Sampler
from .solvers.base import Solver
from .solvers.sequential import Sequential

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .engine.distributed.ranks import Ranks

__all__ = ["Job", "Solutions", "Stream", "numerical_floor", "sample", "stream"]


def sample(
    denoise: Callable[..., Tensor],
    noise: Tensor | Iterable[Job | Tensor],
    sampler: Sampler,
    solver: Solver | Literal["auto"],
    *,
    tolerance: float = 1e-2,
    condition: Any = None,
    rows_per_round: int | None = None,
    guess: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    keep_trajectory: bool = False,
    frozen_steps: int = 0,
    max_rows: int | None = None,
    buckets: Sequence[int] | None = None,
    numerical_floor: float = 0.0,
    mesh: DeviceMesh | Ranks | None = None,
    progress: bool = False,
    on_round: Callable[[Sequence[Run]], None] | None = None,
    stop: Callable[[Run], bool] | None = None,
) -> Solutions:
    """Draw a batch of samples with a network of one's own, many time steps side by side.

    Each sample is solved on its own; a round of the batch is one call of the network.

    Args:
        denoise: ``denoise(x, t)`` or, with ``condition``, ``denoise(x, t, condition)``: x (R, *shape), t (R,) the times
            of the sampler, to outputs (R, *shape) of x's dtype. The rows of a call belong to different steps and
            samples: each output must be a function of its own row, whatever stands beside it, and the same in every
            call. Nothing checks that; a network that mixes its rows (a mean over the batch, batch norm that is
            trained) or draws random numbers (dropout) gives wrong samples, so call ``eval()``. Rounding may depend on
            the number of rows: :func:`parataxis.numerical_floor` measures by how much.
        noise: (B, *shape) standard normal; its dtype is what the network is given. States are float32, or float64 if
            the noise is. With ``rows_per_round`` also an iterator of :class:`parataxis.Job`, drawn in its order.
        sampler: The equation, from :mod:`parataxis.samplers`.
        solver: How it is solved, from :data:`parataxis.SOLVERS`; those from :data:`parataxis.EXACT_IN_DISTRIBUTION`
            give a sample of the same law instead of the same sample; or ``auto``: by the solver that
            :func:`parataxis.plan` expects to be fastest, the sequential loop among them. That takes some calls of the
            network: to draw more than one batch, plan once and pass ``plan.solver``.
        tolerance: Relative error allowed in each final sample, compared with the sequential loop's; without meaning
            for law-exact solvers.
        condition: What the network is told of each sample: tensors (B, ...), or dicts, lists, tuples of them; handed to
            the network row by row. Leaves that are no tensors are the same for all samples.
        rows_per_round: Rows of a round: not all samples at once, but as many as keep that many rows busy, the next one
            entering where another leaves; see :func:`parataxis.stream`, which yields samples as they are finished.
            Default: whatever all samples ask for.
        guess: (B, N + 1, *shape) trajectories to start from: of another condition, guidance, seed or solver. All states
            are free, so the result is the sample of the new condition.
        generator: Source of the noise that stochastic samplers add: one for the batch, in the order of the sequential
            loop, or one for each sample. Law-exact solvers then draw one seed for each sample from it.
        keep_trajectory: Keep the trajectories (memory of N + 1 states a sample).
        frozen_steps: Steps of the guess that stay as they are; see :func:`parataxis.start`.
        max_rows: Most rows that the network is given in one call; larger rounds are split. The result is the same. When
            memory runs out, the limit is halved and kept for the rest of the solve.
        buckets: The numbers of rows that a call may have, such as (1, 2, 4, 8); rounds are split and padded to them, so
            that ``torch.compile`` or CUDA graphs meet few shapes.
        numerical_floor: What :func:`parataxis.numerical_floor` measured for this network; a tolerance below it is
            refused.
        mesh: A ``DeviceMesh`` with a dimension ``time``: its ranks share the rows of every round, each with
            ``max_rows`` and ``buckets`` of its own; see :func:`parataxis.engine.distributed.sharded`.
        progress: Show a bar: settled levels of all samples.
        on_round: Called after every round with the runs; see :func:`parataxis.drive`.
        stop: Ends a run early; see :func:`parataxis.drive`.

    Returns:
        One :class:`Solution` a sample. Ctrl-C ends the solve and returns the present estimates, marked
        ``interrupted``; with ``rows_per_round``, samples of a batch that had not begun are their noise, marked ``not
        started``, and jobs of an iterator that had not begun are left out. Printed, it says what was done and, for
        ``auto``, how long that was expected to take.

    Raises:
        RankError: With a mesh, if a rank is lost, fails, was interrupted, or does other work than the others.
        OutputError: If the network returns a wrong type, shape or dtype, or NaN or Inf for a final input.
        TypeError: If ``denoise``, ``sampler``, ``solver`` or ``generator`` is not one.
        ValueError: For inputs that do not fit together, with what was given and what was expected.
    """
    graphed = denoise if isinstance(denoise, GraphedNetwork) else None
    network = wrap_denoiser(denoise)
    check_tolerance(tolerance)
    check_rows(max_rows, buckets)
    if 0 < tolerance < numerical_floor:
        raise ValueError(
            f"tolerance {tolerance:g} is below the floor {numerical_floor:g} of this network, by which the loop itself "
            "differs between batch sizes: ask for at least that, or for 0, which solves the equations to rounding."
        )
    if isinstance(noise, Tensor):
        check_inputs(noise, sampler, condition)
        check_generators(generator, len(noise))
    if rows_per_round is not None or not isinstance(noise, Tensor):
        if rows_per_round is None or not isinstance(noise, Iterable):
            raise ValueError(
                "noise must be a floating-point tensor (B, *shape), or an iterable of jobs with rows_per_round=, "
                f"got {type(noise).__name__} and rows_per_round={rows_per_round!r}."
            )
        if solver == "auto":
            raise ValueError(
                "solver='auto' plans for a batch that is solved at once: with rows_per_round=, choose a solver."
            )
        if guess is not None or frozen_steps or on_round is not None or stop is not None:
            raise ValueError(
                "samples that come and go (rows_per_round=) admit none of guess, frozen_steps, on_round and stop."
            )
        if not isinstance(noise, Tensor) and (condition is not None or generator is not None):
            raise ValueError(
                "jobs bring their own: give condition and generator with each, Job(noise, condition, generator)."
            )
        running = stream(
            denoise,
            _jobs(noise, sampler, condition, generator) if isinstance(noise, Tensor) else noise,
            sampler,
            solver,
            rows_per_round=rows_per_round,
            tolerance=tolerance,
            keep_trajectory=keep_trajectory,
            max_rows=max_rows,
            buckets=buckets,
            mesh=mesh,
        )
        begun, batch = time.perf_counter(), noise if isinstance(noise, Tensor) else None
        with tqdm(total=None if batch is None else len(batch), disable=not progress) as bar:
            solutions_by_number = _gathered(running, bar)
        if batch is not None and (
            left := [number for number in range(len(batch)) if number not in solutions_by_number]
        ):
            solutions_by_number.update(zip(left, _not_started(batch[left], sampler, solver, tolerance), strict=True))
        if not solutions_by_number:
            raise ValueError("there is no sample to draw: the jobs are empty.")
        return Solutions(
            [solutions_by_number[number] for number in sorted(solutions_by_number)],
            running.rounds,
            time.perf_counter() - begun,
        )
    ranks = ranks_of(mesh)
    planned = None
    if isinstance(solver, str) and solver == "auto":
        if guess is not None or frozen_steps:
            raise ValueError("solver='auto' plans for a start from noise, and a guess saves rounds: name a solver.")
        planned = plan(
            network,
            noise,
            sampler,
            tolerance=tolerance,
            condition=condition,
            devices=1 if ranks is None else ranks.size,
            max_rows=max_rows,
            buckets=buckets,
        )
        planned = planned if ranks is None else ranks.broadcast(planned)
        solver, max_rows = planned.solver, planned.latency.limit
    begun = time.perf_counter()
    table = sampler.recurrence(_states(noise), generator, noise.dtype)
    begin = partial(
        start,
        sampler,
        table,
        solver,
        tolerance=tolerance,
        guess=guess,
        dtype=noise.dtype,
        keep_trajectory=keep_trajectory,
        frozen_steps=frozen_steps,
        generator=generator,
    )
    runs = begin()
    evaluate: Callable[[EvalBatch], Tensor] = Executor(
        Network(network, sampler.network_times(noise.dtype), condition), max_rows=max_rows, buckets=buckets
    )
    if ranks is not None:
        from .engine.distributed.ranks import Sharded

        ranks.compare(
            noise=table.start,
            added=table.noise,
            condition=condition,
            guess=guess,
            sampler=sampler.coefficients,
            times=sampler.times,
            solver=solver,
            tolerance=tolerance,
        )
        evaluate = Sharded(evaluate, ranks)
    total = sampler.steps * len(runs)
    captured = None
    if graphed is not None and ranks is None and max_rows is None and on_round is None and stop is None:
        captured = graphed.drive(runs, sampler, condition, noise.dtype)
    with tqdm(total=total, unit="step", disable=not progress) as bar:
        try:
            with torch.no_grad():
                if captured is not None and not captured.finish():
                    runs = begin()  # what it met needs more than a graph
                for rounds in drive(runs, evaluate, on_round=on_round, stop=stop):
                    bar.set_postfix(rounds=rounds, refresh=False)
                    bar.update(sum(run.accepted for run in runs) - bar.n)
        except KeyboardInterrupt:
            for run in runs:
                run.stop("interrupted")
            if ranks is not None:
                ranks.interrupted()
        else:
            if ranks is not None:
                ranks.end()
    solutions = [run.solution for run in runs]
    return Solutions(solutions, max(entry.rounds for entry in solutions), time.perf_counter() - begun, planned)


def _jobs(
    noise: Tensor,
    sampler: Sampler,
    condition: Any,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Iterator[Job]:
    """Yield the samples of a batch; with one generator, what steps add is drawn at once, in the order of its loop."""
    table = None if isinstance(generator, Sequence) else sampler.recurrence(_states(noise), generator, noise.dtype)
    for b in range(len(noise)):
        source, drawn = generator[b] if isinstance(generator, Sequence) else generator, None
        if table is not None:
            added = None if table.noise is None else table.noise[b : b + 1]
            drawn = Recurrence(table.coefficients, table.start[b : b + 1], added)
        yield Job(noise[b], select_condition(condition, torch.tensor(b, device="cpu")), source, drawn)


def _gathered(running: Stream, bar: Any) -> dict[int, Solution]:
    """Return the samples of a stream by the numbers of their jobs; after Ctrl-C, of those that have begun."""
    solutions: dict[int, Solution] = {}
    try:
        for number, solution in running:
            solutions[number] = solution
            bar.update()
    except KeyboardInterrupt:
        solutions.update(running.interrupt())
    return solutions


def _not_started(noise: Tensor, sampler: Sampler, solver: Solver, tolerance: float) -> list[Solution]:
    """Return what is known of samples that have not begun."""
    table = Recurrence(sampler.coefficients, _states(noise) * sampler.start_scale)
    runs = start(sampler, table, solver, tolerance=tolerance, dtype=noise.dtype)
    for run in runs:
        run.stop("not started")
    return [run.solution for run in runs]


def _states(noise: Tensor) -> Tensor:
    return noise.to(torch.promote_types(noise.dtype, torch.float32))


def numerical_floor(
    denoise: Callable[..., Tensor],
    noise: Tensor,
    sampler: Sampler,
    *,
    condition: Any = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    rows: int = 8,
) -> float:
    """Measure the relative error below which samples of a network cannot be compared: its own batch dependence.

    Kernels for one row and for several round differently. The floor is |x_1 - x_n| / |x_1|, the worst of the samples,
    where x_n is the sequential loop's sample if every call holds its row n times. It takes 2 N calls for each sample.

    Args:
        denoise: As for :func:`parataxis.sample`.
        noise: (B, *shape), likewise; one sample is enough.
        sampler: Likewise.
        condition: Likewise.
        generator: Likewise.
        rows: n, how many rows a round will have.

    Returns:
        The floor, 0 for networks whose rows do not depend on their number; for ``numerical_floor=`` of
        :func:`parataxis.sample`.
    """
    check_inputs(noise, sampler, condition)
    check_generators(generator, len(noise))
    check_whole("rows", rows, 2)  # calls of one row are compared with larger ones
    table = sampler.recurrence(_states(noise), generator, noise.dtype)
    network = Network(wrap_denoiser(denoise), sampler.network_times(noise.dtype), condition)

    def samples(count: int) -> Tensor:
        def repeated(row: EvalBatch) -> Tensor:
            return network(EvalBatch(*(part.repeat_interleave(count, 0) for part in row)))[:1]

        runs = start(sampler, table, Sequential(), dtype=noise.dtype)
        with torch.no_grad():
            for _ in drive(runs, Executor(repeated, max_rows=1)):
                pass
        return torch.stack([run.solution.x for run in runs]).flatten(1).double()

    alone, among = samples(1), samples(rows)
    return float(((among - alone).norm(dim=1) / alone.norm(dim=1)).max())


class Job(NamedTuple):
    """One sample to be drawn.

    Attributes:
        noise: (*shape) standard normal.
        condition: What the network is told of the sample: tensors, or dicts, lists, tuples of them; the network is
            given those of its rows, stacked. None for networks without.
        generator: Source of the noise that the sampler adds, or None for torch's own.
        recurrence: Of this one sample, if that noise is drawn already.
    """

    noise: Tensor
    condition: Any = None
    generator: torch.Generator | None = None
    recurrence: Recurrence | None = None


class _Network:
    """The user's callable, with the conditions of the samples at work by their places."""

    def __init__(self, denoise: Callable[..., Tensor], sampler: Sampler) -> None:
        self.conditions: dict[int, Any] = {}
        self._denoise, self._sampler = denoise, sampler
        self._times: Tensor | None = None

    def __call__(self, rows: EvalBatch) -> Tensor:
        if self._times is None:
            self._times = self._sampler.network_times(rows.x.dtype)
        t = upload(self._times[rows.step], rows.x.device)
        conditions = [self.conditions[place] for place in rows.sample.tolist()]
        if conditions[0] is None:
            return self._denoise(rows.x, t)
        return self._denoise(rows.x, t, tree_map(_stacked, *conditions))


class Stream(Iterator[tuple[int, Solution]]):
    """The samples of jobs, as they are finished: (number of the job, its solution); made by :func:`stream`.

    Attributes:
        rounds: Rounds so far.
        rows: Rows evaluated so far: in full rounds, ``rounds`` times the rows of a round.
        runs: Those at work.
    """

    def __init__(
        self,
        denoise: Callable[..., Tensor],
        entries: Iterator[tuple[Recurrence, Any, torch.Generator | None]],
        begin: Callable[[Recurrence], Run],
        sampler: Sampler,
        rows: int,
        *,
        max_rows: int | None = None,
        buckets: Sequence[int] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Take what :func:`stream` makes of its arguments; nothing runs yet."""
        self.rounds = self.rows = 0
        self._entries, self._ranks = enumerate(entries), ranks
        self._network = _Network(denoise, sampler)
        self._evaluate: Callable[[EvalBatch], Tensor] = Executor(self._network, max_rows=max_rows, buckets=buckets)
        if ranks is not None:
            from .engine.distributed.ranks import Sharded

            self._evaluate = Sharded(self._evaluate, ranks)
        self._pool = Pool(begin, rows)
        self._open: dict[int, Run] = {}  # by the numbers of their jobs, those that have not been yielded
        self._solutions = self._drive()

    @property
    def runs(self) -> Sequence[Run]:
        """The runs at work."""
        return tuple(run for run in self._pool.runs if not run.done)

    def __next__(self) -> tuple[int, Solution]:
        """Go on until a sample is finished."""
        return next(self._solutions)

    def interrupt(self) -> Iterator[tuple[int, Solution]]:
        """End the stream: yield what is finished, and the present estimates of the samples at work."""
        self._solutions.close()
        if self._ranks is not None and self._open:
            self._ranks.interrupted()
        for run in self._open.values():
            run.stop("interrupted")
        yield from self._yielded(list(self._open))

    def _yielded(self, numbers: Iterable[int]) -> Iterator[tuple[int, Solution]]:
        for number in numbers:
            solution = self._open[number].solution
            del self._open[number]
            yield number, solution

    def _drive(self) -> Generator[tuple[int, Solution], None, None]:
        rounds = self._pool.rounds(self._round, self._admit)
        while True:
            with torch.no_grad():  # not while the caller has its turn
                ended = next(rounds, None)
            if ended is None:
                break
            yield from self._yielded(run.number for run in ended)
        if self._ranks is not None and self.rounds:
            self._ranks.end()

    def _admit(self) -> bool:
        """Start the run of the next job, if there is one."""
        number, entry = next(self._entries, (0, None))
        if entry is None:
            return False
        table, condition, generator = entry
        if self._ranks is not None:
            self._ranks.compare(job=number, noise=table.start, added=table.noise, condition=condition)
        run = self._pool.add(number, table, generator)
        self._open[number], self._network.conditions[run.slot] = run, condition
        return True

    def _round(self, rows: EvalBatch) -> Tensor:
        self.rounds += 1
        self.rows += len(rows.x)
        return self._evaluate(rows)


def stream(
    denoise: Callable[..., Tensor],
    jobs: Iterable[Job | Tensor],
    sampler: Sampler,
    solver: Solver,
    *,
    rows_per_round: int,
    tolerance: float = 1e-2,
    keep_trajectory: bool = False,
    max_rows: int | None = None,
    buckets: Sequence[int] | None = None,
    mesh: DeviceMesh | Ranks | None = None,
) -> Stream:
    """Draw samples with a network of one's own, as many at a time as keep the rows of every round full.

    The oldest samples are served first. Where their windows leave room, or one is finished, the next job enters; what
    does not fit of a sample's window waits for the next round. So R rows are evaluated in every round but the last few,
    and E evaluations of all samples take about E / R rounds.

    Args:
        denoise: As for :func:`parataxis.sample`.
        jobs: The samples to be drawn, of one shape, dtype and device: :class:`Job`, or their noise alone. Asked for one
            more when there is room for it, so they may be made on the way and need not end.
        sampler: The equation.
        solver: How it is solved. Windows are for latency: with jobs enough, ``Sequential()`` evaluates each level once
            and has the highest throughput.
        rows_per_round: R, rows of a round.
        tolerance: Relative error allowed in each sample, compared with the sequential loop's.
        keep_trajectory: Keep the trajectories.
        max_rows: Most rows that the network is given in one call; larger rounds are split.
        buckets: The numbers of rows that a call may have; see :func:`parataxis.sample`.
        mesh: Ranks that share the rows of every round; all must be given the same jobs.

    Returns:
        An iterator over (number of the job, solution), in the order in which they are finished.

    Raises:
        TypeError: If ``denoise`` or ``solver`` is not one.
        ValueError: Also on the way, for a job that does not fit: what was given and what was expected.
        OutputError: On the way, if the network returns a wrong type, shape or dtype, or NaN or Inf for a final input.
    """
    network = wrap_denoiser(denoise)
    check_whole("rows_per_round", rows_per_round)
    check_rows(max_rows, buckets)
    check_solver(solver)
    check_tolerance(tolerance)
    if not isinstance(jobs, Iterable):
        raise TypeError(f"jobs must be an iterable of samples to be drawn, got {jobs!r}.")
    first: list[Job] = []

    def entries() -> Iterator[tuple[Recurrence, Any, torch.Generator | None]]:
        for number, item in enumerate(jobs):
            job = item if isinstance(item, Job) else Job(item)
            check_inputs(job.noise[None] if isinstance(job.noise, Tensor) else job.noise, sampler, None)
            check_generators(None if job.generator is None else [job.generator], 1)
            _check_alike(number, job, first[0] if first else job)
            first[:] = first or [job]
            state = job.noise.to(torch.promote_types(job.noise.dtype, torch.float32))
            table = job.recurrence or sampler.recurrence(state[None], job.generator, job.noise.dtype)
            yield table, job.condition, job.generator

    def begin(table: Recurrence) -> Run:
        return start(
            sampler, table, solver, tolerance=tolerance, dtype=first[0].noise.dtype, keep_trajectory=keep_trajectory
        )[0]

    return Stream(
        network, entries(), begin, sampler, rows_per_round, max_rows=max_rows, buckets=buckets, ranks=ranks_of(mesh)
    )


def _check_alike(number: int, job: Job, like: Job) -> None:
    forms = [f"{entry.noise.dtype} {tuple(entry.noise.shape)} on {entry.noise.device}" for entry in (job, like)]
    if forms[0] != forms[1]:
        raise ValueError(
            f"the noise of job {number} is {forms[0]}, and that of job 0 {forms[1]}: samples of a stream share the "
            "calls of the network, so they must have one form."
        )
    if (job.condition is None) != (like.condition is None):
        raise ValueError(f"job {number} and job 0 differ in having a condition: give all jobs one, or none.")


def _stacked(*leaves: Any) -> Any:
    if isinstance(leaves[0], Tensor):
        return torch.stack(leaves)
    if any(leaf != leaves[0] for leaf in leaves):
        raise ValueError(f"conditions may differ in tensors only, got {leaves[0]!r} beside others: make it a tensor.")
    return leaves[0]
