"""Wall-clock of one sample: the plain loop, compiled or not, diffusers' own pipeline, ParaDiGMS's setting, and ours.

    python benchmarks/latency.py [--device cuda] [--steps 100] [--models digits ..] [--dtypes float32 bfloat16]

All of one row of the table is measured in turns, so that what else the machine does meets all of them, after a run to
warm up; seconds are medians. The loop to beat is the tightest there is: two tensor operations a step around the
compiled network (CUDA graphs on CUDA, at batch 1). Windows of ours have graphs for their own size, and wide ones for a
half and a quarter of it, as the front moves. Errors are relative to the plain loop in the same dtype. Also the
seconds of a call against its rows, which decide what can be gained (``px.latency``); on CUDA those of a U-Net of Stable
Diffusion 1.5's size and of DiT-XL/2 as well, with random weights: of these nothing but the cost of a call means
anything. Writes ``latency.csv``, ``latency_curve.csv`` and ``latency-DEVICE.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import parataxis as px
from meter import machine, write
from parataxis import models
from parataxis.engine.latency import seconds_of
from parataxis.engine.rows import EvalBatch
from parataxis.solvers import Solver

ROOT = Path(__file__).resolve().parent.parent
GRAPHS = 64  # most that torch may keep of one network
Denoise = Callable[..., Tensor]


def plain_loop(denoise: Denoise, sampler: px.Sampler, table: px.Recurrence, told: Any, dtype: torch.dtype) -> Tensor:
    """Return the sample of a loop with no more than two operations a step besides the network."""
    x, local, times = table.start, sampler.coefficients, sampler.network_times(dtype).to(table.start.device)
    decay, weight = local.state_weight.tolist(), local.output_weight[:, 0].tolist()
    with torch.no_grad():
        for i in range(sampler.steps):
            output = denoise(x.to(dtype), times[i, None], *told).to(x)
            kept = decay[i] * x if table.noise is None else torch.add(table.noise[:, i], x, alpha=decay[i])
            x = torch.add(kept, output, alpha=weight[i])
    return x


def methods(
    model: models.Model, compiled: models.Model, name: str, steps: int, dtype: torch.dtype, options: argparse.Namespace
) -> Iterator[tuple[str, int, Callable[[int], tuple[Tensor, int, int]]]]:
    """Yield the name, window and run of every method; a run takes a seed and gives sample, rounds and evaluations."""
    sampler = model.sampler(name, steps)
    label = () if model.classes is None else (torch.tensor([3], device=options.device),)

    def drawn(seed: int) -> Tensor:
        noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(seed))
        return noise.to(options.device, dtype)

    def loop(chosen: models.Model) -> Callable[[int], tuple[Tensor, int, int]]:
        def run(seed: int) -> tuple[Tensor, int, int]:
            table = sampler.recurrence(drawn(seed).float(), torch.Generator().manual_seed(seed), dtype)
            return plain_loop(chosen.denoiser(), sampler, table, label, dtype), steps, steps

        return run

    def solve(solver: Solver) -> Callable[[int], tuple[Tensor, int, int]]:
        window = getattr(solver, "window", None) or steps
        buckets = [window] if window <= 32 else [window // 4, window // 2, window]

        def run(seed: int) -> tuple[Tensor, int, int]:
            found = px.sample(
                compiled.denoiser(),
                drawn(seed),
                sampler,
                solver,
                condition=label[0] if label else None,
                generator=torch.Generator().manual_seed(seed),
                buckets=buckets if options.compile else None,
            )
            return found.x, found.rounds, found.evaluations

        return run

    yield "loop", 1, loop(model)
    if options.compile:
        yield "compiled loop", 1, loop(compiled)
    if model.classes is None and name in ("ddim", "ddpm"):
        yield "diffusers pipeline", 1, pipeline(model, name, steps, dtype, options)
    for window in [window for window in (8, 16, 32, 64, 128, 256) if window < steps]:
        yield "paradigms", window, solve(px.Picard(window=window, rule="paradigms", entry="copy"))
        yield "secant", window, solve(px.Secant(window=window))
    yield "secant", steps, solve(px.Secant())


def compile_(network: Any, options: argparse.Namespace) -> Any:
    """Compile a network as its device wants it: CUDA graphs for every bucket, or one graph for all sizes."""
    if not options.compile:
        return network
    if options.device == "cuda":
        return torch.compile(network, mode="reduce-overhead", dynamic=False)
    return torch.compile(network, dynamic=True)


def pipeline(
    model: models.Model, name: str, steps: int, dtype: torch.dtype, options: argparse.Namespace
) -> Callable[[int], tuple[Tensor, int, int]]:
    """Return the run of diffusers' own pipeline; it draws its noise by itself, so there is no error to tell."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(model.folder).to(options.device, dtype)
    kind = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)

    def run(seed: int) -> tuple[Tensor, int, int]:
        generator = torch.Generator().manual_seed(seed)
        pipe(num_inference_steps=steps, generator=generator, output_type="np")
        return torch.tensor(float("nan")), steps, steps

    return run


