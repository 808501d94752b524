"""Milliseconds a sample of the shipped image models, what a call costs against its rows, and throughput.

    python benchmarks/latency.py [--device cuda] [--parts images curves large throughput] [--models digits ..]

``images``: one sample at a time of the shipped models by DDPM with 1000 and 100 steps, DDIM with 100 and 50, or Euler
along the flow with 100: the loops of ``baselines.py``, diffusers' own pipeline, ours and ParaDiGMS's published setting
by window, and DDIM with 10 steps. The network is channels-last and, on CUDA, in bfloat16; states are float32. Methods
take turns over the seeds; the clock runs from noise on the device to the sample on the device. Errors are relative to
the compiled loop in the same arithmetic; that of DDIM-10 is its distance from the long loop's sample, as it is another
sampler. Writes ``latency.csv``.

``curves``: milliseconds of a call with 1, 2, 4, .. rows, as the loop makes it and as ours does, which decides what can
be gained. ``large``: the same for a U-Net of Stable Diffusion 1.5's size, with latents of 64x64 and 32x32, and
DiT-XL/2, with random weights, each call a CUDA graph. Nothing but the cost of a call means anything there: the rounds
that are then run are as many as the shipped, trained networks need, and what they return is not a sample. Beside them
stands what ``px.plan`` expects from the same curve. Writes ``latency_curve.csv`` and ``forecast.csv``.

``throughput``: samples a second of a shipped model, 256 of them with 64 rows a round, against batches of the loop.
Writes ``throughput.csv``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import parataxis as px
from baselines import (
    Coefficients,
    Denoise,
    Graphed,
    GraphedLoop,
    Run,
    Turns,
    buckets_of,
    by_rows,
    cuda_graph,
    curve,
    doublings,
    drawn,
    eager_loop,
)
from meter import Budget, Results, read, synchronize
from parataxis import models

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("images", "curves", "large", "throughput")
WINDOWS = (8, 16, 32, 64, 128, 256)
SAMPLERS = {"vp": (("ddim", 100), ("ddpm", 1000), ("ddpm", 100), ("ddim", 50)), "flow": (("flow_euler", 100),)}
KEY = ("model", "sampler", "steps", "dtype", "method", "window")
ROUNDS = ROOT / "benchmarks" / "results" / "rounds.csv"


class Shipped:
    """A shipped model as the benchmarks call it: float32 in and out, inside in the dtype and layout of the device.

    Attributes:
        model: As ``parataxis.models`` loads it.
        shape: Of a sample.
        label: (1,) the class of every sample, or None.
    """

    def __init__(self, name: str, device: str, dtype: torch.dtype) -> None:
        self.model = models.load(name)
        self.network = self.model.network.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.shape, self.dtype, self.device = self.model.shape, dtype, device
        self.label = None if self.model.classes is None else torch.tensor([3], device=device)

    def denoise(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the outputs (R, *shape) in float32."""
        u = x.to(self.dtype, memory_format=torch.channels_last)
        told = {} if label is None else {"class_labels": label}
        output: Tensor = self.network(u, t, **told).sample
        return output.float()

    @property
    def samplers(self) -> tuple[tuple[str, int], ...]:
        """Names and steps, the most valuable first."""
        return SAMPLERS["flow" if self.model.prediction == "flow" else "vp"]


def solvers(steps: int, windows: list[int]) -> Iterator[tuple[str, int, Any]]:
    """Yield name, window and solver of ours and of ParaDiGMS's published setting."""
    for window in [window for window in windows if window < steps]:
        yield "secant", window, px.Secant(window=window)
        if window >= 16 or steps < 32:
            yield "paradigms", window, px.Picard(window=window, rule="paradigms", entry="copy")
    if steps <= 128:
        yield "secant", steps, px.Secant()


def pipeline(shipped: Shipped, name: str, steps: int) -> Callable[[int], Tensor] | None:
    """Return diffusers' own pipeline for an unconditional model; None where there is none."""
    if shipped.model.classes is not None or name not in ("ddim", "ddpm"):
        return None
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(shipped.model.folder).to(shipped.device, shipped.dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    kind = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)

    def run(seed: int) -> Tensor:
        generator = torch.Generator(shipped.device).manual_seed(seed)
        pipe(num_inference_steps=steps, generator=generator, output_type="np")
        return torch.full((1,), float("nan"))

    return run


