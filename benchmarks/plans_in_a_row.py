"""Does a plan come out the same every time, and right: ten in a row, for networks of a millisecond and of less.

    python benchmarks/plans_in_a_row.py [--plans 10] [--threads 1]

Plans the 0.5 M policy of ``examples/policy`` and a network of some 0.07 ms, draws one sample by each plan, and prints
what was chosen, what was forecast and what it took. Run it beside other work: that is what it is about.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import parataxis as px

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "policy"))
from diffusion_policy import folder_of, load
from safetensors.torch import load_file

POLICY = "button-press-topdown-v3"


def policy() -> tuple[Callable[..., Tensor], Tensor, px.Sampler, Tensor]:
    """Return network, noise, sampler and condition of the policy."""
    trained = load(folder_of(POLICY))
    recorded = load_file(folder_of(POLICY) / "episode.safetensors")
    noise = trained.noise([torch.Generator().manual_seed(0)])
    condition = trained.condition(recorded["observations"][:1])
    return trained.network, noise, px.from_scheduler(trained.config.scheduler()), condition


def tiny() -> tuple[Callable[..., Tensor], Tensor, px.Sampler, None]:
    """Return a network of some 0.07 ms, noise and a sampler."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))
    return lambda x, t: layers(x), torch.randn(1, 64), px.samplers.ddim(px.vp(), steps=100), None


def main() -> None:
    """Plan, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    for name, (network, noise, sampler, condition) in {"policy 0.5 M": policy(), "network of 0.07 ms": tiny()}.items():
        chosen: Counter[str] = Counter()
        near = 0
        for index in range(options.plans):
            plan = px.plan(network, noise, sampler, condition=condition)
            known: dict[str, Any] = {"condition": condition, "generator": torch.Generator().manual_seed(index)}
            seconds = px.sample(network, noise, sampler, plan.solver, **known).seconds
            chosen[repr(plan.solver)] += 1
            near += abs(plan.seconds / seconds - 1) <= 0.25
            noisy = ", timing is noisy" if plan.latency.noisy else ""
            print(f"{name}: {plan!r}, forecast {1e3 * plan.seconds:.1f} ms, took {1e3 * seconds:.1f} ms{noisy}")
        print(f"{name}: {dict(chosen)}; {near} of {options.plans} forecasts within 25 %", flush=True)


if __name__ == "__main__":
    main()
