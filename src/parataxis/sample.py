"""Sampling with your own network: a batch at once, with a solver of choice or with the fastest."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .calibration import Calibration
from .checks import (
    check_errors,
    check_generators,
    check_rows,
    check_tolerance,
    check_whole,
    describe,
    is_finite,
    wrap_denoiser,
)
from .engine.captured import GraphedNetwork
from .engine.checkpoint import Interruptions, load_runs, save_runs
from .engine.executor import Executor, Network, check_inputs, ranks_of, select_condition
from .engine.row_check import RowCheck
from .engine.rows import EvalBatch
from .engine.run import Run, drive, start
from .engine.solution import Solution, Solutions
from .planning import PLAN_CLASSES, Plan, plan
from .samplers.from_scheduler import as_sampler
from .samplers.recurrence import Recurrence
from .samplers.sampler import Sampler
from .solvers import SOLVERS, as_solver
from .solvers.base import Solver
from .solvers.sequential import Sequential
from .streaming import Job, stream

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .engine.distributed.ranks import Ranks

__all__ = ["numerical_floor", "sample"]


HELD_BYTES = 2**27  # of noise that is held without a thought
BLOCK_BYTES, MOST_STEPS = 2**24, 64  # of a block of noise that is drawn again


def sample(
    denoise: Callable[..., Tensor],
    noise: Tensor | Iterable[Job | Tensor],
    sampler: Sampler | Any,
    solver: Solver | Calibration | str | None = None,
    *,
    tolerance: float = 1e-2,
    condition: Any = None,
    rows_per_round: int | None = None,
    guess: Tensor | Calibration | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    keep_trajectory: bool = False,
    keep_residuals: bool = False,
    frozen_steps: int = 0,
    max_rows: int | None = None,
    buckets: Sequence[int] | None = None,
    numerical_floor: float = 0.0,
    mesh: DeviceMesh | Ranks | None = None,
    progress: bool = False,
    on_round: Callable[[Sequence[Run]], None] | None = None,
    stop: Callable[[Run], bool] | None = None,
    errors: Literal["raise", "return"] = "raise",
    checkpoint: str | Path | None = None,
) -> Solutions:
    """Draw a batch of samples with your own network, many time steps side by side.

    Samples do not depend on one another; a round of the batch is one call of the network. In one round the network gets
    one row more: a row of the first round again, to see whether its output depends on the other rows.

    Args:
        denoise: ``denoise(x, t)`` or, with ``condition``, ``denoise(x, t, condition)``: x (R, *shape), t (R,) the times
            of the sampler, to outputs (R, *shape) of x's dtype. Times fall from noise to sample, in training steps:
            from about 999 to 0 on the schedules ``vp`` and ``cosine``, from 1000 (noise) towards 0 on ``flow``; on
            ``karras`` they are log(noise level) / 4. The rows of a call belong to different steps and samples: each
            output must depend on its own row only, and be the same in every call. Nothing checks that; a network that
            mixes its rows (a mean over the batch, batch norm that is trained) or draws random numbers (dropout) gives
            wrong samples, so call ``eval()``. Rounding may depend on the number of rows:
            :func:`parataxis.numerical_floor` measures by how much.
        noise: (B, *shape) standard normal; its dtype is that of the network's input. States are float32, or float64 if
            the noise is. With ``rows_per_round`` also an iterator of :class:`parataxis.Job`, drawn in its order.
        sampler: The equation, from :mod:`parataxis.samplers`; or a diffusers scheduler whose timesteps are set, which
            :func:`parataxis.from_scheduler` reads.
        solver: How it is solved, from :data:`parataxis.SOLVERS`, or its name, such as ``"secant"``; default
            ``Secant(window=8)``. Those from :data:`parataxis.EXACT_IN_DISTRIBUTION`
            give another sample, from the same distribution; or ``auto``: by the solver that
            :func:`parataxis.plan` expects to be fastest, which may be the sequential loop. That takes some calls of the
            network: to draw more than one batch, plan once and pass ``plan.solver``. A :class:`parataxis.Calibration`
            solves as it was found to keep its tolerance, and reports its bound as the error estimate.
        tolerance: Relative error allowed in each final sample, compared with the sequential loop's; ignored by
            solvers that are exact in distribution. A calibration has its own.
        condition: Tensors (B, ...), one entry a sample, or dicts, lists, tuples of them; passed to the network row by
            row. Leaves that are not tensors are the same for all samples.
        rows_per_round: Rows of a round: only as many samples run at a time as fill them, and the next one enters when
            another leaves; see :func:`parataxis.stream`, which yields samples as they are finished. Default: the rows
            of all samples.
        guess: (B, N + 1, *shape) trajectories to start from: of another condition, guidance, seed or solver. All states
            are free, so the result is the sample of the new condition. A calibration with a solver of full width gives
            those of Gaussian data with the moments of its samples; that is also the default when it is the solver.
        generator: Source of the noise that stochastic samplers add: one for the batch, in the order of the sequential
            loop, or one for each sample. Solvers that are exact in distribution draw one seed for each
            sample from it.
        keep_trajectory: Keep the trajectories (memory of N + 1 states a sample).
        keep_residuals: Keep the residual of every step in every round, which :meth:`Solution.plot` then shows.
        frozen_steps: Leading steps of the guess that are not changed; see :func:`parataxis.start`.
        max_rows: Most rows of one call; larger rounds are split. The result is the same. When memory runs out, the
            limit is halved for the remaining rounds.
        buckets: The numbers of rows that a call may have, such as (1, 2, 4, 8); rounds are split and padded to them, so
            that ``torch.compile`` or CUDA graphs meet few shapes.
        numerical_floor: What :func:`parataxis.numerical_floor` measured for this network; a tolerance below it is
            an error.
        mesh: A ``DeviceMesh`` with a dimension ``time``: its ranks share the rows of every round, and each
            rank applies ``max_rows`` and ``buckets``; see :func:`parataxis.engine.distributed.sharded`.
        progress: Show a bar: accepted steps of all samples.
        on_round: Called after every round with the runs; see :func:`parataxis.drive`.
        stop: Ends a run early; see :func:`parataxis.drive`.
        errors: What happens if the network returns NaN or Inf for an accepted input of a sample: ``raise``, or
            ``return`` that sample as failed, with the reason and its last estimate, and the others as ever. Looking for
            it costs one more read of the device a round.
        checkpoint: A file for a solve that is interrupted: Ctrl-C or SIGTERM writes it, and the same call goes on from
            it, to the same bits; it is removed when the solve has ended. Not with ``mesh`` or ``rows_per_round``.

    Returns:
        One :class:`Solution` a sample. Ctrl-C ends the solve and returns the present estimates, marked
        ``interrupted``; with ``rows_per_round``, samples of a batch that had not begun are their noise, marked ``not
        started``, and jobs of an iterator that had not begun are left out. Printed, it shows what was done and, for
        ``auto``, how long that was expected to take.

    Raises:
        RankError: With a mesh, if a rank is lost, fails, was interrupted, or does other work than the others.
        OutputError: If the network returns a wrong type, shape or dtype, or NaN or Inf for an accepted input, or if
            states overflow though all outputs are finite.
        TypeError: If ``denoise``, ``sampler``, ``solver`` or ``generator`` is not one.

    Warns:
        RuntimeWarning: If an output changes with the other rows of its call by more than a tenth of the tolerance.
        ValueError: For inputs that do not fit together, with what was passed and what was expected.
    """
    _check_order(denoise, noise, sampler, solver)
    wrap_denoiser(denoise)
    sampler = as_sampler(sampler)
    if solver != "auto" and not isinstance(solver, Calibration):
        solver = as_solver(solver)
    check_rows(max_rows, buckets)
    check_errors(errors)
    _check_tolerance(tolerance, numerical_floor)
    if isinstance(noise, Tensor):
        check_inputs(noise, condition)
        check_generators(generator, len(noise))
    if checkpoint is not None and (rows_per_round is not None or mesh is not None or not isinstance(noise, Tensor)):
        raise ValueError("checkpoint= cannot be combined with rows_per_round= or mesh=: draw a batch on one device.")
    calibration = None
    if isinstance(solver, Calibration):
        calibration = solver
        if not isinstance(noise, Tensor):
            raise ValueError("a calibration is checked against a batch: pass noise as a tensor, or a solver.")
        calibration.check_use(denoise, noise, sampler, condition, tolerance)
        solver, tolerance = calibration.solver, calibration.solver_tolerance
    limits: dict[str, Any] = {"max_rows": max_rows, "buckets": buckets}
    options: dict[str, Any] = {"tolerance": tolerance, "keep_trajectory": keep_trajectory, "errors": errors}
    task = _Task(denoise, sampler, solver, condition, generator, limits, options, progress)
    if rows_per_round is not None or not isinstance(noise, Tensor):
        if guess is not None or frozen_steps or keep_residuals or on_round is not None or stop is not None:
            raise ValueError(
                "rows_per_round= cannot be combined with guess, frozen_steps, keep_residuals, on_round or stop."
            )
        drawn = _sample_stream(task, noise, rows_per_round, mesh)
    else:
        if calibration is not None and guess is None and not frozen_steps and calibration.guesses(sampler.steps):
            guess = calibration
        watching = _Watching(on_round, stop, None if checkpoint is None else Path(checkpoint))
        task.options["keep_residuals"] = keep_residuals
        drawn = _sample_batch(task, noise, ranks_of(mesh), watching, guess, frozen_steps)
    return drawn if calibration is None else drawn.bounded(calibration.report)


class _Task(NamedTuple):
    """What is drawn, checked: the arguments of :func:`sample` that a batch and a stream share.

    Attributes:
        limits: ``max_rows`` and ``buckets``.
        options: Those of :func:`parataxis.start` that every sample has.
    """

    denoise: Callable[..., Tensor]
    sampler: Sampler
    solver: Solver | str
    condition: Any
    generator: torch.Generator | Sequence[torch.Generator] | None
    limits: dict[str, Any]
    options: dict[str, Any]
    progress: bool


class _Watching(NamedTuple):
    """What is looked at between rounds."""

    on_round: Callable[[Sequence[Run]], None] | None
    stop: Callable[[Run], bool] | None
    checkpoint: Path | None


def _check_order(denoise: Any, noise: Any, sampler: Any, solver: Any) -> None:
    """Raise for arguments that stand in each other's places."""
    swapped = (
        isinstance(denoise, (Tensor, Sampler))
        or isinstance(noise, (torch.nn.Module, Sampler))
        or inspect.isroutine(noise)
        or isinstance(sampler, (Tensor, torch.nn.Module))
        or hasattr(sampler, "unsupported")
        or isinstance(solver, (Tensor, Sampler))
    )
    if swapped:
        passed = ", ".join(describe(value) for value in (denoise, noise, sampler, solver) if value is not None)
        raise TypeError(f"write parataxis.sample(network, noise, sampler, solver) in this order, got ({passed}).")


