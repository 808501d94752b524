"""``parataxis solvers``: list the solvers and their options."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from . import flags
from .errors import choose
from .options import TABLE
from .output import emit, table

__all__ = ["solvers"]

TITLES = {True: "the same sample:", False: "the same distribution, another sample:"}


def solvers(
    name: Annotated[str | None, typer.Argument(help="Of one solver, whose options are listed.")] = None,
    as_json: flags.Json = False,
) -> None:
    """List the solvers and their options."""
    known = TABLE["solvers"]
    if name is not None:
        known = {choose("solver", name, known): known[name]}
    if as_json:
        emit(json.dumps(known, indent=2))
        return
    if name is not None:
        options = known[name]["options"]
        rows = [
            (f"--{option.replace('_', '-')}", form["type"], form["default"], form["help"])
            for option, form in options.items()
        ]
        emit(table(f"{name}: {known[name]['summary']}", ["option", "type", "default", ""], rows))
        return
    parts = []
    for same_sample, title in TITLES.items():
        entries = {solver: entry for solver, entry in known.items() if entry["same_sample"] == same_sample}
        lines = [(solver, entry["summary"], _defaults(entry["options"])) for solver, entry in entries.items()]
        parts.append(table(title, ["solver", "", "options and their defaults"], lines))
    emit("\n".join(parts))


def _defaults(options: dict[str, dict[str, str]]) -> str:
    return "  ".join(f"--{option.replace('_', '-')} {form['default']}" for option, form in options.items())
