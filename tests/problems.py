"""Problems with known answers, and every solver and sampler that is registered."""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch

import parataxis as px
from parataxis.denoisers import empirical, mixture
from parataxis.solvers.frame import Frame

DIM = 16
SCALED = ("euler", "euler_ancestral", "heun")


@cache
def mixtures():
    """Return the exact problems by name."""
    data = torch.randn(12, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {"power law": mixture(DIM, 4, power=1.0), "data set": empirical(data, 0.1)}


@cache
def planar():
    """Return exact problems in the plane, where few samples tell much of a law, by name."""
    data = torch.randn(6, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {"mixture": mixture(2, 3, power=1.0, scale=0.25, seed=1), "data set": empirical(data, 0.05)}


def chain():
    """Return network and sampler of a nonlinear Gaussian chain in the plane whose mean moves about as far as its noise.

    Its fourth step adds no noise.
    """
    steps = 8
    deviation = np.full(steps, 0.5)
    deviation[3] = 0.0

    def network(x, t):
        return torch.tanh(2 * x.roll(1, 1)) + torch.sin(1.7 * t)[:, None]

    local = px.Coefficients(np.full(steps, 0.8), np.full((steps, 1), 0.8), deviation)
    return network, px.Sampler("chain", np.arange(steps) + 0.5, local)


def sampler(name, points):
    """Return a registered sampler with this many evaluations (Heun's come in odd numbers: one less)."""
    if name == "heun":
        return px.SAMPLERS[name](steps=points // 2)
    return px.SAMPLERS[name](steps=points)


def network(problem, name):
    """Return the exact network of a problem for a sampler."""
    if name == "flow_euler":
        return mixtures()[problem].network(px.flow(), "flow")
    return mixtures()[problem].network(px.vp(), "eps", scaled=name in SCALED)


def noise(count, dtype=torch.float64, seed=0, shape=(DIM,)):
    """Return standard normal noise, one generator a sample."""
    rows = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64) for i in range(count)
    ]
    return torch.stack(rows).to(dtype)


def generators(count, seed=1000):
    """Return one generator a sample."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def solve(problem, name, points, solver, *, count=2, dtype=torch.float64, **options):
    """Draw samples of a problem."""
    return px.sample(
        network(problem, name),
        noise(count, dtype),
        sampler(name, points),
        solver,
        generator=generators(count),
        **options,
    )


@cache
def reference(problem, name, points, count=2, dtype=torch.float64):
    """Return the sequential samples."""
    return solve(problem, name, points, px.Sequential(), count=count, dtype=dtype).x


def relative(x, y):
    """Return the largest relative error of the samples x to y."""
    return float(((x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).max())


def bound(solver, steps):
    """Return the most levels that a solver may evaluate in a round, by its options."""
    if isinstance(solver, px.Parareal):
        blocks = solver.blocks or round(math.sqrt(3 * steps))
        return min(solver.width or blocks, blocks)
    return min(getattr(solver, "window", 1) or steps, steps)


def works(solver, name):
    """Return whether a solver supports a sampler; tests/solvers/test_supported.py prints the table and its reasons."""
    return solver.unsupported(sampler(name, 25).coefficients) is None


def variants():
    """Return every registered solver, with its defaults and, if it has a window, with narrow ones."""
    found = []
    for cls in px.SOLVERS.values():
        found.append(cls())
        if any(field.name == "window" for field in dataclasses.fields(cls)):
            found += [cls(window=1), cls(window=8)]
        if any(field.name == "width" for field in dataclasses.fields(cls)):
            found.append(cls(width=3))
    return found


def law_exact():
    """Return every registered law-exact solver with all combinations of its options, and windows of 1, 4 and all."""
    found = []
    for cls in px.EXACT_IN_DISTRIBUTION.values():
        kinds = typing.get_type_hints(cls)
        choices = {
            name: typing.get_args(kind) for name, kind in kinds.items() if typing.get_origin(kind) is typing.Literal
        }
        found += [cls(), cls(window=1), cls(window=None)]
        found += [
            cls(window=4, **dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())
        ]
    return found


# -- a window without a network ---


def frame_at(lo, evaluated_until, width=5, steps=20, dim=16, strides=(), rounds=0, eta=0.0):
    """Return the window of one sample that begins at a step: DDIM, nothing evaluated but what is said."""
    coefficients = px.samplers.ddim(px.vp(), steps, eta=eta).coefficients
    problem = SimpleNamespace(
        steps=steps, dim=dim, coefficients=coefficients, strides=strides, rounding=1e-7, tolerance=1e-3
    )
    batch = SimpleNamespace(problem=problem, active=np.ones(1, bool), output_rounding=1e-7)
    batch.recurrence = SimpleNamespace(replays=False)
    frame = Frame(batch, width)
    frame.seat_frame(np.zeros(1, np.int64))
    frame.lo[:], frame.evaluated_until[:], frame.rounds[:] = lo, evaluated_until, rounds
    frame.look()
    return frame


# -- problems made to hurt -----------------------------------------------------------------------------------------


def pointwise(kind, strength):
    """Return a network that is no denoiser, element by element: growth, jumps, saturation and chaos."""
    return {
        "zero": lambda x, t: torch.zeros_like(x),
        "linear": lambda x, t: strength * x,
        "sign": lambda x, t: torch.sign(x + 0.05),
        "relu": lambda x, t: strength * torch.relu(x),
        "saturated": lambda x, t: strength * torch.tanh(5 * x),
        "chaotic": lambda x, t: torch.sin(5 * strength * x),
    }[kind]


def rough(network, strength):
    """Return a network with the error of a trained one: a fixed function of its input that changes quickly."""
    return lambda x, t: network(x, t) + strength * torch.sin(7 * x + 3 * x.roll(1, -1))


HARD = ("zero", "linear", "sign", "relu", "saturated", "chaotic", "points", "close points", "learned-like")
HARD_SAMPLERS = ("ddim", "ddpm", "dpmpp_2m", "clipped", "clipped ddpm", "clipped dpmpp_2m", "flow_euler", "sigma 25")
HARD_SAMPLERS += ("sigma 80", "no signal")


@cache
def hard_schedule(name):
    """Return the schedule of a hard sampler."""
    if name == "flow_euler":
        return px.flow()
    if name.startswith("sigma"):
        return px.karras(sigma_max=float(name.split()[1]))
    return px.cosine() if name == "no signal" else px.vp()


@cache
def hard_sampler(name, steps):
    """Return a sampler: clipped, of a schedule whose variance explodes, or whose signal is 0 where it starts."""
    schedule = hard_schedule(name)
    if name.startswith("sigma"):
        return px.samplers.euler_ancestral(schedule, steps)
    kind = {"clipped": "ddim", "no signal": "ddim"}.get(name, name.removeprefix("clipped "))
    options = {"clip": 1.0} if name.startswith("clipped") else {"prediction": "v"} if name == "no signal" else {}
    return px.SAMPLERS[kind](schedule, steps, **options)


@cache
def hard_network(kind, strength, dim, sampler):
    """Return a hard network for a sampler."""
    if kind not in ("points", "close points", "learned-like"):
        return pointwise(kind, strength)
    points = torch.randn(5, dim, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    prediction = {"flow_euler": "flow", "no signal": "v"}.get(sampler, "eps")
    ideal = empirical(points, 0.01 if kind == "close points" else 0.0 if kind == "points" else 0.3)
    network = ideal.network(hard_schedule(sampler), prediction, scaled=sampler.startswith("sigma"))
    return rough(network, 0.02 * strength) if kind == "learned-like" else network