def _check_tolerance(tolerance: float, floor: float) -> None:
    """Raise for a tolerance that is none, or that lies below the numerical floor of the network."""
    check_tolerance(tolerance)
    if not (is_finite(floor) and floor >= 0):
        raise ValueError(f"numerical_floor must be a relative error of at least 0, got {floor!r}.")
    if 0 < tolerance < floor:
        raise ValueError(
            f"tolerance {tolerance:g} is below the floor {floor:g} of this network, by which the loop itself "
            "differs between batch sizes: choose at least that, or 0, which solves the equations to rounding."
        )


def _sample_batch(
    task: _Task,
    noise: Tensor,
    ranks: Ranks | None,
    watching: _Watching,
    guess: Tensor | Calibration | None,
    frozen_steps: int,
) -> Solutions:
    """Solve all samples at once."""
    sampler, condition, solver, limits, planned = task.sampler, task.condition, task.solver, task.limits, None
    if isinstance(solver, str):
        if guess is not None or frozen_steps:
            raise ValueError("solver='auto' plans for a start from noise, and a guess saves rounds: choose a solver.")
        if watching.checkpoint is not None:
            raise ValueError(
                "solver='auto' chooses by measured times, another one each time, and a checkpoint is of one solver: "
                "choose a solver."
            )
        planned = _plan(task.denoise, noise, sampler, task.options["tolerance"], condition, ranks, limits)
        solver, limits = planned.solver, {**limits, "max_rows": planned.latency.limit}
    started = time.perf_counter()
    states, graphed = _states(noise), task.denoise if isinstance(task.denoise, GraphedNetwork) else None
    block = _noise_block(states, sampler, solver) if graphed is None and ranks is None else None
    recurrence = sampler.recurrence(states, task.generator, noise.dtype, block=block)
    if isinstance(guess, Calibration):
        guess = guess.guess(recurrence, condition)
    if ranks is not None:
        ranks.compare(
            noise=recurrence.start,
            added=recurrence.noise,
            condition=condition,
            guess=guess,
            sampler=sampler.coefficients,
            times=sampler.times,
            solver=solver,
            tolerance=task.options["tolerance"],
        )
    options = {**task.options, "guess": guess, "frozen_steps": frozen_steps}
    begin = partial(start, sampler, recurrence, solver, dtype=noise.dtype, generator=task.generator, **options)
    network = Network(wrap_denoiser(task.denoise), sampler.network_times(noise.dtype), condition)
    capture = None
    watched = any(part is not None for part in watching) or task.options["keep_residuals"]
    limited = task.limits["max_rows"] is not None
    if graphed is not None and ranks is None and not limited and not watched:
        capture = partial(graphed.drive, sampler=sampler, condition=condition, dtype=noise.dtype)
    executor = Executor(network, **limits)
    alone = ranks is not None or capture is not None or isinstance(solver, Sequential)  # calls cannot be compared
    check = None if alone else RowCheck(executor)
    runs = _solve(begin, check or executor, ranks, capture, watching, progress=task.progress)
    if check is not None:
        check.warn(task.options["tolerance"])
    solutions = [run.solution for run in runs]
    rounds = max(solution.rounds for solution in solutions)
    return Solutions(solutions, rounds, time.perf_counter() - started, planned)


