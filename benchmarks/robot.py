"""Rounds of a robot policy's loop, by scheduler, window and tolerance; writes the table of docs/robots.md.

``python benchmarks/robot.py`` trains the policy of examples/robot_policy.py and plans for 64 observations.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import torch

import parataxis as px

ROOT = Path(__file__).parent.parent
COUNT = 64


def main() -> None:
    """Measure, print and write the table."""
    example = runpy.run_path(str(ROOT / "examples" / "robot_policy.py"))
    network, options = example["network"], example["OPTIONS"]
    _, observation = example["demonstrations"](COUNT, torch.Generator().manual_seed(7))
    lines = ["| scheduler | window | tolerance | rounds | evaluations / N | error |", "|---" * 6 + "|"]
    for name, steps in [("DDPMScheduler", 100), ("DDIMScheduler", 100), ("DDIMScheduler", 16)]:
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
                work = torch.tensor([one.work for one in result])
                lines.append(
                    f"| {name}, {steps} | {window or 'all'} | {tolerance:g} | {rounds.median():g} ({result.rounds}) "
                    f"| {work.median():.1f} | {error.median():.0e} ({error.max():.0e}) |"
                )
    table = "\n".join(lines)
    print(table)
    page = ROOT / "docs" / "robots.md"
    block = f"<!-- rounds: written by benchmarks/robot.py -->\n{table}\n<!-- end -->"
    page.write_text(re.sub(r"<!-- rounds.*?<!-- end -->", block, page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
