"""``parataxis plan``: measure what network calls cost here, and say which solver is fastest and by how much."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import flags
from .options import with_options
from .output import check_pictures, emit, picture_writer, save
from .problem import Problem, Wanted, with_problem

if TYPE_CHECKING:
    from ..planning import Plan

__all__ = ["plan", "plan_figures"]


@with_problem(omit=("seed",), count=10)
@with_options("samplers")
def plan(
    wanted: Wanted,
    options: dict[str, str],
    devices: Annotated[int, typer.Option(help="Equal devices that would share the rows.")] = 1,
    plot: flags.Plot = None,
    force: flags.Force = False,
    as_json: flags.Json = False,
    config: flags.Config = None,
) -> None:
    """Measure what calls of a model cost here, and say which solver is fastest and by how much."""
    check_pictures([] if plot is None else [plot], force=force)
    problem = Problem.load(wanted, options)
    import torch

    from ..planning import plan as make_plan

    made = make_plan(
        problem.denoise,
        torch.zeros(wanted.count, *problem.model.shape, device=wanted.device),
        problem.sampler,
        tolerance=wanted.tolerance,
        condition=problem.labels,
        devices=devices,
        max_rows=wanted.max_rows,
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
