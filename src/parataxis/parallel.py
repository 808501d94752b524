"""Run a sampling loop parallel in time: a function, or a diffusers pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from . import pipelines, planning
from .calibration import Calibration
from .checks import describe
from .engine.executor import ranks_of
from .loops.function import Parallel
from .loops.loop import check_denoisers
from .loops.solver import check_options
from .planning import Plan
from .samplers.sampler import Sampler
from .solvers.base import Solver

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .engine.distributed.ranks import Ranks

__all__ = ["parallel", "plan"]


def parallel(
    target: Any,
    solver: Solver | Calibration | str | None = None,
    *,
    tolerance: float = 1e-2,
    denoisers: Sequence[nn.Module] | None = None,
    max_rows: int | None = None,
    buckets: Sequence[int] | None = None,
    mesh: DeviceMesh | Ranks | None = None,
    progress: bool = False,
) -> Any:
    """Run a sampling loop parallel in time: the same sample, in fewer rounds of network calls.

    Args:
        target: A function that runs a sampling loop, or a diffusers pipeline.
        solver: A solver, or its name; default ``Secant(window=8)``. Or ``auto``: what :func:`plan` expects to be
            fastest for the arguments of a call, or the unmodified loop, chosen at the first call and given up if calls
            by it turn out slower than the loop (``report.reason`` says so). Or what :func:`parataxis.calibrate_loop`
            found for this loop, which is compared with what is run at every call, has its own tolerance, and reports
            its bound.
        tolerance: Relative error allowed in each sample, compared with the unmodified loop.
        denoisers: The networks that the loop calls; default: those of the pipeline, or the one module that the
            function can see.
        max_rows: Most rows of a network call that holds several steps; larger rounds are split. When memory runs out,
            the limit is halved, for later calls as well. A step that is evaluated for itself has the rows that the
            loop gives it.
        buckets: The numbers of rows that a call with several steps may have, such as (1, 2, 4, 8); rounds are split
            and padded to them, so that ``torch.compile`` or CUDA graphs meet few shapes. All rows count, so guidance
            with two rows a sample needs even numbers.
        mesh: A ``DeviceMesh`` with a dimension ``time``: its ranks, which all run the loop, share the network's calls;
            see :func:`parataxis.engine.distributed.sharded`. They share whole steps, because rows of one call belong
            together.
        progress: Show a bar: accepted steps, the round, and the seconds left. The logger ``parataxis`` says at level
            INFO how every call went, and at level DEBUG every round.

    Returns:
        For a function, a callable with its signature and ``.report``. For a pipeline, a callable that is also a context
        manager: within ``with parallel(pipe) as report``, calls of ``pipe`` itself run in parallel.

    Raises:
        TypeError: If the target is neither, or the denoisers are not modules.
        ValueError: If the denoisers cannot be found, the tolerance is negative or infinite, or a number of rows is not
            an integer of at least 1.
    """
    limits: dict[str, Any] = {"max_rows": max_rows, "buckets": buckets}
    if isinstance(solver, Calibration):
        calibration = solver
        calibration.check_tolerance(tolerance)
        tolerance = calibration.solver_tolerance
        running = parallel(target, calibration.solver, tolerance=tolerance, denoisers=denoisers, mesh=mesh, **limits)
        running.calibration, running.progress = calibration, progress
        return running
    if not isinstance(target, type) and hasattr(target, "components") and hasattr(target, "register_modules"):
        running = pipelines.parallel(target, solver, tolerance=tolerance, denoisers=denoisers, mesh=mesh, **limits)
    else:
        _check_target(target)
        options = check_options(solver, tolerance)
        running = Parallel(target, *options, check_denoisers(denoisers), ranks_of(mesh), **limits)
    running.progress = progress
    return running


def plan(target: Any, *args: Any, **kwargs: Any) -> Plan:
    """Measure what the network costs, and choose the solver that is expected to be fastest, or the unmodified loop.

    For a network of your own, ``plan(network, noise, sampler, ...)`` as :func:`parataxis.sample`: see
    :func:`parataxis.planning.plan` for its options. For a pipeline, a function that runs a sampling loop, or what
    :func:`parallel` made of them, ``plan(target, *args, **kwargs)`` with the arguments of a call: its Python runs once
    with stubs instead of the networks, which are timed with the arguments that it gives them.
    ``parallel(target, plan.solver)`` follows it, and ``parallel(target, "auto")`` plans by itself.

    Args:
        target: A network, a function, a pipeline, or what :func:`parallel` returned, which says tolerance and
            denoisers.
        args: See above.
        kwargs: See above.

    Raises:
        ValueError: If a loop cannot be solved in parallel, with the reason; see also :func:`parataxis.planning.plan`.
        TypeError: If the target is none of these.
    """
    if isinstance(target, (Parallel, pipelines.ParallelPipeline)):
        return target.plan(*args, **kwargs)
    pipeline = hasattr(target, "components") and hasattr(target, "register_modules")
    sampler = kwargs["sampler"] if "sampler" in kwargs else args[1] if len(args) > 1 else None
    network = isinstance(target, nn.Module) or "sampler" in kwargs or isinstance(sampler, Sampler)
    network |= hasattr(sampler, "step") and hasattr(sampler, "timesteps")
    if network and not pipeline:
        return planning.plan(target, *args, **kwargs)
    planned: Plan = parallel(target).plan(*args, **kwargs)
    return planned


def _check_target(target: Any) -> None:
    """Raise unless this is a function that runs a loop, with the line to write for the usual slips."""
    if isinstance(target, type):
        name = target.__name__
        raise TypeError(f"target is the class {name}: make one first, {name}.from_pretrained(...) or {name}(...).")
    if isinstance(target, nn.Module):
        raise TypeError(
            f"target is a network, {describe(target)}: pass the function that runs its sampling loop, or draw with "
            "parataxis.sample(network, noise, sampler)."
        )
    if hasattr(target, "step") and hasattr(target, "timesteps"):
        raise TypeError(
            f"target is a scheduler, {describe(target)}: pass the pipeline, or draw with "
            "parataxis.sample(network, noise, scheduler)."
        )
    if not callable(target):
        raise TypeError(f"target must be a function that runs a sampling loop, or a pipeline, got {describe(target)}.")
    code = target if inspect.isroutine(target) else type(target).__call__
    if inspect.isgeneratorfunction(code) or inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
        raise TypeError(
            f"target must return its sample, and {describe(target)} yields or awaits: write a function that runs it to "
            "its end and returns the sample."
        )
