"""Flags that several subcommands have."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import Wrong
from .options import AUTO, SAMPLER_NAMES, SOLVER_NAMES

__all__ = [
    "Config",
    "Count",
    "Device",
    "Force",
    "Guidance",
    "Json",
    "Label",
    "MaxRows",
    "ModelName",
    "Plot",
    "Sampler",
    "Seed",
    "Solver",
    "Steps",
    "Tolerance",
]


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the defaults of this command's flags from a TOML file: its table of that name, then the top of the file.

    Raises:
        Wrong: If it cannot be read, or names a flag that the command does not have.
    """
    if path is None or context.resilient_parsing:
        return path
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        with path.open("rb") as file:
            config = tomllib.load(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Wrong(f"--config {path} cannot be read ({reason}): give a TOML file.") from None
    command, known = str(context.info_name), {str(parameter.name) for parameter in context.command.params}
    table = config.get(command, {})
    if not isinstance(table, dict):
        raise Wrong(f"--config {path}: {command} must be a table, [{command}], got {table!r}.")
    flags = {key: value for key, value in config.items() if not isinstance(value, dict)} | table
    defaults: dict[str, Any] = {}
    for key, value in flags.items():
        name = key.replace("-", "_")
        if name not in known:
            if key not in table:  # the top of the file is for all commands
                continue
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise Wrong(f"--config {path}: parataxis {command} has no flag {key!r}.{hint}")
        defaults[name] = _text(value)
    context.default_map = defaults
    return path


def _text(value: Any) -> Any:
    """Return a value of a TOML file as it would be typed."""
    if isinstance(value, list):
        return ",".join(str(_text(part)) for part in value)
    return value if isinstance(value, bool) else str(value)


Plot = Annotated[Path | None, typer.Option("--plot", help="Figure to write of the result: .png, .jpg or .webp.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that parataxis has not written.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with defaults of these flags.", is_eager=True, callback=read_config),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, alone, on standard output.")]
ModelName = Annotated[str, typer.Option("--model", help="One of `parataxis models`, or a folder in diffusers' format.")]
Sampler = Annotated[
    str,
    typer.Option("--sampler", help=f"The equation: {', '.join(SAMPLER_NAMES)}.", autocompletion=lambda: SAMPLER_NAMES),
]
Solver = Annotated[
    str | None,
    typer.Option(
        "--solver",
        help=f"How it is solved: {', '.join(SOLVER_NAMES)}, or {AUTO}: the fastest by `parataxis plan`. "
        "Default: secant with a window of 8.",
        autocompletion=lambda: [*SOLVER_NAMES, AUTO],
    ),
]
Steps = Annotated[int, typer.Option("--steps", help="N, steps of the sampler.")]
Tolerance = Annotated[
    float,
    typer.Option("--tolerance", help="Relative error of a sample; solvers that are exact in distribution have none."),
]
Label = Annotated[
    str | None,
    typer.Option("--label", help="Classes, separated by commas, repeated over the samples; default all."),
]
Guidance = Annotated[float, typer.Option("--guidance", help="Classifier-free guidance; 1 is none.")]
Count = Annotated[int, typer.Option("--count", help="Number of samples.")]
MaxRows = Annotated[int, typer.Option("--max-rows", help="Most rows of one network call.")]
Device = Annotated[str, typer.Option("--device", help="Where the network runs, such as cpu or cuda.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the noise: sample i has the seed plus i.")]
