"""Diffusers pipelines, parallel in time, without code for any single pipeline.

The denoisers are the components whose class is one of diffusers' U-Nets, transformers or ControlNets, or whose name
says so. Every other module is memoized: text encoders run once, a decoder in the final replay only. :func:`enable`
replaces the class of the pipeline by one whose call goes through :mod:`parataxis.loops`; :func:`disable` puts it back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn

from .checks import describe
from .engine.executor import ranks_of, row_limits
from .fingerprint import loop_fingerprint
from .loops.auto import plan_loop, run_loop
from .loops.loop import Loop, check_denoisers
from .loops.report import Report
from .loops.schedulers import schedulers_in, writes_past_versions
from .loops.solver import check_options
from .progress import reported
from .solvers.base import Solver

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .calibration import Calibration
    from .engine.distributed.ranks import Ranks
    from .planning import Plan

__all__ = ["ParallelPipeline", "disable", "enable", "parallel"]

NAMES = ("unet", "transformer", "prior", "controlnet", "denoiser", "dit")
FOLDERS = ("unets", "transformers", "controlnets")
CALLBACKS = ("callback_on_step_end", "callback")
METHODS = ("encode", "decode", "generate")


def parallel(
    pipe: Any,
    solver: Solver | str | None = None,
    *,
    tolerance: float = 1e-2,
    denoisers: Sequence[nn.Module] | None = None,
    max_rows: int | None = None,
    buckets: Sequence[int] | None = None,
    mesh: DeviceMesh | Ranks | None = None,
) -> ParallelPipeline:
    """Run a pipeline parallel in time; see :func:`parataxis.parallel`.

    ``parallel(pipe)(...)`` is one call; within ``with parallel(pipe) as report``, calls of ``pipe`` itself are
    parallel.

    Raises:
        TypeError: If ``pipe`` is not a pipeline, or the denoisers are not modules.
        ValueError: If the tolerance is negative or infinite.
    """
    if not hasattr(pipe, "components") or not hasattr(pipe, "register_modules"):
        raise TypeError(f"pipe must be a diffusers pipeline, got {describe(pipe)}.")
    options = check_options(solver, tolerance)
    limits: dict[str, Any] = {"max_rows": max_rows, "buckets": buckets}
    return ParallelPipeline(pipe, *options, check_denoisers(denoisers), ranks_of(mesh), **limits)


def enable(
    pipe: Any,
    solver: Solver | str | None = None,
    *,
    tolerance: float = 1e-2,
    denoisers: Sequence[nn.Module] | None = None,
    max_rows: int | None = None,
    buckets: Sequence[int] | None = None,
    mesh: DeviceMesh | Ranks | None = None,
) -> Report:
    """Make every call of ``pipe`` parallel in time, until :func:`disable`; its copies are not.

    Returns:
        The report, filled in by each call.

    Raises:
        RuntimeError: If it is enabled already.
        TypeError: See :func:`parallel`.
        ValueError: See :func:`parallel`.
    """
    options: dict[str, Any] = {"max_rows": max_rows, "buckets": buckets, "mesh": mesh}
    return parallel(pipe, solver, tolerance=tolerance, denoisers=denoisers, **options).__enter__()


def disable(pipe: Any) -> None:
    """Undo :func:`enable`.

    Raises:
        RuntimeError: If it is not enabled.
    """
    if not _enabled(pipe):
        raise RuntimeError("this pipeline is not enabled: call parataxis.pipelines.enable(pipe) first.")
    pipe.__class__ = type(pipe).__mro__[1]


class ParallelPipeline:
    """A pipeline whose calls run parallel in time.

    Attributes:
        pipe: The pipeline.
        solver: How its loop is solved.
        tolerance: Relative error allowed.
        report: How the latest call went.
        calibration: Compared at every call, and reported by; None without.
    """

    def __init__(
        self,
        pipe: Any,
        solver: Solver | str,
        tolerance: float,
        denoisers: tuple[nn.Module, ...] | None = None,
        ranks: Ranks | None = None,
        *,
        max_rows: int | None = None,
        buckets: Sequence[int] | None = None,
    ) -> None:
        """See :func:`parallel`."""
        self._limit, self._buckets = row_limits(max_rows, buckets)
        self.pipe, self.solver, self.tolerance = pipe, solver, tolerance
        self.report = Report(tolerance=tolerance)
        self._chosen = denoisers
        self._ranks = ranks
        self._loop: Loop | None = None
        self.calibration: Calibration | None = None
        self.progress = False
        self._recorded = False  # whether the call that runs is solved from passes, which hide the pipeline's bar
        self._bar: Any = None

    def __repr__(self) -> str:
        """Return what is solved, and how."""
        return f"ParallelPipeline({type(self.pipe).__name__}, {self.solver!r}, tolerance={self.tolerance:g})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline."""
        if self.calibration is not None:
            self.calibration.check(loop_fingerprint(self.pipe, args, kwargs))
        loop, name = self._current(), type(self.pipe).__name__
        self._recorded, self._bar = False, None
        try:
            with reported(loop, name, self.report, self.calibration, bar=self.progress):
                return run_loop(loop, args, kwargs, self.solver, self.tolerance, self.report)
        finally:
            if self._bar is not None:
                self._bar.close()

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Return the plan of a call with these arguments; see :func:`parataxis.plan`."""
        return plan_loop(self._current(), args, kwargs, self.tolerance)

    def __enter__(self) -> Report:
        """Enable the pipeline."""
        pipe = self.pipe
        if _enabled(pipe):
            raise RuntimeError("this pipeline is enabled already: call parataxis.pipelines.disable(pipe) first.")
        plain, parallelized = type(pipe), self

        @functools.wraps(plain.__call__)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self is not pipe:  # a copy has the same class, and was not enabled
                return plain.__call__(self, *args, **kwargs)
            return parallelized(*args, **kwargs)

        pipe.__class__ = type(
            plain.__name__,
            (plain,),
            {"__call__": call, "__module__": plain.__module__, "__doc__": plain.__doc__, "_parataxis": self},
        )
        return self.report

    def __exit__(self, *exception: object) -> None:
        """Disable the pipeline."""
        disable(self.pipe)

    def _current(self) -> Loop:
        """Return the loop; a new one if components have been exchanged since the last call."""
        components = [(name, part) for name, part in self.pipe.components.items() if isinstance(part, nn.Module)]
        denoisers = self._chosen or tuple(part for name, part in components if _denoises(name, part))
        if not denoisers:
            raise ValueError(
                f"found no denoiser among the components {', '.join(name for name, _ in components)}; pass those that "
                "the pipeline calls at every step: denoisers=[...]."
            )
        memoized: list[tuple[Any, str]] = []
        for _, part in components:
            if not any(part is denoiser for denoiser in denoisers):
                memoized.append((part, "__call__"))
                memoized += [(part, name) for name in METHODS if callable(getattr(part, name, None))]
        loop = self._loop
        if loop is None or loop.denoisers != denoisers or loop.memoized != tuple(memoized):
            loop = self._loop = Loop(
                run=self._run,
                denoisers=denoisers,
                memoized=tuple(memoized),
                unsupported=lambda: _unsupported(denoisers),
                state=self._state,
                calls_back=lambda kwargs: any(kwargs.get(name) is not None for name in CALLBACKS),
                limit=self._limit,
                buckets=self._buckets,
                schedulers=self._schedulers,
                ranks=self._ranks,
                owner=("pipe", self.pipe),
                on_round=self._show_accepted,
            )
        return loop

    def _schedulers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the pipeline's schedulers, to run it in one pass; none where a callback may write past versions."""
        writes = writes_past_versions(kwargs.get(name) for name in CALLBACKS)
        return [] if writes else schedulers_in(self.pipe.components.values())

    def _show_accepted(self, accepted: int, steps: int) -> None:
        """Move the pipeline's own bar with what is accepted, where the pipeline does not do that itself."""
        if not self._recorded or self.progress:
            return
        if self._bar is None:
            bar = self.pipe.progress_bar(total=steps)
            # A pipeline of several pipelines has none of its own.
            self._bar = SimpleNamespace(refresh=lambda: None, close=lambda: None) if bar is None else bar
        self._bar.total, self._bar.n = steps, accepted
        self._bar.refresh()

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], quiet: bool) -> Any:
        pipe = self.pipe
        plain = type(pipe).__mro__[1] if _enabled(pipe) else type(pipe)
        self._recorded = self._recorded or quiet
        if quiet:
            kwargs = {name: value for name, value in kwargs.items() if name not in CALLBACKS}
        with _no_progress(pipe) if quiet or self._bar is not None or self.progress else nullcontext():
            return plain.__call__(pipe, *args, **kwargs)

    def _state(self) -> Any:
        parts = self.pipe.components.items()
        return [
            (name, type(part).__name__, dict(getattr(part, "config", {})))
            for name, part in parts
            if hasattr(part, "step")
        ]


