r"""The tensors of a batch of windows: what is measured of a round and what is moved behind it, on the device.

Everything here is a fixed sequence of tensor operations on tensors that stay where they are, steered by numbers and
indices that the host sends in one copy (:class:`parataxis.arrays.Packed`). So a round has few operations, whatever the
number of samples and steps, and a CUDA graph can hold all of it.

All lie in one block of rows (:mod:`.row_block`), so that rows of different kinds are gathered by one index.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Packed
from . import correction, extrapolation
from .batch import Batch
from .row_block import RowBlock

__all__ = ["WindowTensors"]


class WindowTensors(RowBlock):
    """States, outputs and residuals of S windows of W steps.

    Args:
        batch: The samples, for their noise, dtype and device.
        count: S.
        width: W.
        lags: L, earlier outputs that a step uses.
        keeps_pairs: Whether inputs and outputs of the evaluation before are kept, for secants.
        predicts: Whether the data prediction is known; else the last state of a window stands for its size.
        order: Terms kept of the correction, or None for all.
        history: Rounds of corrections kept, of accelerated methods.
        bends: Whether to measure how long bends of the outputs last, see :func:`.extrapolation.persistence`.

    Attributes:
        x: (S, W + 1, dim) the states lo .. lo + W; ``inputs`` the first W of them, ``targets`` the last W.
        f: (S, L + W, dim) the outputs of the steps lo - L .. lo + W - 1; ``outputs`` the last W.
        step: (S, W, dim) from round to round the inputs of the evaluation before, in their place the moves since then
            while they are measured, then the step of each state, and at last the corrected states lo + 1 .. lo + W.
        r: (S, W, dim) the outputs of the evaluation before, their moves, then the residuals.
        ends: (4 or 5, S, dim) input of the last step of each window as it was evaluated last, the state behind it where
            that stands for the size of data, input of the first step, and outputs of the last and of the first step.
        measured: What a round measures, in one piece: the arrays of :meth:`measured_shapes`, one behind the other.
    """

    def __init__(
        self,
        batch: Batch,
        count: int,
        width: int,
        lags: int,
        *,
        keeps_pairs: bool = False,
        predicts: bool = True,
        order: int | None = None,
        history: int = 1,
        bends: bool = False,
    ) -> None:
        self.batch, self.count, self.width, self.lags = batch, count, width, lags
        self.keeps_pairs, self.predicts, self.order, self.history = keeps_pairs, predicts, order, history
        self.bends = bends
        self.overflowed = False  # whether a residual may be infinite
        self.enters_from = 0  # rows of states before this one have nothing to be filled with
        super().__init__(batch.start, self.regions(), count)

    def like(self, count: int) -> WindowTensors:
        """Return tensors of the same kind for another number of samples."""
        options = {"keeps_pairs": self.keeps_pairs, "predicts": self.predicts, "order": self.order, "bends": self.bends}
        return type(self)(self.batch, count, self.width, self.lags, **options, history=self.history)  # type: ignore[arg-type]

    def regions(self) -> dict[str, int]:
        """Return how many rows each region has for a sample.

        What is moved from the first two to the others is one slice of the block, and never overlaps them.
        """
        width = self.width
        return {"x": width + 1, "f": self.lags + width, "step": width, "r": width}

    def numbers(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the numbers that the host sends."""
        width, lags, count = self.width, self.lags, self.count
        numbers: dict[str, tuple[int, ...]] = {
            "weights": (lags + 2, count, width, 1),  # A, then B of each lag
            "prediction": (2, 2, count, 1),  # p and q, of the last and of the first step
            # Slopes of the outputs that steps of the next window, and the tail, look back on.
            "history": (2, count, lags, 1),
            "enter": (count, width + 1, extrapolation.HISTORY + lags),
        }
        if self.batch.noise is not None:
            numbers["enter_noise"] = (count, width + 1, width + 1)
        for i, shape in enumerate(correction.chunk_shapes(width, lags, whole=self.order is not None)):
            numbers[f"chunk{i}"] = (count, *shape)
        return numbers

    def indices(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the indices that the host sends."""
        width, lags = self.width, self.lags
        indices = {"step": width, "noise": width, "shift": width + 1}
        indices |= {"tail": extrapolation.HISTORY, "tail_noise": width + 1}
        shapes: dict[str, tuple[int, ...]] = {name: (self.count, size) for name, size in indices.items()}
        # Of the history: outputs, corrected inputs and inputs as they were evaluated.
        shapes |= {"before": (2, self.count, width), "history_rows": (3, 2, self.count, lags)}
        return {**shapes, "ends": (4 if self.predicts else 5, self.count)}

    def measured_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what a round measures.

        The Gram matrix of the residuals, the products of (dx, df) of each step, the norms of the data prediction at
        the last and at the first step, the products of the last two bends of the outputs, and those of corrections of
        accelerated methods.
        """
        count, width = self.count, self.width
        pairs = (count, width, 2, 2) if self.keeps_pairs else (0,)
        return {
            "gram": (count, width, width),
            "pairs": pairs,
            "sizes": (2, count),
            "bends": (count, 2, 2) if self.bends else (0,),
            "corrections": (0,),
        }

    def look(self) -> None:
        """Make the views that every round uses."""
        super().look()
        width, lags, count = self.width, self.lags, self.count
        dim = self.all.shape[1]
        self.pack = Packed(self.numbers(), self.indices(), self.batch.start)
        self.a, *self.b = self.pack.tensors["weights"]
        self.p, self.q = self.pack.tensors["prediction"]
        self.x, self.f, self.step, self.r = (self.view(name) for name in ("x", "f", "step", "r"))
        self.r_transposed = self.r.mT
        self.inputs, self.targets = self.x[:, :width], self.x[:, 1:]
        self.states = self.inputs[0] if count == 1 else None  # for one sample, in rows
        self.lagged = [self.f[:, lags - lag : lags - lag + width] for lag in range(lags + 1)]
        self.outputs, self.past = self.lagged[0], self.f[:, :lags]
        self.ends = self.all.new_zeros(4 if self.predicts else 5, count, dim)
        self.end_rows, self.last_x, self.last_f = self.ends.view(-1, dim), self.ends[0], self.ends[-2]
        self.end_inputs, self.end_outputs = self.ends[-4:-2], self.ends[-2:]
        # Both regions are as long, so that a stride leads from one to the other: (S W, 2, dim).
        middle = self.first["step"]
        self.front, self.before = self.all[:middle], self.all[middle : middle + 2 * count * width]
        self.pairs = self.before.view(2, -1, dim).transpose(0, 1)
        self.pairs_transposed = self.pairs.mT
        if self.bends:
            apart = extrapolation.apart(width)
            self.apart = self.outputs[:, width - 1 - 3 * apart :: apart]  # (S, 4, dim)
            self.second = self.all.new_empty(count, 2, dim)  # their second differences, the last one first
            self.second_transposed = self.second.mT
            differences = self.all.new_tensor([[0.0, 1.0, -2.0, 1.0], [1.0, -2.0, 1.0, 0.0]])
            self.differences = differences.expand(count, 2, 4)
        shapes = self.measured_shapes()
        self.measured = self.all.new_zeros(sum(int(np.prod(shape)) for shape in shapes.values()))
        self.pieces, self.slices, first = {}, [], 0
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            self.slices.append((name, slice(first, first + size), shape))
            self.pieces[name] = self.measured[first : first + size].view(shape)
            first += size
        if self.keeps_pairs:
            self.pair_products = self.pieces["pairs"].view(-1, 2, 2)

    def split(self, measured: Array) -> dict[str, Array]:
        """Return the arrays of :meth:`measured_shapes`, once :attr:`measured` is on the host."""
        return {name: measured[piece].reshape(shape) for name, piece, shape in self.slices}

    # -- measure --------------------------------------------------------------------------------------------------

    def measure(self, *, pairs: bool) -> None:
        """Measure a round whose outputs are in their places; see :meth:`measured_shapes`.

        With ``pairs`` the moves since the evaluation before are measured first: what was kept of it is gone then.
        """
        sent, noise, step, r = self.pack.tensors, self.batch.noise_rows, self.step, self.r
        if pairs:
            torch.sub(self.inputs, step, out=step)
            torch.sub(self.outputs, r, out=r)
            torch.bmm(self.pairs, self.pairs_transposed, out=self.pair_products)
        if noise is None:
            torch.mul(self.outputs, self.b[0], out=step)
        else:
            torch.index_select(noise, 0, sent["noise"], out=self.flat["step"])
            step.addcmul_(self.outputs, self.b[0])
        for lag in range(1, self.lags + 1):
            step.addcmul_(self.lagged[lag], self.b[lag])
        step.addcmul_(self.inputs, self.a)
        torch.sub(step, self.targets, out=r)
        torch.index_select(self.all, 0, sent["ends"], out=self.end_rows)
        prediction = torch.mul(self.end_inputs, self.p).addcmul_(self.end_outputs, self.q)
        torch.linalg.vector_norm(prediction, dim=2, out=self.pieces["sizes"])
        if self.bends:
            torch.bmm(self.differences, self.apart, out=self.second)
            torch.bmm(self.second, self.second_transposed, out=self.pieces["bends"])
        self.measure_residuals()

    def measure_residuals(self) -> None:
        """Take the inner products of the residuals."""
        torch.bmm(self.r, self.r_transposed, out=self.pieces["gram"])

    # -- move -----------------------------------------------------------------------------------------------------

    def move(self, *, enter: bool) -> Tensor | None:
        """Move the windows along, with :meth:`correct` done: their states and, with ``enter``, those that enter.

        Returns:
            (W, dim) a copy of the inputs of a single sample, which the network may write into; None for several.
        """
        sent = self.pack.tensors
        tail = self.all.index_select(0, sent["tail"]).view(self.count, -1, self.all.shape[1]) if enter else self.x
        if self.lags:
            # What was evaluated at an earlier guess, moved along its slope to the corrected state.
            outputs, corrected, before = self.all.index_select(0, sent["history_rows"]).view(3, 2, *self.past.shape)
            past, history = outputs.addcmul_(corrected.sub_(before), sent["history"])
            if enter:
                tail = torch.cat([tail, history], 1)
            self.past.copy_(past)
        entered = self.all.index_select(0, sent["shift"])
        if self.keeps_pairs:
            torch.index_select(self.front, 0, sent["before"], out=self.before)
        if enter:
            self.fill(entered.view(self.x.shape), tail)
        self.flat["x"].copy_(entered)
        return entered[:-1] if self.count == 1 else None

    def fill(self, states: Tensor, tail: Tensor) -> None:
        """Put the states that enter in place, at the end of each window: combinations of the tail and of noise."""
        sent, first, noise = self.pack.tensors, self.enters_from, self.batch.noise_rows
        entering, factors = states, sent["enter"]
        if first:
            entering, factors = entering[:, first:], factors[:, first:]
        entering.baddbmm_(factors, tail)
        if noise is None:
            return
        index, factors = sent["tail_noise"], sent["enter_noise"]
        if first:
            # Noise enters with the step before the first of these states, and with those behind it.
            count = self.width + 2 - first
            index, factors = index.view(self.count, -1)[:, :count].flatten(), factors[:, first:, :count]
        entering.baddbmm_(factors, noise.index_select(0, index).view(self.count, -1, noise.shape[1]))

    def correct(self) -> None:
        """Turn the steps into the corrected states: new = step + M r, chunk by chunk."""
        sent, r, step = self.pack.tensors, self.r, self.step
        if self.overflowed:
            r.nan_to_num_(0.0, 0.0, 0.0)
        shapes = correction.chunk_shapes(self.width, self.lags, whole=self.order is not None)
        if len(shapes) == 1:
            step.baddbmm_(sent["chunk0"], r)
            return
        first = 0
        for i, (rows, columns) in enumerate(shapes):
            stop = first + rows
            carried = torch.bmm(sent[f"chunk{i}"], r[:, stop - columns : stop])
            step[:, first:stop] += carried
            if stop < self.width:
                # What the next chunk starts from: the whole change of the states before it.
                r[:, stop - self.lags - 1 : stop] += carried[:, -self.lags - 1 :]
            first = stop
