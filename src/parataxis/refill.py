"""Throughput: samples that come and go, while the rows of every round stay full."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .checks import called, check_generators, check_rows, check_solver, check_tolerance, check_whole
from .execution import Executor, check, ranks_of
from .samplers import Sampler
from .solve import Pool, Rows, Run, Solution, Solver, start
from .table import Table, upload

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .distributed import Ranks

__all__ = ["Job", "Stream", "stream"]


class Job(NamedTuple):
    """One sample to be drawn.

    Attributes:
        noise: (*shape) standard normal.
        condition: What the network is told of the sample: tensors, or dicts, lists, tuples of them; the network is
            given those of its rows, stacked. None for networks without.
        generator: Source of the noise that the sampler adds, or None for torch's own.
        table: Of this one sample, if that noise is drawn already.
    """

    noise: Tensor
    condition: Any = None
    generator: torch.Generator | None = None
    table: Table | None = None


class _Network:
    """The user's callable, with the conditions of the samples at work by their places."""

    def __init__(self, denoise: Callable[..., Tensor], sampler: Sampler) -> None:
        self.conditions: dict[int, Any] = {}
        self._denoise, self._sampler = denoise, sampler
        self._times: Tensor | None = None

    def __call__(self, rows: Rows) -> Tensor:
        if self._times is None:
            self._times = self._sampler.network_times(rows.u.dtype)
        t = upload(self._times[rows.point], rows.u.device)
        told = [self.conditions[place] for place in rows.sample.tolist()]
        if told[0] is None:
            return self._denoise(rows.u, t)
        return self._denoise(rows.u, t, tree_map(_stacked, *told))


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
        entries: Iterator[tuple[Table, Any, torch.Generator | None]],
        begin: Callable[[Table], Run],
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
        self._evaluate: Callable[[Rows], Tensor] = Executor(self._network, max_rows=max_rows, buckets=buckets)
        if ranks is not None:
            from .distributed import Sharded

            self._evaluate = Sharded(self._evaluate, ranks)
        self._pool = Pool(begin, rows)
        self._open: dict[int, Run] = {}  # by the numbers of their jobs, those that have not been yielded
        self._found = self._drive()

    @property
    def runs(self) -> Sequence[Run]:
        """The runs at work."""
        return tuple(run for run in self._pool.runs if not run.done)

    def __next__(self) -> tuple[int, Solution]:
        """Go on until a sample is finished."""
        return next(self._found)

    def interrupt(self) -> Iterator[tuple[int, Solution]]:
        """End the stream: yield what is finished, and the present estimates of the samples at work."""
        self._found.close()
        if self._ranks is not None and self._open:
            self._ranks.interrupted()
        for run in self._open.values():
            run.end("interrupted")
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
        run = self._pool.enter(number, table, generator)
        self._open[number], self._network.conditions[run.index] = run, condition
        return True

    def _round(self, rows: Rows) -> Tensor:
        self.rounds += 1
        self.rows += len(rows.u)
        return self._evaluate(rows)


def stream(
    denoise: Callable[..., Tensor],
    jobs: Iterable[Job | Tensor],
    sampler: Sampler,
    solver: Solver,
    *,
    rows: int,
    tolerance: float = 1e-2,
    keep: bool = False,
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
        rows: R, rows of a round.
        tolerance: Relative error allowed in each sample, compared with the sequential loop's.
        keep: Keep the trajectories.
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
    network = called(denoise)
    check_whole("rows", rows)
    check_rows(max_rows, buckets)
    check_solver(solver)
    check_tolerance(tolerance)
    if not isinstance(jobs, Iterable):
        raise TypeError(f"jobs must be an iterable of samples to be drawn, got {jobs!r}.")
    first: list[Job] = []

    def entries() -> Iterator[tuple[Table, Any, torch.Generator | None]]:
        for number, given in enumerate(jobs):
            job = given if isinstance(given, Job) else Job(given)
            check(job.noise[None] if isinstance(job.noise, Tensor) else job.noise, sampler, None)
            check_generators(None if job.generator is None else [job.generator], 1)
            _check_alike(number, job, first[0] if first else job)
            first[:] = first or [job]
            state = job.noise.to(torch.promote_types(job.noise.dtype, torch.float32))
            table = job.table or sampler.table(state[None], job.generator, job.noise.dtype)
            yield table, job.condition, job.generator

    def begin(table: Table) -> Run:
        return start(sampler, table, solver, tolerance=tolerance, dtype=first[0].noise.dtype, keep=keep)[0]

    return Stream(network, entries(), begin, sampler, rows, max_rows=max_rows, buckets=buckets, ranks=ranks_of(mesh))


def _check_alike(number: int, job: Job, like: Job) -> None:
    forms = [f"{one.noise.dtype} {tuple(one.noise.shape)} on {one.noise.device}" for one in (job, like)]
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
