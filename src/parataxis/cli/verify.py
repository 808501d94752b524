"""``parataxis verify``: see whether a network or a loop of your own is fit for parallel sampling."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import flags
from .errors import Failed, Wrong
from .options import make_solver, with_options
from .output import emit
from .problem import Problem

if TYPE_CHECKING:
    from ..verification import Verification

__all__ = ["verify"]


@with_options("samplers", "solvers")
def verify(
    options: dict[str, str],
    target: Annotated[
        str,
        typer.Argument(
            help="A shipped model, a folder with one, or module:function. The function takes nothing and returns "
            "(denoise, noise, sampler), or a loop run(generator) that returns a tensor."
        ),
    ],
    sampler: flags.Sampler = "ddim",
    steps: flags.Steps = 50,
    solver: flags.Solver = "secant",
    tolerance: flags.Tolerance = 1e-2,
    count: Annotated[int, typer.Option(help="Samples, or seeds of a loop, that are compared.")] = 3,
    seed: flags.Seed = 0,
    device: flags.Device = "cpu",
    as_json: flags.Json = False,
    config: flags.Config = None,
) -> None:
    """Measure whether a network or loop keeps the laws of parallel sampling, and say what to do where it does not."""
    method = make_solver(solver, options)
    if ":" in target:
        result = _verify_function(target, method, tolerance, count, seed)
    else:
        problem = Problem.load(
            model=target,
            sampler=sampler,
            steps=steps,
            options=options,
            tolerance=tolerance,
            label=None,
            guidance=1.0,
            count=count,
            device=device,
            seed=seed,
        )
        from ..verification import verify as run

        result = run(
            problem.denoise,
            problem.noise(),
            problem.sampler,
            method,
            tolerance=tolerance,
            condition=problem.labels,
            seed=seed,
        )
    emit(json.dumps(_figures(result), indent=2) if as_json else str(result))
    if not result.passed:
        raise Failed(result.verdict)


def _verify_function(target: str, method: Any, tolerance: float, count: int, seed: int) -> Verification:
    made = _load(target)()
    from ..verification import verify as run
    from ..verification import verify_loop

    if callable(made):
        return verify_loop(made, method, tolerance=tolerance, seeds=count)
    if not (isinstance(made, tuple) and len(made) == 3):
        raise Wrong(f"{target} must return (denoise, noise, sampler) or a loop, got {type(made).__name__}.")
    denoise, noise, equation = made
    return run(denoise, noise, equation, method, tolerance=tolerance, seed=seed)


def _load(target: str) -> Any:
    """Return the function that ``module:function`` names; modules of the present folder count too."""
    module, _, name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Wrong(f"{target} cannot be loaded ({error}): name it as module:function.") from error
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise Wrong(f"{target} is no function: it must return (denoise, noise, sampler), or a loop.")
    return function


def _figures(result: Verification) -> dict[str, Any]:
    """Return a verification as JSON."""
    return {"passed": result.passed, "verdict": result.verdict, "checks": [vars(check) for check in result.checks]}
