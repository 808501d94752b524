"""Rounds of a robot policy's loop, by scheduler, window and tolerance; writes the tables of docs/robots.md.

``python benchmarks/robot.py`` trains the policy of examples/robot_policy.py and plans for 64 observations at once with
the scheduler read, and for 8, one after another, with the loop as it stands.
"""

from __future__ import annotations

import re
import runpy
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import parataxis as px

ROOT = Path(__file__).parent.parent
COUNT, SINGLE = 64, 8
LOOPS = [("DDPMScheduler", 100), ("DDIMScheduler", 100), ("DDIMScheduler", 16)]


def write(name: str, lines: Sequence[str]) -> None:
    """Print a table and write it to its place on the page."""
    table = "\n".join(lines)
    print(table)
    page = ROOT / "docs" / "robots.md"
    block = f"<!-- {name}: written by benchmarks/robot.py -->\n{table}\n<!-- end -->"
    page.write_text(re.sub(f"<!-- {name}.*?<!-- end -->", lambda _: block, page.read_text(), flags=re.DOTALL))


def unchanged(example: dict[str, Any], observation: torch.Tensor) -> list[str]:
    """Return the table of loops that run as they stand."""
    lines = ["| scheduler | window | rounds | evaluations / N | passes, first and later | error |", "|---" * 6 + "|"]
    loop, network = example["plain_loop"], example["network"]
    for name, steps in LOOPS:
        scheduler = example[name](100, **example["OPTIONS"])
        scheduler.set_timesteps(steps)
        for window in (16, 8):
            run = px.parallel(loop, px.Secant(window=window))
            rounds, work, passes, errors = [], [], [], []
            for i in range(SINGLE):
                own = observation[i : i + 1]
                plain = loop(network, scheduler, own, torch.Generator().manual_seed(i))
                result = run(network, scheduler, own, torch.Generator().manual_seed(i))
                rounds.append(run.report.rounds)
                work.append(run.report.evaluations / steps)
                passes.append(run.report.passes)
                errors.append(float((result - plain).norm() / plain.norm()))
            lines.append(
                f"| {name}, {steps} | {window or 'all'} | {statistics.median(rounds):g} ({max(rounds)}) "
                f"| {statistics.median(work):.1f} | {passes[0]}, {statistics.median(passes[1:]):g} "
                f"| {statistics.median(errors):.0e} ({max(errors):.0e}) |"
            )
    return lines


def main() -> None:
    """Measure, print and write the tables."""
    example = runpy.run_path(str(ROOT / "examples" / "robot_policy.py"))
    network, options = example["network"], example["OPTIONS"]
    _, observation = example["demonstrations"](COUNT, torch.Generator().manual_seed(7))
    lines = ["| scheduler | window | tolerance | rounds | evaluations / N | error |", "|---" * 6 + "|"]
    for name, steps in LOOPS:
        scheduler = example[name](100, **options)
        scheduler.set_timesteps(steps)
        plain = example["plain_loop"](network, scheduler, observation, torch.Generator().manual_seed(3))
        for window in (None, 16, 8):
            for tolerance in (1e-2, 1e-3):
                result = example["parallel_loop"](
                    network,
                    scheduler,
                    observation,
                    torch.Generator().manual_seed(3),
                    solver=px.Secant(window=window),
                    tolerance=tolerance,
                )
                error = (result.x - plain)[:, 1:].flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
                rounds = torch.tensor([float(one.rounds) for one in result])
                work = torch.tensor([one.nfe_ratio for one in result])
                lines.append(
                    f"| {name}, {steps} | {window or 'all'} | {tolerance:g} | {rounds.median():g} ({result.rounds}) "
                    f"| {work.median():.1f} | {error.median():.0e} ({error.max():.0e}) |"
                )
    write("rounds", lines)
    write("unchanged", unchanged(example, observation))


if __name__ == "__main__":
    main()
