"""Whole rounds as CUDA graphs: network, measurement and move of a window, launched at once.

On a GPU a small network is over sooner than Python can launch it. Where the shapes of a round do not change, everything
that the device does in it is recorded twice over: one graph evaluates the network and measures, one moves the windows.
A round is then two launches, one read, and the decision of the solver on the host. Rows behind the end of a window are
evaluated too, and ignored, so that the shapes stay the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..arrays import Array, Indices
from ..samplers.recurrence import Recurrence
from ..samplers.sampler import Sampler
from ..solvers.batch import Batch
from ..solvers.instructions import write_frame
from ..solvers.window import Window
from ..solvers.windowed import Windowed
from .rows import rounding_of
from .run import Group, Run
from .solution import Round

__all__ = ["GraphedNetwork", "cuda_graph"]

log = logging.getLogger("parataxis")
WARM_UP = 3  # calls before a capture, as libraries choose their kernels in the first ones
KEPT = 32  # captured rounds that a network keeps, of different shapes


def cuda_graph(denoise: Callable[..., Tensor]) -> GraphedNetwork:
    """Return a network whose rounds :func:`parataxis.sample` captures as CUDA graphs, and replays.

    Wrap a network once and hold on to the wrapper: captured rounds are kept in it, for every shape, window and sampler
    that it has met, and the first call of each takes as long as some rounds. What is replayed is what was captured:
    after a change of the network's own settings, wrap it anew (weights may change in place). Elsewhere than on CUDA,
    and where a round cannot be captured (the network waits for the device, a guess, a mesh, accelerated solvers), the
    network is called as it is.

    Args:
        denoise: As for :func:`parataxis.sample`; compiled or not, but without CUDA graphs of its own.
    """
    return GraphedNetwork(denoise)


class GraphedNetwork:
    """See :func:`cuda_graph`."""

    def __init__(self, denoise: Callable[..., Tensor]) -> None:
        self.denoise = denoise
        self._rounds: dict[Any, CapturedRounds | None] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        """Call the network as it is."""
        return self.denoise(*arguments)

    def __repr__(self) -> str:
        """Return how many rounds are captured."""
        return f"GraphedNetwork({len(self._rounds)} captured)"

    def drive(self, runs: Sequence[Run], sampler: Sampler, condition: Any, dtype: torch.dtype) -> Captured | None:
        """Return the captured rounds of these runs, or None if they cannot be captured."""
        group = runs[0].group
        batch, solver = group.batch, group.solver
        if not isinstance(solver, Windowed) or type(solver).round is not Windowed.round:
            return None
        if not batch.start.is_cuda and not FAKE:
            return None
        if batch.guess is not None or batch.trajectory is not None or batch.problem.strides or batch.recurrence.replays:
            return None
        leaves, spec = tree_flatten(condition)
        shapes = tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = (id(sampler), solver, tuple(batch.recurrence.start.shape), batch.start.dtype, dtype, shapes, str(spec))
        if key not in self._rounds:
            if len(self._rounds) >= KEPT:
                self._rounds.pop(next(iter(self._rounds)))
            try:
                self._rounds[key] = CapturedRounds(self.denoise, group, sampler, condition, dtype)
            except RuntimeError as error:
                log.warning("rounds run without CUDA graphs, as one cannot be captured: %s", error)
                self._rounds[key] = None
        rounds = self._rounds[key]
        return None if rounds is None else Captured(rounds, runs, condition)


class CapturedWindow(Window):
    """A window whose tensors are moved by a graph."""

    always_enters = True
    replay: Callable[[], None]

    def carry_out(self, count: Indices, *, enter: bool) -> None:
        """Launch the graph that sends what has been written, and corrects and moves the tensors."""
        self.replay()


class CapturedRounds:
    """The graphs of one solver, sampler and shape, with the tensors that they read and write."""

    def __init__(
        self, denoise: Callable[..., Tensor], group: Group, sampler: Sampler, condition: Any, dtype: torch.dtype
    ) -> None:
        self.denoise, self.sampler, self.dtype, self.shape = denoise, sampler, dtype, group.shape
        batch, self.solver = group.batch, group.solver
        start, noise = batch.recurrence.start, batch.recurrence.noise
        static = Recurrence(batch.recurrence.coefficients, start.clone(), None if noise is None else noise.clone())
        self.batch = Batch(batch.problem, static)
        assert isinstance(self.solver, Windowed)
        self.window = CapturedWindow(self.batch, self.solver.window)
        self.times = sampler.network_times(dtype).to(start.device)
        self.columns = None
        if sampler.transform is not None:
            self.columns = torch.from_numpy(sampler.transform.columns).to(batch.start)
        self.conditional = condition is not None
        leaves, self.spec = tree_flatten(condition)
        rows = self.window.W
        self.leaves = [leaf.repeat_interleave(rows, 0) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        measured = self.window.tensors.measured
        self.measured = torch.zeros(measured.shape, dtype=measured.dtype, device="cpu", pin_memory=measured.is_cuda)
        self._capture()

    def load(self, batch: Batch, condition: Any) -> None:
        """Take the samples of another solve."""
        self.batch.recurrence.start.copy_(batch.recurrence.start)
        if self.batch.recurrence.noise is not None and batch.recurrence.noise is not None:
            self.batch.recurrence.noise.copy_(batch.recurrence.noise)
        for mine, leaf in zip(self.leaves, tree_flatten(condition)[0], strict=True):
            if isinstance(leaf, Tensor):
                mine.copy_(leaf.repeat_interleave(self.window.W, 0))
        state = self.batch
        state.problem = self.window.problem = batch.problem
        state.accepted[:], state.error[:], state.finished[:], state.active[:], state.bounded[:] = (
            0,
            0.0,
            False,
            True,
            True,
        )
        state.results, state.numbers = {}, batch.numbers
        self.window.reset(self.window.rows)
        write_frame(self.window)
        self.window.pack.send()

    def evaluate(self) -> None:
        """Evaluate the network at all windows, measure, and copy what was measured to the host."""
        tensors, sent = self.window.tensors, self.window.pack.tensors
        x = tensors.inputs.reshape(-1, *self.shape)
        condition = (tree_unflatten(self.leaves, self.spec),) if self.conditional else ()
        # A copy: the network may write into its input.
        inputs = x.to(self.dtype) if x.dtype != self.dtype else x.clone()
        outputs = self.denoise(inputs, self.times.index_select(0, sent["step"]), *condition)
        if outputs.shape != x.shape or outputs.dtype != self.dtype:
            raise RuntimeError(f"the network returned {outputs.dtype} {tuple(outputs.shape)}")
        if not self.batch.output_rounding:  # in the first round, which warms up: a graph cannot be asked
            self.batch.output_rounding = rounding_of(outputs)
        outputs = outputs.to(x)
        if self.sampler.transform is not None:
            assert self.columns is not None
            outputs = self.sampler.transform.apply(self.columns.index_select(1, sent["step"]), x, outputs)
        outputs = outputs.reshape(-1, tensors.outputs.shape[2])
        tensors.outputs.copy_(outputs.view(tensors.outputs.shape))
        tensors.measure(pairs=tensors.keeps_pairs)
        self.measured.copy_(tensors.measured, non_blocking=True)

    def move(self) -> None:
        """Send what the host has written, and correct and move the tensors."""
        pack, tensors = self.window.pack, self.window.tensors
        pack.send()
        tensors.overflowed = True  # costs one operation, and saves a second graph
        tensors.correct()
        tensors.move(enter=True)

    def read(self) -> dict[str, Array]:
        """Return what has been measured, once it is there."""
        if self.measured.is_pinned():
            torch.cuda.current_stream().synchronize()
        return self.window.tensors.split(self.measured.double().numpy())

    def _capture(self) -> None:
        if self.batch.start.is_cuda:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.no_grad(), torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.evaluate()
                    self.move()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graphs = []
            for work in (self.evaluate, self.move):
                graphs.append(torch.cuda.CUDAGraph())
                with torch.no_grad(), torch.cuda.graph(graphs[-1]):
                    work()
            self.replay_evaluate: Callable[[], None] = graphs[0].replay
            self.window.replay = graphs[1].replay
        else:
            self.replay_evaluate, self.window.replay = self.evaluate, self.move


class Captured(Iterator[int]):
    """A solve by captured rounds, as :func:`parataxis.drive` drives one: yields the number of rounds so far."""

    def __init__(self, rounds: CapturedRounds, runs: Sequence[Run], condition: Any) -> None:
        self.rounds, self.runs, self.count = rounds, runs, 0
        rounds.load(runs[0].group.batch, condition)
        for run in runs:
            run.group.batch = rounds.batch
        rounds.batch.memory = rounds.window

    def finish(self) -> bool:
        """Solve to the end; return whether that was possible."""
        try:
            for _ in self:
                pass
        except NotFinite:
            return False
        return True

    def __next__(self) -> int:
        """Do one round."""
        rounds, window, solver = self.rounds, self.rounds.window, self.rounds.solver
        active = [run for run in self.runs if not run.done]
        if not active:
            raise StopIteration
        if active[0].group.changed:
            window.refresh()
            write_frame(window)
            window.pack.send()
            active[0].group.changed = False
        rounds.replay_evaluate()
        values = rounds.read()
        if not window.looks_finite(values):
            raise NotFinite
        batch = rounds.batch
        before = [
            Round(int(batch.accepted[run.place]), int(window.width[run.place]), float(batch.error[run.place]))
            for run in active
        ]
        measured = window.take_measured(values, None)
        assert isinstance(solver, Windowed)
        solver.decide(window, measured)
        if window.overflow:
            raise NotFinite
        for run, entry in zip(active, before, strict=True):
            run.took_round(entry)
        self.count += 1
        return self.count


class NotFinite(Exception):
    """An output was not finite, or a correction overflowed: that needs more than a graph."""


FAKE = False  # tests run the same code without graphs