def _solve(
    begin: Callable[[], list[Run]],
    evaluate: Callable[[EvalBatch], Tensor],
    ranks: Ranks | None,
    capture: Callable[..., Any] | None,
    watching: _Watching,
    *,
    progress: bool,
) -> list[Run]:
    """Solve all samples at once, and return their runs; after Ctrl-C they are stopped as ``interrupted``."""
    on_round, stop, checkpoint = watching
    runs, interruptions = begin(), Interruptions()
    if checkpoint is not None:
        evaluate = interruptions.during(evaluate)
        if checkpoint.exists():
            load_runs(checkpoint, runs)
    if ranks is not None:
        from .engine.distributed.ranks import Sharded

        evaluate = sharded = Sharded(evaluate, ranks)
        sharded.name_ranks(runs[0].group)
    captured = None if capture is None else capture(runs)
    total = sum(run.problem.steps for run in runs)
    with tqdm(total=total, unit="step", disable=not progress) as bar:
        try:
            with torch.no_grad(), nullcontext() if checkpoint is None else interruptions:
                if captured is not None and not captured.finish():
                    runs = begin()  # these samples need more than a graph
                for rounds in drive(runs, evaluate, on_round=on_round, stop=stop):
                    if progress:  # a bar that is not shown costs as much as a step of the plain loop
                        bar.set_postfix(rounds=rounds, refresh=False)
                        bar.update(sum(run.accepted for run in runs) - bar.n)
        except KeyboardInterrupt:
            if checkpoint is not None and not all(run.done for run in runs):
                save_runs(checkpoint, runs)
            for run in runs:
                run.stop("interrupted")
            if ranks is not None:
                ranks.interrupted()
        else:
            if ranks is not None:
                ranks.end()
            if checkpoint is not None:
                checkpoint.unlink(missing_ok=True)
    return runs


