"""Rounds of sampler functions of k-diffusion's signature, run in parallel as they are, on the model `digits`.

    python benchmarks/comfyui.py

N = 50 steps on Karras sigmas from 80 to 0.03, guidance 2, tolerance 1e-2, digits 0 to 3. Calls are those of the model,
the trials of a first run included.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import parataxis as px
from parataxis import kdiffusion, models

STEPS, SEEDS = 50, 4


def euler(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    """Sample by Euler steps."""
    for sigma, after in pairwise(sigmas):
        slope = (x - model(x, sigma.expand(len(x)), **extra_args)) / sigma
        x = x + (after - sigma) * slope
    return x


def dpmpp_2m(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    """Sample by DPM-Solver++ 2M."""
    before = width = None
    for sigma, after in pairwise(sigmas):
        data, step = model(x, sigma.expand(len(x)), **extra_args), (sigma / after).log()
        used = data if before is None or after == 0 else data + (data - before) * step / width / 2
        x = after / sigma * x + (1 - after / sigma) * used
        before, width = data, step
    return x


def main() -> None:
    """Print the table."""
    torch.set_grad_enabled(False)
    digits = models.load("digits")
    predict = digits.denoiser(guidance=2.0)

    def model(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        times = torch.as_tensor(digits.schedule.times_of(sigma.double().numpy())).float()
        scale = sigma.view(-1, 1, 1, 1)
        return x - scale * predict(x / (1 + scale**2).sqrt(), times, label)

    sigmas = torch.from_numpy(px.karras(0.03, 80.0).grid(STEPS).sigma).float()
    print("| sampler | window | rounds, median (worst) | calls, first run | evaluations / N | worst error |")
    print("|---|---|---|---|---|---|")
    for loop in (euler, dpmpp_2m):
        cases = []
        for seed in range(SEEDS):
            noise = torch.randn(1, *digits.shape, generator=torch.Generator().manual_seed(seed)) * sigmas[0]
            extra = {"label": torch.tensor([seed])}
            cases.append((noise, extra, loop(model, noise, sigmas, extra)))
        for window in (8, 16, None):
            run, reports, errors = kdiffusion.parallel(loop, px.Secant(window=window)), [], []
            for noise, extra, expected in cases:
                x = run(model, noise, sigmas, extra, disable=True)
                errors.append(float((x - expected).norm() / expected.norm()))
                reports.append((run.report.rounds, run.report.calls, run.report.evaluations / run.report.steps))
            rounds, calls, work = zip(*reports, strict=True)
            print(
                f"| {loop.__name__} | {window or 'all'} | {statistics.median(rounds):g} ({max(rounds)}) | {calls[0]} "
                f"| {statistics.median(work):.1f} | {max(errors):.0e} |"
            )


if __name__ == "__main__":
    main()
