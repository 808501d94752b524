"""Sampling loops in k-diffusion's signature, written out: what ours must equal, and what it must run unmodified."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

import parataxis as px
import problems
from parataxis import kdiffusion

SIGMAS = torch.from_numpy(px.karras(0.03, 14.0).grid(14).sigma)  # (15,), the last is 0


def euler(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    s_churn=0.0,
    s_tmin=0.0,
    s_tmax=math.inf,
    s_noise=1.0,
):
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        x, hat = churned(x, sigma, len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
        slope = (x - tell(model, x, sigma, hat, i, extra_args, callback)) / hat
        x = x + (after - hat) * slope
    return x


def euler_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        slope = (x - tell(model, x, sigma, sigma, i, extra_args, callback)) / sigma
        up = min(after, eta * (after**2 * (sigma**2 - after**2) / sigma**2).sqrt())
        x = x + ((after**2 - up**2).sqrt() - sigma) * slope
        if after > 0:
            x = x + (torch.randn_like(x) if noise_sampler is None else noise_sampler(sigma, after)) * s_noise * up
    return x


def heun(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    s_churn=0.0,
    s_tmin=0.0,
    s_tmax=math.inf,
    s_noise=1.0,
):
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        x, hat = churned(x, sigma, len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
        slope = (x - tell(model, x, sigma, hat, i, extra_args, callback)) / hat
        trial = x + (after - hat) * slope
        if after > 0:
            end = (trial - model(trial, after.expand(len(x)), **(extra_args or {}))) / after
            trial = x + (after - hat) * (slope + end) / 2
        x = trial
    return x


def dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    before = width = None
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        data = tell(model, x, sigma, sigma, i, extra_args, callback)
        step = (sigma / after).log()
        used = data if before is None or after == 0 else data + (data - before) * step / width / 2
        x = after / sigma * x + (1 - after / sigma) * used
        before, width = data, step
    return x


def churned(x, sigma, steps, churn, smallest, largest, factor):
    gamma = min(churn / steps, 2**0.5 - 1) if smallest <= sigma <= largest else 0.0
    drawn, hat = torch.randn_like(x) * factor, sigma * (1 + gamma)
    return x + drawn * (hat**2 - sigma**2).sqrt() if gamma else x, hat


def tell(model, x, sigma, hat, i, extra_args, callback):
    denoised = model(x, hat.expand(len(x)), **(extra_args or {}))
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": hat, "denoised": denoised})
    return denoised


def dpmpp_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None, r=0.5
):
    draw = Brownian(x, (extra_args or {}).get("seed")) if noise_sampler is None else noise_sampler
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        data = tell(model, x, sigma, sigma, i, extra_args, callback)
        if after == 0:
            x = data
            continue
        between = (sigma.log() + r * (after.log() - sigma.log())).exp()
        down, up = ancestral(sigma, between, eta)
        y = down / sigma * x + (1 - down / sigma) * data + draw(sigma, between) * s_noise * up
        second = model(y, between.expand(len(x)), **(extra_args or {}))
        down, up = ancestral(sigma, after, eta)
        used = data + (second - data) / (2 * r)
        x = down / sigma * x + (1 - down / sigma) * used + draw(sigma, after) * s_noise * up
    return x


def ancestral(sigma, after, eta):
    up = min(after, eta * (after**2 * (sigma**2 - after**2) / sigma**2).sqrt())
    return (after**2 - up**2).sqrt(), up


class Brownian:
    """Increments of one Brownian path, of unit variance; what is asked first depends on what it was asked before."""

    def __init__(self, x, seed=None):
        seed = int(torch.randint(0, 2**62, ())) if seed is None else seed
        self.generator, self.like = torch.Generator().manual_seed(seed), x
        self.path = {0.0: torch.zeros_like(x)}

    def at(self, time):
        if time not in self.path:
            before = max((t for t in self.path if t < time), default=0.0)
            behind = min((t for t in self.path if t > time), default=None)
            fresh = torch.randn(self.like.shape, generator=self.generator, dtype=self.like.dtype)
            share = 0.0 if behind is None else (time - before) / (behind - before)
            end = self.path[before] if behind is None else self.path[behind]
            spread = ((time - before) * (1 - share)) ** 0.5
            self.path[time] = self.path[before] + share * (end - self.path[before]) + spread * fresh
        return self.path[time]

    def __call__(self, sigma, after):
        one, two = float(sigma), float(after)
        return (self.at(two) - self.at(one)) / abs(two - one) ** 0.5


def model(x, sigma, shift=None):
    """An exact denoiser; ``shift`` moves its data, one number a sample."""
    mixture = problems.mixtures()["power law"]
    moved = 0.0 if shift is None else shift.view(-1, *(1,) * (x.ndim - 1))
    return (
        mixture.data_prediction((x - moved).double().flatten(1), torch.ones(len(x)), sigma).view(x.shape).to(x) + moved
    )


def state(dtype=torch.float64):
    return 14.0 * problems.noise(3, dtype, shape=(4, 4))


SIGMAS_20 = torch.from_numpy(px.karras(0.03, 14.0).grid(20).sigma).float()


SAMPLERS = {loop.__name__: loop for loop in (euler, euler_ancestral, heun, dpmpp_2m, dpmpp_sde)}


SHAPE = (4, 4)


def relative(x, y):
    x, y = x.double().flatten(1), y.double().flatten(1)
    return float(((x - y).norm(dim=1) / y.norm(dim=1)).max())


def noise():
    return state(torch.float32)


def both(
    loop, model=model, sigmas=SIGMAS_20, extra_args=None, solver=None, *, tolerance=1e-2, boundaries=(), **options
):
    """Return the sequential sample, the parallel one, and the parallel function."""
    run = kdiffusion.parallel(loop, solver, tolerance=tolerance, boundaries=boundaries)
    torch.manual_seed(3)
    expected = loop(model, noise(), sigmas, extra_args, disable=True, **options)
    torch.manual_seed(3)
    return expected, run(model, noise(), sigmas, extra_args, disable=True, **options), run
