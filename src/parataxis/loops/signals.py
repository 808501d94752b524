"""What ends a pass or a solve of a loop before its end.

Signals pass through somebody else's code, which may well say ``except Exception`` (a retry, a progress bar, a callback
that logs). Such a handler would swallow them, and the loop would run on with outputs that mean nothing. So they are no
``Exception``, like ``GeneratorExit`` and ``KeyboardInterrupt``.
"""

from __future__ import annotations

__all__ = [
    "CallbackChangedLoop",
    "LoopChanged",
    "NotParallelizable",
    "OnlyThisCall",
    "PassComplete",
    "RowsInteract",
    "StartOver",
    "Unforeseeable",
]


class NotParallelizable(BaseException):
    """The loop cannot be solved in parallel; the argument says why."""


class LoopChanged(NotParallelizable):
    """A pass called the denoiser in another way than the passes before it."""


class OnlyThisCall(NotParallelizable):
    """This call cannot be solved in parallel; others of the same loop have been."""


class Unforeseeable(NotParallelizable):
    """The steps of a loop that runs once cannot be foreseen; recorded, it may still be solved."""


class StartOver(BaseException):
    """A loop that runs once had better be recorded: it is put back as it was, and begins anew."""


class PassComplete(BaseException):
    """A pass has seen what it was for."""


class CallbackChangedLoop(BaseException):
    """A callback has changed what the loop does."""


class RowsInteract(Exception):
    """The rows of a call influence one another, so samples cannot be evaluated apart; raised by our own code only."""