def _sample_stream(
    task: _Task,
    noise: Tensor | Iterable[Job | Tensor],
    rows_per_round: int | None,
    mesh: DeviceMesh | Ranks | None,
) -> Solutions:
    """Solve as many samples at a time as keep the rows of a round full; after Ctrl-C, return what is there."""
    sampler, solver = task.sampler, task.solver
    if isinstance(solver, str):
        raise ValueError(
            "solver='auto' plans for a batch that is solved at once: with rows_per_round=, choose a solver."
        )
    jobs = _jobs(noise, sampler, task.condition, task.generator, rows_per_round)
    started, batch = time.perf_counter(), noise if isinstance(noise, Tensor) else None
    # Without rows_per_round there would have been no jobs.
    rows, options = rows_per_round or 1, {**task.limits, **task.options}
    running = stream(task.denoise, jobs, sampler, solver, rows_per_round=rows, mesh=mesh, **options)
    solutions: dict[int, Solution] = {}
    with tqdm(total=None if batch is None else len(batch), disable=not task.progress) as bar:
        try:
            for number, solution in running:
                solutions[number] = solution
                bar.update()
        except KeyboardInterrupt:
            solutions.update(running.interrupt())
    if batch is not None:
        waiting = [number for number in range(len(batch)) if number not in solutions]
        if waiting:
            solutions.update(
                zip(waiting, _not_started(batch[waiting], sampler, solver, task.options["tolerance"]), strict=True)
            )
    if not solutions:
        raise ValueError("there is no sample to draw: the jobs are empty.")
    in_order = [solutions[number] for number in sorted(solutions)]
    return Solutions(in_order, running.rounds, time.perf_counter() - started)


