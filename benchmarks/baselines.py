"""The loops that parallel sampling has to beat, and what a call of a network is made of on CUDA.

A *denoiser* here is ``denoise(x, t, condition)`` with float32 states x (R, *shape), times t (R,) and a tensor of
conditions (R, ...) or None. The sequential loop around it comes in three forms:

``loop``
    eager PyTorch with the coefficients as numbers: two tensor operations a step besides the network, five with
    clipping.
``compiled loop``
    network and step compiled together by ``torch.compile`` and captured as one CUDA graph, which reads its coefficients
    and noise at a step number that it counts by itself. A step is one replay and nothing else: what
    ``mode="reduce-overhead"`` does, without its Python.
``whole-loop graph``
    all N steps of the same captured in a single CUDA graph: not even replays are launched one by one. This is the
    strongest baseline there is; it takes a capture for each sampler and number of steps.

On a CPU, where there are no graphs, the compiled loop is the compiled step, and there is no whole-loop graph.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import parataxis as px
from meter import Budget, Results, synchronize

Denoise = Callable[..., Tensor]
Run = Callable[[int], tuple[Tensor, int, int]]  # a seed to a sample, its rounds and its evaluations
MOST = 1000  # steps; tables of coefficients all have this length, so that one compiled step serves all samplers


@dataclass(frozen=True)
class Coefficients:
    """A one-step sampler: y = d + gain (clip(d) - d) with d = p x + q f, then x' = a x + b y + z.

    Attributes:
        times: (N,) what the network is told.
        table: (N, 5) a, b, p, q, gain.
        clip: c of clipping to [-c, c]; infinite for none.
        start: First state over standard normal noise.
    """

    times: np.ndarray
    table: np.ndarray
    clip: float
    start: float

    @property
    def steps(self) -> int:
        """N."""
        return len(self.times)

    @classmethod
    def of(cls, sampler: px.Sampler) -> Coefficients:
        """Take the coefficients of a sampler without history."""
        local, transform = sampler.coefficients, sampler.transform
        if local.output_weight.shape[1] != 1:
            raise ValueError(f"{sampler.name} is a multistep sampler: the loops here hold one state.")
        count = sampler.steps
        p, q, gain, clip = np.zeros(count), np.ones(count), np.zeros(count), np.inf
        if transform is not None:
            p, q, gain = transform.x0_from_input, transform.x0_from_output, transform.gain
            clip = np.inf if transform.clip is None else transform.clip
        table = np.stack([local.state_weight, local.output_weight[:, 0], p, q, gain], 1)
        return cls(sampler.times, table, float(clip), sampler.start_scale)


def drawn(sampler: px.Sampler, noise: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    """Return the first state (1, *shape) and the noise (N, 1, *shape) that the steps add, or None, as ours draws it."""
    table = sampler.recurrence(noise, generator)
    return table.start, None if table.noise is None else table.noise.transpose(0, 1).contiguous()


def eager_loop(
    denoise: Denoise, coefficients: Coefficients, start: Tensor, noise: Tensor | None, condition: Any
) -> Tensor:
    """Return the sample of the plain loop."""
    x, clips, after = start, np.isfinite(coefficients.clip), coefficients.table.tolist()
    times = torch.from_numpy(coefficients.times).to(start)
    with torch.no_grad():
        for i, (a, b, p, q, gain) in enumerate(after):
            y = denoise(x, times[i, None].expand(len(x)), condition)
            if clips:
                data = torch.add(p * x, y, alpha=q)
                y = data.clamp(-coefficients.clip, coefficients.clip)
                y = y if gain == 1 else torch.lerp(data, y, gain)
            x = torch.add(a * x if noise is None else torch.add(noise[i], x, alpha=a), y, alpha=b)
    return x


def advance(
    denoise: Denoise, x: Tensor, step: Tensor, times: Tensor, table: Tensor, clip: Tensor, noise: Tensor, condition: Any
) -> Tensor:
    """Return the state after a step, whose number (1,) is on the device."""
    a, b, p, q, gain = table.index_select(0, step)[0].unbind()
    f = denoise(x, times.index_select(0, step), condition)
    data = p * x + q * f
    clipped = torch.minimum(torch.maximum(data, -clip), clip)
    return a * x + b * (data + gain * (clipped - data)) + noise.index_select(0, step)[0]


class GraphedLoop:
    """The compiled loop of one network, for any sampler of at most 1000 steps, one sample at a time.

    Args:
        denoise: The network.
        shape: Of a sample.
        condition: An example (1, ...) of what the network is told, or None.
        device: Where.
        compiled: Whether to compile network and step together.
    """

    def __init__(
        self, denoise: Denoise, shape: tuple[int, ...], condition: Tensor | None, device: str, *, compiled: bool
    ) -> None:
        self.x = torch.zeros(1, *shape, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.times = torch.zeros(MOST, device=device)
        self.table = torch.zeros(MOST, 5, device=device)
        self.clip = torch.zeros((), device=device)
        self.noise = torch.zeros(MOST, 1, *shape, device=device)
        self.condition = None if condition is None else condition.clone()
        self._cuda = device == "cuda"

        def one(x: Tensor, step: Tensor, *tables: Any) -> Tensor:
            return advance(denoise, x, step, *tables)

        self._advance: Callable[..., Tensor] = torch.compile(one, dynamic=False) if compiled else one
        self._graph: Any = None
        self._whole: dict[int, Any] = {}
        self._loaded: Coefficients | None = None

    def load(self, coefficients: Coefficients) -> None:
        """Put the coefficients of a sampler in place; no graph changes."""
        if self._loaded is not coefficients:
            self.times[: coefficients.steps] = torch.from_numpy(coefficients.times).to(self.times)
            self.table[: coefficients.steps] = torch.from_numpy(coefficients.table).to(self.table)
            self.clip.fill_(coefficients.clip)
            self.noise.zero_()
            self._loaded = coefficients

    def _one(self) -> None:
        tables = (self.times, self.table, self.clip, self.noise, self.condition)
        self.x.copy_(self._advance(self.x, self.step, *tables))
        self.step.add_(1)

    def _captured(self, steps: int) -> Any:
        """Capture so many steps in one graph."""
        warm(self._one)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            self.step.zero_() if steps > 1 else None
            for _ in range(steps):
                self._one()
        return graph

    def __call__(
        self,
        coefficients: Coefficients,
        start: Tensor,
        noise: Tensor | None,
        condition: Tensor | None,
        *,
        whole: bool = False,
    ) -> Tensor:
        """Return the sample; the graphs are captured when they are first needed."""
        self.load(coefficients)
        steps = coefficients.steps
        graph: Any = self._whole.get(steps) if whole else self._graph
        if self._cuda and graph is None:
            self.x.copy_(start)
            self.step.zero_()
            graph = self._captured(steps if whole else 1)
            if whole:
                self._whole = {steps: graph}  # one at a time: a graph of 1000 steps has 100 thousand nodes
            else:
                self._graph = graph
        self.x.copy_(start)
        self.step.zero_()
        if noise is not None:
            self.noise[:steps].copy_(noise)
        if self.condition is not None and condition is not None:
            self.condition.copy_(condition)
        if self._cuda:
            for _ in range(1 if whole else steps):
                graph.replay()
        else:
            with torch.no_grad():
                for _ in range(steps):
                    self._one()
        return self.x.clone()


def warm(call: Callable[[], Any], times: int = 3) -> None:
    """Call on a side stream, as a capture asks for."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(times):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


