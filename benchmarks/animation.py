"""The animation of the README: one digit drawn by the sequential loop and in parallel, both at the speed measured here.

    OMP_NUM_THREADS=1 python benchmarks/animation.py

Seconds are those of the process on one CPU core, without the time that drawing the frames takes.
"""

from __future__ import annotations

import argparse
import bisect
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import parataxis as px
from parataxis import models, plots

MODEL, SAMPLER = "digits-flow", "flow_euler"
STEPS, LABEL, GUIDANCE, ZOOM, FRAMES_A_SECOND, HOLD = 100, 7, 2.0, 6, 12, 1.5
GAP, HEAD, FOOT = 24, 34, 30


def measure(solver: px.solvers.Solver, seed: int) -> tuple[list[float], list[Image.Image], list[int], px.Solutions]:
    """Return, for every round, seconds since the start, the estimate as a picture, and accepted steps."""
    model = models.load(MODEL)
    noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(seed))
    seconds, pictures, accepted = [0.0], [plots.image_grid(noise / 3, zoom=ZOOM)], [0]
    spent = 0.0  # on the pictures

    def draw(runs: list[px.Run]) -> None:
        nonlocal spent
        entered = time.process_time()
        seconds.append(entered - started - spent)
        pictures.append(plots.image_grid(runs[0].estimate[None], zoom=ZOOM))
        accepted.append(runs[0].accepted)
        spent += time.process_time() - entered

    sampler, condition = model.sampler(SAMPLER, STEPS), torch.tensor([LABEL])
    started = time.process_time()
    result = px.sample(model.denoiser(GUIDANCE), noise, sampler, solver, condition=condition, on_round=draw)
    return seconds, pictures, accepted, result


def frame(at: float, sides: list[tuple[str, list[float], list[Image.Image], list[int]]]) -> Image.Image:
    """Return the picture at a time: what each side shows then."""
    width, height = sides[0][2][0].size
    canvas = Image.new("RGB", (2 * width + 3 * GAP, height + HEAD + FOOT), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for place, (name, seconds, pictures, accepted) in enumerate(sides):
        now = bisect.bisect_right(seconds, at) - 1
        left, done = GAP + place * (width + GAP), now == len(seconds) - 1
        canvas.paste(pictures[now], (left, HEAD))
        pen.text((left, 10), name, fill="black", font=font)
        clock = f"done in {seconds[-1]:.2f} s" if done else f"{at:.2f} s, {accepted[now]} of {STEPS} steps"
        pen.text((left, HEAD + height + 8), clock, fill="#1c7ed6" if done else "grey", font=font)
    return canvas


def main() -> None:
    """Measure both, and write the animation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "converge.gif")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(px.Secant(window=options.window), options.seed)  # warms up
    loop, parallel = (measure(solver, options.seed) for solver in (px.Sequential(), px.Secant(window=options.window)))
    error = float((parallel[3].x - loop[3].x).norm() / loop[3].x.norm())
    sides = [
        (f"sequential: {STEPS} calls", *loop[:3]),
        (f"parataxis: {parallel[3].rounds} rounds", *parallel[:3]),
    ]
    count = int((loop[0][-1] + HOLD) * FRAMES_A_SECOND)
    frames = [frame(number / FRAMES_A_SECOND, sides).quantize(32) for number in range(count)]
    frames[0].save(
        options.out, save_all=True, append_images=frames[1:], duration=1000 // FRAMES_A_SECOND, loop=0, optimize=True
    )
    print(f"{options.out}: loop {loop[0][-1]:.2f} s, parallel {parallel[0][-1]:.2f} s, error {error:.1e}")


if __name__ == "__main__":
    main()
