r"""The tensors of a batch of windows: what is measured of a round and what is moved behind it, on the device.

Everything here is a fixed sequence of tensor operations on tensors that stay where they are, steered by numbers and
indices that the host sends in one copy (:class:`parataxis.arrays.Packed`). So a round has few operations, whatever the
number of samples and steps, and a CUDA graph can hold all of it.

Tensors are flat, (rows + 1, dim), with one more row that stays zero, for indices that are to point to nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..arrays import Indices, Packed, upload
from . import correction, extrapolation
from .batch import Batch

__all__ = ["WindowTensors"]

SCRATCH = ("moved", "r")  # written anew in every round


class WindowTensors:
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

    Attributes:
        x: (S, W + 1, dim) the states lo .. lo + W; ``inputs`` the first W of them, ``targets`` the last W.
        f: (S, L + W, dim) the outputs of the steps lo - L .. lo + W - 1; ``outputs`` the last W.
        step: (S, W, dim) the step of each state, later the corrected states lo + 1 .. lo + W.
        r: (S, W, dim) residuals.
        dx, df: (S, W, dim) input and output of the evaluation before, and once measured the moves since then.
        end_x, end_f: (S, 2, dim) input and output of the first and of the last step of each window; ``last_x`` and
            ``last_f`` (S, dim) those of the last.
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
    ) -> None:
        self.batch, self.count, self.width, self.lags = batch, count, width, lags
        self.keeps_pairs, self.predicts, self.order, self.history = keeps_pairs, predicts, order, history
        self.overflowed = False  # whether a residual may be infinite
        like = batch.start
        self.flat = {name: like.new_zeros(rows * count + 1, like.shape[1]) for name, rows in self.rows().items()}
        self.pack = Packed(self.numbers(), self.indices(), like)
        self.look()

    def like(self, count: int) -> WindowTensors:
        """Return tensors of the same kind for another number of samples."""
        options = {"keeps_pairs": self.keeps_pairs, "predicts": self.predicts, "order": self.order}
        return type(self)(self.batch, count, self.width, self.lags, **options, history=self.history)  # type: ignore[arg-type]

    def rows(self) -> dict[str, int]:
        """Return how many rows each tensor has for a sample."""
        width = self.width
        rows = {"x": width + 1, "moved": width + 1, "r": width, "f": self.lags + width, "end_x": 2, "end_f": 2}
        return rows | ({"pairs": 2 * width} if self.keeps_pairs else {})

    def numbers(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the numbers that the host sends."""
        width, lags, count = self.width, self.lags, self.count
        tail = extrapolation.HISTORY + lags + (width + 1 if self.batch.noise is not None else 0)
        numbers: dict[str, tuple[int, ...]] = {
            "a": (count, width, 1),
            **{f"b{lag}": (count, width, 1) for lag in range(lags + 1)},
            "p": (count, 2, 1),
            "q": (count, 2, 1),
            "slopes": (count, width, 1),
            "enter": (count, width + 1, tail),
        }
        for i, shape in enumerate(correction.chunk_shapes(width, lags, whole=self.order is not None)):
            numbers[f"chunk{i}"] = (count, *shape)
        return numbers

    def indices(self) -> dict[str, int]:
        """Return how many indices of each kind the host sends."""
        width, lags = self.width, self.lags
        indices = {
            "step": width,
            "noise": width,
            "end_x": 2,
            "end_f": 2,
            "size_x": 2,
            "before_x": width,
            "before_f": width,
        }
        indices |= {"shift": width + 1, "history": lags}
        indices |= {"tail_moved": 2, "tail_f": 1, "tail_history": lags, "tail_noise": width + 1}
        return {name: size * self.count for name, size in indices.items()}

    def look(self) -> None:
        """Make the views that every round uses: slicing them anew would cost as much as a small product."""
        width, lags, count = self.width, self.lags, self.count
        dim = self.batch.start.shape[1]

        def view(name: str) -> Tensor:
            return self.flat[name][:-1].view(count, -1, dim)

        self.x, self.f, self.moved, self.r = (view(name) for name in ("x", "f", "moved", "r"))
        self.r_transposed = self.r.mT
        self.inputs, self.targets, self.first = self.x[:, :width], self.x[:, 1:], self.x[:, :1]
        self.step, self.moved_inputs, self.moved_first = self.moved[:, 1:], self.moved[:, :width], self.moved[:, :1]
        self.lagged = [self.f[:, lags - lag : lags - lag + width] for lag in range(lags + 1)]
        self.outputs, self.past = self.lagged[0], self.f[:, :lags]
        self.x_rows, self.end_x, self.end_f = self.flat["x"][:-1], view("end_x"), view("end_f")
        self.last_x, self.last_f = self.end_x[:, 1], self.end_f[:, 1]
        self.last_rows = self.end_x[:, 1:], self.end_f[:, 1:]
        if self.keeps_pairs:
            halves = self.flat["pairs"][:-1].view(2, count * width, dim)
            self.dx_rows, self.df_rows = halves[0], halves[1]
            self.dx, self.df = (rows.view(count, width, dim) for rows in halves)
            self.pairs = halves.transpose(0, 1)
            self.pairs_transposed = self.pairs.transpose(1, 2)

    def copy_rows(self, rows: Indices, into: WindowTensors) -> None:
        """Copy the tensors of some samples to others of as many samples."""
        for name, flat in into.flat.items():
            flat[:-1] = self.flat[name].index_select(0, self.index(name, rows))

    def put_rows(self, rows: Indices, part: WindowTensors) -> None:
        """Take the tensors of some samples from others of as many samples."""
        for name, flat in part.flat.items():
            self.flat[name].index_copy_(0, self.index(name, rows), flat[:-1])

    def clear_rows(self, rows: Indices) -> None:
        """Set the tensors of some samples to zero."""
        for name, flat in self.flat.items():
            flat.index_fill_(0, self.index(name, rows), 0)

    def index(self, name: str, rows: Indices) -> Tensor:
        """Return where the rows of some samples lie in a tensor."""
        if name == "pairs":  # two halves, for one product of all
            half = self.rows()[name] // 2
            index_in_half = (rows[:, None] * half + np.arange(half)).reshape(-1)
            index = np.concatenate([index_in_half, self.count * half + index_in_half])
        else:
            count = self.rows()[name]
            index = (rows[:, None] * count + np.arange(count)).reshape(-1)
        return upload(index, self.batch.start.device)

    def state(self, row: int) -> dict[str, Tensor]:
        """Return the rows of a sample that are kept from round to round."""
        rows = np.array([row])
        kept = {name: flat for name, flat in self.flat.items() if name not in SCRATCH}
        return {f"rows.{name}": flat.index_select(0, self.index(name, rows)) for name, flat in kept.items()}

    def load(self, row: int, state: dict[str, Tensor]) -> None:
        """Take such rows."""
        rows = np.array([row])
        for name, flat in self.flat.items():
            if name not in SCRATCH:
                flat.index_copy_(0, self.index(name, rows), state[f"rows.{name}"].to(flat))

    # -- measure --------------------------------------------------------------------------------------------------

    def measure(self, *, pairs: bool) -> list[Tensor]:
        """Return what a round measures; empty where there is nothing.

        Returns:
            (S, W, W) the Gram matrix of the residuals, (S, W, 2, 2) the products of (dx, df), (S, 2) the norms of the
            data prediction at the first and at the last step, and the products of corrections, of accelerated methods.
        """
        sent, noise, step, r = self.pack.tensors, self.batch.noise_rows, self.step, self.r
        self.moved_first.copy_(self.first)
        if noise is None:
            torch.mul(self.outputs, sent["b0"], out=step)
        else:
            step.copy_(noise.index_select(0, sent["noise"]).view(step.shape)).addcmul_(self.outputs, sent["b0"])
        for lag in range(1, self.lags + 1):
            step.addcmul_(self.lagged[lag], sent[f"b{lag}"])
        step.addcmul_(self.inputs, sent["a"])
        torch.sub(step, self.targets, out=r)
        inner = self.measure_pairs() if pairs else r.new_zeros(0)
        torch.index_select(self.flat["x"], 0, sent["end_x"], out=self.flat["end_x"][:-1])
        torch.index_select(self.flat["f"], 0, sent["end_f"], out=self.flat["end_f"][:-1])
        sized = self.end_x
        if not self.predicts:
            sized = self.flat["x"].index_select(0, sent["size_x"]).view(self.end_x.shape)
        prediction = torch.mul(sized, sent["p"]).addcmul_(self.end_f, sent["q"])
        return [self.gram(), inner, torch.linalg.vector_norm(prediction, dim=2), self.measure_corrections()]

    def gram(self) -> Tensor:
        """Return the inner products of the residuals, (S, W, W)."""
        return torch.bmm(self.r, self.r_transposed)

    def measure_pairs(self) -> Tensor:
        """Return the inner products of (dx, df), (S, W, 2, 2); the moves take the place of what was kept."""
        torch.sub(self.inputs, self.dx, out=self.dx)
        torch.sub(self.outputs, self.df, out=self.df)
        return torch.bmm(self.pairs, self.pairs_transposed).view(self.count, self.width, 2, 2)

    def measure_corrections(self) -> Tensor:
        """Return nothing: only accelerated methods keep corrections."""
        return self.r.new_zeros(0)

    # -- move -----------------------------------------------------------------------------------------------------

    def move(self, *, enter: bool) -> None:
        """Put the corrected states, the shift of every window and, with ``enter``, the entering states in place."""
        sent, flat = self.pack.tensors, self.flat
        self.correct()
        if self.keeps_pairs:
            torch.index_select(flat["x"], 0, sent["before_x"], out=self.dx_rows)
            torch.index_select(flat["f"], 0, sent["before_f"], out=self.df_rows)
        tail: list[Tensor] = []
        if enter:
            moved = flat["moved"].index_select(0, sent["tail_moved"]).view(self.count, 2, -1)
            tail = [moved, *self.last_rows, flat["f"].index_select(0, sent["tail_f"])[:, None]]
        if self.lags:
            # What was evaluated at an earlier guess, moved along its slope to the accepted state.
            self.outputs.addcmul_(self.moved_inputs - self.inputs, sent["slopes"])
            if enter:
                tail.append(flat["f"].index_select(0, sent["tail_history"]).view(self.past.shape))
            self.past.copy_(flat["f"].index_select(0, sent["history"]).view(self.past.shape))
        torch.index_select(flat["moved"], 0, sent["shift"], out=self.x_rows)
        if enter:
            known = sum(part.shape[1] for part in tail)
            self.x.baddbmm_(sent["enter"][:, :, :known], torch.cat(tail, 1))
            if self.batch.noise_rows is not None:
                noise = self.batch.noise_rows.index_select(0, sent["tail_noise"]).view(self.x.shape)
                self.x.baddbmm_(sent["enter"][:, :, known:], noise)

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
