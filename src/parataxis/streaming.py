"""Throughput: samples enter and leave while the rows of every round stay full."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .arrays import upload
from .checks import (
    check_errors,
    check_generators,
    check_rows,
    check_tolerance,
    check_whole,
    describe,
    wrap_denoiser,
)
from .engine.executor import Executor, check_inputs, ranks_of
from .engine.pool import Pool
from .engine.rows import EvalBatch
from .engine.run import Run, start
from .engine.solution import Solution
from .samplers.from_scheduler import as_sampler
from .samplers.recurrence import Recurrence
from .samplers.sampler import Sampler
from .solvers import as_solver
from .solvers.base import Solver

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .engine.distributed.ranks import Ranks

__all__ = ["Job", "Stream", "stream"]


class Job(NamedTuple):
    """One sample to be drawn.

    Attributes:
        noise: (*shape) standard normal.
        condition: Tensors, or dicts, lists, tuples of them; the network receives those of its rows, stacked. None for
            networks without.
        generator: Source of the noise that the sampler adds, or None for torch's own.
        recurrence: Of this sample, if that noise is drawn already.
    """

    noise: Tensor
    condition: Any = None
    generator: torch.Generator | None = None
    recurrence: Recurrence | None = None


class _Network:
    """The user's callable, with the conditions of the running samples by their places."""

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
        runs: Those that have not ended.
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

            self._evaluate = self._sharded = Sharded(self._evaluate, ranks)
        self._pool = Pool(begin, rows)
        self._open: dict[int, Run] = {}  # by the numbers of their jobs, those that have not been yielded
        self._solutions = self._drive()
        self._error: BaseException | None = None  # that ended the stream

    def __repr__(self) -> str:
        """Return how far the stream has come."""
        return f"Stream({len(self.runs)} runs, {self.rounds} rounds)"

    @property
    def runs(self) -> Sequence[Run]:
        """The runs that have not ended."""
        return tuple(run for run in self._pool.runs if not run.done)

    def __next__(self) -> tuple[int, Solution]:
        """Go on until a sample is finished; after an error, raise it again: a stream that broke is not at its end."""
        if self._error is not None:
            raise self._error
        try:
            return next(self._solutions)
        except StopIteration:
            raise
        except BaseException as error:
            self._error = error
            raise

    def interrupt(self) -> Iterator[tuple[int, Solution]]:
        """End the stream: yield what is finished, and the present estimates of the running samples."""
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
        rounds = self._pool.rounds(self._round, self._start_next_job)
        while True:
            # Not around the yield, where the caller's own code runs. The next sample may be asked for within inference
            # mode or not, and tensors that it has made cannot be changed outside of it.
            with torch.inference_mode(False), torch.no_grad():
                ended = next(rounds, None)
            if ended is None:
                break
            yield from self._yielded(run.number for run in ended)
        if self._ranks is not None and self.rounds:
            self._ranks.end()

    def _start_next_job(self) -> bool:
        """Start the run of the next job, if there is one."""
        number, entry = next(self._entries, (0, None))
        if entry is None:
            return False
        recurrence, condition, generator = entry
        if self._ranks is not None:
            self._ranks.compare(job=number, noise=recurrence.start, added=recurrence.noise, condition=condition)
        run = self._pool.add(number, recurrence, generator)
        if self._ranks is not None:
            self._sharded.name_ranks(run.group)
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
    solver: Solver | str | None = None,
    *,
    rows_per_round: int,
    tolerance: float = 1e-2,
    keep_trajectory: bool = False,
    max_rows: int | None = None,
    buckets: Sequence[int] | None = None,
    mesh: DeviceMesh | Ranks | None = None,
    errors: Literal["raise", "return"] = "raise",
) -> Stream:
    """Draw samples with your own network, as many at a time as keep the rows of every round full.

    The oldest samples are served first. Where their windows leave room, or one is finished, the next job enters; what
    does not fit of a sample's window waits for the next round. So R rows are evaluated in every round except the last
    few, and E evaluations of all samples take about E / R rounds.

    Args:
        denoise: As for :func:`parataxis.sample`.
        jobs: The samples to be drawn, of one shape, dtype and device: :class:`Job`, or their noise alone. The next
            one is taken when there is room for it, so the iterable may be lazy and endless.
        sampler: The equation: a sampler, or a diffusers scheduler whose timesteps are set.
        solver: How it is solved, or its name; default ``Secant(window=8)``. Windows are for latency: with
            enough jobs, ``Sequential()`` evaluates each step once and has the highest throughput.
        rows_per_round: R, rows of a round.
        tolerance: Relative error allowed in each sample, compared with the sequential loop's.
        keep_trajectory: Keep the trajectories.
        max_rows: Most rows of one call; larger rounds are split.
        buckets: The numbers of rows that a call may have; see :func:`parataxis.sample`.
        mesh: Ranks that share the rows of every round; all need the same jobs.
        errors: ``raise``, or ``return`` a sample for which the network returns NaN or Inf as failed, and go on with
            the others; see :func:`parataxis.sample`.

    Returns:
        An iterator over (number of the job, solution), in the order in which they are finished.

    Raises:
        TypeError: If ``denoise`` or ``solver`` is not one.
        ValueError: Also while streaming, for a job that does not fit: what was passed and what was expected.
        OutputError: While streaming, if the network returns a wrong type, shape or dtype, or NaN or Inf for an accepted
            input.
    """
    network = wrap_denoiser(denoise)
    check_whole("rows_per_round", rows_per_round)
    check_rows(max_rows, buckets)
    sampler, solver = as_sampler(sampler), as_solver(solver)
    check_tolerance(tolerance)
    check_errors(errors)
    if not isinstance(jobs, Iterable):
        raise TypeError(f"jobs must be an iterable of samples to be drawn, got {describe(jobs)}.")
    first: list[Job] = []

    def entries() -> Iterator[tuple[Recurrence, Any, torch.Generator | None]]:
        for number, item in enumerate(jobs):
            job = item if isinstance(item, Job) else Job(item)
            check_inputs(job.noise[None] if isinstance(job.noise, Tensor) else job.noise, None)
            check_generators(None if job.generator is None else [job.generator], 1)
            _check_alike(number, job, first[0] if first else job)
            first[:] = first or [job]
            state = job.noise.to(torch.promote_types(job.noise.dtype, torch.float32))
            recurrence = job.recurrence or sampler.recurrence(state[None], job.generator, job.noise.dtype)
            yield recurrence, job.condition, job.generator

    def begin(table: Recurrence) -> Run:
        return start(
            sampler,
            table,
            solver,
            tolerance=tolerance,
            dtype=first[0].noise.dtype,
            keep_trajectory=keep_trajectory,
            errors=errors,
        )[0]

    return Stream(
        network, entries(), begin, sampler, rows_per_round, max_rows=max_rows, buckets=buckets, ranks=ranks_of(mesh)
    )


def _check_alike(number: int, job: Job, like: Job) -> None:
    forms = [f"{entry.noise.dtype} {tuple(entry.noise.shape)} on {entry.noise.device}" for entry in (job, like)]
    if forms[0] != forms[1]:
        raise ValueError(
            f"the noise of job {number} is {forms[0]}, and that of job 0 {forms[1]}: samples of a stream share "
            "network calls, so they must have the same form."
        )
    if (job.condition is None) != (like.condition is None):
        raise ValueError(f"job {number} and job 0 differ in having a condition: pass one with all jobs, or with none.")


def _stacked(*leaves: Any) -> Any:
    if isinstance(leaves[0], Tensor):
        return torch.stack(leaves)
    if any(leaf != leaves[0] for leaf in leaves):
        raise ValueError(f"conditions may differ in tensors only, got {leaves[0]!r} and others: make it a tensor.")
    return leaves[0]
