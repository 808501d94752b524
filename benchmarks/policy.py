"""Milliseconds a plan of diffusion policies: the loops that robots run today, and the same plans in parallel.

    python benchmarks/policy.py --latency [--device cuda] [--sizes 4.4M 16M ..] [--samplers ddpm ddim flow]

Policies are the conditional 1-D U-Nets of diffusion_policy and LeRobot (horizon 16, FiLM, kernel 5, squared-cosine
DDPM with 100 steps, ``clip_sample``, epsilon), of 0.5, 4.4, 16 and 63 million parameters. Rounds of random weights
mean nothing, so each is trained first, for some seconds, on the demonstrations of ``examples/policy`` or, where there
are none, on plans around an obstacle that are made up on the device; the flow is trained by itself. Weights are kept
in ``--weights``, and those in ``out/weights`` are used as they are.

One plan at a time. All methods of a size and sampler take turns over the seeds, so that what else the machine does
meets all of them. The clock runs from an observation on the device to the plan on the device, both ends synchronised:
ours draws the noise of its steps in that time, and the loops copy theirs in. Errors are relative to the compiled loop,
which is the plain loop with the same arithmetic; the row ``loop`` says how far eager PyTorch is from it. DDIM with 10
steps is another sampler: its error says how far its plan is from the plan of DDIM with 100. Writes
``policy_latency.csv``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import parataxis as px
from baselines import (
    Coefficients,
    Denoise,
    GraphedLoop,
    Run,
    Turns,
    buckets_of,
    by_rows,
    cuda_graph,
    curve,
    drawn,
    eager_loop,
)
from meter import Budget, Results

ROOT = Path(__file__).resolve().parent.parent
POLICY = ROOT / "examples" / "policy"
WEIGHTS = ROOT / "out" / "weights"
HORIZON, STEPS, SEEN = 16, 100, 2
TASK = "door-open-v3"  # of the demonstrations the one whose observations have the most entries
KEY = ("size", "sampler", "method", "window", "dtype")
BATCH = {"0.5M": 2048, "4.4M": 2048, "16M": 1024, "63M": 512}
RATE = {"0.5M": 2e-3, "4.4M": 1e-3, "16M": 5e-4, "63M": 3e-4}
ORDER = ("4.4M", "16M", "0.5M", "63M")


def policy_network() -> Any:
    """Return the module of the example's network."""
    spec = importlib.util.spec_from_file_location("policy_network", POLICY / "network.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["policy_network"] = module
    spec.loader.exec_module(module)
    return module


# Demonstrations


class Demonstrations:
    """Plans and observations to train on: those of a file, or made up on the device.

    Attributes:
        action_dim: Entries of an action.
        observation_dim: Entries of an observation.
        source: Where they come from.
    """

    def __init__(self, device: str, path: Path) -> None:
        self.device = device
        self.source, self.action_dim, self.observation_dim = "made up", 4, 20
        self._plans: Tensor | None = None
        if path.exists():
            plans, observations = windows(path)
            self._plans, self._observations = plans.to(device), observations.to(device)
            self.source, self.action_dim = path.stem, plans.shape[-1]
            self.observation_dim = observations.shape[-1]

    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return plans (count, 16, actions) in [-1, 1] and observations (count, observations)."""
        if self._plans is None:
            return made_up(count, self.device, generator)
        index = torch.randint(len(self._plans), (count,), device=self.device, generator=generator)
        return self._plans[index], self._observations[index]


def made_up(count: int, device: str, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return plans of a gripper that goes around an obstacle, on one of two sides, and closes at its goal."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, device=device, generator=generator) * 2 - 1

    start, goal = 0.6 * uniform(3), 0.6 * uniform(3)
    way = torch.linspace(0, 1, HORIZON, device=device)[None, :, None]
    side = uniform(1, 1).sign()
    speed = 0.7 + 0.3 * uniform(1, 1)
    along = (way * (1.0 + 0.5 * speed)).clamp(max=1.0)
    direction = torch.nn.functional.normalize(goal - start, dim=1)
    across = torch.nn.functional.normalize(
        torch.stack([-direction[:, 1], direction[:, 0], torch.full_like(direction[:, 0], 0.1)], 1), dim=1
    )
    height = 0.25 + 0.1 * uniform(1, 1)
    bend = side * height * torch.sin(math.pi * along) * across[:, None]
    path = start[:, None] + along * (goal - start)[:, None] + bend
    grip = torch.tanh(8 * (along - 0.8))
    obstacle = (start + goal) / 2
    known = torch.cat([start, goal, obstacle, direction, speed[:, 0], height[:, 0]], 1)
    rest = torch.zeros(count, 20 - known.shape[1], device=device)
    return torch.cat([path, grip], 2).clamp(-1, 1), torch.cat([known, rest], 1)


def windows(path: Path) -> tuple[Tensor, Tensor]:
    """Return a plan (n, 16, actions) for each step of a file's episodes, and the last two observations (n, ..).

    The file holds ``action`` (steps, actions) and ``observation`` (steps, observations), scaled to [-1, 1], and
    ``episode_ends`` (episodes,). Plans that reach beyond an episode repeat its last action.
    """
    held = load_file(path)
    ends = held["episode_ends"].long()
    step = torch.arange(int(ends[-1]))
    episode = torch.bucketize(step, ends, right=True)
    first, last = torch.cat([ends.new_zeros(1), ends[:-1]])[episode][:, None], ends[episode][:, None] - 1
    index = (step[:, None] + torch.arange(HORIZON) - (SEEN - 1)).clamp(first, last)
    return held["action"].float()[index], held["observation"].float()[index[:, :SEEN]].flatten(1)


# Training


def train(
    network: nn.Module, kind: str, data: Demonstrations, seconds: float, batch: int, rate: float, device: str
) -> tuple[int, float]:
    """Train a policy in place for some seconds, averaging its weights; return steps and the last mean loss.

    Args:
        network: Of random weights.
        kind: ``eps`` (squared-cosine DDPM, noise prediction) or ``flow`` (x = (1 - s) plan + s noise, velocity).
        data: What to learn.
        seconds: How long.
        batch: Plans a step.
        rate: Largest learning rate of AdamW.
        device: On CUDA in bfloat16, a whole training step being one CUDA graph.
    """
    cuda = device == "cuda"
    parameters: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
    lr: Any = torch.tensor(rate, device=device) if cuda else rate
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-4, betas=(0.95, 0.99), capturable=cuda, fused=cuda)
    average = [p.detach().clone() for p in parameters]
    bar = torch.from_numpy(px.cosine(STEPS).alphas_cumprod).float().to(device)
    total = torch.zeros((), device=device)

    def step() -> None:
        plan, observation = data.draw(batch)
        noise = torch.randn_like(plan)
        if kind == "eps":
            t = torch.randint(STEPS, (batch,), device=device)
            kept = bar[t][:, None, None]
            noisy, target = kept.sqrt() * plan + (1 - kept).sqrt() * noise, noise
        else:
            level = torch.rand(batch, 1, 1, device=device)
            noisy, target, t = torch.lerp(plan, noise, level), noise - plan, 1000 * level[:, 0, 0]
        with torch.autocast(device, torch.bfloat16, enabled=cuda, cache_enabled=False):
            output = network(noisy, t, observation)
        loss = (output.float() - target).square().mean()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 0.005)
        total.add_(loss.detach())

    graph = None
    if cuda:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                step()
        except RuntimeError as error:  # training is then slower, and nothing else
            graph = None
            print("a training step cannot be captured:", error, file=sys.stderr)
    count, loss, begun = 0, float("nan"), time.perf_counter()
    every = 20 if cuda else 1
    while (elapsed := time.perf_counter() - begun) < seconds:
        part = elapsed / seconds
        current = rate * min(1.0, 20 * part + 0.02) * 0.5 * (1 + math.cos(math.pi * part))
        if cuda:
            lr.fill_(current)
        else:
            optimizer.param_groups[0]["lr"] = current
        total.zero_()
        for _ in range(every):
            if graph is None:
                step()
            else:
                graph.replay()
        loss = float(total) / every  # waits for the device, so that the clock is right
        count += every
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    return count, loss


def weights(size: str, kind: str, network: nn.Module, data: Demonstrations, options: argparse.Namespace) -> str:
    """Put trained weights into a network, from the file if there is one; return what is known of their training."""
    path: Path = options.weights / f"policy-{size}-{kind}-{data.source}.safetensors".replace(" ", "-")
    for known in (path, WEIGHTS / path.name):
        if known.exists() and not options.dims:
            network.load_state_dict({name: value.float() for name, value in load_file(known).items()})
            return f"loaded {known.name}"
    torch.manual_seed(0)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    network.requires_grad_(True)
    seconds = options.train * (1.5 if size == "63M" else 1.0)
    begun = time.perf_counter()
    steps, loss = train(network, kind, data, seconds, options.batch or BATCH[size], RATE[size], options.device)
    network.requires_grad_(False)
    about = f"{steps} steps of {options.batch or BATCH[size]} in {time.perf_counter() - begun:.0f} s, loss {loss:.4f}"
    held = {name: value.half().contiguous().cpu() for name, value in network.state_dict().items()}
    network.load_state_dict({name: value.float() for name, value in held.items()})  # as they are read again
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(held, path)
    return about


# What is timed


def sampler_of(name: str, steps: int = STEPS) -> px.Sampler:
    """Return a policy's sampler: DDPM or DDIM as diffusers makes it for these policies, or Euler along a flow."""
    if name == "flow":
        return px.SAMPLERS["flow_euler"](px.flow(), steps)
    options = {"prediction": "eps", "spacing": "leading", "clip": 1.0}
    return px.SAMPLERS[name](px.cosine(STEPS), steps, **options)


def diffusers_loop(name: str, denoise: Denoise, device: str) -> Callable[[Tensor, int, Tensor], Tensor] | None:
    """Return diffusers' own loop around the network, or None without diffusers."""
    try:
        import diffusers
    except ImportError:
        return None
    if name == "flow":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), device=device)
    else:
        kind = diffusers.DDPMScheduler if name == "ddpm" else diffusers.DDIMScheduler
        scheduler = kind(STEPS, beta_schedule="squaredcos_cap_v2", clip_sample=True, prediction_type="epsilon")
        scheduler.set_timesteps(STEPS, device=device)

    def run(start: Tensor, seed: int, condition: Tensor) -> Tensor:
        x, generator = start, torch.Generator(device).manual_seed(seed)
        noise = {} if name == "flow" else {"generator": generator}
        if name == "flow":
            scheduler._step_index = None
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(denoise(x, t[None].float(), condition), t, x, **noise).prev_sample
        return x

    return run


