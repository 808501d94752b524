"""``parataxis sample``: draw samples of a model, many time steps side by side."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import flags
from .calibrate import read_calibration
from .errors import INTERRUPTED, Failed, Wrong
from .options import AUTO, make_solver, with_options
from .output import (
    check_output,
    check_pictures,
    emit,
    is_figures,
    is_saved_solve,
    json_writer,
    picture_writer,
    save,
    table,
)
from .plan import plan_figures
from .problem import Problem, Wanted, with_problem

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.run import Run
    from ..engine.solution import Solutions

__all__ = ["sample"]

SEQUENTIAL = "sequential"
WARM_ROWS = 8
SHOWN = 10  # samples in a picture of the rounds


@with_problem(count=10)
@with_options("solvers", "samplers")
def sample(
    wanted: Wanted,
    options: dict[str, str],
    solver: flags.Solver = None,
    calibration: Annotated[
        Path | None, typer.Option(help="File of `parataxis calibrate`, used instead of --solver and --tolerance.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Image grid to write; its figures go beside it as .json.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Picture to write of the samples after every round.")] = None,
    plot: flags.Plot = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="File that Ctrl-C and SIGTERM write: the same command goes on from it, to the same bits."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the sequential loop too and compare with it.")
    ] = False,
    force: flags.Force = False,
    as_json: flags.Json = False,
    config: flags.Config = None,
) -> None:
    """Draw samples of a model, many time steps side by side."""
    pictures = [path for path in (out, trace, plot) if path is not None]
    check_pictures(pictures, force=force)
    if out is not None:
        check_output([out.with_suffix(".json")], is_figures, force=force)
    if checkpoint is not None:
        if solver == AUTO:
            raise Wrong("--checkpoint needs one solver: --solver auto chooses by measured times, each time anew.")
        if checkpoint in pictures:
            raise Wrong(f"{checkpoint} is named twice: give each file a path of its own.")
        check_output([checkpoint], is_saved_solve)  # even with --force: it would be read, not replaced
    method = make_solver(solver, options)
    calibrated = None if calibration is None else read_calibration(calibration)
    if calibrated is not None:
        if method != make_solver(None, {}) or wanted.tolerance not in (1e-2, calibrated.tolerance):
            raise Wrong(
                "--calibration has its own solver and tolerance: leave --solver, its options and --tolerance out."
            )
        method, wanted = calibrated.solver, replace(wanted, tolerance=calibrated.tolerance)
    problem = Problem.load(wanted, options, window=getattr(method, "window", None))
    rounds: list[Tensor] = []

    def remember(runs: Sequence[Run]) -> None:
        import torch

        rounds.append(torch.stack([run.estimate for run in runs[:SHOWN]]))

    progress = sys.stderr.isatty() and not as_json
    if compare:
        problem.warm_up(min(wanted.max_rows, WARM_ROWS))
    result = problem.draw(
        calibrated or method,
        on_round=None if trace is None else remember,
        keep_residuals=plot is not None,
        progress=progress,
        checkpoint=checkpoint,
    )
    figures = _figures(problem, result, solver)
    if calibrated is not None:
        figures["promised"] = calibrated.promised
        if not math.isfinite(calibrated.quantile):  # too few runs: the solver's own estimate is not of this error test
            figures["error_estimate"] = None
    if compare and result[0].reason != "interrupted":
        _compare(figures, result, problem.draw(SEQUENTIAL, progress=progress))
    files = {}
    if pictures:
        from ..plots import figure_image, image_grid, trace_grid
        from ..plots import rounds as rounds_figure

        if out is not None:
            files[out] = picture_writer(image_grid(result.x, zoom=3))
            files[out.with_suffix(".json")] = json_writer(figures)
        if trace is not None and rounds:
            files[trace] = picture_writer(trace_grid(rounds, zoom=2))
        if plot is not None:
            files[plot] = picture_writer(figure_image(rounds_figure(result)))
    save(files)
    emit(json.dumps(figures, indent=2) if as_json else _text(figures, result, pictures))
    if not result.converged:
        reason = result[0].reason
        raise Failed(
            f"not every sample was finished ({reason}): what was written is the last estimate.{_goes_on(checkpoint)}",
            **({"status": INTERRUPTED} if reason == "interrupted" else {}),
        )


def _goes_on(checkpoint: Path | None) -> str:
    """Return how the solve can be ended, or nothing where it cannot."""
    return "" if checkpoint is None or not checkpoint.exists() else f" The same command goes on from {checkpoint}."


def _compare(figures: dict[str, Any], result: Solutions, reference: Solutions) -> None:
    """Fill in how long the sequential loop took, and how far the samples are from its."""
    figures["sequential_seconds"] = reference.seconds
    if not figures["exact_in_distribution"]:
        errors = (result.x - reference.x).flatten(1).norm(dim=1) / reference.x.flatten(1).norm(dim=1)
        figures["relative_error"] = _median(errors.tolist())
        figures["relative_error_worst"] = float(errors.max())


def _figures(problem: Problem, result: Solutions, solver: str | None) -> dict[str, Any]:
    """Return what is printed of a batch; errors to the sequential loop are filled in later."""
    from ..solvers import EXACT_IN_DISTRIBUTION

    exact = solver in EXACT_IN_DISTRIBUTION
    return {
        "model": problem.model.name,
        "sampler": problem.sampler.name,
        "solver": repr(result[0].solver),
        "steps": problem.sampler.steps,
        "samples": problem.wanted.count,
        "seed": problem.wanted.seed,
        "exact_in_distribution": exact,
        "tolerance": None if exact else problem.wanted.tolerance,
        "rounds": result.rounds,
        "evaluations": _median([solution.evaluations for solution in result]),
        "nfe_ratio": _median([solution.nfe_ratio for solution in result]),
        "peak_width": max(solution.peak_width for solution in result),
        "rows_per_step": 1 if problem.wanted.guidance == 1 else 2,
        "converged": result.converged,
        # None while it is not known, as JSON has no infinity
        "error_estimate": max(solution.error_estimate for solution in result) if result.converged else None,
        "relative_error": None,
        "relative_error_worst": None,
        "seconds": result.seconds,
        "sequential_seconds": None,
        "plan": None if result.plan is None else plan_figures(result.plan),
    }


def _median(values: Sequence[float]) -> float:
    import torch

    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def _text(figures: dict[str, Any], result: Solutions, pictures: list[Path]) -> str:
    """Return the figures as a table, with the plan where there is one."""
    seconds, sequential = figures["seconds"], figures["sequential_seconds"]
    rows = [("seconds", "-" if sequential is None else f"{sequential:.2f}", f"{seconds:.2f}")]
    if sequential is not None:
        rows.append(("speed-up", "1", f"{sequential / seconds:.2f}"))
    rows += [
        ("rounds, one network call each", str(figures["steps"]), str(figures["rounds"])),
        ("evaluations / N", "1.00", f"{figures['nfe_ratio']:.2f}"),
        ("most steps in a round", "1", str(figures["peak_width"])),
    ]
    kind = "other samples than the sequential loop's, of exactly the same distribution"
    if not figures["exact_in_distribution"]:
        kind = f"tolerance {figures['tolerance']:g}"
        if "promised" in figures:
            kind += f", which at least {figures['promised']:.1%} of such runs keep by the calibration"
        if figures["error_estimate"] is None:
            rows.append(("estimated error", "0", "not known"))
        else:
            rows.append(("estimated error", "0", f"{figures['error_estimate']:.1e}"))
        if sequential is not None:
            many = figures["samples"] > 1
            rows.append((f"relative error{', median' if many else ''}", "0", f"{figures['relative_error']:.1e}"))
            if many:
                rows.append(("relative error, worst", "0", f"{figures['relative_error_worst']:.1e}"))
    samples = f"{figures['samples']} sample{'s' if figures['samples'] > 1 else ''}"
    heading = (
        f"{samples} of {figures['model']}: {figures['sampler']}, N = {figures['steps']}\n{figures['solver']}, {kind}"
    )
    parts = [heading, table("", ["", "sequential", "parallel"], rows, numbers=(1, 2))]
    if result.plan is not None:
        parts = [str(result.plan), *parts, result.plan.compare(result.seconds)]
    return "\n".join([*parts, *(f"wrote {path}" for path in pictures)])