def _enabled(pipe: Any) -> bool:
    parallelized = type(pipe).__dict__.get("_parataxis")
    return parallelized is not None and parallelized.pipe is pipe


def _denoises(name: str, part: nn.Module) -> bool:
    kind = type(getattr(part, "_orig_mod", part))
    path = kind.__module__.split(".")
    return name.rstrip("_0123456789") in NAMES or (path[0] == "diffusers" and any(folder in FOLDERS for folder in path))


@contextmanager
def _no_progress(pipe: Any) -> Iterator[None]:
    """Hide the progress bars of passes, which do not show the progress of the solve."""
    before = pipe.__dict__.get("_progress_bar_config")
    pipe.__dict__["_progress_bar_config"] = {**(before or {}), "disable": True}
    try:
        yield
    finally:
        if before is None:
            pipe.__dict__.pop("_progress_bar_config", None)  # what a pass has changed may be put back within it
        else:
            pipe.__dict__["_progress_bar_config"] = before


def _unsupported(denoisers: Sequence[nn.Module]) -> str | None:
    """Return why denoisers cannot be evaluated out of order, or None."""
    for denoiser in denoisers:
        for part in denoiser.modules():
            hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
            for name, hook in hooks.items():
                if getattr(hook, "_is_stateful", False):
                    return f"the denoiser keeps state from call to call (its hook {name!r}): disable its cache."
    return None
