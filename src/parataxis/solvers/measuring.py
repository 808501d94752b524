"""What windows ask for and what they measure: evaluate, and read the device once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..arrays import Array, Indices, read, upload
from . import extrapolation
from .base import Query
from .frame import Flags
from .instructions import write_frame
from .seats import Seats

__all__ = ["Measured", "Measuring"]


@dataclass(eq=False)
class Measured:
    """What one round has measured, float64 on the host.

    Attributes:
        gram: (S, W, W) inner products of the residuals.
        pairs: (S, W, 2, 2) inner products of (dx, df): moves of input and output since the evaluation before, or from
            the origin for steps that are new; empty for windows of one step.
        finite: (S, W) whether the outputs were finite, or None if all were.
        corrections: (S, W, m, m) inner products of the corrections of the last m rounds, the present one first; empty
            unless the solver combines them.
    """

    gram: Array
    pairs: Array
    finite: Flags | None
    corrections: Array


class Measuring(Seats):
    """Windows that are evaluated and measured."""

    def query(self) -> Query:
        """Return the states to be evaluated."""
        widths = np.zeros(len(self.batch), np.int64)
        self.chosen: Indices | None = None  # places of the outputs, if they are not all
        if self.uniform and not self.coarse.any():
            widths[self.places] = self.W
            # A copy, as the network may write into its input.
            inputs, self.entered = self.entered, None
            if inputs is None:
                inputs = self.tensors.inputs.clone().view(-1, self.tensors.x.shape[2])
            return Query(inputs, self.steps.reshape(-1), self.rows_of_all, widths, self.tensors.states)
        nodes, self.entered = self.nodes(), None
        widths[self.places] = nodes.sum(1)
        sample, offset = np.nonzero(nodes)
        self.chosen = sample * (self.lags + self.W) + self.lags + offset
        index = upload(sample * (self.W + 1) + offset, self.batch.start.device)
        return Query(self.tensors.flat["x"].index_select(0, index), self.steps[nodes], self.places[sample], widths)

    def measure(self, outputs: Tensor) -> Measured:
        """Store outputs (R, dim) of the last query, and measure.

        Raises:
            OutputError: If an output is not finite though its input is accepted.
        """
        if self.batch.returns_errors:
            outputs = self._fail_broken(outputs)
        measured = self._measure(outputs, pairs=self.tensors.keeps_pairs)
        flags, pairs = None, measured["pairs"]
        if not self.looks_finite(measured):
            finite = read(torch.isfinite(outputs).all(1)).astype(bool)
            if not finite.all():
                flags, outputs = self._repair(outputs, finite)
                measured = self._measure(outputs, pairs=False)
        return self.take_measured({**measured, "pairs": pairs}, flags)

    def looks_finite(self, measured: dict[str, Array]) -> bool:
        """Return whether all outputs of a round are finite for sure; squares may also overflow by themselves.

        An output that is not finite makes its move so, and its residual, which are measured anyway.
        """
        finite = np.isfinite(measured["pairs" if self.tensors.keeps_pairs else "gram"])
        return bool(finite.all() or finite[self.inside].all())

    def _fail_broken(self, outputs: Tensor) -> Tensor:
        """End the samples that meet an output which the sequential loop meets too: their windows are empty then."""
        widths = self.nodes().sum(1)
        present = np.flatnonzero(widths)
        places, lo, widths = self.places[present], self.lo[present], widths[present]
        failed = self.batch.fail_broken(places, lo, widths, outputs, self.rounds[present])
        if not failed.any():
            return outputs
        self.refresh()
        return outputs.masked_fill(upload(np.repeat(failed, widths), outputs.device)[:, None], 0)

    def take_measured(self, measured: dict[str, Array], finite: Flags | None) -> Measured:
        """Take what the device has measured."""
        self.errors.note_size(self, measured["sizes"])
        self.bend = extrapolation.persistence(measured["bends"]) if self.tensors.bends else None
        return Measured(measured["gram"], measured["pairs"], finite, measured["corrections"])

    def _measure(self, outputs: Tensor, *, pairs: bool) -> dict[str, Array]:
        self._store(outputs)
        if not self.frame_sent:
            write_frame(self)
            self.pack.send()
            self.frame_sent = True
        self.tensors.measure(pairs=pairs)
        return self.tensors.split(read(self.tensors.measured))

    def _store(self, outputs: Tensor) -> None:
        """Put the outputs of the last query in their places; between nodes they are interpolated."""
        tensors = self.tensors
        if self.chosen is None:
            tensors.outputs.copy_(outputs.view(tensors.outputs.shape))
            return
        if self.strided:
            tensors.outputs.zero_()  # between nodes something not finite may have been left
        tensors.flat["f"].index_copy_(0, upload(self.chosen, outputs.device), outputs)
        if self.coarse.any():
            factors = extrapolation.between_nodes(
                self.nodes(), self.inside, self.steps, self.problem.coefficients, self.tables
            )
            by_output, by_state = (upload(factor, outputs) for factor in factors)
            tensors.outputs.copy_(torch.bmm(by_output, tensors.outputs).baddbmm_(by_state, tensors.inputs))

    def _repair(self, outputs: Tensor, finite: Flags) -> tuple[Flags, Tensor]:
        """Replace each output that is not finite by the last finite one before it.

        Returns:
            (S, W) which outputs are finite; an interpolated one is if its neighbours are. And the outputs repaired.
        """
        nodes = self.nodes()
        sample, offset = np.nonzero(nodes)
        broken = (offset == 0) & ~finite
        if broken.any():
            row = int(sample[np.argmax(broken)])
            raise self.batch.output_error(int(self.places[row]), int(self.lo[row]), int(self.rounds[row]) + 1)
        nearest = np.maximum.accumulate(np.where(finite, np.arange(len(finite)), -1))
        outputs = outputs.index_select(0, upload(nearest, outputs.device))
        flags = np.ones((len(self.places), self.W), bool)
        flags[nodes] = finite
        for row in np.flatnonzero(self.coarse).tolist() if self.strided else ():
            at, inside = np.flatnonzero(nodes[row]), np.arange(self.width[row])
            flags[row, inside] = np.interp(inside, at, flags[row, at]) == 1
        return flags, outputs