def compare(
    model: models.Model, compiled: models.Model, name: str, steps: int, dtype: torch.dtype, options: argparse.Namespace
) -> Any:
    """Return a row for every method."""
    every = list(methods(model, compiled, name, steps, dtype, options))
    reference = every[0][2]
    taken: list[list[float]] = [[] for _ in every]
    found: list[list[tuple[float, int, int]]] = [[] for _ in every]
    for seed in tqdm(range(-1, options.repeats), desc=f"{model.name} {name} {steps} {str(dtype)[6:]}", leave=False):
        exact = reference(max(seed, 0))[0]
        for place, (_, _, run) in enumerate(every):
            result: list[tuple[Tensor, int, int]] = []
            seconds = seconds_of(lambda: result.append(run(max(seed, 0))), torch.device(options.device))  # noqa: B023
            x, rounds, evaluations = result[0]
            if seed >= 0:  # the first turn warms up
                taken[place].append(seconds)
                away = float((x.float() - exact.float()).norm() / exact.float().norm())
                found[place].append((away, rounds, evaluations))
    beaten = median(taken[1 if options.compile else 0])
    rows = []
    for (method, window, _), seconds, runs in zip(every, taken, found, strict=True):
        away, rounds, evaluations = (median(column) for column in zip(*runs, strict=True))
        about = {"model": model.name, "sampler": name, "steps": steps, "dtype": str(dtype)[6:], "method": method}
        about |= {"window": window, "compiled": options.compile, "rounds": rounds, "evaluations": evaluations}
        figures = {"relative_error": f"{away:.2e}", "seconds": f"{median(seconds):.4g}"}
        rows.append({**about, **figures, "speedup": round(beaten / median(seconds), 3)})
    return rows


