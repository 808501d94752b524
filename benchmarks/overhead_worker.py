"""What a version of the package costs a round, printed as JSON; run by ``overhead.py --against``.

    PYTHONPATH=TREE/src python overhead_worker.py '{"state": [16, 4], "sampler": "ddim", "window": 8, "samples": 1}'

The version is the one that ``import parataxis`` finds, and names that older ones have are tried. With ``"loop": 2`` in
the place of a window it is the sequential loop on a network that takes 2 milliseconds, by ``px.sample`` and written out
by hand.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from statistics import median
from typing import Any

import torch
from torch import Tensor

import parataxis as px

STEPS = 100


def attribute(thing: Any, *names: str) -> Any:
    """Return the attribute of an object that has one of these names."""
    return next(getattr(thing, name) for name in names if hasattr(thing, name))


def smooth(x: Tensor, t: Tensor) -> Tensor:
    """Stand for a network: an elementwise function of states x and times t."""
    return torch.tanh(x * (0.5 + t.view(-1, *(1,) * (x.ndim - 1)).to(x) / 2000))


def rounds(shape: list[int], name: str, window: int, count: int, repeats: int) -> float:
    """Return the median milliseconds of a round outside the network, over all rounds of the repeats."""
    sampler = px.SAMPLERS[name](steps=STEPS)
    times, drive = sampler.network_times(), attribute(px, "drive", "together")
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    inside, seconds = 0.0, []

    def evaluate(rows: Any) -> Tensor:
        nonlocal inside
        begun = time.perf_counter()
        outputs = smooth(attribute(rows, "x", "u"), times[attribute(rows, "step", "point")])
        inside += time.perf_counter() - begun
        return outputs

    for repeat in range(repeats + 1):
        recurrence = attribute(sampler, "recurrence", "table")(noise, torch.Generator().manual_seed(1))
        runs = px.start(sampler, recurrence, px.Secant(window=window), tolerance=1e-2)
        begun, inside, total = time.perf_counter(), 0.0, []
        for _ in drive(runs, evaluate):
            now = time.perf_counter()
            total.append(now - begun - inside)
            begun, inside = now, 0.0
        if repeat:  # the first one fills caches
            seconds += total[1:]  # the first round makes room
    return 1e3 * median(seconds)


def loop(shape: list[int], name: str, milliseconds: float, count: int, repeats: int) -> tuple[float, float]:
    """Return milliseconds a step of the sequential loop by ``px.sample``, and of the same loop written out by hand."""
    sampler = px.SAMPLERS[name](steps=STEPS)
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    times = sampler.network_times()
    local = attribute(sampler, "coefficients", "local")
    a, b = (attribute(local, *names) for names in (("state_weight", "decay"), ("output_weight", "weight")))
    a, b = a.tolist(), b[:, 0].tolist()

    def network(x: Tensor, t: Tensor) -> Tensor:
        begun = time.perf_counter()
        outputs = smooth(x, t)
        while time.perf_counter() - begun < milliseconds / 1e3:
            pass
        return outputs

    def by_hand() -> Tensor:
        u = noise * sampler.start_scale
        with torch.no_grad():
            for i in range(STEPS):
                u = a[i] * u + b[i] * network(u, times[i].expand(count))
        return u

    figures: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for kind, call in enumerate((lambda: px.sample(network, noise, sampler, px.Sequential()), by_hand)):
            begun = time.perf_counter()
            call()
            figures[kind].append(time.perf_counter() - begun)
    return 1e3 * median(figures[0]) / STEPS, 1e3 * median(figures[1]) / STEPS


def main() -> None:
    """Measure the case that the command line names."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    case = json.loads(sys.argv[1])
    shape, name, count, repeats = case["state"], case["sampler"], case["samples"], case["repeats"]
    with torch.no_grad():
        if "loop" in case:
            print(json.dumps(loop(shape, name, case["loop"], count, repeats)))
        else:
            print(json.dumps(rounds(shape, name, case["window"], count, repeats)))


if __name__ == "__main__":
    main()
