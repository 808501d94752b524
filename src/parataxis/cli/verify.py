"""``parataxis verify``: see whether a network or a loop of your own is fit for parallel sampling."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import flags
from .errors import Failed, Wrong
from .options import make_solver, with_options
from .output import emit
from .problem import Problem, Wanted, with_problem

if TYPE_CHECKING:
    from ..verification import Verification

__all__ = ["verify"]


@with_problem(omit=("model", "label", "guidance", "max_rows"), count=3)
@with_options("samplers", "solvers")
def verify(
    wanted: Wanted,
    options: dict[str, str],
    target: Annotated[
        str,
        typer.Argument(
            help="A shipped model, a folder with one, or module:function. The function takes nothing and returns "
            "(denoise, noise, sampler), or a loop run(generator) that returns a tensor."
        ),
    ],
    solver: flags.Solver = None,
    as_json: flags.Json = False,
    config: flags.Config = None,
) -> None:
    """Measure whether a network or loop keeps the laws of parallel sampling, and say what to do where it does not."""
    method = make_solver(solver, options)
    if ":" in target:
        result = _verify_function(target, method, wanted)
    else:
        problem = Problem.load(replace(wanted, model=target), options)
        from ..verification import verify as run

        result = run(
            problem.denoise,
            problem.noise,
            problem.sampler,
            method,
            tolerance=wanted.tolerance,
            condition=problem.labels,
            seed=wanted.seed,
        )
    emit(json.dumps(_figures(result), indent=2) if as_json else str(result))
    if not result.passed:
        raise Failed(result.verdict)


def _verify_function(target: str, method: Any, wanted: Wanted) -> Verification:
    made = _load(target)()
    from ..verification import verify as run
    from ..verification import verify_loop

    if callable(made):
        return verify_loop(made, method, tolerance=wanted.tolerance, seeds=wanted.count)
    if not (isinstance(made, tuple) and len(made) == 3):
        raise Wrong(f"{target} must return (denoise, noise, sampler) or a loop, got {type(made).__name__}.")
    denoise, noise, equation = made
    return run(denoise, noise, equation, method, tolerance=wanted.tolerance, seed=wanted.seed)


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
