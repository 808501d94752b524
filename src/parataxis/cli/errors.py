"""What goes wrong on the command line, and the exit status of each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["FAILED", "INTERRUPTED", "TERMINATED", "WRONG", "Failed", "NoReader", "Wrong", "choose"]

FAILED = 1  # the work was begun, and its result is missing, not converged, or not where it was wanted
WRONG = 2  # nothing was done: the command has to be corrected
INTERRUPTED = 130  # Ctrl-C, as shells count it: 128 and the signal's number
TERMINATED = 143  # SIGTERM


class Wrong(Exception):
    """A mistake that the user can correct, in one sentence; nothing has been done."""


class Failed(Exception):
    """The work was begun and did not end as it should, in one sentence that says where its results are.

    Attributes:
        status: The exit status.
    """

    def __init__(self, message: str, status: int = FAILED) -> None:
        """Say what failed."""
        super().__init__(message)
        self.status = status


class NoReader(Exception):
    """Nobody reads standard output any more, as after ``| head``; typer would end the program with status 1."""


def choose(kind: str, name: str, registry: Iterable[str]) -> str:
    """Return ``name`` if it is registered.

    Raises:
        Wrong: Else, with the nearest name and the whole list.
    """
    names = list(registry)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names)
    near.sort(key=lambda other: sorted(other) != sorted(name))  # letters that changed places are the likeliest slip
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise Wrong(f"there is no {kind} {name!r}.{hint} Choose one of {', '.join(names)}.")
