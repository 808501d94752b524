"""The command line: ``parataxis sample``, ``parataxis plan``, ``parataxis solvers``, ``parataxis models``.

Flags of solvers are made from the fields of their dataclass, flags of samplers from their function's parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from . import models
from .checks import is_finite
from .engine.rows import OutputError
from .engine.run import Run
from .engine.solution import Solutions
from .planning import Plan, plan
from .sample import sample
from .samplers import SAMPLERS, options
from .samplers.sampler import Sampler
from .solvers import EXACT_IN_DISTRIBUTION, SOLVERS
from .solvers.base import Solver
from .solvers.sequential import Sequential
from .solvers.windowed import Windowed

__all__ = ["main"]

EVERY_SOLVER: dict[str, type[Solver]] = {**SOLVERS, **EXACT_IN_DISTRIBUTION}
AUTO = "auto"
PICTURES = ".png", ".jpg", ".jpeg", ".webp"
SEEDS = 2**62


class _Wrong(Exception):
    """A mistake that the user can correct, in one sentence."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """End the program."""
        self.exit(2, f"parataxis: {message} (see {self.prog} --help)\n")


def choose(kind: str, name: str, registry: Iterable[str]) -> str:
    """Return ``name`` if it is registered.

    Raises:
        ValueError: Else, with the nearest name and the whole list.
    """
    names = list(registry)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names)
    near.sort(key=lambda other: sorted(other) != sorted(name))  # letters that changed places are the likeliest slip
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"there is no {kind} {name!r}.{hint} Choose one of {', '.join(names)}.")


def _parser_of(annotation: Any) -> tuple[Callable[[str], Any], str]:
    """Return how to read a flag of this type, and what to call its value."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [kind for kind in arguments if kind is not type(None)]
        read, label = _parser_of(inner[0])
        return _reading(lambda text: None if text.lower() in ("none", "all") else read(text), f"{label}|none")
    if origin is Literal:
        return _one_of(arguments), "|".join(map(str, arguments))
    if annotation is bool:
        return _boolean, "yes|no"
    if origin is tuple:
        label = f"{arguments[0].__name__},.."
        return _reading(lambda text: tuple(arguments[0](part) for part in text.split(",")), label)
    if annotation in (Solver, Windowed):
        return _solver, "solver"
    return _reading(annotation, annotation.__name__)


def _reading(read: Callable[[str], Any], label: str) -> tuple[Callable[[str], Any], str]:
    """Return a reader of flags whose errors say what it expects, and that text."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(f"must be {label}, got {text!r}") from None

    return checked, label


def _solver(name: str) -> Solver:
    try:
        return SOLVERS[choose("solver", name, SOLVERS)]()
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _one_of(values: Sequence[Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text not in values:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(map(str, values))}, got {text!r}")
        return text

    return read


def _boolean(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false"):
        raise argparse.ArgumentTypeError(f"must be yes or no, got {text!r}")
    return text.lower() in ("yes", "true")


def _add_flags(group: Any, parameters: dict[str, tuple[Any, Any]]) -> None:
    for name, (annotation, default) in parameters.items():
        read, label = _parser_of(annotation)
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=name, type=read, metavar=label, default=default, help=f"default {default}")


def _solver_fields(solver: str) -> dict[str, tuple[Any, Any]]:
    if solver == AUTO:
        return {}
    cls: Any = EVERY_SOLVER[solver]
    types_of = typing.get_type_hints(cls)
    return {field.name: (types_of[field.name], getattr(cls(), field.name)) for field in dataclasses.fields(cls)}


def _sampler_fields(sampler: str) -> dict[str, tuple[Any, Any]]:
    known = options(sampler)
    return {name: (field.annotation, field.default) for name, field in known.items() if name != "prediction"}


def _sample_parser(solver: str, sampler: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="parataxis sample",
        description="Draw samples of a shipped model, many time steps side by side.",
        allow_abbrev=False,
    )
    _add_problem(parser)
    known = f"{', '.join(EVERY_SOLVER)}, or {AUTO}: the fastest by `parataxis plan`; default secant"
    parser.add_argument("--solver", default="secant", help=known)
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default 0")
    parser.add_argument("--out", type=Path, help="image grid to write; its figures go beside it as .json")
    parser.add_argument("--trace", type=Path, help="picture of the samples after every round")
    parser.add_argument("--compare", action="store_true", help="run the sequential loop too and compare with it")
    _add_flags(parser.add_argument_group(f"options of the solver {solver}"), _solver_fields(solver))
    _add_flags(parser.add_argument_group(f"options of the sampler {sampler}"), _sampler_fields(sampler))
    return parser


def _add_problem(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the samples to draw."""
    parser.add_argument("--model", default="digits", help="one of `parataxis models`, or a folder; default digits")
    parser.add_argument("--sampler", default="ddim", help=f"{', '.join(SAMPLERS)}; default ddim")
    parser.add_argument("--steps", type=int, default=50, help="N; default 50")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-2,
        help="relative error of a sample (solvers exact in distribution have none); default 0.01",
    )
    parser.add_argument("--label", help="classes, comma-separated, repeated over the samples; default all")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; default 1, none")
    parser.add_argument("--count", type=int, default=10, help="number of samples; default 10")
    parser.add_argument("--max-rows", type=int, default=128, help="most rows of one network call; default 128")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, alone, on standard output")


