"""A diffusion policy's loop: plain, with its scheduler read, and unchanged but parallel. The same trajectories.

Run it: ``python examples/robot_policy.py``; it trains the policy first, for some seconds. The policy plans 16 points
from a start to a goal, with two ways around what stands between. Its parts are those of diffusion policies in use: a
1-D U-Net conditioned by FiLM, squared-cosine betas, clip_sample, and a first point that is put into the trajectory
before every step.
"""

import math

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

import parataxis as px

HORIZON, TRAIN_STEPS = 16, 300
OPTIONS = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "prediction_type": "epsilon"}


class Block(nn.Module):
    """Two convolutions over time; what is known scales and shifts the channels in between (FiLM)."""

    def __init__(self, inputs: int, outputs: int, known: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU())
        self.film = nn.Linear(known, 2 * outputs)
        self.second = nn.Sequential(nn.SiLU(), nn.Conv1d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        """Return (R, outputs, T) of x (R, inputs, T) and known (R, known)."""
        scale, shift = self.film(known)[..., None].chunk(2, dim=1)
        return self.skip(x) + self.second(self.first(x) * (1 + scale) + shift)


class UNet(nn.Module):
    """Predicts the noise in trajectories (R, HORIZON, 2) at times (R,) for observations (R, 4)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.known = nn.Sequential(nn.Linear(32 + 4, 64), nn.SiLU())
        self.enter = Block(2, width, 64)
        self.down = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.low = Block(width, 2 * width, 64)
        self.up = nn.ConvTranspose1d(2 * width, width, 4, stride=2, padding=1)
        self.leave = Block(2 * width, width, 64)
        self.out = nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        """Return the predicted noise, of the shape of x."""
        angle = t[:, None] * torch.exp(torch.arange(16) * (-math.log(1000) / 15))
        known = self.known(torch.cat([angle.sin(), angle.cos(), observation], 1))
        high = self.enter(x.mT, known)
        low = self.up(self.low(self.down(high), known))
        return self.out(self.leave(torch.cat([high, low], 1), known)).mT


def demonstrations(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return trajectories (count, HORIZON, 2) and observations (count, 4): start and goal, an obstacle half way."""
    start = torch.rand(count, 2, generator=generator) * torch.tensor([0.2, 1.0]) + torch.tensor([-0.9, -0.5])
    goal = torch.rand(count, 2, generator=generator) * torch.tensor([0.2, 1.0]) + torch.tensor([0.7, -0.5])
    way = torch.linspace(0, 1, HORIZON)[None, :, None]
    side = torch.randint(0, 2, (count, 1), generator=generator) * 2.0 - 1  # the two ways around
    bend = 0.4 * side * torch.sin(math.pi * way[..., 0])
    path = start[:, None] + way * (goal - start)[:, None]
    return path + torch.stack([torch.zeros_like(bend), bend], -1), torch.cat([start, goal], 1)


def train(generator: torch.Generator) -> UNet:
    """Return a policy trained for some seconds."""
    scheduler, network = DDPMScheduler(100, **OPTIONS), UNet()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=TRAIN_STEPS)
    for _ in range(TRAIN_STEPS):
        clean, observation = demonstrations(128, generator)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(0, 100, (len(clean),), generator=generator)
        noisy = scheduler.add_noise(clean, noise, t)
        noisy[:, 0] = observation[:, :2]
        loss = (network(noisy, t, observation) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


Scheduler = DDPMScheduler | DDIMScheduler


def plain_loop(network: UNet, scheduler: Scheduler, observation: Tensor, generator: torch.Generator) -> Tensor:
    """Return the trajectories (B, HORIZON, 2) by the loop that robot policies run."""
    trajectory = torch.randn(len(observation), HORIZON, 2, generator=generator)
    for t in scheduler.timesteps:
        trajectory[:, 0] = observation[:, :2]
        output = network(trajectory, t.expand(len(trajectory)), observation)
        trajectory = scheduler.step(output, t, trajectory, generator=generator).prev_sample
    trajectory[:, 0] = observation[:, :2]
    return trajectory


def parallel_loop(
    network: UNet,
    scheduler: Scheduler,
    observation: Tensor,
    generator: torch.Generator,
    solver: px.solvers.Solver = px.Secant(),  # noqa: B008 (frozen)
    tolerance: float = 1e-3,
) -> px.Solutions:
    """Return the same trajectories, all steps solved side by side."""

    def policy(trajectory: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        first = observation[:, None, :2]
        output = network(torch.cat([first, trajectory[:, 1:]], 1), t, observation)
        signal = scheduler.alphas_cumprod[t.long()][:, None, None]
        noise = (trajectory[:, :1] - signal.sqrt() * first) / (1 - signal).sqrt()  # that leads to the first point
        return torch.cat([noise, output[:, 1:]], 1)

    noise = torch.randn(len(observation), HORIZON, 2, generator=generator)
    sampler = px.from_scheduler(scheduler)  # once for all plans
    return px.sample(policy, noise, sampler, solver, tolerance=tolerance, condition=observation, generator=generator)


torch.manual_seed(0)
network = train(torch.Generator().manual_seed(1))
_, observation = demonstrations(4, torch.Generator().manual_seed(2))
for scheduler, steps in [(DDPMScheduler(100, **OPTIONS), 100), (DDIMScheduler(100, **OPTIONS), 16)]:
    scheduler.set_timesteps(steps)
    plain = plain_loop(network, scheduler, observation, torch.Generator().manual_seed(3))
    result = parallel_loop(network, scheduler, observation, torch.Generator().manual_seed(3))
    unchanged = px.parallel(plain_loop, px.Secant(window=16))  # the loop as it stands
    same = unchanged(network, scheduler, observation, torch.Generator().manual_seed(3))
    found = torch.stack([result.x, same])
    error = (found - plain)[:, :, 1:].flatten(2).norm(dim=2) / plain.flatten(1).norm(dim=1)
    print(f"{type(scheduler).__name__}: {steps} rounds one after another, {result.rounds} side by side")
    print(f"  relative error of the trajectories: median {error[0].median():.0e}, worst {error[0].max():.0e}")
    print(f"  unchanged, {unchanged.report}")
    print(f"  relative error of the trajectories: median {error[1].median():.0e}, worst {error[1].max():.0e}")
    bends = plain[:, HORIZON // 2, 1] - plain[:, [0, -1], 1].mean(1)
    print(f"  away from the goal: {(plain[:, -1] - observation[:, 2:]).norm(dim=1).mean():.2f}, ", end="")
    print(f"{(bends > 0).sum()} ways to the left and {(bends < 0).sum()} to the right")