def _plan(
    denoise: Callable[..., Tensor],
    noise: Tensor,
    sampler: Sampler,
    tolerance: float,
    condition: Any,
    ranks: Ranks | None,
    limits: dict[str, Any],
) -> Plan:
    """Return the plan of the first rank, for ``auto``."""
    network, devices = wrap_denoiser(denoise), 1 if ranks is None else ranks.size
    planned = plan(network, noise, sampler, tolerance=tolerance, condition=condition, devices=devices, **limits)
    return planned if ranks is None else ranks.broadcast(planned, (*PLAN_CLASSES, *SOLVERS.values()))


def _jobs(
    noise: Tensor | Iterable[Job | Tensor],
    sampler: Sampler,
    condition: Any,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    rows_per_round: int | None,
) -> Iterable[Job | Tensor]:
    """Return the jobs of a stream, or raise."""
    if rows_per_round is None or not isinstance(noise, Iterable):
        raise ValueError(
            "noise must be a floating-point tensor (B, *shape), or an iterable of jobs with rows_per_round=, "
            f"got {type(noise).__name__} and rows_per_round={rows_per_round!r}."
        )
    if isinstance(noise, Tensor):
        return _jobs_of_batch(noise, sampler, condition, generator)
    if condition is not None or generator is not None:
        raise ValueError("pass condition and generator with each job: Job(noise, condition, generator).")
    return noise


