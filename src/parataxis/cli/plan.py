"""``parataxis plan``: measure what network calls cost here, and say which solver is fastest and by how much."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import flags
from .options import with_options
from .output import check_pictures, emit, picture_writer, save
from .problem import Problem

if TYPE_CHECKING:
    from ..planning import Plan

__all__ = ["plan", "plan_figures"]


@with_options("samplers")
def plan(
    options: dict[str, str],
    model: flags.ModelName = "digits",
    sampler: flags.Sampler = "ddim",
    steps: flags.Steps = 50,
    tolerance: flags.Tolerance = 1e-2,
    label: flags.Label = None,
    guidance: flags.Guidance = 1.0,
    count: flags.Count = 10,
    max_rows: flags.MaxRows = 128,
    device: flags.Device = "cpu",
    devices: Annotated[int, typer.Option(help="Equal devices that would share the rows.")] = 1,
    plot: flags.Plot = None,
    force: flags.Force = False,
    as_json: flags.Json = False,
    config: flags.Config = None,
) -> None:
    """Measure what calls of a model cost here, and say which solver is fastest and by how much."""
    check_pictures([] if plot is None else [plot], force=force)
    problem = Problem.load(
        model=model,
        sampler=sampler,
        steps=steps,
        options=options,
        tolerance=tolerance,
        label=label,
        guidance=guidance,
        count=count,
        device=device,
    )
    import torch

    from ..planning import plan as make_plan

    made = make_plan(
        problem.denoise,
        torch.zeros(count, *problem.model.shape, device=device),
        problem.sampler,
        tolerance=tolerance,
        condition=problem.labels,
        devices=devices,
        max_rows=max_rows,
    )
    if plot is not None:
        from ..plots import figure_image

        save({plot: picture_writer(figure_image(made.plot()))})
    emit(json.dumps(plan_figures(made), indent=2) if as_json else f"{problem.model.name}: {made}")


def plan_figures(made: Plan) -> dict[str, Any]:
    """Return a plan as JSON."""
    return {
        "solver": repr(made.solver),
        "reason": made.reason,
        "seconds": made.seconds,
        "loop_seconds": made.loop_seconds,
        "speedup": made.speedup.median,
        "speedup_range": [made.speedup.low, made.speedup.high],
        "planning_seconds": made.planning_seconds,
        "rows": list(made.latency.rows),
        "row_seconds": list(made.latency.times),
        "batch_headroom": made.latency.batch_headroom,
        "candidates": [
            {"solver": repr(candidate.solver), "rounds": candidate.rounds, "seconds": candidate.seconds}
            for candidate in made.candidates
        ],
    }
