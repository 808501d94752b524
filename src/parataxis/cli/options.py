"""Flags for the options of solvers and samplers.

They are the fields of the solvers' dataclasses and the parameters of the samplers' functions, with their docstrings as
help. Reading those imports torch, so they are kept in ``options.json``, which ``make options``
writes and a test compares with the classes. Values are checked against the classes themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .errors import Wrong, choose

__all__ = [
    "AUTO",
    "SAMPLER_NAMES",
    "SOLVER_NAMES",
    "TABLE",
    "describe",
    "make_solver",
    "read_options",
    "with_options",
    "with_parameters",
]

FILE = Path(__file__).with_suffix(".json")
TABLE: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
SOLVER_NAMES = list(TABLE["solvers"])
SAMPLER_NAMES = list(TABLE["samplers"])
AUTO = "auto"

Reader = Callable[[str], Any]


def with_options(*kinds: Literal["solvers", "samplers"]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command a flag for each option of the solvers or samplers; it takes those that were passed as ``options``.

    ``options`` is a dict from names to the texts on the command line.
    """
    added = [_parameter(name, panel, form) for kind in kinds for name, (panel, form) in _merged(kind).items()]
    return with_parameters(
        added, "options", lambda values: {name: text for name, text in values.items() if text is not None}
    )


