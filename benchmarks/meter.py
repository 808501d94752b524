"""What benchmarks share: a count of what a solve dispatches and holds besides the network, and where it ran."""

from __future__ import annotations

import csv
import platform
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import parataxis as px

LATENT = (4, 64, 64)


@dataclass
class Meter:
    """Operations and live bytes of a solve, without the network's own.

    Attributes:
        operations: Dispatched torch operations outside the network.
        peak: Most bytes of tensors made by the solve that were alive at once.
        seconds: Time spent in the network.
    """

    operations: int = 0
    peak: int = 0
    live: int = 0
    inside: bool = False
    seconds: float = 0.0
    seen: dict[int, int] = field(default_factory=dict)

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes()
        self.seen[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        """Forget a storage that has died."""
        self.live -= self.seen.pop(key, 0)


class Counting(TorchDispatchMode):
    """Feed a meter."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it unless the network is running."""
        result = func(*args, **(kwargs or {}))
        if not self.meter.inside:
            self.meter.operations += 1
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, Tensor):
                    self.meter.hold(value)
        return result


def network(meter: Meter, stiffness: float = 0.5) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a cheap smooth network whose own operations are not counted."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        meter.inside = True
        begun = time.perf_counter()
        output = torch.tanh(x * (0.5 + stiffness * t.view(-1, *(1,) * (x.ndim - 1)).to(x) / 1000))
        meter.seconds += time.perf_counter() - begun
        meter.inside = False
        return output

    return denoise


def noises(count: int, shape: Sequence[int] = LATENT) -> Tensor:
    """Return standard normal noise."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def measure(
    sampler: px.Sampler,
    solver: Any,
    count: int,
    tolerance: float = 1e-3,
    shape: Sequence[int] = LATENT,
    device: str = "cpu",
) -> dict[str, float]:
    """Return operations and milliseconds a round outside the network, and memory in windows and trajectories."""
    noise = noises(count, shape).to(device)
    times = sampler.network_times().to(device)
    synchronize = getattr(torch, device).synchronize

    def solve(meter: Meter) -> tuple[int, float]:
        denoise = network(meter)
        runs = px.start(sampler, sampler.recurrence(noise), solver, tolerance=tolerance)
        meter.operations = 0  # of rounds, not of drawing the noise
        synchronize()
        begun = time.perf_counter()
        rounds = sum(1 for _ in px.drive(runs, lambda rows: denoise(rows.x, times[rows.step.to(device)])))
        synchronize()
        return rounds, time.perf_counter() - begun - meter.seconds

    meter = Meter()
    with Counting(meter):
        rounds, _ = solve(meter)
    solve(Meter())
    seconds = min(solve(Meter())[1] for _ in range(3))
    state = noise[0].numel() * noise.element_size() * count
    width = getattr(solver, "window", None) or sampler.steps
    return {
        "rounds": rounds,
        "operations_a_round": meter.operations / rounds,
        "milliseconds_a_round": 1e3 * seconds / rounds,
        "windows": (meter.peak - (state * sampler.steps if sampler.coefficients.noise_std.any() else 0))
        / (state * width),
    }


def machine(device: str = "cpu") -> dict[str, str]:
    """Return the columns that say where a benchmark ran: the device's name and the software's versions."""
    threads = torch.get_num_threads()
    name = f"{platform.machine()} {threads} thread{'s' * (threads > 1)}"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    return {"device": name, "torch": torch.__version__, "parataxis": px.__version__}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table: new rows take the place of those of the same device."""
    path.parent.mkdir(exist_ok=True)
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open() as file:
            kept = [row for row in csv.DictReader(file) if row["device"] != rows[0]["device"]]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([*kept, *rows])
