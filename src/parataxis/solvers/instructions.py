"""What the host sends to the device in a round: numbers and indices, written into the one copy that is sent.

Indices point to rows of the block of :class:`.tensors.WindowTensors`, those for which there is nothing to its row of
zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..arrays import Indices
from . import extrapolation

if TYPE_CHECKING:
    from .frame import Flags
    from .seats import Seats
    from .window import Window

__all__ = ["write_entering", "write_frame", "write_shift"]

LARGE = 1 << 16  # elements of the states of all windows from which only rows that enter are filled
STATE_ITSELF = np.array([1.0, 0.0]).reshape(2, 1, 1)  # p and q


def write_frame(window: Seats) -> None:
    """Write down where the windows stand."""
    pack, tables = window.pack, window.tables
    pack.begin()
    numbers, indices, steps = pack.numbers, pack.indices, window.steps
    numbers["weights"][..., 0] = window.weights
    if window.uniform:
        point = window.hi - 1
        # Of the last step and of the first; if there is one step, it is both.
        of_ends = window.prediction[:, :, :: -max(window.W - 1, 1)].transpose(0, 2, 1)
    else:
        steps = np.minimum(steps, window.problem.steps - 1)
        point = np.where(window.width > 0, np.maximum(window.hi - 1, window.lo), window.last_step)
        both = np.stack([point, window.lo])
        of_ends = np.stack([tables.p[both], tables.q[both]])
    window.last_step = point
    # Where the data prediction is unknown, the last state of the window stands for it.
    numbers["prediction"][..., 0] = of_ends if window.tensors.predicts else STATE_ITSELF
    if not (window.uniform and window.ends_are_uniform):  # else they are as they were
        last, ends = np.maximum(window.width - 1, 0), indices["ends"]
        first_x, first_f = window.first_x, window.first_f
        # In the order of WindowTensors.ends.
        ends[0], ends[1], ends[-3:] = first_x + last, first_x + window.width, (first_x, first_f + last, first_f)
        window.ends_are_uniform = window.uniform
    indices["step"][:] = steps
    if window.batch.noise is not None:
        steps = window.batch.noise_at(window.places, np.maximum(window.lo - 1, 0), steps)
        np.add(steps, window.first_noise, out=indices["noise"])


def write_shift(window: Window, count: Indices, last: Indices) -> None:
    """Write down where every row of the next window comes from; states behind ``last`` are not gone on from."""
    indices, nothing = window.pack.indices, window.tensors.nothing
    # State lo + j of the window is the corrected state behind step j - 1; only empty windows would keep state lo.
    source = window.offset + count[:, None]
    lost = source > last[:, None]
    if not window.uniform:
        lost |= source == 0
    shift = np.add(source, window.row_step - 1, out=indices["shift"])
    np.copyto(shift, nothing, where=lost)
    if window.tensors.keeps_pairs:
        # States and outputs of steps that stay; interpolated outputs are no measurement.
        source = source[:, :-1]
        lost = source >= window.width[:, None]
        if window.strided:
            lost |= window.coarse[:, None]
        before = np.add(source, window.row_before, out=indices["before"])
        np.copyto(before, nothing, where=lost)
    if window.lags:
        _write_history(window, 0, count[:, None] + np.arange(-window.lags, 0))


def _write_history(window: Window, which: int, place: Indices, lost: Flags | None = None) -> None:
    """Write down the outputs of steps lo + ``place`` (S, L), and what moves them; of the samples ``lost`` (S,) none.

    Steps before lo are final, and so is the input of step lo.
    """
    rows, slopes = window.pack.indices["history_rows"][:, which], window.pack.numbers["history"][which, ..., 0]
    moved = place > 0
    rows[0] = window.row_f + place
    rows[1] = np.where(moved, window.row_step - 1 + place, window.tensors.nothing)
    rows[2] = np.where(moved, window.row_x + place, window.tensors.nothing)
    slopes[:] = np.where(moved, np.take_along_axis(window.slopes, np.maximum(place, 0), 1), 0.0)
    if lost is not None:
        rows[:, lost] = window.tensors.nothing
        slopes[lost] = 0.0


def write_entering(window: Window, count: Indices, last: Indices, entering: Indices, entry: str) -> None:
    """Write down the states that enter as combinations of the tail; see :mod:`.extrapolation`."""
    numbers, indices, tensors = window.pack.numbers, window.pack.indices, window.tensors
    W, lags, width, noise = window.W, window.lags, window.width, window.batch.noise
    enter = numbers["enter"]
    enter[:] = 0.0
    known, tail = enter.shape[2], enter.shape[2]
    if noise is not None:
        numbers["enter_noise"][:] = 0.0
        tail += W + 1
    # States of the window that are lost by an overflow are copies of the last good one, and so are new ones then.
    new, origin, first = entering + (width - last), window.lo + last, last - count + 1
    wanted = zip(new.tolist(), window.lo.tolist(), origin.tolist(), first.tolist(), strict=True)
    # A captured round always does the same work, and of small states all are as quick as some.
    narrow = not window.always_enters and tensors.x.numel() >= LARGE
    tensors.enters_from = int(first[new > 0].min(initial=W)) if narrow else 0
    for s, (size, lo, begins_behind, row) in enumerate(wanted):
        if not size:
            continue
        kind = "copy" if window.overflow and last[s] < width[s] else entry
        stop = min(row + size, W + 1)
        factors = window.tables.factors(lo, begins_behind, stop - row, W, tail, kind)[: stop - row]
        enter[s, row:stop] = factors[:, :known]
        if kind == "extrapolate" and window.bend is not None and window.bend[s]:
            bend = window.tables.factors(lo, begins_behind, stop - row, W, tail, "bend")[: stop - row]
            enter[s, row:stop] += window.bend[s] * bend[:, :known]
        if noise is not None:
            numbers["enter_noise"][s, row:stop] = factors[:, known:]
    end = np.maximum(last - 1, 0)
    whole = window.uniform and not window.overflow
    if not (whole and window.tail_is_uniform):  # else it is as it was
        # [new_hi, new_{hi-1}, u_{hi-1}, f_{hi-1}, f_middle, f_early]; before the first step's is state lo itself.
        ends, places = indices["ends"], indices["tail"]
        lo_state, step = window.first_x, window.row_step[:, 0] - 1
        places[:, 0], places[:, 1] = np.where(last > 0, step + last, lo_state), np.where(end > 0, step + end, lo_state)
        places[:, 2], places[:, 3] = ends[0], ends[-2]
        span = extrapolation.span(W)
        places[:, 4] = window.first_f + np.maximum(0, end - span // 2)
        places[:, 5] = window.first_f + np.maximum(0, end - span)
        window.tail_is_uniform = whole
    if lags:
        _write_history(window, 1, end[:, None] + np.arange(-lags, 0), lost=last < width)
    if noise is not None:
        steps = np.minimum((window.lo + end)[:, None] + window.offset, window.problem.steps - 1)
        steps = window.batch.noise_at(window.places, np.maximum(window.lo - 1, 0), steps)
        np.add(steps, window.first_noise, out=indices["tail_noise"])
