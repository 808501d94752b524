"""Objects as JSON: what ranks tell one another is read as data, and never run.

A pickle may run code where it is read. Ranks trust one another with numbers, not with their processes, so only frozen
dataclasses and named tuples that the reader names itself are made anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

__all__ = ["from_json", "to_json"]


def to_json(value: Any) -> str:
    """Return a value as JSON: numbers, texts, None, lists, tuples, dicts, dataclasses and named tuples of these.

    Raises:
        TypeError: For anything else.
    """
    return json.dumps(_plain(value))


def from_json(text: str | bytes, classes: Iterable[type] = ()) -> Any:
    """Return the value of :func:`to_json`.

    Args:
        text: What was sent.
        classes: The dataclasses and named tuples that may be made.

    Raises:
        ValueError: If this is no such text, or names another class.
    """
    return _value(json.loads(text), {kind.__name__: kind for kind in classes})


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(part)] for key, part in value.items()]}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.init}
        return {"class": type(value).__name__, "fields": parts}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"class": type(value).__name__, "fields": {name: _plain(getattr(value, name)) for name in value._fields}}
    if isinstance(value, tuple):
        return {"tuple": [_plain(part) for part in value]}
    raise TypeError(f"{type(value).__name__} cannot be sent to other ranks as data, got {value!r}.")


def _value(plain: Any, classes: dict[str, type]) -> Any:
    if isinstance(plain, list):
        return [_value(part, classes) for part in plain]
    if not isinstance(plain, dict):
        return plain
    if "tuple" in plain:
        return tuple(_value(part, classes) for part in plain["tuple"])
    if "dict" in plain:
        return {_value(key, classes): _value(part, classes) for key, part in plain["dict"]}
    kind = classes.get(plain.get("class", ""))
    if kind is None:
        raise ValueError(f"another rank sent {plain.get('class')!r}, expected one of {', '.join(sorted(classes))}.")
    return kind(**{name: _value(part, classes) for name, part in plain["fields"].items()})
