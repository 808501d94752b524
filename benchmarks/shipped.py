"""Rounds of the shipped model through its own, unmodified pipeline, and the true errors of what comes out.

    python benchmarks/shipped.py

DDIM and DDPM, with and without clipping, 50 steps, windows of 16 levels, 16 seeds, the default tolerance. The error is
|x - y| / |y| of the final sample in [-1, 1], as the pipeline returns it, y by the pipeline as it is. Writes
``results/shipped.csv`` and the table of ``docs/pipelines.md``; rows that the file already holds are skipped, so the
script can be stopped and started again.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm import tqdm

import parataxis as px
from parataxis.models import FOLDER

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "shipped.csv"
COLUMNS = ["scheduler", "clip", "seed", "rounds", "evaluations", "peak_width", "passes", "mode", "error_estimate"]
COLUMNS += ["relative_error", "converged"]
STEPS, WINDOW, SEEDS = 50, 16, 16


def pipeline(name: str, clip: bool) -> Any:
    """Return the shipped pipeline with another scheduler."""
    shipped = diffusers.DiffusionPipeline.from_pretrained(FOLDER / "digits-unconditional", low_cpu_mem_usage=False)
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(shipped.scheduler.config, clip_sample=clip)
    pipe = getattr(diffusers, f"{name}Pipeline")(unet=shipped.unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(run: Any, seed: int) -> torch.Tensor:
    """Return the sample of one seed, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    images = run(num_inference_steps=STEPS, generator=generator, output_type="np").images
    return 2 * torch.from_numpy(images) - 1


def measure(name: str, clip: bool, pipe: Any, run: Any, seed: int) -> dict[str, Any]:
    """Draw one sample both ways."""
    plain, result, report = draw(pipe, seed), draw(run, seed), run.report
    return {
        "scheduler": name,
        "clip": clip,
        "seed": seed,
        "rounds": report.rounds,
        "evaluations": report.evaluations,
        "peak_width": report.peak_width,
        "passes": report.passes,
        "mode": report.mode,
        "error_estimate": f"{report.error_estimate:.2e}",
        "relative_error": f"{(result - plain).norm() / plain.norm():.2e}",
        "converged": report.converged,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return medians (and the worst) of every scheduler as a table."""
    lines = ["| scheduler | mode | rounds | evaluations / N | passes, first and later | error | above 1e-2 |"]
    lines.append("|---" * 7 + "|")
    for key in dict.fromkeys((row["scheduler"], str(row["clip"])) for row in rows):
        own = [row for row in rows if (row["scheduler"], str(row["clip"])) == key]

        def values(name: str, own: Sequence[dict[str, Any]] = own) -> list[float]:
            return [float(row[name]) for row in own]

        rounds, errors, passes = values("rounds"), values("relative_error"), values("passes")
        later = statistics.median(passes[1:])
        work = statistics.median(values("evaluations")) / STEPS
        lines.append(
            f"| {key[0]}{', clipped' if key[1] == 'True' else ''} | {own[0]['mode']} "
            f"| {statistics.median(rounds):g} ({max(rounds):g}) | {work:.1f} | {passes[0]:g}, {later:g} "
            f"| {statistics.median(errors):.0e} ({max(errors):.0e}) | {sum(e > 1e-2 for e in errors)} of {len(own)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Fill in the rows that are missing; print and write the table."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if OUT.exists():
        with OUT.open() as file:
            rows += csv.DictReader(file)
    done = {(row["scheduler"], str(row["clip"])) for row in rows}
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        for name, clip in [("DDIM", False), ("DDPM", False), ("DDIM", True), ("DDPM", True)]:
            if (name, str(clip)) in done:
                continue
            pipe = pipeline(name, clip)
            run = px.parallel(pipe, px.Secant(window=WINDOW))
            # One callable for all seeds, so only the first learns the loop; a scheduler is written when it is complete.
            own = [measure(name, clip, pipe, run, seed) for seed in tqdm(range(SEEDS), f"{name} {clip}")]
            writer.writerows(own)
            file.flush()
            rows += own
    text = table(rows)
    print(text)
    page = ROOT / "docs" / "pipelines.md"
    block = f"<!-- shipped: written by benchmarks/shipped.py -->\n{text}\n<!-- end -->"
    page.write_text(re.sub(r"<!-- shipped.*?<!-- end -->", lambda _: block, page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
