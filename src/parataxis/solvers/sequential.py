"""The sequential loop: one step after another. What every other solver is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Indices, largest, upload
from ..samplers.coefficients import Coefficients
from .base import Queries, Query
from .batch import Batch

__all__ = ["PlainLoop", "Sequential"]


@dataclass(frozen=True)
class Sequential:
    """Forward substitution: u_{i+1} = A_i u_i + sum_l B_{i,l} f_{i-l} + C_i z_i, N rounds of one step each."""

    adopts = True  # samples that begin later join the same loop
    goes_forward = True

    def unsupported(self, coefficients: Coefficients) -> str | None:
        """Every recurrence can be solved."""
        return None

    def solve(self, batch: Batch) -> Queries:
        """Solve the samples of a batch."""
        return _loop(batch)


CHECK_EVERY = 16  # steps between looks for outputs that are not finite, where looking means to wait for a device


class PlainLoop:
    """The working memory of the plain loop: present states, the outputs that steps look back to, and little else."""

    def __init__(self, batch: Batch) -> None:
        local, start = batch.problem.coefficients, batch.start
        self.batch, self.lags = batch, local.lags
        batch.hold_noise(1)
        self.a = upload(local.state_weight, start)[:, None, None]
        self.b = upload(local.output_weight.T.copy(), start)[..., None, None]
        # Of every step, views that are made once: to index costs as much as to step.
        self.weights = list(zip(self.a.unbind(0), zip(*(b.unbind(0) for b in self.b), strict=True), strict=True))
        self.step = np.zeros(len(batch), np.int64)
        self.u = start.clone()
        self.f = start.new_zeros(len(batch), self.lags + 1, start.shape[1])  # the last outputs, the latest first
        self.evaluated = self.u  # where the latest outputs were evaluated
        self.largest = start.new_zeros(len(batch), batch.problem.steps)  # |f| of every step
        self.look()

    def look(self) -> None:
        """Make the views that every step uses."""
        self.latest, self.sizes = self.f[:, 0], self.largest.unbind(1)
        count = len(self.step)
        self.everyone, self.none = np.arange(count), np.zeros(count)
        self.ones = np.ones(count, np.int64)

    def adopt(self) -> None:
        """Take up the samples that have been added."""
        batch = self.batch
        extra = len(batch) - len(self.step)
        if extra:
            self.step = np.append(self.step, np.zeros(extra, np.int64))
            self.u, self.f, self.largest = (
                torch.cat([values, values.new_zeros(extra, *values.shape[1:])])
                for values in (self.u, self.f, self.largest)
            )
            self.evaluated = torch.cat([self.evaluated, self.u[len(self.evaluated) :]])
            self.look()
        for place in batch.added:
            self.step[place] = 0
            self.u[place], self.f[place], self.largest[place] = batch.start[place], 0, 0
        batch.added.clear()

    def advance(self, places: Indices, outputs: Tensor) -> None:
        """Take one step of the samples at these places."""
        batch, N = self.batch, self.batch.problem.steps
        if batch.returns_errors:
            failed = batch.fail_broken(places, self.step[places], np.ones(len(places), np.int64), outputs)
            if failed.any():
                places, outputs = places[~failed], outputs[upload(np.flatnonzero(~failed), outputs.device)]
                if not len(places):
                    return
        steps = self.step[places].tolist()
        if len(steps) == len(self.step) and steps.count(steps[0]) == len(steps):
            self.advance_all(steps[0], outputs)
        else:
            self._advance_some(places, self.step[places], outputs)
        for place, step in zip(places.tolist(), steps, strict=True):
            if step + 1 == N:
                batch.finished[place], batch.results[place] = True, self.u[place].clone()

    def _advance_some(self, places: Indices, steps: Indices, outputs: Tensor) -> None:
        """Take one step of samples that stand at different steps, or are not all."""
        batch = self.batch
        rows = slice(None) if len(places) == len(self.step) else upload(places, outputs.device)
        self.evaluated = self.u if isinstance(rows, slice) else self.evaluated.index_copy(0, rows, self.u[rows])
        if self.lags:
            self.f[rows, 1:] = self.f[rows, :-1].clone()
        self.f[rows, 0] = outputs
        index = upload(steps, outputs.device)
        noise = None
        if batch.noise is not None:
            at = upload(batch.noise_at(places, steps, steps), outputs.device)
            noise = batch.noise[upload(places, outputs.device), at, None]
        u = self._step(self.u[rows, None], self.f[rows], noise, self.a[index], self.b[:, index])
        if isinstance(rows, slice):
            self.u = u[:, 0]
        else:
            self.u = self.u.index_copy(0, rows, u[:, 0])
        self.step[places] += 1
        self._check(places, outputs, steps)
        batch.accept(places, np.ones(len(places), np.int64), u, np.zeros(len(places)))

    def _step(self, u: Tensor, f: Tensor, noise: Tensor | None, a: Tensor, b: Sequence[Tensor] | Tensor) -> Tensor:
        """Return A u + sum_l B_l f_l + noise, (R, 1, dim), summed in the order in which windows sum it."""
        new = f[:, :1] * b[0] if noise is None else noise.addcmul(f[:, :1], b[0])
        for lag in range(1, self.lags + 1):
            new.addcmul_(f[:, lag : lag + 1], b[lag])
        return new.addcmul_(u, a)

    def advance_all(self, step: int, outputs: Tensor) -> None:
        """Take one step of all samples, which stand at the same one; outputs (S, dim)."""
        self.evaluated = self.u
        if self.lags:
            self.f[:, 1:] = self.f[:, :-1].clone()
        self.latest.copy_(outputs)
        noise, everyone = None, self.everyone
        if self.batch.noise is not None:
            noise = self.batch.noise[:, int(self.batch.noise_at(everyone, self.step, self.step)[0]), None]
        u = self._step(self.u[:, None], self.f, noise, *self.weights[step])
        self.u = u[:, 0]
        largest(outputs, out=self.sizes[step])
        self.step[:] = step + 1
        self.batch.accept(everyone, self.ones, u, self.none)
        if step + 1 == self.batch.problem.steps or (step + 1) % CHECK_EVERY == 0:
            self._raise_unless_finite(self.largest)

    def _check(self, places: Indices, outputs: Tensor, steps: Indices) -> None:
        """Raise if an output was not finite: at once on the CPU, elsewhere every few steps and at the end."""
        index = upload(places * self.largest.shape[1] + steps, outputs.device)
        norms = largest(outputs)
        self.largest.view(-1).index_copy_(0, index, norms)
        ends = self.step[places] == self.batch.problem.steps
        if outputs.device.type == "cpu":
            sizes = norms
        elif ends.any() or int(self.step[places].max()) % CHECK_EVERY == 0:
            sizes = self.largest.view(-1)
        else:
            return
        self._raise_unless_finite(sizes)

    def _raise_unless_finite(self, norms: Tensor) -> None:
        """Raise if a norm of an output is not finite, and name the first step where that is so."""
        if not bool(torch.isfinite(norms).all()):
            place, step = (int(values[0]) for values in np.nonzero(~np.isfinite(self.largest.cpu().numpy())))
            raise self.batch.output_error(place, step)

    def estimate(self, place: int) -> Tensor:
        """Return (dim,) the data prediction at the last step; where it is unknown, the present state."""
        local, step = self.batch.problem.coefficients, int(self.step[place])
        if 0 < step < local.steps and local.x0_from_input is not None and local.x0_from_output is not None:
            p, q = local.x0_from_input[step - 1], local.x0_from_output[step - 1]
            return p * self.evaluated[place] + q * self.f[place, 0]
        return self.u[place]

    def state(self, place: int) -> dict[str, Any]:
        """Return what the loop knows of a sample."""
        return {name: getattr(self, name)[place] for name in STATE}

    def load(self, place: int, state: dict[str, Tensor]) -> None:
        """Take such a state."""
        self.evaluated = self.evaluated.clone()  # may be the same tensor as u
        for name in STATE:
            getattr(self, name)[place] = state[name]


STATE = ("step", "u", "f", "evaluated", "largest")


def _loop(batch: Batch) -> Queries:
    loop = batch.memory = PlainLoop(batch)
    while True:
        loop.adopt()
        # All places as they were made once, while all are being solved: as elsewhere here, small things count.
        everyone = bool(batch.active.all())
        places, widths = (
            (loop.everyone, loop.ones) if everyone else (np.flatnonzero(batch.active), batch.active.astype(np.int64))
        )
        states = loop.u.clone() if everyone else loop.u[upload(places, loop.u.device)]
        answer = yield Query(states, loop.step[places], places, widths)
        if answer.sample is not None and not len(answer.sample):  # samples have ended or have been added
            continue
        loop.advance(places if answer.sample is None else answer.sample, answer.outputs)