def _problem(flags: argparse.Namespace) -> tuple[models.Model, Sampler, Tensor | None]:
    """Return the model, the sampler and the labels of these flags."""
    if flags.count < 1:
        raise _Wrong(f"--count must be at least 1, got {flags.count}.")
    if not is_finite(flags.tolerance):
        raise _Wrong(f"--tolerance must be a finite number, got {flags.tolerance}.")
    try:
        torch.zeros(1, device=flags.device).item()
    except (RuntimeError, AssertionError) as error:  # what torch says without CUDA is an AssertionError
        raise _Wrong(
            f"--device {flags.device} cannot be used ({str(error).splitlines()[0]}): choose another."
        ) from error
    name = flags.model if Path(flags.model).is_dir() else choose("model", flags.model, models.available())
    model = models.load(name, device=flags.device)
    chosen = {option: getattr(flags, option) for option in _sampler_fields(flags.sampler)}
    sampler = model.sampler(flags.sampler, flags.steps, **chosen)
    labels = _labels(flags.label, model.classes, flags.count)
    return model, sampler, None if labels is None else labels.to(flags.device)


def _check_pictures(paths: Sequence[Path]) -> None:
    """Raise unless pictures can be written there, at different paths; creates their folders."""
    for path in paths:
        _check_writable(path)
        if path.suffix.lower() not in PICTURES:
            raise _Wrong(f"{path} has no picture's ending: use .png, .jpg or .webp.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise _Wrong(f"--out and --trace are both {paths[0]}: give each a path of its own.")


def _check_writable(path: Path) -> None:
    """Raise unless a file can be written at ``path``; creates its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise _Wrong(f"{path} cannot be written ({error.strerror}): give another path.") from error


def _labels(text: str | None, classes: int | None, count: int) -> Tensor | None:
    if classes is None:
        if text is not None:
            raise _Wrong("this model is unconditional: leave --label out.")
        return None
    try:
        chosen = list(range(classes)) if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise _Wrong(f"--label must be integers separated by commas, got {text!r}.") from None
    if not all(0 <= label <= classes for label in chosen):
        raise _Wrong(f"--label must lie in 0..{classes - 1} (or {classes} for none), got {text!r}.")
    return torch.tensor([chosen[i % len(chosen)] for i in range(count)])


def _sample(arguments: Sequence[str]) -> None:
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--solver", default="secant")
    first.add_argument("--sampler", default="ddim")
    named, _ = first.parse_known_args(arguments)
    choose("solver", named.solver, [*EVERY_SOLVER, AUTO])
    choose("sampler", named.sampler, SAMPLERS)
    flags = _sample_parser(named.solver, named.sampler).parse_args(arguments)

    if abs(flags.seed) > SEEDS:
        raise _Wrong(f"--seed must lie in -2^62..2^62, got {flags.seed}.")
    pictures = [path for path in (flags.out, flags.trace) if path is not None]
    _check_pictures(pictures)
    if flags.out is not None:
        _check_writable(flags.out.with_suffix(".json"))
    solver: Any = AUTO
    if flags.solver != AUTO:
        make_solver: Any = EVERY_SOLVER[flags.solver]
        solver = make_solver(**{name: getattr(flags, name) for name in _solver_fields(flags.solver)})
    model, sampler, labels = _problem(flags)
    denoise = model.denoiser(flags.guidance)

    def generators(first: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(first + index) for index in range(flags.count)]

    noise = torch.stack([torch.randn(model.shape, generator=source) for source in generators(flags.seed)]).to(
        flags.device
    )
    rounds: list[Tensor] = []

    def remember(runs: Sequence[Run]) -> None:
        rounds.append(torch.stack([run.estimate for run in runs[:10]]))

    def solve(with_solver: Any, *, trace: bool) -> Solutions:
        return sample(
            denoise,
            noise,
            sampler,
            with_solver,
            tolerance=flags.tolerance,
            condition=labels,
            generator=generators(flags.seed + 2**32),
            max_rows=flags.max_rows,
            progress=sys.stderr.isatty() and not flags.json,
            on_round=remember if trace else None,
        )

    result = solve(solver, trace=flags.trace is not None)
    figures = _sample_figures(model, sampler, result, flags)
    if flags.compare:
        reference = solve(Sequential(), trace=False)
        figures["sequential_seconds"] = reference.seconds
        if not figures["exact_in_distribution"]:
            errors = (result.x - reference.x).flatten(1).norm(dim=1) / reference.x.flatten(1).norm(dim=1)
            figures["relative_error"] = float(errors.median())
            figures["relative_error_worst"] = float(errors.max())
    if flags.out is not None or flags.trace is not None:
        from .plots import image_grid, trace_grid

        if flags.out is not None:
            image_grid(result.x, zoom=3).save(flags.out)
            flags.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
        if flags.trace is not None:
            trace_grid(rounds, zoom=2).save(flags.trace)
    if flags.json:
        print(json.dumps(figures, indent=2))
    else:
        if result.plan is not None:
            print(result.plan)
        _print_table(figures)
        if result.plan is not None:
            print(result.plan.compare(result.seconds))
        for path in pictures:
            print(f"wrote {path}")
    if not result.converged:
        raise _Wrong(f"not every sample was finished ({result[0].reason}): what was written is the last estimate.")


def _sample_figures(
    model: models.Model, sampler: Sampler, result: Solutions, flags: argparse.Namespace
) -> dict[str, Any]:
    """Return what is printed of a batch; errors to the sequential loop are filled in later."""
    exact = flags.solver in EXACT_IN_DISTRIBUTION
    return {
        "model": model.name,
        "sampler": sampler.name,
        "solver": repr(result[0].solver),
        "steps": sampler.steps,
        "samples": flags.count,
        "exact_in_distribution": exact,
        "tolerance": None if exact else flags.tolerance,
        "rounds": result.rounds,
        "evaluations": _median([solution.evaluations for solution in result]),
        "nfe_ratio": _median([solution.nfe_ratio for solution in result]),
        "peak_width": max(solution.peak_width for solution in result),
        "rows_per_step": 1 if flags.guidance == 1 else 2,
        "converged": result.converged,
        # None while it is not known, as JSON has no infinity
        "error_estimate": max(solution.error_estimate for solution in result) if result.converged else None,
        "relative_error": None,
        "relative_error_worst": None,
        "seconds": result.seconds,
        "sequential_seconds": None,
        "plan": None if result.plan is None else _figures(result.plan),
    }


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def _print_table(figures: dict[str, Any]) -> None:
    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    worst, middle = figures["relative_error_worst"], figures["relative_error"]
    rows = [
        ("", "sequential", "parallel"),
        ("rounds", str(figures["steps"]), str(figures["rounds"])),
        ("evaluations a sample", str(figures["steps"]), f"{figures['evaluations']:g}"),
        ("NFE ratio (evaluations / N)", "1.00", f"{figures['nfe_ratio']:.2f}"),
        ("peak width", "1", str(figures["peak_width"])),
        ("seconds", seconds(figures["sequential_seconds"]), seconds(figures["seconds"])),
    ]
    if not figures["exact_in_distribution"]:
        rows[-1:-1] = [
            ("relative error, median", "0", "-" if middle is None else f"{middle:.1e}"),
            ("relative error, worst", "0", "-" if worst is None else f"{worst:.1e}"),
        ]
    print(f"{figures['samples']} samples of {figures['model']}: {figures['sampler']}, N = {figures['steps']}")
    if figures["exact_in_distribution"]:
        print(f"{figures['solver']}: other samples than the sequential loop's, of exactly the same distribution")
    else:
        print(f"{figures['solver']}, tolerance {figures['tolerance']:g}")
    for name, sequential, parallel in rows:
        print(f"  {name:<24}{sequential:>12}{parallel:>12}")


def _plan(arguments: Sequence[str]) -> None:
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--sampler", default="ddim")
    named, _ = first.parse_known_args(arguments)
    choose("sampler", named.sampler, SAMPLERS)
    parser = _Parser(
        prog="parataxis plan",
        description="Measure what calls of a shipped model cost here, and say which solver is fastest and by how much.",
        allow_abbrev=False,
    )
    _add_problem(parser)
    parser.add_argument("--devices", type=int, default=1, help="equal devices that would share the rows; default 1")
    _add_flags(parser.add_argument_group(f"options of the sampler {named.sampler}"), _sampler_fields(named.sampler))
    flags = parser.parse_args(arguments)
    model, sampler, labels = _problem(flags)
    result = plan(
        model.denoiser(flags.guidance),
        torch.zeros(flags.count, *model.shape, device=flags.device),
        sampler,
        tolerance=flags.tolerance,
        condition=labels,
        devices=flags.devices,
        max_rows=flags.max_rows,
    )
    print(json.dumps(_figures(result), indent=2) if flags.json else f"{model.name}: {result}")


def _figures(made: Plan) -> dict[str, Any]:
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


def _solvers(arguments: Sequence[str]) -> None:
    _Parser(prog="parataxis solvers", description="List the solvers.").parse_args(arguments)
    for title, registry in (
        ("the same sample:", SOLVERS),
        ("the same distribution, another sample:", EXACT_IN_DISTRIBUTION),
    ):
        print(title)
        for name, solver in registry.items():
            fields = "  ".join(
                f"--{field.replace('_', '-')} {default}" for field, (_, default) in _solver_fields(name).items()
            )
            print(f"  {name:<12} {(inspect.getdoc(solver) or '').splitlines()[0]}")
            if fields:
                print(f"  {'':<12} {fields}")


def _models(arguments: Sequence[str]) -> None:
    _Parser(prog="parataxis models", description="List the shipped models.").parse_args(arguments)
    for name in models.available():
        config = json.loads((models.FOLDER / name / "unet" / "config.json").read_text())
        scheduler = json.loads((models.FOLDER / name / "scheduler" / "scheduler_config.json").read_text())
        kind = "eps, variance-preserving" if "beta_schedule" in scheduler else "velocity, flow matching"
        classes = config.get("num_class_embeds")
        label = "unconditional" if classes is None else f"{classes - 1} classes"
        size = config["sample_size"]
        print(f"{name:<22} {config['in_channels']}x{size}x{size}, {kind}, {label}")


_COMMANDS = {
    "sample": (_sample, "draw samples of a shipped model"),
    "plan": (_plan, "say which solver is fastest here, and by how much"),
    "solvers": (_solvers, "list the solvers and their options"),
    "models": (_models, "list the shipped models"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 2 for a mistake that the user can correct."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    usage = "usage: parataxis COMMAND [options]   (parataxis COMMAND --help)\n"
    listing = usage + "\n".join(f"  {name:<9} {text}" for name, (_, text) in _COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing)
        return 0 if arguments else 2
    try:
        _COMMANDS[choose("command", arguments[0], _COMMANDS)][0](arguments[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (_Wrong, ValueError, OutputError, ModuleNotFoundError) as error:
        print(f"parataxis: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
