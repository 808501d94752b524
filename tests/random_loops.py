"""Loops at random: rolls, masks, momentum, clipping, multistep of any order, noise from any source, two networks."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import nn

DIM = 24


class Field(nn.Module):
    """A smooth network; ``slope`` is about how fast its output changes with its input."""

    def __init__(self, seed=0, slope=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = nn.Parameter(slope * torch.randn(DIM, DIM, generator=generator) / DIM**0.5, requires_grad=False)
        self.outer = nn.Parameter(torch.randn(DIM, DIM, generator=generator) / DIM**0.5, requires_grad=False)

    def forward(self, x, t):
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
        return torch.tanh(x @ self.inner + torch.sin(4 * t)) @ self.outer


@dataclass(frozen=True)
class Spec:
    """What a loop does in its steps, in this order.

    Attributes:
        steps: N.
        kind: What the network predicts: a velocity, the data, or the noise.
        slope: Of the network.
        order: Outputs that a step uses.
        momentum: Of the outputs.
        second: Weight of another network's output, evaluated at every step by a call of its own.
        limit: To which data predictions are clipped; 0 for none.
        quantile: Of the data prediction by which it is scaled down; 0 for none.
        roll: The state is rolled in every so many steps; 0 for none.
        mask: Part of the state that is replaced at every step.
        noise: Where noise comes from; "" for none.
        seed: Of everything.
    """

    steps: int = 16
    kind: str = "velocity"
    slope: float = 1.0
    order: int = 1
    momentum: float = 0.0
    second: float = 0.0
    limit: float = 0.0
    quantile: float = 0.0
    roll: int = 0
    mask: float = 0.0
    noise: str = ""
    seed: int = 0


CHOICES = {
    "steps": (9, 12, 16, 20, 24, 32),
    "kind": ("velocity", "data", "noise"),
    "slope": (0.3, 1.0, 2.0),
    "order": (1, 1, 1, 2, 3, 5, 7, 8),
    "momentum": (0.0, 0.0, 0.0, 0.3, 0.8),
    "second": (0.0, 0.0, 0.0, 0.5, -1.0),
    "limit": (0.0, 0.0, 0.0, 1.0, 0.3),
    "quantile": (0.0, 0.0, 0.0, 0.9),
    "roll": (0, 0, 0, 1, 4),
    "mask": (0.0, 0.0, 0.0, 0.5),
    "noise": ("", "", "torch", "generator", "numpy", "list", "python"),
    "seed": tuple(range(1000)),
}


def draw(seed):
    """Return a spec at random."""
    source = random.Random(seed)
    return Spec(**{field.name: source.choice(CHOICES[field.name]) for field in fields(Spec)})


def weights(order, steps):
    """Return the weights of a multistep method that integrates polynomials below this order exactly."""
    nodes = -np.arange(min(order, steps))
    return [
        float(np.polyint(np.poly1d(np.poly(np.delete(nodes, j))) / np.prod(nodes[j] - np.delete(nodes, j)))(1.0))
        for j in range(len(nodes))
    ]


def make(spec):
    """Return (networks, loop): ``loop()`` draws a sample of two rows."""
    net, other = Field(spec.seed, spec.slope), Field(spec.seed + 1, spec.slope)
    schedule = np.random.default_rng(spec.seed)
    shifts, mask = schedule.integers(DIM, size=spec.steps), torch.from_numpy(schedule.random(DIM) < spec.mask)
    x0 = torch.randn(2, DIM, generator=torch.Generator().manual_seed(spec.seed))
    known = torch.randn(2, DIM, generator=torch.Generator().manual_seed(spec.seed + 2))
    noises = [torch.randn(2, DIM, generator=torch.Generator().manual_seed(i)) for i in range(spec.steps)]

    def source():
        generator, numbers = torch.Generator().manual_seed(spec.seed), np.random.default_rng(spec.seed)
        left = list(noises)
        return {
            "torch": lambda: torch.randn(2, DIM),
            "generator": lambda: torch.randn(2, DIM, generator=generator),
            "numpy": lambda: torch.from_numpy(numbers.normal(size=(2, DIM))).float(),
            "list": lambda: left.pop(0),
            "python": lambda: torch.tensor([[random.gauss(0, 1) for _ in range(DIM)] for _ in range(2)]),
        }.get(spec.noise)

    def clean(data):
        if spec.limit:
            data = data.clamp(-spec.limit, spec.limit)
        if spec.quantile:
            scale = data.abs().quantile(spec.quantile, dim=1, keepdim=True).clamp(min=1.0)
            data = data / scale
        return data

    def increment(f, x, sigma, after):
        if spec.kind == "velocity":
            f = clean(f)
            return (sigma - after) * f
        data = clean(f if spec.kind == "data" else (x - sigma * f) / (1.02 - sigma))
        return (1 - after / sigma) * (data - x)

    def loop():
        x, velocity, past, draw_noise, total = x0.clone(), torch.zeros(2, DIM), [], source(), 0
        for i in range(spec.steps):
            sigma, after = 1 - i / spec.steps, 1 - (i + 1) / spec.steps
            if spec.roll and i % spec.roll == 0:
                x, total = torch.roll(x, int(shifts[i]), -1), total + int(shifts[i])
            f = net(x, sigma)
            if spec.second:
                f = f + spec.second * other(x, sigma)
            velocity = spec.momentum * velocity + f
            past = [increment(velocity, x, sigma, after), *past][: spec.order]
            x = x + sum(w * p for w, p in zip(weights(spec.order, len(past)), past, strict=True))
            if spec.mask:
                x = torch.where(mask, (1 - after) * known + after * noises[0], x)
            if draw_noise is not None and after > 0:
                x = x + 0.3 * after / spec.steps**0.5 * draw_noise()
        return torch.roll(x, -total, -1)

    return [net, other] if spec.second else [net], loop