class Graphed:
    """A denoiser whose calls are replays of CUDA graphs, one for each number of rows.

    Args:
        denoise: The network, compiled or not.
    """

    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise
        self._graphs: dict[tuple[int, torch.dtype], tuple[Any, Tensor, Tensor, Tensor | None, Tensor]] = {}

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the outputs, in memory that the next call with as many rows writes to."""
        if not x.is_cuda:
            return self._call(x, t, condition)
        key = len(x), t.dtype
        if key not in self._graphs:
            own = x.clone(), t.clone(), None if condition is None else condition.clone()
            warm(lambda: self._call(*own))
            graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(graph):
                outputs = self._call(*own)
            self._graphs[key] = (graph, *own, outputs)
        graph, held, times, told, outputs = self._graphs[key]
        held.copy_(x)
        times.copy_(t)
        if told is not None and condition is not None:
            told.copy_(condition)
        graph.replay()
        return outputs

    def _call(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        return self._denoise(x, t) if condition is None else self._denoise(x, t, condition)


def by_rows(denoise: Denoise, *, static: bool = False) -> Denoise:
    """Compile a denoiser once for all numbers of rows from two on, or ``static``, once for each."""
    compiled = torch.compile(denoise, dynamic=False if static else None)

    def call(x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        t = t.float()  # samplers with whole times have int64, which would be compiled once more
        if len(x) > 1 and not static:
            for tensor in (x, t, condition):
                if tensor is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(x, t, condition)

    return call


def cuda_graph(denoise: Denoise) -> Denoise:
    """Return the denoiser as the package captures it, or, where it cannot, with graphs of its calls."""
    captured: Callable[[Denoise], Denoise] = getattr(px, "cuda_graph", Graphed)
    return captured(denoise)


def buckets_of(window: int | None, steps: int) -> list[int]:
    """Return the numbers of rows that calls have: the window's own, of wide ones also a half and a quarter."""
    window = min(window or steps, steps)
    return [window] if window <= 32 else [max(window // 4, 2), max(window // 2, 2), window]


class Turns:
    """Methods that are timed in turns.

    Args:
        device: Where.
        repeats: Turns of every method.
    """

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self._runs: dict[Any, tuple[Run, int, Callable[[], object]]] = {}

    def add(self, name: Any, run: Run, *, every: int = 1, before: Callable[[], object] = lambda: None) -> None:
        """Take a method.

        Args:
            name: A key of the results.
            run: Seed to sample, rounds and evaluations.
            every: It takes every n-th turn; 0 for the first one alone, without warming up.
            before: Called before the clock starts.
        """
        self._runs[name] = run, every, before

    def take(self, reference: Run, budget: Budget) -> dict[Any, dict[str, float]]:
        """Return p50 and p95 milliseconds, rounds, evaluations and errors to a reference of every method."""
        seconds: dict[Any, list[float]] = {name: [] for name in self._runs}
        found: dict[Any, list[tuple[float, int, int]]] = {name: [] for name in self._runs}
        failed: dict[Any, str] = {}
        for turn in range(-1, self.repeats):  # the first turn warms up: compiles and captures
            if turn > 2 and budget.over():
                break
            seed = max(turn, 0)
            exact = reference(seed)[0].float()
            for name, (run, every, before) in self._runs.items():
                left_out = turn != 0 if every == 0 else turn > 0 and turn % every > 0
                if name in failed or left_out:
                    continue
                before()
                synchronize(self.device)
                begun = time.perf_counter()
                try:
                    x, rounds, evaluations = run(seed)
                    synchronize(self.device)
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                    print(name, "failed:", failed[name], file=sys.stderr, flush=True)
                    continue
                spent = time.perf_counter() - begun
                if turn >= 0:
                    seconds[name].append(spent)
                    away = float((x.float() - exact).norm() / exact.norm())
                    found[name].append((away, rounds, evaluations))
        rows = {}
        for name, taken in seconds.items():
            if not taken:
                continue
            errors, turns, counts = zip(*found[name], strict=True)
            rows[name] = {
                "p50_ms": 1e3 * float(np.percentile(taken, 50)),
                "p95_ms": 1e3 * float(np.percentile(taken, 95)),
                "rounds": float(np.median(turns)),
                "evaluations": float(np.median(counts)),
                "error": float(np.median(errors)),
                "worst_error": float(np.max(errors)),
                "turns": len(taken),
            }
        return rows


def call_ms(call: Callable[[], object], device: str, seconds: float = 0.2) -> float:
    """Return the median milliseconds of a call, in groups of calls that follow one another as in a loop."""
    call()
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    once = time.perf_counter() - begun
    group = max(1, min(20, int(0.01 / max(once, 1e-6))))
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 3 or (time.perf_counter() - begun < seconds and len(taken) < 50):
        start = time.perf_counter()
        for _ in range(group):
            call()
        synchronize(device)
        taken.append((time.perf_counter() - start) / group)
    return 1e3 * float(np.median(taken))


def curve(
    name: str,
    denoise: Denoise,
    shape: tuple[int, ...],
    condition: Tensor | None,
    results: Results,
    sizes: Iterable[int],
    about: dict[str, Any],
    device: str,
) -> px.Latency:
    """Measure and write the milliseconds of a call, as a CUDA graph, against its rows; stop where memory ends."""
    times: list[float] = []
    measured: list[int] = []
    for size in sizes:
        call = Graphed(denoise)  # drops the graph of the size before, and its memory
        x, t = torch.randn(size, *shape, device=device), torch.full((size,), 500.0, device=device)
        told = None if condition is None else condition.expand(size, *condition.shape[1:]).contiguous()
        try:
            with torch.no_grad():
                spent = call_ms(lambda: call(x, t, told), device)  # noqa: B023
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        measured.append(size)
        times.append(spent / 1e3)
        ratio = times[-1] / times[0]
        results.add(
            {"model": name, **about, "rows": size, "milliseconds": f"{spent:.4g}", "of_one_row": f"{ratio:.3f}"}
        )
    return px.Latency(tuple(measured), tuple(times))


def doublings(most: int) -> list[int]:
    """Return 1, 2, 4, .. up to a number of rows."""
    return [2**i for i in range(most.bit_length())]
