"""``parataxis bench``: time solvers against the sequential loop on a model, and say how far their samples are apart."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import flags
from .errors import Wrong
from .options import SOLVER_NAMES, TABLE, make_solver, with_options
from .output import check_pictures, emit, picture_writer, save, table
from .problem import Problem, Wanted, with_problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engine.solution import Solutions

__all__ = ["bench"]

DEFAULT_SOLVERS = "secant,picard,anderson"


@with_problem()
@with_options("samplers")
def bench(
    wanted: Wanted,
    options: dict[str, str],
    solvers: Annotated[str, typer.Option(help=f"Separated by commas, of {', '.join(SOLVER_NAMES)}.")] = DEFAULT_SOLVERS,
    windows: Annotated[str, typer.Option(help="Steps of a round, separated by commas; all for N.")] = "8,all",
    repeat: Annotated[int, typer.Option(help="Timings of each solver, in turns; the median is printed.")] = 3,
    plot: flags.Plot = None,
    force: flags.Force = False,
    as_json: flags.Json = False,
    config: flags.Config = None,
) -> None:
    """Time solvers against the sequential loop on a model, and say how far their samples are from the loop's."""
    check_pictures([] if plot is None else [plot], force=force)
    if repeat < 1:
        raise Wrong(f"--repeat must be at least 1, got {repeat}.")
    methods = [method for name in solvers.split(",") for method in _methods(name.strip(), windows)]
    problem = Problem.load(wanted, options)
    rows = _measure(problem, methods, repeat)
    if plot is not None:
        from ..plots import figure_image, work_precision

        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows[1:]:
            name = row["name"].split(",")[0]
            points.setdefault(name, []).append((row["seconds"], row["relative_error"] or 0.0))
        save({plot: picture_writer(figure_image(work_precision(points, "seconds")))})
    if as_json:
        setting = {"model": problem.model.name, "sampler": wanted.sampler, "steps": wanted.steps}
        setting |= {"samples": wanted.count, "device": wanted.device, "tolerance": wanted.tolerance, "repeat": repeat}
        emit(json.dumps({**setting, "solvers": rows}, indent=2))
        return
    samples = f"{wanted.count} sample{'s' if wanted.count > 1 else ''} on {wanted.device}"
    title = f"{problem.model.name}: {wanted.sampler}, N = {wanted.steps}, {samples}, median of {repeat}"
    columns = ["solver", "rounds", "evaluations / N", "seconds", "speed-up", "error, median", "worst"]
    emit(table(title, columns, [_cells(row) for row in rows], numbers=range(1, len(columns))))


def _methods(name: str, windows: str) -> list[Any]:
    """Return a solver with every window, or once if it has none."""
    if name in TABLE["solvers"] and "window" not in TABLE["solvers"][name]["options"]:
        return [make_solver(name, {})]
    return [make_solver(name, {"window": window.strip()}) for window in windows.split(",")]


def _measure(problem: Problem, methods: list[Any], repeat: int) -> list[dict[str, Any]]:
    """Time every solver and the loop in turns, and return a row for each, the loop first."""
    from ..solvers import EXACT_IN_DISTRIBUTION
    from ..solvers.sequential import Sequential

    def solve(solver: Any) -> Solutions:
        return problem.draw(solver)

    methods = [Sequential(), *(method for method in methods if method != Sequential())]
    results = [solve(method) for method in methods]  # also warms up
    seconds = _times(solve, methods, repeat)
    loop = results[0].x.flatten(1)
    rows = []
    for method, result, times in zip(methods, results, seconds, strict=True):
        errors = ((result.x.flatten(1) - loop).norm(dim=1) / loop.norm(dim=1)).tolist()
        same_sample = type(method) not in EXACT_IN_DISTRIBUTION.values()
        rows.append(
            {
                "name": _name(method),
                "solver": repr(method),
                "rounds": result.rounds,
                "nfe_ratio": statistics.median(solution.nfe_ratio for solution in result),
                "seconds": statistics.median(times),
                "speedup": statistics.median(seconds[0]) / statistics.median(times),
                "relative_error": statistics.median(errors) if same_sample else None,
                "relative_error_worst": max(errors) if same_sample else None,
                "converged": result.converged,
            }
        )
    return rows


def _times(solve: Callable[[Any], Solutions], methods: list[Any], repeat: int) -> list[list[float]]:
    """Return the seconds of each method, measured in turns, so that a change of the machine's load meets all."""
    seconds: list[list[float]] = [[] for _ in methods]
    for _ in range(repeat):
        for times, method in zip(seconds, methods, strict=True):
            times.append(solve(method).seconds)
    return seconds


def _name(method: Any) -> str:
    """Return the name of a solver with its window."""
    if not hasattr(method, "window"):
        return type(method).__name__
    return f"{type(method).__name__}, window {method.window or 'all'}"


def _cells(row: dict[str, Any]) -> list[str]:
    def error(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    mark = "" if row["converged"] else " (not converged)"
    return [
        row["name"] + mark,
        str(row["rounds"]),
        f"{row['nfe_ratio']:.2f}",
        f"{row['seconds']:.3f}",
        f"{row['speedup']:.2f}",
        error(row["relative_error"]),
        error(row["relative_error_worst"]),
    ]