def _jobs_of_batch(
    noise: Tensor,
    sampler: Sampler,
    condition: Any,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Iterator[Job]:
    """Yield the samples of a batch; with one generator, all noise is drawn first, in the order of the batch's loop."""
    batch = None if isinstance(generator, Sequence) else sampler.recurrence(_states(noise), generator, noise.dtype)
    for b in range(len(noise)):
        source, recurrence = generator[b] if isinstance(generator, Sequence) else generator, None
        if batch is not None:
            added = None if batch.noise is None else batch.noise[b : b + 1]
            recurrence = Recurrence(batch.coefficients, batch.start[b : b + 1], added)
        yield Job(noise[b], select_condition(condition, torch.tensor(b, device="cpu")), source, recurrence)


def _not_started(noise: Tensor, sampler: Sampler, solver: Solver, tolerance: float) -> list[Solution]:
    """Return solutions of samples that have not begun: their noise."""
    recurrence = Recurrence(sampler.coefficients, _states(noise) * sampler.start_scale)
    runs = start(sampler, recurrence, solver, tolerance=tolerance, dtype=noise.dtype)
    for run in runs:
        run.stop("not started")
    return [run.solution for run in runs]


def _noise_block(states: Tensor, sampler: Sampler, solver: Solver) -> int | None:
    """Return the steps of a block of noise, where to hold all of it takes much more memory than a solver needs."""
    of_step = states.numel() * states.element_size()
    block = max(1, min(MOST_STEPS, BLOCK_BYTES // of_step))
    window = getattr(solver, "window", 1) or sampler.steps
    much = sampler.coefficients.stochastic and of_step * sampler.steps > HELD_BYTES
    return block if much and 4 * (window + 2 * block) <= sampler.steps else None


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
    """Measure the relative error below which samples of a network cannot be compared.

    Kernels for one row and for several round differently, and a loop may make much of little. So the floor is the
    larger of two differences |x_1 - x| / |x_1|, the worst of the samples. x_1 is the sequential loop's sample, and x
    its sample

    - if every call holds its row n times;
    - if the first state and every input of the network move by a unit in their last place, up or down at random. Any
      two orders of the same arithmetic do as much, so a chaotic loop has a floor near 1 whatever its network does.

    It takes 3 N calls for each sample.

    Args:
        denoise: As for :func:`parataxis.sample`.
        noise: (B, *shape) as for :func:`parataxis.sample`; one sample is enough.
        sampler: As for :func:`parataxis.sample`.
        condition: As for :func:`parataxis.sample`.
        generator: As for :func:`parataxis.sample`.
        rows: n, how many rows a round will have.

    Returns:
        The floor; for ``numerical_floor=`` of :func:`parataxis.sample`.
    """
    sampler = as_sampler(sampler)
    check_inputs(noise, condition)
    check_generators(generator, len(noise))
    check_whole("rows", rows, 2)  # calls of one row are compared with larger ones
    recurrence = sampler.recurrence(_states(noise), generator, noise.dtype)
    network = Network(wrap_denoiser(denoise), sampler.network_times(noise.dtype), condition)

    draw = torch.Generator().manual_seed(0)
    unit = torch.finfo(recurrence.start.dtype).eps

    def moved(x: Tensor) -> Tensor:
        return x * (1 + unit * (2 * torch.randint(2, x.shape, generator=draw) - 1).to(x))

    def samples(begun: Recurrence, call: Callable[[EvalBatch], Tensor]) -> Tensor:
        runs = start(sampler, begun, Sequential(), dtype=noise.dtype)
        with torch.no_grad():
            for _ in drive(runs, Executor(call, max_rows=1)):
                pass
        return torch.stack([run.solution.x for run in runs]).flatten(1).double()

    def repeated(row: EvalBatch) -> Tensor:
        return network(EvalBatch(*(part.repeat_interleave(rows, 0) for part in row)))[:1]

    alone = samples(recurrence, network)
    others = (
        samples(recurrence, repeated),
        samples(replace(recurrence, start=moved(recurrence.start)), lambda row: network(row._replace(x=moved(row.x)))),
    )
    return max(float(((other - alone).norm(dim=1) / alone.norm(dim=1)).max()) for other in others)