def with_parameters(
    added: Sequence[inspect.Parameter],
    name: str,
    collect: Callable[[dict[str, Any]], Any],
    *,
    first: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command more flags, which it takes together, as one argument.

    Args:
        added: The flags.
        name: Of the argument.
        collect: Makes it, from the values of the flags.
        first: Whether help lists them before the flags that the command has.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(command, include_extras=True)
        present = [
            parameter.replace(annotation=hints.get(other, parameter.annotation), kind=parameter.KEYWORD_ONLY)
            for other, parameter in inspect.signature(command).parameters.items()
            if other != name
        ]
        parameters = [*added, *present] if first else [*present, *added]

        @functools.wraps(command)
        def run(**values: Any) -> Any:
            collected = collect({parameter.name: values.pop(parameter.name) for parameter in added})
            return command(**values, **{name: collected})

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _merged(kind: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Return for each option of any solver (sampler) its panel, and its type and help."""
    owners: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for owner, entry in TABLE[kind].items():
        for name, form in entry["options"].items():
            owners.setdefault(name, []).append((owner, form))
    merged = {}
    for name, forms in owners.items():
        defaults = {form["default"] for _, form in forms}
        default = ", ".join(f"{form['default']} ({owner})" for owner, form in forms)
        text = f"{forms[0][1]['help']} ({', '.join(owner for owner, _ in forms)}; default "
        labels = dict.fromkeys(form["type"] for _, form in forms)
        label = next(iter(labels)) if len(labels) == 1 else "choice" if len(defaults) > 1 else " or ".join(labels)
        shown = f"{text}{defaults.pop() if len(defaults) == 1 else default})"
        merged[name] = (f"Options of the {kind[:-1]}", {"type": label, "help": shown})
    return merged


def _parameter(name: str, panel: str, form: dict[str, str]) -> inspect.Parameter:
    flag = typer.Option(f"--{name.replace('_', '-')}", metavar=form["type"], help=form["help"], rich_help_panel=panel)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, flag])


def make_solver(name: str | None, options: dict[str, str]) -> Any:
    """Return the solver of this name with those of the options that solvers have, or ``auto``; None: the default."""
    if name is None:
        name, options = "secant", {"window": "8", **options}  # as where the library is given none
    choose("solver", name, [*SOLVER_NAMES, AUTO])
    if name == AUTO:
        _refuse_foreign("solver", AUTO, {}, options)
        return AUTO
    from ..solvers import EXACT_IN_DISTRIBUTION, SOLVERS

    cls: Any = {**SOLVERS, **EXACT_IN_DISTRIBUTION}[name]
    return cls(**read_options("solver", name, options, solver_fields(cls)))


def sampler_options(name: str, options: dict[str, str]) -> dict[str, Any]:
    """Return those of the options that samplers have, read for this sampler."""
    choose("sampler", name, SAMPLER_NAMES)
    return read_options("sampler", name, options, sampler_fields(name))


def read_options(kind: str, name: str, options: dict[str, str], fields: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Return the options of one solver or sampler, read by their types.

    Raises:
        Wrong: For an option of another one, or a value of another type.
    """
    _refuse_foreign(kind, name, fields, options)
    values = {}
    for option, text in options.items():
        if option in fields:
            read, label = reader_of(fields[option][0])
            try:
                values[option] = read(text)
            except ValueError:
                raise Wrong(f"--{option.replace('_', '-')} must be {label}, got {text!r}.") from None
    return values


def _refuse_foreign(kind: str, name: str, fields: dict[str, Any], options: dict[str, str]) -> None:
    """Raise for an option that other solvers (samplers) have and this one does not."""
    for option in options:
        owners = [owner for owner, entry in TABLE[f"{kind}s"].items() if option in entry["options"]]
        if owners and option not in fields:
            flag = f"--{option.replace('_', '-')}"
            raise Wrong(f"the {kind} {name} has no {flag}: it is an option of {', '.join(owners)}.")


def reader_of(annotation: Any) -> tuple[Reader, str]:
    """Return how to read a value of this type from text, raising ValueError, and what to call it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [kind for kind in arguments if kind is not type(None)]
        read, label = reader_of(inner[0])
        return lambda text: None if text.lower() in ("none", "all") else read(text), f"{label}|none"
    if origin is Literal:
        return _one_of(arguments), "|".join(map(str, arguments))
    if annotation is bool:
        return _boolean, "yes|no"
    if origin is tuple:
        read = arguments[0]
        return lambda text: tuple(read(part) for part in text.split(",")), f"{read.__name__},.."
    if annotation in (int, float, str):
        return annotation, annotation.__name__
    return lambda name: make_solver(name, {}), "solver"


def _one_of(values: Sequence[Any]) -> Reader:
    def read(text: str) -> Any:
        if text not in values:
            raise ValueError
        return text

    return read


def _boolean(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false"):
        raise ValueError
    return text.lower() in ("yes", "true")


def solver_fields(cls: Any) -> dict[str, tuple[Any, Any]]:
    """Return type and default of the options of a solver's class."""
    hints = typing.get_type_hints(cls)
    return {field.name: (hints[field.name], getattr(cls(), field.name)) for field in dataclasses.fields(cls)}


def sampler_fields(name: str) -> dict[str, tuple[Any, Any]]:
    """Return type and default of the options of a sampler; the model knows its prediction type."""
    from ..samplers import options

    known = options(name)
    return {option: (field.annotation, field.default) for option, field in known.items() if option != "prediction"}


def describe() -> dict[str, dict[str, Any]]:
    """Return the table: every solver and sampler, with the type, default and help of its options."""
    from ..samplers import SAMPLERS
    from ..solvers import EXACT_IN_DISTRIBUTION, SOLVERS

    solvers: Any = {**SOLVERS, **EXACT_IN_DISTRIBUTION}
    return {
        "solvers": {
            name: {
                "summary": _summary(cls),
                "same_sample": name in SOLVERS,
                "options": _forms(cls, "Attributes", solver_fields(cls)),
            }
            for name, cls in solvers.items()
        },
        "samplers": {
            name: {"summary": _summary(make), "options": _forms(make, "Args", sampler_fields(name))}
            for name, make in SAMPLERS.items()
        },
    }


def _forms(documented: Any, section: str, fields: dict[str, tuple[Any, Any]]) -> dict[str, dict[str, str]]:
    texts = _documented(inspect.getdoc(documented) or "", section)
    texts |= {name: text for name, text in _grid_options().items() if texts.get(name, "").startswith("See ")}
    return {
        name: {"type": reader_of(annotation)[1], "default": _shown(default), "help": texts.get(name, "")}
        for name, (annotation, default) in fields.items()
    }


def _grid_options() -> dict[str, str]:
    """Return the help of the options that samplers hand on to the grid of their schedule."""
    from ..samplers.schedules import Variance

    return _documented(inspect.getdoc(Variance.grid) or "", "Args")


def _summary(documented: Any) -> str:
    return _plain((inspect.getdoc(documented) or "").split("\n\n")[0])


def _documented(text: str, section: str) -> dict[str, str]:
    """Return the entries of a section of a docstring in Google's style."""
    body = re.search(rf"^{section}:\n((?:    .*\n?|\n)*)", text, re.MULTILINE)
    entries = re.findall(r"^    (\w+): ((?:.*)(?:\n        .*)*)", body.group(1) if body else "", re.MULTILINE)
    return {name: _plain(entry) for name, entry in entries}


def _plain(text: str) -> str:
    """Return a docstring's text in one line, without markup."""
    text = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", " ".join(text.split()))
    return text.replace("``", "")


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if dataclasses.is_dataclass(default):
        return type(default).__name__.lower()
    return str(default).lower() if default is None else str(default)


def write() -> None:
    """Write the table, as ``make options`` does."""
    FILE.write_text(json.dumps(describe(), indent=2) + "\n", encoding="utf-8")