def solvers(steps: int) -> Iterator[tuple[str, Any]]:
    """Yield the parallel methods: ours and ParaDiGMS's published setting, by window."""
    for window in (8, 16, 32, None):
        if window is None or window < steps:
            yield "secant", px.Secant(window=window)
    for window in (16, None):
        yield "picard", px.Picard(window=window)
    for window in (16, 32, None):
        if window is None or window < steps:
            yield "paradigms", px.Picard(window=window, rule="paradigms", entry="copy")


def measure(
    size: str,
    name: str,
    denoise: Denoise,
    graphed: GraphedLoop,
    network: Denoise,
    data: Demonstrations,
    results: Results,
    about: dict[str, Any],
    options: argparse.Namespace,
    budget: Budget,
) -> None:
    """Time every method for one policy and sampler, and write the rows."""
    device, sampler = options.device, sampler_of(name)
    coefficients = Coefficients.of(sampler)
    _, observations = data.draw(max(options.repeats, 1), torch.Generator(device).manual_seed(7))
    shape = (HORIZON, data.action_dim)

    def noise(seed: int) -> Tensor:
        return torch.randn(1, *shape, generator=torch.Generator(device).manual_seed(1000 + seed), device=device)

    def generator(seed: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    ready = [drawn(sampler, noise(seed), generator(seed)) for seed in range(options.repeats)]
    starts = [noise(seed) for seed in range(options.repeats)]

    def loop(how: str) -> Run:
        def run(seed: int) -> tuple[Tensor, int, int]:
            if how == "loop":
                x = eager_loop(denoise, coefficients, *ready[seed], observations[seed, None])
            else:
                x = graphed(coefficients, *ready[seed], observations[seed, None], whole=how == "whole-loop graph")
            return x, STEPS, STEPS

        return run

    def ours(solver: Any) -> Run:
        buckets = buckets_of(solver.window, STEPS)
        captured = cuda_graph(network)  # a wrapper keeps few captures, so each method has its own

        def run(seed: int) -> tuple[Tensor, int, int]:
            found = px.sample(
                captured,
                starts[seed],
                sampler,
                solver,
                condition=observations[seed, None],
                generator=generator(seed),
                buckets=buckets,
            )
            return found.x, found.rounds, found.evaluations

        return run

    turns = Turns(device, options.repeats)
    turns.add(("loop", 1), loop("loop"), every=6)
    turns.add(("compiled loop", 1), loop("compiled loop"))
    if device == "cuda":
        turns.add(("whole-loop graph", 1), loop("whole-loop graph"))
    if options.reduce_overhead and options.compile:
        reduced = torch.compile(denoise, mode="reduce-overhead", dynamic=False)

        def reduced_loop(seed: int) -> tuple[Tensor, int, int]:
            return eager_loop(reduced, coefficients, *ready[seed], observations[seed, None]), STEPS, STEPS

        turns.add(("reduce-overhead loop", 1), reduced_loop)
    theirs = diffusers_loop(name, denoise, device)
    if theirs is not None:

        def diffusers_run(seed: int) -> tuple[Tensor, int, int]:
            return theirs(starts[seed], seed, observations[seed, None]), STEPS, STEPS

        turns.add(("diffusers loop", 1), diffusers_run, every=6)
    for method, solver in solvers(STEPS):
        turns.add((method, solver.window or STEPS), ours(solver))
    if name != "flow":
        short = Coefficients.of(sampler_of("ddim", 10))
        turns.add(
            ("ddim-10", 1),
            lambda seed: (graphed(short, ready[seed][0], None, observations[seed, None]), 10, 10),
            before=lambda: graphed.load(short),
        )
    if name == "ddpm":

        def draw(seed: int) -> tuple[Tensor, int, int]:
            drawn(sampler, starts[seed], generator(seed))
            return starts[seed], 0, 0

        turns.add(("drawing the noise", 1), draw)
    found = turns.take(loop("compiled loop"), budget)
    beaten = found.get(("compiled loop", 1), {}).get("p50_ms", float("nan"))
    whole = found.get(("whole-loop graph", 1), {}).get("p50_ms", float("nan"))
    for (method, window), figures in found.items():
        row = {"size": size, "sampler": f"{name}-{STEPS}", "method": method, "window": window, **about}
        row |= {name: f"{value:.4g}" for name, value in figures.items()}
        row |= {"speedup": f"{beaten / figures['p50_ms']:.3f}", "over_whole_graph": f"{whole / figures['p50_ms']:.3f}"}
        if method == "drawing the noise":
            row |= {"speedup": "", "over_whole_graph": "", "error": "", "worst_error": ""}
        results.add(row)


def latency(options: argparse.Namespace) -> None:
    """Train and time the policies, the most valuable first."""
    budget, device = Budget(options.seconds), options.device
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64
    module = policy_network()
    data = Demonstrations(device, POLICY / "demonstrations" / f"{TASK}.safetensors")
    results = Results(options.results / "policy_latency.csv", KEY, device, resume=options.resume)
    key = ("model", "dtype", "rows")
    curves = Results(options.results / "latency_curve.csv", key, device, resume=options.resume)
    dtype = getattr(torch, options.dtype)
    for size in sorted(options.sizes, key=ORDER.index):
        if budget.over(options.train):
            print("no time left for", size, flush=True)
            break
        dims = options.dims or module.SIZES[size]
        network = module.UNet1d(data.action_dim, HORIZON, data.observation_dim, dims).to(device)
        count = sum(parameter.numel() for parameter in network.parameters())
        working = (
            network.to(dtype)
            if dtype == torch.float32
            else type(network)(data.action_dim, HORIZON, data.observation_dim, dims).to(device, dtype)
        )
        working.requires_grad_(False).eval()

        def denoise(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            output: Tensor = working(x.to(dtype), t.float().to(dtype), condition.to(dtype))  # noqa: B023
            return output.float()

        example = torch.zeros(1, data.observation_dim, device=device)
        shape = (HORIZON, data.action_dim)
        graphed = GraphedLoop(denoise, shape, example, device, compiled=options.compile)
        called = by_rows(denoise, static=options.static) if options.compile else denoise
        for kind in ("eps", "flow"):
            names = [name for name in options.samplers if (name == "flow") == (kind == "flow")]
            names = [
                name
                for name in names
                if not results.done(
                    size=size, sampler=f"{name}-{STEPS}", method="compiled loop", window=1, dtype=options.dtype
                )
            ]
            if not names or budget.over():
                continue
            trained = weights(size, kind, network, data, options)
            if working is not network:
                working.load_state_dict(network.state_dict())
            print(f"{size} {kind}: {count} parameters, {trained}", flush=True)
            about = {"parameters": count, "dtype": options.dtype, "compiled": options.compile, "data": data.source}
            for name in names:
                measure(size, name, denoise, graphed, called, data, results, about, options, budget)
                print(f"  {budget.left:.0f} s left", flush=True)
        sizes = [1, 8, 16, 32, STEPS]
        if not budget.over() and not curves.done(model=f"policy {size}", dtype=options.dtype, rows_per_round=1):
            about = {"dtype": options.dtype, "compiled": options.compile}
            curve(f"policy {size}", called, shape, example, curves, sizes, about, device)
        del graphed, called
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", action="store_true", help="measure milliseconds a plan")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument("--samplers", nargs="+", choices=["ddpm", "ddim", "flow"], default=["ddpm", "ddim", "flow"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the network")
    parser.add_argument("--dims", type=int, nargs="+", help="channels of the levels, in the place of the size's own")
    parser.add_argument("--train", type=float, default=20.0, help="seconds of training for each network")
    parser.add_argument("--batch", type=int, help="plans of a training step")
    parser.add_argument("--repeats", type=int, default=30, help="turns, each with a seed of its own")
    parser.add_argument("--seconds", type=float, help="end after so many, between two turns")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--reduce-overhead", action="store_true", help='also torch.compile(mode="reduce-overhead")')
    parser.add_argument("--static", action="store_true", help="compile for each number of rows by itself")
    parser.add_argument("--resume", action="store_true", help="leave out what the table holds already")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    if not options.latency:
        parser.error("say what to measure: --latency.")
    latency(options)


if __name__ == "__main__":
    main()
