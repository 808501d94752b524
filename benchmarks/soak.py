"""Soak: a thousand samples through a stream with flat memory, and a long chain of large latents under a row limit.

``python benchmarks/soak.py [--out benchmarks/results/soak.csv]``. Memory is the resident set of this process. Of the
stream it is sampled after every job: the peak of the last hundred jobs must be at most 1.02 times that of the second
hundred. The latents have 16 x 128 x 128 elements, N = 1000, and calls of at most four rows; of them it is sampled after
every round: the peak of the last fifth must be at most 1.1 times that of the second. What comes first fills the heap.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import parataxis as px

OUT = Path(__file__).parent / "results" / "soak.csv"
FIELDS = (
    "what",
    "samples",
    "steps",
    "peak_before_mb",
    "peak_after_mb",
    "ratio",
    "largest_call",
    "converged",
    "cpu_seconds",
)
MOST = {"stream": 1.02, "latents": 1.1}  # the last windows are shorter, and blocks of other sizes lie beside the others


def resident() -> float:
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def stream(count: int) -> dict[str, object]:
    """Draw samples one after another, thirty-two rows at a time."""
    largest, began = 0, time.process_time()

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(x))
        return 0.4 * torch.tanh(x)

    def jobs() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            yield torch.randn(3, 32, 32, generator=generator)

    peaks, converged = [0.0] * (count // 100), 0
    sampler, solver = px.samplers.ddpm(steps=50), px.Secant(window=8)
    for number, (_, solution) in enumerate(px.stream(denoise, jobs(), sampler, solver, rows_per_round=32)):
        hundred = min(number // 100, len(peaks) - 1)
        peaks[hundred] = max(peaks[hundred], resident())
        converged += solution.converged
    return {
        "what": "stream of 3x32x32, 32 rows a round",
        "samples": count,
        "steps": 50,
        "peak_before_mb": f"{peaks[1]:.1f}",
        "peak_after_mb": f"{peaks[-1]:.1f}",
        "ratio": f"{peaks[-1] / peaks[1]:.4f}",
        "largest_call": largest,
        "converged": converged,
        "cpu_seconds": f"{time.process_time() - began:.0f}",
    }


def latents(steps: int) -> dict[str, object]:
    """Draw one large sample, in calls of at most four rows."""
    largest, began, peaks = 0, time.process_time(), []

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(x))
        return 0.4 * torch.tanh(x)

    noise = torch.randn(1, 16, 128, 128, generator=torch.Generator().manual_seed(0))
    solutions = px.sample(
        denoise,
        noise,
        px.samplers.ddim(steps=steps),
        px.Secant(window=8),
        max_rows=4,
        on_round=lambda runs: peaks.append(resident()),
    )
    fifth = len(peaks) // 5
    before, after = max(peaks[fifth : 2 * fifth]), max(peaks[-fifth:])
    return {
        "what": "16x128x128 latents, at most 4 rows a call",
        "samples": 1,
        "steps": steps,
        "peak_before_mb": f"{before:.1f}",
        "peak_after_mb": f"{after:.1f}",
        "ratio": f"{after / before:.4f}",
        "largest_call": largest,
        "converged": int(solutions.converged),
        "cpu_seconds": f"{time.process_time() - began:.0f}",
    }


def main() -> int:
    """Run both and write the table; return how many do not stay flat."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [latents(1000), stream(1000)]
    with options.out.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(lines)
    for line in lines:
        print(line)
    bounds = MOST["latents"], MOST["stream"]
    return sum(
        float(str(line["ratio"])) > most or line["converged"] != line["samples"]
        for line, most in zip(lines, bounds, strict=True)
    )


if __name__ == "__main__":
    raise SystemExit(main())
