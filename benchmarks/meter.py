"""What benchmarks share: a count of what a solve dispatches and holds besides the network, and where it ran."""

from __future__ import annotations

import csv
import platform
import subprocess
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
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

    def solve(meter: Meter) -> tuple[int, float]:
        denoise = network(meter)
        runs = px.start(sampler, sampler.recurrence(noise), solver, tolerance=tolerance)
        synchronize(device)
        begun, rounds = time.perf_counter(), 0
        for rounds in px.drive(runs, lambda rows: denoise(rows.x, times[rows.step.to(device)])):
            if rounds == 1:
                meter.operations = 0  # of rounds, not of drawing the noise and of making room
        synchronize(device)
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
        "operations_a_round": meter.operations / max(rounds - 1, 1),
        "milliseconds_a_round": 1e3 * seconds / rounds,
        "windows": (meter.peak - (state * sampler.steps if sampler.coefficients.noise_std.any() else 0))
        / (state * width),
    }


def device_name(device: str = "cpu") -> str:
    """Return the name that tables give a device."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"{platform.machine()} {threads} thread{'s' * (threads > 1)}"


def machine(device: str = "cpu") -> dict[str, str]:
    """Return the columns that say where a benchmark ran: the device's name and the software's versions."""
    return {"device": device_name(device), "torch": torch.__version__, "parataxis": px.__version__}


@cache
def driver() -> str:
    """Return the version of the CUDA driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def synchronize(device: str) -> None:
    """Wait for the device."""
    getattr(torch, device).synchronize()


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table: new rows take the place of those of the same device."""
    path.parent.mkdir(exist_ok=True, parents=True)
    kept = [row for row in read(path) if row["device"] != rows[0]["device"]]
    _save(path, [*kept, *rows])


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table; none if there is no file."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table in one move, so that a run that is cut short leaves a whole file."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def merge(path: Path, key: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Take rows into a table: each in the place of the one with the same key and device."""
    path.parent.mkdir(exist_ok=True, parents=True)
    names = (*key, "device")
    every = {tuple(str(row.get(name, "")) for name in names): row for row in [*read(path), *rows]}
    _save(path, list(every.values()))


class Results:
    """A table that is written row by row: a row takes the place of the one with the same key and device.

    Args:
        path: The CSV file; rows that it holds are kept.
        key: The columns that, with ``device``, tell rows apart.
        device: ``cpu`` or ``cuda``.
        resume: Count rows that are there already as done.
    """

    def __init__(self, path: Path, key: Sequence[str], device: str = "cpu", *, resume: bool = False) -> None:
        self.path, self.key = path, tuple(key)
        self.about = {**machine(device), "driver": driver() if device == "cuda" else ""}
        path.parent.mkdir(exist_ok=True, parents=True)
        self.rows = {self._key(row): row for row in read(path)}
        self._done = set(self.rows) if resume else set()

    def _key(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in (*self.key, "device"))

    def done(self, **about: Any) -> bool:
        """Return whether the row with this key is there, of this run or of one before that is resumed."""
        return self._key({**self.about, **about}) in self._done

    def add(self, row: dict[str, Any], *, quiet: bool = False) -> None:
        """Write a row, and print it unless ``quiet``."""
        row = {**row, **self.about}
        key = self._key(row)
        self.rows[key] = row
        self._done.add(key)
        _save(self.path, list(self.rows.values()))
        if not quiet:
            print(self.path.stem + ":", *(row[name] for name in row if name not in self.about), flush=True)


class Budget:
    """The seconds that a benchmark may take.

    Args:
        seconds: None for no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.begun, self.seconds = time.perf_counter(), float("inf") if seconds is None else seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.perf_counter() - self.begun)

    def over(self, need: float = 0.0) -> bool:
        """Return whether fewer than the ``need`` seconds are left."""
        return self.left <= need