def curve(name: str, call: Denoise, shape: tuple[int, ...], dtype: torch.dtype, options: argparse.Namespace) -> Any:
    """Return the seconds of a call against its rows."""
    u = torch.randn(1, *shape, device=options.device, dtype=dtype)
    rows = EvalBatch(u, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        found = px.latency(lambda asked: call(asked.x), rows, most=options.most)
    about = {"model": name, "dtype": str(dtype)[6:], "free": round(found.batch_headroom, 2)}
    return [
        {**about, "rows": count, "seconds": f"{seconds:.4g}"}
        for count, seconds in zip(found.rows, found.times, strict=True)
    ]


def curves(dtype: torch.dtype, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Yield the latency curves of the shipped models and, on CUDA, of networks of the usual sizes."""
    device = options.device
    for name in options.models:
        model = models.load(name)
        network = model.network.to(device, dtype)

        def shipped(u: Tensor) -> Tensor:
            told = {} if model.classes is None else {"class_labels": u.new_zeros(len(u), dtype=torch.int64)}  # noqa: B023
            output: Tensor = network(u, u.new_full((len(u),), 500.0), **told).sample  # noqa: B023
            return output

        yield curve(name, shipped, model.shape, dtype, options)
    if device != "cuda":
        return
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).to(dtype).eval()
        text = torch.randn(1, 77, 768, dtype=dtype)
        dit = DiTTransformer2DModel(num_layers=28, num_attention_heads=16, attention_head_dim=72, sample_size=32)
        dit = dit.to(dtype).eval()
    size = "Stable Diffusion 1.5's U-Net, random weights"
    yield curve(size, lambda u: unet(u, 500, text.expand(len(u), -1, -1)).sample, (4, 64, 64), dtype, options)

    def transformer(u: Tensor) -> Tensor:
        whole = u.new_full((len(u),), 500, dtype=torch.int64)
        output: Tensor = dit(u, timestep=whole, class_labels=whole).sample[:, :4]
        return output

    yield curve("DiT-XL/2, random weights", transformer, (4, 32, 32), dtype, options)


def draw(rows: list[dict[str, Any]], costs: list[dict[str, Any]], path: Path) -> None:
    """Draw the cost of rows, and what every method gains over the loop."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in costs):
        own = [row for row in costs if (row["model"], row["dtype"]) == (name, dtype)]
        one = float(own[0]["seconds"])
        left.plot(
            [row["rows"] for row in own], [float(row["seconds"]) / one for row in own], "o-", label=f"{name}, {dtype}"
        )
    left.set(xscale="log", yscale="log", xlabel="rows of a call", ylabel="its cost, in calls of one row")
    left.legend(frameon=False, fontsize=7)
    cells = list(dict.fromkeys((row["model"], row["sampler"], row["steps"], row["dtype"]) for row in rows))
    for place, cell in enumerate(cells):
        own = [row for row in rows if (row["model"], row["sampler"], row["steps"], row["dtype"]) == cell]
        for method, mark in (("secant", "o"), ("paradigms", "x"), ("diffusers pipeline", "s"), ("loop", "+")):
            values = [row["speedup"] for row in own if row["method"] == method]
            right.plot(values, [place] * len(values), mark, color="C0", label=method if place == 0 else None)
    right.axvline(1, color="0.7")
    right.set(yticks=range(len(cells)), yticklabels=[" ".join(map(str, cell)) for cell in cells])
    right.tick_params("y", labelsize=7)
    right.set_xlabel(f"speed-up over the {'compiled ' if rows[0]['compiled'] else ''}loop, by window")
    right.legend(frameon=False, fontsize=7)
    figure.suptitle(rows[0]["device"])
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, write the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", default=models.available())
    parser.add_argument("--steps", type=int, nargs="+", help="default: 50 on the CPU, 100 and 1000 (DDPM) on CUDA")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], help="default: both, on the CPU float32"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most", type=int, help="most rows of the curve; default: 32 on the CPU, 256 on CUDA")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.most = options.most or (256 if cuda else 32)
    torch._dynamo.config.recompile_limit = GRAPHS
    rows, costs = [], []
    for dtype in [
        getattr(torch, name) for name in options.dtypes or (["float32", "bfloat16"] if cuda else ["float32"])
    ]:
        for found in curves(dtype, options):
            costs += [{**row, **machine(options.device)} for row in found]
            print(found[0]["model"], found[0]["dtype"], "b* =", found[0]["free"], flush=True)
        write(options.results / "latency_curve.csv", costs)
        for name in options.models:
            model = models.load(name)
            compiled = replace(model, network=compile_(model.network.to(options.device, dtype), options))
            for sampler in ("flow_euler",) if model.prediction == "flow" else ("ddim", "ddpm"):
                for steps in options.steps or ((100, *((1000,) if sampler == "ddpm" else ())) if cuda else (50,)):
                    for row in compare(model, compiled, sampler, steps, dtype, options):
                        rows.append({**row, **machine(options.device)})
                        print({key: rows[-1][key] for key in list(row)[:5] + list(row)[7:]}, flush=True)
                    write(options.results / "latency.csv", rows)  # what there is, if the time ends here
            torch.compiler.reset()
    draw(rows, costs, options.figures / f"latency-{options.device}.png")


if __name__ == "__main__":
    main()
