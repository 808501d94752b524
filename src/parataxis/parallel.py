"""Run a sampling loop parallel in time: a function, or a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from . import pipelines
from .calibration import Calibration
from .engine.executor import ranks_of
from .loops.function import Parallel
from .loops.loop import check_denoisers
from .loops.solver import check_options
from .solvers.base import Solver

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .engine.distributed.ranks import Ranks

__all__ = ["parallel"]


def parallel(
    target: Any,
    solver: Solver | Calibration | None = None,
    *,
    tolerance: float = 1e-2,
    denoisers: Sequence[nn.Module] | None = None,
    mesh: DeviceMesh | Ranks | None = None,
) -> Any:
    """Run a sampling loop parallel in time: the same sample, in fewer rounds of network calls.

    Args:
        target: A function that runs a sampling loop, or a diffusers pipeline.
        solver: Default ``Secant(window=8)``; or what :func:`parataxis.calibrate_loop` found for this loop, which is
            compared with what is run at every call, has its own tolerance, and whose bound is reported.
        tolerance: Relative error allowed in each sample, compared with the unmodified loop.
        denoisers: The networks that the loop calls; default: those of the pipeline, or the one module that the
            function can see.
        mesh: A ``DeviceMesh`` with a dimension ``time``: its ranks, which all run the loop, share the network's calls;
            see :func:`parataxis.engine.distributed.sharded`. They share whole steps, because rows of one call belong
            together.

    Returns:
        For a function, a callable with its signature and ``.report``. For a pipeline, a callable that is also a context
        manager: within ``with parallel(pipe) as report``, calls of ``pipe`` itself run in parallel.

    Raises:
        TypeError: If the target is neither, or the denoisers are not modules.
        ValueError: If the denoisers cannot be found, or the tolerance is negative or infinite.
    """
    if isinstance(solver, Calibration):
        calibration = solver
        calibration.check_tolerance(tolerance)
        tolerance = calibration.solver_tolerance
        running = parallel(target, calibration.solver, tolerance=tolerance, denoisers=denoisers, mesh=mesh)
        running.calibration = calibration
        return running
    if hasattr(target, "components") and hasattr(target, "register_modules"):
        return pipelines.parallel(target, solver, tolerance=tolerance, denoisers=denoisers, mesh=mesh)
    if not callable(target) or isinstance(target, nn.Module):
        raise TypeError(f"target must be a function that runs a sampling loop, or a pipeline, got {target!r}.")
    return Parallel(target, *check_options(solver, tolerance), check_denoisers(denoisers), ranks_of(mesh))
