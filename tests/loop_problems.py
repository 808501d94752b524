"""Loops and networks that belong to no library, small enough to run hundreds of times."""

from __future__ import annotations

import itertools

import torch
from torch import nn

import parataxis as px
from parataxis.parallel import parallel

DIM = 48


LEVELS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt()


class Net(nn.Module):
    """A network with a time, a condition and a slope of order one; it counts its rows."""

    def __init__(self, dim=DIM, out=None):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.inner = nn.Parameter(torch.randn(dim, dim, generator=generator) / dim**0.5, requires_grad=False)
        self.outer = nn.Parameter(torch.randn(dim, out or dim, generator=generator) / dim**0.5, requires_grad=False)
        self.rows = []

    def forward(self, x, t, condition=None):
        self.rows.append(len(x))
        hidden = x.float() @ self.inner + torch.sin(torch.as_tensor(t).float() / 100).reshape(-1, 1)
        if condition is not None:
            hidden = hidden + condition.float()
        output = torch.tanh(hidden) @ self.outer
        output[:, : x.shape[1]] += 0.7 * x.float()
        return output.to(x.dtype)


class Mixture(nn.Module):
    """The exact prediction of data, a mixture of Gaussians, from x = a data + s noise."""

    def __init__(self, dim, count=4, std=0.3):
        super().__init__()
        self.means, self.std = torch.randn(count, dim, generator=torch.Generator().manual_seed(0)), std

    def data(self, x, a, s):
        variance = (a * self.std) ** 2 + s**2
        mean = torch.softmax(-((x[:, None] - a * self.means) ** 2).sum(2) / (2 * variance), 1) @ self.means
        return mean + a * self.std**2 / variance * (x - a * mean)


class Noise(Mixture):
    """The noise that the data leave."""

    def forward(self, x, t):
        a = LEVELS[t].float()
        s = (1 - a**2).sqrt()
        return (x - a * self.data(x, a, s)) / s


def steps(count):
    """Return (time, alpha, sigma, alpha', sigma') of each step of a variance-preserving loop."""
    for i in range(count):
        t, after = (999 * (count - i)) // count, (999 * (count - i - 1)) // count
        a = float(LEVELS[t])
        b = float(LEVELS[after]) if i < count - 1 else 1.0
        yield t, a, (1 - a**2) ** 0.5, b, (1 - b**2) ** 0.5


def ddim(net, batch=2, count=20, *, eta=0.0, clip=None, dtype=torch.float32, predict=None):
    """The loop of the tests: DDIM with any way to call the network."""
    x = torch.randn(batch, DIM).to(dtype)
    for t, a, s, b, r in steps(count):
        f = net(x, t) if predict is None else predict(net, x, t)
        clean = (x - s * f) / a
        if clip is not None:
            clean = clean.clamp(-clip, clip)
        noise = eta * r / s * max(1 - a**2 / b**2, 0) ** 0.5
        x = b * clean + (r**2 - noise**2) ** 0.5 * f
        if noise:
            x = x + noise * torch.randn_like(x)
    return x


def guided(net, x, t):
    condition = torch.linspace(-1, 1, 2 * len(x) * DIM).view(-1, DIM)
    without, with_ = net(torch.cat([x] * 2), t, condition.to(x.dtype)).chunk(2)
    return without + 3 * (with_ - without)


def guided_by_two_calls(net, x, t):
    condition = torch.linspace(-1, 1, len(x) * DIM).view(-1, DIM).to(x.dtype)
    with_, without = net(x, t, condition), net(x, t, -condition)
    return without + 3 * (with_ - without)


def guided_and_rescaled(net, x, t):
    condition = torch.linspace(-1, 1, 2 * len(x) * DIM).view(-1, DIM).to(x.dtype)
    without, with_ = net(torch.cat([x] * 2), t, condition).chunk(2)
    both = without + 3 * (with_ - without)
    return both * with_.std(1, keepdim=True) / both.std(1, keepdim=True)


def guided_in_between(net, x, t):
    return guided(net, x, t) if 200 < t < 800 else net(x, t, torch.zeros_like(x))


def second_order(net, batch=2, count=20):
    """DPM-Solver++ 2M on a noise prediction: a step remembers the data prediction before."""
    x, before = torch.randn(batch, DIM), None
    for i, (t, a, s, b, r) in enumerate(steps(count)):
        clean = (x - s * net(x, t)) / a
        mixed = clean if before is None or i == count - 1 else 1.5 * clean - 0.5 * before
        x, before = r / s * x + (b - a * r / s) * mixed, clean
    return x


def heun(net, batch=2, count=10):
    """Heun's method, two evaluations a step, in coordinates of its own."""
    x = torch.randn(batch, DIM) * 10
    sigmas = [10 * (1 - i / count) ** 2 for i in range(count + 1)]
    for s, r in itertools.pairwise(sigmas):
        slope = net(x / (s**2 + 1) ** 0.5, s)
        guess = x + (r - s) * slope
        if r > 0:
            slope = (slope + net(guess / (r**2 + 1) ** 0.5, r)) / 2
        x = x + (r - s) * slope
    return x


LINEAR = {
    "ddim": ddim,
    "ddpm": lambda net: ddim(net, eta=1.0),
    "guided": lambda net: ddim(net, predict=guided),
    "guided by two calls": lambda net: ddim(net, predict=guided_by_two_calls),
    "guided in between": lambda net: ddim(net, predict=guided_in_between),
    "guided ddpm": lambda net: ddim(net, eta=1.0, predict=guided),
    "second order": second_order,
    "heun": heun,
}


OTHER = {
    "clipped": lambda net: ddim(net, clip=1.0),
    "clipped ddpm": lambda net: ddim(net, eta=1.0, clip=1.0),
    "rescaled guidance": lambda net: ddim(net, predict=guided_and_rescaled),
}


LOOPS = LINEAR | OTHER


def relative(x, y):
    x, y = x.double().flatten(1), y.double().flatten(1)
    return float(((x - y).norm(dim=1) / y.norm(dim=1)).max())


def both(loop, net, solver=None, seed=0, **options):
    """Return the sequential result, the parallel one, and the callable."""
    torch.manual_seed(seed)
    expected = loop(net)
    run = parallel(loop, solver or px.Secant(window=8), denoisers=[net], **options)
    torch.manual_seed(seed)
    return expected, run(net), run


def with_gradients(net):
    def predict(net, x, t):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            output = net(x, t)
        return output.detach() + 0.01 * torch.autograd.grad(output.square().sum(), x)[0]

    return ddim(net, predict=predict)
