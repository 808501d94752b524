"""What a parallel loop costs besides its network, relative to the sequential run of a network that takes 20 ms a call.

    python benchmarks/loop_overhead.py

A tiny Stable Diffusion, guided, 50 steps, whose U-Net sleeps for 20 ms in every call; one thread. A table loop (DDIM)
and a replayed one (DDIM with rescaled guidance); the first call, which records, and later ones (median of five). Time
outside the network is all time but that within the U-Net's calls. Time is this process's own on the processor, with the
naps: what else the machine does is not counted. Writes ``results/loop_overhead.csv``.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import parataxis as px

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import zoo

OUT = Path(__file__).parent / "results" / "loop_overhead.csv"
COLUMNS = ["loop", "call", "mode", "passes", "rounds", "sequential_seconds", "outside_seconds", "outside_share"]
STEPS, LATER, SLEEP = 50, 5, 0.02
LOOPS = {"recurrence": {}, "replay": {"guidance_rescale": 0.7}}


class Clock:
    """A network's own forward, with a nap, and the time that was spent in it."""

    def __init__(self, forward: Any) -> None:
        self.forward, self.inside, self.calls = forward, 0.0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        begun = time.process_time()
        time.sleep(SLEEP)
        result = self.forward(*args, **kwargs)
        self.inside += time.process_time() - begun
        self.calls += 1
        return result


def timed(run: Any, call: dict[str, Any], clock: Clock, seed: int) -> tuple[float, float]:
    """Return the seconds of one call, and those outside the network."""
    clock.inside, clock.calls = 0.0, 0
    begun = time.process_time()
    run(**call | {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed)})
    total = time.process_time() - begun
    return total + clock.calls * SLEEP, total - clock.inside


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    rows = []
    for name, options in LOOPS.items():
        pipe, call = zoo.PIPELINES["stable_diffusion"](torch.float32)
        call |= options
        clock = pipe.unet.__dict__["forward"] = Clock(pipe.unet.forward)
        timed(pipe, call, clock, 0)  # what torch and diffusers set up once
        plain = [timed(pipe, call, clock, seed) for seed in range(3)]
        sequential = statistics.median(total for total, _ in plain)
        found = [("sequential", statistics.median(outside for _, outside in plain), 1, STEPS)]
        run = px.parallel(pipe, px.Secant(window=16))
        found.append(("first", timed(run, call, clock, 0)[1], run.report.passes, run.report.rounds))
        outside = [timed(run, call, clock, seed)[1] for seed in range(1, 1 + LATER)]
        found.append(("later", statistics.median(outside), run.report.passes, run.report.rounds))
        for which, seconds, passes, rounds in found:
            row = {"loop": name, "call": which, "mode": run.report.mode, "passes": passes, "rounds": rounds}
            row |= {"sequential_seconds": f"{sequential:.3f}", "outside_seconds": f"{seconds:.3f}"}
            rows.append(row | {"outside_share": f"{seconds / sequential:.3f}"})
            print(rows[-1], flush=True)
    with OUT.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
