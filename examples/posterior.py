"""Simulation-based inference: one sample of a posterior that a diffusion model has learned, drawn in parallel.

Run it: ``pip install sbi``, then ``python examples/posterior.py``. It trains sbi's neural posterior score estimation
(NPSE) on the two-moons simulator, some ten seconds of the CPU, and draws one parameter in 500 Euler-Maruyama steps:

1. by ``posterior.sample``, as sbi has it;
2. by the same code through ``px.parallel``;
3. by ``px.sample`` on the score network, with the equation of sbi's sampler written down;
4. and a thousand parameters in one batch, by ``posterior.sample``: the better way wherever many are wanted.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sbi.inference import NPSE
from sbi.utils import BoxUniform
from torch import Tensor

import parataxis as px

STEPS = 500
OBSERVATION = torch.zeros(1, 2)
# What sbi says of samples outside of the prior is not about how they are drawn; times are printed below.
warnings.filterwarnings("ignore", category=UserWarning)
warnings.filterwarnings("ignore", "running in parallel was slower", RuntimeWarning)
torch.set_num_threads(1)
torch.manual_seed(0)


def two_moons(theta: Tensor) -> Tensor:
    """Simulate: a point on a crescent, moved by the parameters theta (n, 2)."""
    angle = torch.pi * (torch.rand(len(theta)) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta))
    crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)
    total, difference = theta.sum(1).abs(), theta[:, 1] - theta[:, 0]
    return crescent + torch.stack([-total, difference], 1) / 2**0.5


prior = BoxUniform(-torch.ones(2), torch.ones(2))
theta = prior.sample((2000,))
inference = NPSE(prior, sde_type="ve").append_simulations(theta, two_moons(theta))
estimator = inference.train(max_num_epochs=10, training_batch_size=200)
posterior = inference.build_posterior(estimator)


def draw(count: int) -> Tensor:
    """Draw parameters (count, 2) as sbi does."""
    torch.manual_seed(1)
    return posterior.sample((count,), x=OBSERVATION, steps=STEPS, reject_outside_prior=False, show_progress_bars=False)


def euler_maruyama() -> px.Sampler:
    """Return sbi's equation, u' = u + g^2 dt score(u, t) + g sqrt(dt) z, for a variance-exploding schedule."""
    times = estimator.solve_schedule(STEPS).double()
    sigma, squared = estimator.noise_schedule(times).numpy(), estimator.diffusion_fn(OBSERVATION, times).view(-1) ** 2
    change = (squared[:-1] * (times[:-1] - times[1:])).numpy()
    ones = np.ones(len(times))
    return px.Sampler(
        "euler_maruyama",
        times[:-1].numpy(),
        px.Coefficients(
            state_weight=ones[1:],
            output_weight=change[:, None],
            noise_std=np.sqrt(change),
            alpha=ones,
            sigma=sigma,
            scale=ones,
            x0_from_input=ones[1:],
            x0_from_output=sigma[:-1] ** 2,
        ),
        start_scale=float(estimator.std_base.max()),
    )


def score(u: Tensor, t: Tensor) -> Tensor:
    """Return the score of rows (R, 2) at their times (R,)."""
    return estimator.score(u[:, None], OBSERVATION, t[:, None])[:, 0]


def timed(call: Callable[..., Any], *arguments: object) -> tuple[float, Any]:
    """Return the seconds of the second call, and what it returned."""
    call(*arguments)
    begin = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - begin, result


sampler, solver = euler_maruyama(), px.Secant(window=32)
noise = torch.randn(1, 2, generator=torch.Generator().manual_seed(1))


def read() -> px.Solutions:
    """Draw one parameter in parallel, with the written equation."""
    with torch.no_grad():
        return px.sample(score, noise, sampler, solver, generator=torch.Generator().manual_seed(2))


def step_by_step() -> px.Solutions:
    """Draw the same, one step after the other."""
    with torch.no_grad():
        return px.sample(score, noise, sampler, px.Sequential(), generator=torch.Generator().manual_seed(2))


unmodified = px.parallel(draw, solver, denoisers=[posterior.vector_field_estimator])
seconds, expected = timed(draw, 1)
recorded_seconds, result = timed(unmodified, 1)
loop_seconds, wanted = timed(step_by_step)
read_seconds, found = timed(read)
begin = time.perf_counter()
draw(1000)
batch_seconds = time.perf_counter() - begin
error = torch.stack([(a - b).norm() / b.norm() for a, b in ((result, expected), (found.x, wanted.x))])

print(f"sbi's loop, one sample:         {1e3 * seconds:5.0f} ms, {STEPS - 1} evaluations one after the other")
print(
    f"the same through px.parallel:   {1e3 * recorded_seconds:5.0f} ms, {unmodified.report.rounds} rounds, relative "
    f"error {error[0]:.0e}: the loop's own Python is run twice"
)
print(f"its equation, step by step:     {1e3 * loop_seconds:5.0f} ms")
print(
    f"its equation through px.sample: {1e3 * read_seconds:5.0f} ms, {found.rounds} rounds, relative error "
    f"{error[1]:.0e}: {loop_seconds / read_seconds:.1f} times as fast, {seconds / read_seconds:.1f} times sbi's loop"
)
print(
    f"a thousand samples in a batch:  {1e3 * batch_seconds:5.0f} ms, {batch_seconds:.2f} ms a sample: where many are "
    "wanted, a batch is the better way"
)
