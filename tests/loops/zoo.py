"""Loops with a state of their own, as people write them: each leaves the world as it does by itself.

An entry makes a fresh :class:`Case`: a function, its arguments for a call, and the objects that it changes.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from torch import nn

DIM, STEPS = 48, 16


class Scaled(nn.Module):
    """A small network with things that a loop may change: an attribute, parameters."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.inner = nn.Parameter(torch.randn(DIM, DIM, generator=generator) / DIM**0.5, requires_grad=False)
        self.outer = nn.Parameter(torch.randn(DIM, DIM, generator=generator) / DIM**0.5, requires_grad=False)
        self.scale = 1.0

    def forward(self, x, t, condition=None):
        hidden = x @ self.inner + torch.sin(torch.as_tensor(t).float() / 100).reshape(-1, 1)
        if condition is not None:
            hidden = hidden + condition
        return self.scale * torch.tanh(hidden) @ self.outer + 0.7 * x


@dataclass
class Case:
    """One loop.

    Attributes:
        net: Its network.
        run: The function.
        arguments: Makes the arguments of a call from its number.
        world: What it may change, besides its arguments.
    """

    net: nn.Module
    run: Callable[..., Any]
    arguments: Callable[[int], tuple[Any, ...]]
    world: dict[str, Any] = field(default_factory=dict)


def scheduler(kind=DDIMScheduler, **options):
    made = kind(**({"clip_sample": False} if kind is not EulerAncestralDiscreteScheduler else {}) | options)
    made.set_timesteps(STEPS)
    return made


def case(body, kind=DDIMScheduler, world=None, predict=None, **options):
    """Make a case of what is done after each step: ``body(i, x, net, world)`` returns the state to go on with."""
    net, steps, world = Scaled(), scheduler(kind, **options), {} if world is None else world

    def run(generator):
        steps.set_timesteps(STEPS)
        x = torch.randn(2, DIM, generator=generator) * steps.init_noise_sigma
        for i, t in enumerate(steps.timesteps):
            u = steps.scale_model_input(x, t)
            output = net(u, t) if predict is None else predict(i, net, u, t)
            more = {"generator": generator} if kind is not DDIMScheduler else {}
            x = body(i, steps.step(output, t, x, **more).prev_sample, net, world)
            if x is None:
                break
        return x

    return Case(net, run, lambda call: (torch.Generator().manual_seed(call),), world | {"scheduler": steps})


def keep(i, x, net, world):
    return x


def append(i, x, net, world):
    world["trace"].append(x.clone())
    return x


def count(i, x, net, world):
    world["count"] += 1
    world["last"] = i
    return x


def stop_by_count(i, x, net, world):
    """Stop by a budget over all calls."""
    world["budget"] -= 1
    return x if world["budget"] > 0 or i > 12 else x * float("nan") if world["budget"] < -99 else x


def attribute_from_step(i, x, net, world):
    net.scale = 0.5 if i >= 9 and i < STEPS - 1 else 1.0
    return x


def parameters_from_step(i, x, net, world):
    if i == 9:
        net.outer.mul_(0.5)
    elif i == STEPS - 1:
        net.outer.mul_(2.0)
    return x


def hook_from_step(i, x, net, world):
    if i == 9:
        world["hook"] = net.register_forward_hook(lambda module, args, output: output * 0.9)
    elif i == STEPS - 1:
        world.pop("hook").remove()
    return x


def shift_once(i, x, net, world):
    return x + 0.5 if i == 6 else x


def shrink(i, x, net, world):
    world["trace"].append(i)
    return x * 0.9


def pin(i, x, net, world):
    x[:, :4] = 0.5
    return x


def in_place(i, x, net, world):
    x[:, 0] += 0.1
    world["copies"].append(x)
    return x


def random_numbers(i, x, net, world):
    world["drawn"].append((random.random(), np.random.rand(), float(torch.rand(()))))  # noqa: NPY002
    return x


def previews(i, x, net, world):
    if i % 5 == 0:
        world["previews"][i] = x.mean().item()
    return x


def guided(i, net, u, t):
    condition = torch.linspace(-1, 1, 2 * len(u) * DIM).view(-1, DIM)
    without, with_ = net(torch.cat([u] * 2), t, condition).chunk(2)
    return without + 3 * (with_ - without)


def guided_in_between(i, net, u, t):
    return guided(i, net, u, t) if 4 <= i < 12 else net(u, t, torch.zeros_like(u))


def guided_by_a_schedule(i, net, u, t):
    condition = torch.linspace(-1, 1, 2 * len(u) * DIM).view(-1, DIM)
    without, with_ = net(torch.cat([u] * 2), t, condition).chunk(2)
    return without + (3 - i / 10) * (with_ - without)


def rescaled(i, net, u, t):
    return torch.nn.functional.normalize(net(u, t), dim=1) * DIM**0.5


