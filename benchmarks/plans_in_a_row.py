"""Does a plan come out the same every time, and right: ten in a row, for networks of a millisecond and of less.

    python benchmarks/plans_in_a_row.py [--plans 10] [--threads 1]

Plans the 0.5 M policy of ``examples/policy`` and a network of some 0.07 ms, draws five samples by each plan and by the
loop in turns, and prints what was chosen, what was forecast, and the medians of what it took and of how many times as
fast it was. Run it beside other work: that is what it is about. Seconds then change from one moment to the next, ratios
less so.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import parataxis as px

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "policy"))
from diffusion_policy import folder_of, load
from safetensors.torch import load_file

POLICY = "button-press-topdown-v3"
DRAWS = 5  # for each plan
NEAR = 0.25  # by which a forecast may be off


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
        near = near_ratio = 0
        for index in range(options.plans):
            plan = px.plan(network, noise, sampler, condition=condition)
            pairs = []  # seconds of the plan's solver and of the loop
            for draw in range(DRAWS):
                known: dict[str, Any] = {"condition": condition}
                pair = []
                for solver in (plan.solver, px.Sequential()):
                    known["generator"] = torch.Generator().manual_seed(DRAWS * index + draw)
                    pair.append(px.sample(network, noise, sampler, solver, **known).seconds)
                pairs.append(pair)
            seconds = median(pair[0] for pair in pairs)
            ratio = median(pair[1] / pair[0] for pair in pairs)
            chosen[repr(plan.solver)] += 1
            near += abs(plan.seconds / seconds - 1) <= NEAR
            near_ratio += abs(plan.speedup.median / ratio - 1) <= NEAR
            noisy = ", timing is noisy" if plan.latency.noisy else ""
            forecast = (
                f"forecast {1e3 * plan.seconds:.1f} ms, took {1e3 * seconds:.1f} ms and was {ratio:.2f} x as fast"
            )
            print(f"{name}: {plan!r}, {forecast}{noisy}", flush=True)
        share = f"of {options.plans} forecasts within {NEAR:.0%}"
        print(f"{name}: {dict(chosen)}; {near} {share} in seconds, {near_ratio} in the ratio", flush=True)


if __name__ == "__main__":
    main()
