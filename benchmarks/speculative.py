"""Rounds and evaluations of sampling that is exact in law, by verification and proposal.

    python benchmarks/speculative.py

Exact mixtures (``isotropic``: 10 components with standard normal means, variance 0.09; ``power law``: their covariances
fall off as 1/i in random directions) and the shipped digits, DDPM. Writes ``results/speculative.csv``, and the table of
``docs/speculative.md`` from it.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import parataxis as px
from parataxis import models
from parataxis.denoisers import mixture

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "speculative.csv"
PAGE = ROOT / "docs" / "speculative.md"
MARK = "<!-- written by benchmarks/speculative.py -->\n"
COLUMNS = ["problem", "dim", "steps", "window", "verification", "proposal", "samples", "rounds", "most_rounds", "work"]
KINDS: list[tuple[Any, Any]] = [
    (kind, held) for held in ("fresh", "latest") for kind in ("reflection", "residual", "block")
]
SHOWN = [
    ("reflection", "fresh", "published"),
    ("block", "fresh", "block verification"),
    ("reflection", "latest", "ours"),
    ("block", "latest", "ours, block"),
]


def cases() -> Iterator[tuple[str, tuple[int, ...], px.Sampler, Callable[..., Tensor], int, tuple[int | None, ...]]]:
    """Yield name, shape, sampler, network, number of samples and windows of every problem."""
    for name, power, dims in (("isotropic", 0.0, (64,)), ("power law", 1.0, (16, 64, 256, 1024))):
        for dim in dims:
            network = mixture(dim, power=power).network(px.vp())
            for steps, count, windows in ((100, 32, (8, 16, 32, None)), (1000, 8, (16, 32, 64))):
                few = count // 4 if dim > 256 else count
                yield name, (dim,), px.samplers.ddpm(steps=steps), network, few, windows
    model = models.load("digits")
    denoise = model.denoiser()

    def three(x: Tensor, t: Tensor) -> Tensor:
        return denoise(x, t, torch.full((len(x),), 3))

    for steps, count, windows in ((100, 8, (8, 16, 32, None)), (1000, 2, (16, 32, 64))):
        yield "digits", model.shape, model.sampler("ddpm", steps), three, count, windows


def measure() -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each problem, window and kind."""
    for name, shape, sampler, network, count, windows in cases():
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(b)) for b in range(count)])
        for window in windows:
            for verification, held in KINDS:
                solver = px.Speculative(window, verification, held)
                generators = [torch.Generator().manual_seed(1000 + b) for b in range(count)]
                result = px.sample(network, noise, sampler, solver, generator=generators, max_rows=256)
                rounds = [one.rounds for one in result]
                yield {
                    "problem": name,
                    "dim": noise[0].numel(),
                    "steps": sampler.steps,
                    "window": window or "all",
                    "verification": verification,
                    "proposal": held,
                    "samples": count,
                    "rounds": round(sum(rounds) / count, 2),
                    "most_rounds": max(rounds),
                    "work": round(result.evaluations / count / sampler.steps, 3),
                }


def page(rows: list[dict[str, str]]) -> str:
    """Return the table of the page."""
    lines = ["| problem | dim | N | window | " + " | ".join(label for *_, label in SHOWN) + " |"]
    lines.append("|---" * (4 + len(SHOWN)) + "|")
    found = {tuple(row[name] for name in COLUMNS[:6]): row for row in rows}
    for key in dict.fromkeys(key[:4] for key in found if key[2:4] in (("100", "16"), ("1000", "32"))):
        cells = [found[(*key, kind, held)] for kind, held, _ in SHOWN]
        shown = [f"{float(cell['rounds']):.0f}, {float(cell['work']):.2f}" for cell in cells]
        lines.append("| " + " | ".join([*key, *shown]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print and write the table."""
    torch.set_num_threads(1)
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in measure():
            writer.writerow(row)
            file.flush()
            print(row, flush=True)
    with OUT.open() as file:
        table = page(list(csv.DictReader(file)))
    before, rest = PAGE.read_text().split(MARK)
    PAGE.write_text(before + MARK + table + "<!-- end -->" + rest.split("<!-- end -->")[1])


if __name__ == "__main__":
    main()