class Robot:
    """A policy as LeRobot has it: a queue of actions, observations that are normalised in place."""

    def __init__(self, net):
        self.net, self.steps, self.actions, self.calls = net, scheduler(DDPMScheduler, clip_sample=True), deque(), 0

    def select_action(self, observation, generator):
        self.calls += 1
        observation["state"] -= 0.5
        if not self.actions:
            x = torch.randn(1, DIM, generator=generator)
            for t in self.steps.timesteps:
                x = self.steps.step(self.net(x, t, observation["state"]), t, x, generator=generator).prev_sample
            self.actions.extend(x.view(4, -1)[:2])
        return self.actions.popleft()


def robot():
    made = Robot(Scaled())

    def arguments(call):
        return {"state": torch.linspace(0, 1, DIM) + call}, torch.Generator().manual_seed(call)

    return Case(made.net, made.select_action, arguments, {"robot": made})


def generators():
    net, steps = Scaled(), scheduler(DDPMScheduler)

    def run(sources):
        x = torch.cat([torch.randn(1, DIM, generator=source) for source in sources])
        for t in steps.timesteps:
            x = steps.step(net(x, t), t, x, generator=sources).prev_sample
        return x

    return Case(net, run, lambda call: ([torch.Generator().manual_seed(10 * call + i) for i in range(3)],))


def two_loops():
    net, steps = Scaled(), scheduler(DDPMScheduler)

    def run(generator):
        chunks = []
        condition = torch.zeros(2, DIM)
        for _ in range(2):
            x = torch.randn(2, DIM, generator=generator)
            for t in steps.timesteps:
                x = steps.step(net(x, t, condition), t, x, generator=generator).prev_sample
            chunks.append(x)
            condition = x.clamp(-1, 1)
        return torch.cat(chunks)

    return Case(net, run, lambda call: (torch.Generator().manual_seed(call),))


def copied_scheduler():
    net, steps = Scaled(), scheduler()

    def run(generator):
        mine = copy.deepcopy(steps)
        x = torch.randn(2, DIM, generator=generator)
        for t in mine.timesteps:
            x = mine.step(net(x, t), t, x).prev_sample
        return x

    return Case(net, run, lambda call: (torch.Generator().manual_seed(call),))


ZOO: dict[str, Callable[[], Case]] = {
    "plain": lambda: case(keep),
    "ancestral": lambda: case(keep, EulerAncestralDiscreteScheduler),
    "clipped": lambda: case(keep, DDPMScheduler, clip_sample=True),
    "list of states": lambda: case(append, world={"trace": []}),
    "counter": lambda: case(count, DDPMScheduler, world={"count": 0}),
    "budget": lambda: case(stop_by_count, world={"budget": 30}),
    "attribute of the network": lambda: case(attribute_from_step),
    "parameters of the network": lambda: case(parameters_from_step),
    "hook of the network": lambda: case(hook_from_step),
    "one shift": lambda: case(shift_once, DDPMScheduler),
    "shrunk states": lambda: case(shrink, world={"trace": []}),
    "pinned entries": lambda: case(pin),
    "in place": lambda: case(in_place, world={"copies": []}),
    "random numbers": lambda: case(random_numbers, world={"drawn": []}),
    "previews": lambda: case(previews, world={"previews": {}}),
    "guided": lambda: case(append, DDPMScheduler, {"trace": []}, guided),
    "guided in between": lambda: case(append, DDPMScheduler, {"trace": []}, guided_in_between),
    "guided by a schedule": lambda: case(append, world={"trace": []}, predict=guided_by_a_schedule),
    "not linear": lambda: case(append, world={"trace": []}, predict=rescaled),
    "robot": robot,
    "a generator a sample": generators,
    "two loops": two_loops,
    "copied scheduler": copied_scheduler,
}


def same(left: Any, right: Any, tolerance: float = 1e-2) -> bool:
    """Return whether two worlds are the same: floating-point tensors within the tolerance, all else equal."""
    if isinstance(left, torch.Tensor):
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        if not left.is_floating_point():
            return torch.equal(left, right)
        distance, norm = float((left - right).double().norm()), float(right.double().norm())
        return distance <= tolerance * norm or (distance == 0 and norm == 0)
    if isinstance(left, torch.Generator):
        return torch.equal(left.get_state(), right.get_state())
    if isinstance(left, float):
        return abs(left - right) <= tolerance * (abs(right) + 0.1)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key], tolerance) for key in left)
    if isinstance(left, (list, tuple, deque)):
        pairs = zip(left, right, strict=False)
        return len(left) == len(right) and all(same(a, b, tolerance) for a, b in pairs)
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    if hasattr(left, "__dict__") and not isinstance(left, (type, nn.Module)):
        return same(vars(left), vars(right), tolerance)
    return type(left) is type(right) and (isinstance(left, nn.Module) or left == right)
