"""``parataxis calibrate``: measure how far the error test of a model may be loosened, and with what guarantee."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import flags
from .errors import Wrong
from .options import make_solver, with_options
from .output import check_output, emit, save
from .problem import Problem, Wanted, with_problem

if TYPE_CHECKING:
    from ..calibration import Calibration

__all__ = ["calibrate", "read_calibration"]


@with_problem(omit=("count",), seed=1_000_000)
@with_options("samplers")
def calibrate(
    wanted: Wanted,
    options: dict[str, str],
    windows: Annotated[str, typer.Option(help="Steps of a round, separated by commas; all for N.")] = "8",
    runs: Annotated[int, typer.Option(help="Runs; 59 prove the defaults, fewer promise less.")] = 59,
    coverage: Annotated[float, typer.Option(help="Share of the runs that should be within the tolerance.")] = 0.95,
    confidence: Annotated[float, typer.Option(help="Probability that the calibration is right about that.")] = 0.95,
    out: Annotated[Path | None, typer.Option(help="JSON to write, for `parataxis sample --calibration`.")] = None,
    force: flags.Force = False,
    as_json: flags.Json = False,
    config: flags.Config = None,
) -> None:
    """Measure how far the error test of a model may be loosened, and with what guarantee."""
    if out is not None:
        check_output([out], _is_calibration, force=force)
    if runs < 1:
        raise Wrong(f"--runs must be at least 1, got {runs}.")
    solvers = [make_solver("secant", {"window": _window(part)}) for part in windows.split(",")]
    problem = Problem.load(replace(wanted, count=runs), options)
    from ..calibration import calibrate as measure

    made = measure(
        problem.denoise,
        problem.noise,
        problem.sampler,
        solvers,
        tolerance=wanted.tolerance,
        coverage=coverage,
        confidence=confidence,
        condition=problem.labels,
        generator=problem.generators(),
        max_rows=wanted.max_rows,
    )
    save({} if out is None else {out: made.save})
    text = f"{problem.model.name}: {wanted.sampler}, N = {wanted.steps}, tolerance {wanted.tolerance:g}\n{made}"
    emit(json.dumps(_figures(made), indent=2) if as_json else text if out is None else f"{text}\nwrote {out}")


def read_calibration(path: Path) -> Calibration:
    """Return a calibration that :func:`calibrate` wrote.

    Raises:
        ValueError: If it cannot be read.
    """
    from ..calibration import Calibration

    return Calibration.load(path)


def _window(text: str) -> str:
    return "none" if text.strip() == "all" else text.strip()


def _is_calibration(path: Path) -> bool:
    try:
        read_calibration(path)
    except ValueError:
        return False
    return True


def _figures(made: Calibration) -> dict[str, Any]:
    """Return a calibration as JSON, without what only its file needs."""
    return {
        "solver": repr(made.solver),
        "scale": made.setting.scale,
        "tolerance": made.tolerance,
        "coverage": made.coverage,
        "confidence": made.confidence,
        "runs": made.runs,
        "promised": made.promised,
        # None with too few runs, as JSON has no infinity
        "quantile": made.quantile if made.quantile < float("inf") else None,
        "evaluations": made.evaluations,
        "seconds": made.seconds,
        "trials": [
            {
                "solver": repr(trial.setting.solver),
                "scale": trial.setting.scale,
                "failures": trial.failures,
                "accepted": trial.accepted,
                "rounds": trial.rounds,
                "nfe_ratio": trial.nfe_ratio,
                "relative_error_worst": trial.worst,
            }
            for trial in made.trials
        ],
    }
