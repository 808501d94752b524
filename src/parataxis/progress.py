"""Progress of a loop that runs in parallel: a bar on the terminal, and lines of the logger ``parataxis``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

__all__ = ["logger", "reported", "show_progress"]

logger = logging.getLogger("parataxis")  # silent until the application asks for it, as loggers of libraries are


@contextmanager
def reported(loop: Any, name: str, report: Any, calibration: Any, *, bar: bool) -> Iterator[None]:
    """Follow a call of a loop; at its end log the report, whose error estimate is then bounded by the calibration.

    Args:
        loop: The loop.
        name: Of the loop, for the log.
        report: Filled in by the call.
        calibration: By which the loop is solved; None without.
        bar: Whether to show a bar.
    """
    with show_progress(loop, name, bar=bar):
        yield
    logger.info("%s: %s", name, report)
    if calibration is not None:
        report.error_estimate = calibration.bounded(report.error_estimate)


@contextmanager
def show_progress(loop: Any, name: str, *, bar: bool) -> Iterator[None]:
    """Follow the rounds of a loop: accepted steps, the round, seconds so far and seconds left.

    Args:
        loop: Its ``on_round`` is called as well, and is put back at the end.
        name: Of the loop, for the log.
        bar: Whether to show a bar; the log, at level DEBUG, has every round.
    """
    if not bar and not logger.isEnabledFor(logging.DEBUG):
        yield
        return
    before, rounds = loop.on_round, 0
    with tqdm(total=None, unit="step", desc=name, disable=not bar) as shown:

        def follow(accepted: int, steps: int) -> None:
            nonlocal rounds
            rounds += 1
            logger.debug("%s: round %d, %d of %d steps accepted", name, rounds, accepted, steps)
            shown.total = steps
            shown.set_postfix(round=rounds, refresh=False)
            shown.n = accepted  # a later stage, or a solve that goes on from a replay, begins anew
            shown.refresh()
            before(accepted, steps)

        loop.on_round = follow
        try:
            yield
        finally:
            loop.on_round = before