def images(options: argparse.Namespace, budget: Budget) -> None:
    """Time every method for the shipped models."""
    results = Results(options.results / "latency.csv", KEY, options.device, resume=options.resume)
    for dtype_name in options.dtypes:
        for name in options.models:
            if budget.over():
                return
            shipped = Shipped(name, options.device, getattr(torch, dtype_name))
            denoise = shipped.denoise
            loop = GraphedLoop(denoise, shipped.shape, shipped.label, options.device, compiled=options.compile)
            called = by_rows(denoise, static=options.static) if options.compile else denoise
            chosen = [(sampler, steps) for sampler, steps in shipped.samplers if not options.steps]
            for sampler, steps in chosen or [
                (sampler, steps)
                for sampler in dict.fromkeys(sampler for sampler, _ in shipped.samplers)
                for steps in options.steps
            ]:
                about = {"model": name, "sampler": sampler, "steps": steps, "dtype": dtype_name}
                if not results.done(**about, method="compiled loop", window=1) and not budget.over():
                    compare(shipped, sampler, steps, loop, called, results, about, options, budget)
                    print(f"  {budget.left:.0f} s left", flush=True)
            del loop, called
            torch.compiler.reset()


def compare(
    shipped: Shipped,
    name: str,
    steps: int,
    graphed: GraphedLoop,
    network: Denoise,
    results: Results,
    about: dict[str, Any],
    options: argparse.Namespace,
    budget: Budget,
) -> None:
    """Time every method for one model and sampler, and write the rows."""
    device, sampler, label = shipped.device, shipped.model.sampler(name, steps), shipped.label
    coefficients = Coefficients.of(sampler)
    repeats = options.repeats or (30 if steps < 1000 else 10)

    def noise(seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(1000 + seed)
        return torch.randn(1, *shipped.shape, generator=generator, device=device)

    def generator(seed: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    starts = [noise(seed) for seed in range(repeats)]
    ready = [drawn(sampler, start, generator(seed)) for seed, start in enumerate(starts)]

    def loop(how: str) -> Run:
        def run(seed: int) -> tuple[Tensor, int, int]:
            if how == "loop":
                return eager_loop(shipped.denoise, coefficients, *ready[seed], label), steps, steps
            return graphed(coefficients, *ready[seed], label, whole=how == "whole-loop graph"), steps, steps

        return run

    def ours(solver: Any, window: int) -> Run:
        buckets = buckets_of(window, steps)
        captured = cuda_graph(network)  # a wrapper keeps few captures, so each method has its own

        def run(seed: int) -> tuple[Tensor, int, int]:
            found = px.sample(
                captured, starts[seed], sampler, solver, condition=label, generator=generator(seed), buckets=buckets
            )
            return found.x, found.rounds, found.evaluations

        return run

    turns, slow = Turns(device, repeats), 6 if steps < 1000 else 0
    turns.add(("loop", 1), loop("loop"), every=slow)
    turns.add(("compiled loop", 1), loop("compiled loop"))
    if device == "cuda":
        turns.add(("whole-loop graph", 1), loop("whole-loop graph"))
    theirs = pipeline(shipped, name, steps)
    if theirs is not None:
        turns.add(("diffusers pipeline", 1), lambda seed: (theirs(seed), steps, steps), every=slow)
    for method, window, solver in solvers(steps, options.windows):
        turns.add((method, window), ours(solver, window))
    if name != "flow_euler":
        short = Coefficients.of(shipped.model.sampler("ddim", 10))
        turns.add(
            ("ddim-10", 1),
            lambda seed: (graphed(short, ready[seed][0], None, label), 10, 10),
            before=lambda: graphed.load(short),
        )
    if name == "ddpm":

        def draw(seed: int) -> tuple[Tensor, int, int]:
            drawn(sampler, starts[seed], generator(seed))
            return starts[seed], 0, 0

        turns.add(("drawing the noise", 1), draw)
    found = turns.take(loop("compiled loop"), budget)
    beaten, whole = (
        found.get((how, 1), {}).get("p50_ms", float("nan")) for how in ("compiled loop", "whole-loop graph")
    )
    for (method, window), figures in found.items():
        row = {**about, "method": method, "window": window, "compiled": options.compile}
        row |= {column: f"{value:.4g}" for column, value in figures.items()}
        row |= {"speedup": f"{beaten / figures['p50_ms']:.3f}", "over_whole_graph": f"{whole / figures['p50_ms']:.3f}"}
        if method == "drawing the noise":
            row |= {"speedup": "", "over_whole_graph": "", "error": "", "worst_error": ""}
        results.add(row)


# Cost of a call


def curves(options: argparse.Namespace, budget: Budget) -> None:
    """Measure the curves of the shipped models."""
    results = curve_results(options)
    for dtype in options.dtypes:
        for name in options.models:
            one = {"model": name, "dtype": dtype, "rows": 1}
            if results.done(**one) or budget.over():
                continue
            shipped = Shipped(name, options.device, getattr(torch, dtype))
            denoise = by_rows(shipped.denoise) if options.compile else shipped.denoise
            about = {"dtype": dtype, "compiled": options.compile}
            sizes = doublings(options.most)
            curve(name, denoise, shipped.shape, shipped.label, results, sizes, about, options.device)
            torch.compiler.reset()


def curve_results(options: argparse.Namespace) -> Results:
    """Return the table of curves."""
    key = ("model", "dtype", "rows")
    return Results(options.results / "latency_curve.csv", key, options.device, resume=options.resume)


def unet(device: str, dtype: torch.dtype, *, tiny: bool) -> tuple[Denoise, int]:
    """Return a U-Net of Stable Diffusion 1.5's size with random weights, and its latents' size; or a small one."""
    from diffusers import UNet2DConditionModel

    small: dict[str, Any] = {}
    if tiny:
        small = {"block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 4}
        small |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        small |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    size = 16 if tiny else 64
    with torch.device(device):
        network = UNet2DConditionModel(sample_size=size, cross_attention_dim=768, **small).to(dtype).eval()
        text = torch.randn(1, 77, 768, dtype=dtype)
    network.requires_grad_(False).to(memory_format=torch.channels_last)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        u = x.to(dtype, memory_format=torch.channels_last)
        output: Tensor = network(u, t, text.expand(len(u), -1, -1)).sample
        return output.float()

    return denoise, size


def transformer(device: str, dtype: torch.dtype, *, tiny: bool) -> tuple[Denoise, int]:
    """Return DiT-XL/2 with random weights, and its latents' size; or a small one."""
    from diffusers import DiTTransformer2DModel

    layers, heads, size = (2, 2, 8) if tiny else (28, 16, 32)
    with torch.device(device):
        network = DiTTransformer2DModel(
            num_layers=layers, num_attention_heads=heads, attention_head_dim=72, sample_size=size, out_channels=4
        )
    network = network.to(dtype).eval().requires_grad_(False)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        label = torch.full((len(x),), 207, dtype=torch.int64, device=x.device)
        output: Tensor = network(x.to(dtype), timestep=t.float(), class_labels=label).sample
        return output.float()

    return denoise, size


def large_networks(device: str, dtype: torch.dtype, *, tiny: bool) -> Iterator[tuple[str, Denoise, tuple[int, ...]]]:
    """Yield name, denoiser and shape of the large networks, one after another in memory."""
    denoise, size = unet(device, dtype, tiny=tiny)
    for side in (size, size // 2):
        yield f"Stable Diffusion 1.5's U-Net, {side}x{side}", denoise, (4, side, side)
    denoise, size = transformer(device, dtype, tiny=tiny)
    yield f"DiT-XL/2, {size}x{size}", denoise, (4, size, size)


def measured_rounds(sampler: str, steps: int, window: int) -> tuple[float, str]:
    """Return the median rounds that trained networks needed for an error of 1e-2, and which networks they are."""
    rows = [
        row
        for row in read(ROUNDS)
        if row["sampler"] == sampler
        and int(row["steps"]) == steps
        and row["solver"] == "secant"
        and str(row["width"]) in (str(window), "full" if window >= steps else "")
        and not row["model"].startswith("mixture")
        and float(row["target"]) == 1e-2
    ]
    names = sorted({row["model"] for row in rows})
    return (statistics.median(int(row["rounds"]) for row in rows), " ".join(names)) if rows else (float("nan"), "")


def large(options: argparse.Namespace, budget: Budget) -> None:
    """Measure curves of large networks, and run as many rounds as trained networks need."""
    results = curve_results(options)
    key = ("model", "dtype", "sampler", "steps", "window")
    forecasts = Results(options.results / "forecast.csv", key, options.device, resume=options.resume)
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    torch.backends.cudnn.benchmark = False  # a search for each of so many shapes takes longer than the rest
    for name, denoise, shape in large_networks(options.device, getattr(torch, dtype), tiny=options.tiny):
        if budget.over():
            return
        if forecasts.done(model=name, dtype=dtype, sampler="ddim", steps=100, window=16):
            continue
        about, sizes = {"dtype": dtype, "compiled": False}, doublings(min(options.most, 64))
        known = curve(name, denoise, shape, None, results, sizes, about, options.device)
        for sampler, steps in (("ddim", 100), ("ddpm", 100), ("ddim", 50), ("ddpm", 1000)):
            expected = px.plan(
                denoise,
                torch.randn(1, *shape, device=options.device),
                px.SAMPLERS[sampler](steps=steps),
                known=known,
                solvers=[px.Secant()],
                windows=(8, 16, 32, 64),
            )
            for window in (8, 16, 32, 64):
                if window > steps or window > known.rows[-1] or budget.over():
                    continue
                rounds, source = measured_rounds(sampler, steps, window)
                one = next((c for c in expected.candidates if getattr(c.solver, "window", 0) == window), None)
                row = {"model": name, "dtype": dtype, "sampler": sampler, "steps": steps, "window": window}
                row |= {"rounds": f"{rounds:g}", "rounds_of": source, "loop_ms": f"{1e3 * expected.loop_seconds:.4g}"}
                spent = 1e3 * float(known.seconds(window)) * rounds
                row |= {"network_ms": f"{spent:.4g}", "speedup": f"{1e3 * expected.loop_seconds / spent:.3f}"}
                if one is not None:
                    low, middle, high = expected.speedup_of(one)
                    row |= {"planned_rounds": f"{one.rounds.median:g}", "planned_speedup": f"{middle:.3f}"}
                    row |= {"planned_low": f"{low:.3f}", "planned_high": f"{high:.3f}"}
                forecasts.add({**row, "note": "random weights: only the cost of calls is measured"})


# Throughput


def throughput(options: argparse.Namespace, budget: Budget) -> None:
    """Measure samples a second with refill, and of batches of the loop."""
    key = ("model", "sampler", "steps", "method", "rows")
    results = Results(options.results / "throughput.csv", key, options.device, resume=options.resume)
    count, rows, steps = options.count, options.rows, 50
    name = "digits-unconditional"
    shipped = Shipped(name, options.device, getattr(torch, options.dtypes[0]))
    denoise = by_rows(shipped.denoise) if options.compile else shipped.denoise
    captured, graphed = cuda_graph(denoise), Graphed(denoise)
    sampler = shipped.model.sampler("ddim", steps)
    coefficients = Coefficients.of(sampler)
    noise = torch.randn(count, *shipped.shape, generator=torch.Generator().manual_seed(0)).to(options.device)

    parts = [noise[first : first + rows] for first in range(0, count, rows)]

    def batches() -> tuple[int, int]:
        for part in parts:
            eager_loop(graphed, coefficients, part * coefficients.start, None, None)
        return steps * len(parts), count * steps

    def streamed(solver: Any) -> Callable[[], tuple[int, int]]:
        def run() -> tuple[int, int]:
            found = px.stream(captured, iter(noise), sampler, solver, rows_per_round=rows, buckets=[rows])
            for _ in found:
                pass
            return found.rounds, found.rows

        return run

    ways = [("batches of the loop", batches)]
    ways += [(f"stream, {solver!r}", streamed(solver)) for solver in (px.Sequential(), px.Secant(window=8))]
    for method, run in ways:
        about = {"model": name, "sampler": "ddim", "steps": steps, "method": method, "rows": rows}
        if results.done(**about) or budget.over():
            continue
        run()
        synchronize(options.device)
        begun = time.perf_counter()
        rounds, evaluations = run()
        synchronize(options.device)
        seconds = time.perf_counter() - begun
        figures = {"rounds": rounds, "evaluations": evaluations, "seconds": f"{seconds:.4g}"}
        results.add({**about, "samples": count, **figures, "samples_a_second": f"{count / seconds:.4g}"})


def main() -> None:
    """Measure, part by part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["images", "curves"])
    order = sorted(models.available(), key=lambda name: ("unconditional" not in name, name))
    parser.add_argument("--models", nargs="+", default=order)
    parser.add_argument("--steps", type=int, nargs="+", help="in the place of each sampler's own")
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--repeats", type=int, help="turns; default 30, of 1000 steps 10")
    parser.add_argument("--most", type=int, help="most rows of a curve; default: 32 on the CPU, 256 on CUDA")
    parser.add_argument("--count", type=int, default=256, help="samples of the throughput")
    parser.add_argument("--rows", type=int, default=64, help="rows of a round of the throughput")
    parser.add_argument("--tiny", action="store_true", help="small networks in the place of the large ones")
    parser.add_argument("--seconds", type=float, help="end after so many, between two turns")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--static", action="store_true", help="compile for each number of rows by itself")
    parser.add_argument("--resume", action="store_true", help="leave out what the tables hold already")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.most = options.most or (256 if cuda else 32)
    options.dtypes = options.dtypes or (["bfloat16"] if cuda else ["float32"])
    torch._dynamo.config.recompile_limit = 64
    torch.backends.cudnn.benchmark = True
    budget = Budget(options.seconds)
    for part in options.parts:
        {"images": images, "curves": curves, "large": large, "throughput": throughput}[part](options, budget)


if __name__ == "__main__":
    main()
