"""The first minute: a robot's plans and a digit, drawn by the loop and side by side in time.

Run it: ``make sample``, or ``python examples/first_minute.py``. It draws the plans of one recorded episode of
``examples/policy`` (no simulator is needed) and one handwritten digit, both ways in turn, by the solver that
``parataxis.plan`` chooses on this machine; where that is the loop itself, it says so. Writes to ``out/``: the
figures of both (``sample.json``), plans side by side (``policy.png``), the digit after every round (``rounds.png``).
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import parataxis as px
from parataxis import models

sys.path.insert(0, str(Path(__file__).parent / "policy"))
from diffusion_policy import folder_of, load

POLICY, STEPS, GUIDANCE, TOLERANCE = "button-press-topdown-v3", 100, 2.0, 1e-2
WINDOWS = (8, 16, 32)
Draw = Callable[[Any, int], px.Solutions]


def both_ways(draw: Draw, plan: px.Plan, count: int) -> tuple[list[px.Solutions], list[px.Solutions]]:
    """Return what the loop and the plan's solver draw, in turn, so that whatever else the machine does slows both.

    Args:
        draw: Draws item ``index`` by a solver.
        plan: Chooses the solver.
        count: How many items there are.
    """
    for solver in (px.Sequential(), plan.solver):  # the first calls are slower
        draw(solver, 0)
    pairs = [(draw(px.Sequential(), index), draw(plan.solver, index)) for index in range(count)]
    loop, chosen = zip(*pairs, strict=True)
    return list(loop), list(chosen)


def figures(
    model: str, sampler: px.Sampler, plan: px.Plan, loop: Sequence[px.Solutions], chosen: Sequence[px.Solutions]
) -> dict[str, Any]:
    """Return the figures of ``sample.json``: medians over the items; seconds of one."""
    errors = [float((a.x - b.x).norm() / b.x.norm()) for a, b in zip(chosen, loop, strict=True)]
    seconds, sequential = (statistics.median(drawn.seconds for drawn in way) for way in (chosen, loop))
    solutions = [solution for drawn in chosen for solution in drawn]
    return {
        "model": model,
        "sampler": sampler.name,
        "solver": repr(plan.solver),
        "steps": sampler.steps,
        "samples": len(solutions),
        "exact_in_distribution": False,
        "tolerance": TOLERANCE,
        "rounds": statistics.median(drawn.rounds for drawn in chosen),
        "evaluations": statistics.median(solution.evaluations for solution in solutions),
        "nfe_ratio": statistics.median(solution.nfe_ratio for solution in solutions),
        "peak_width": max(solution.peak_width for solution in solutions),
        "rows_per_step": 1,
        "converged": all(drawn.converged for drawn in chosen),
        "error_estimate": max(solution.error_estimate for solution in solutions),
        "relative_error": statistics.median(errors),
        "relative_error_worst": max(errors),
        "seconds": seconds,
        "sequential_seconds": sequential,
        "speedup": sequential / seconds,
        "plan": str(plan),
    }


def sentence(what: str, unit: str, found: dict[str, Any]) -> str:
    """Return seconds both ways, speed-up and error in plain words."""
    ways = f"{what}: {1e3 * found['sequential_seconds']:.0f} ms {unit} by the loop of {found['steps']} steps"
    if found["solver"] == repr(px.Sequential()):
        return f"{ways}, which is the fastest way on this machine; error 0."
    return (
        f"{ways}, {1e3 * found['seconds']:.0f} ms by {found['solver']} in {found['rounds']:.0f} rounds: "
        f"{found['speedup']:.1f} times as fast, relative error {found['relative_error_worst']:.0e}."
    )


def policy(out: Path, count: int | None = None) -> dict[str, Any]:
    """Draw the plans of a recorded episode; write ``policy.png``."""
    folder = folder_of(POLICY)
    policy = load(folder)
    conditions = policy.recorded(folder)[:count]
    sampler = px.from_scheduler(policy.config.scheduler())

    def draw(solver: Any, index: int) -> px.Solutions:
        generator = torch.Generator().manual_seed(index)
        noise = policy.noise([generator])
        return px.sample(
            policy.network,
            noise,
            sampler,
            solver,
            tolerance=TOLERANCE,
            condition=conditions[index],
            generator=generator,
        )

    noise = policy.noise([torch.Generator().manual_seed(0)])
    options: dict[str, Any] = {"solvers": [px.Secant()], "windows": WINDOWS}
    plan = px.plan(policy.network, noise, sampler, tolerance=TOLERANCE, condition=conditions[0], **options)
    loop, chosen = both_ways(draw, plan, len(conditions))
    plans_side_by_side(torch.cat([drawn.x for drawn in loop]), torch.cat([drawn.x for drawn in chosen]), out)
    return figures(POLICY, sampler, plan, loop, chosen)


def digits(out: Path, steps: int = STEPS) -> dict[str, Any]:
    """Draw a digit in so many steps; write ``rounds.png``."""
    model = models.load("digits")
    sampler, network, label = model.sampler("ddim", steps), model.denoiser(GUIDANCE), torch.tensor([3])
    noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0))
    estimates: list[Tensor] = []

    def draw(solver: Any, index: int) -> px.Solutions:
        estimates.clear()
        watch = None if isinstance(solver, px.Sequential) else lambda runs: estimates.append(runs[0].estimate)
        return px.sample(network, noise, sampler, solver, tolerance=TOLERANCE, condition=label, on_round=watch)

    options: dict[str, Any] = {"solvers": [px.Secant()], "windows": WINDOWS}
    plan = px.plan(network, noise, sampler, tolerance=TOLERANCE, condition=label, **options)
    loop, chosen = both_ways(draw, plan, 1)
    found = figures(model.name, sampler, plan, loop, chosen) | {"rows_per_step": 2}
    if isinstance(plan.solver, px.Sequential):  # the strip shows what solving side by side would have been
        draw(px.Secant(window=16), 0)
    rounds_strip(estimates, sequential_estimates(network, noise, sampler, label, len(estimates)), out)
    return found


def sequential_estimates(
    network: Any, noise: Tensor, sampler: px.Sampler, label: Tensor, count: int
) -> list[tuple[int, Tensor]]:
    """Return what the loop has after as many calls as there are rounds, and its end: calls and images."""
    states: list[Tensor] = []
    px.sample(
        network,
        noise,
        sampler,
        px.Sequential(),
        condition=label,
        on_round=lambda runs: states.append(runs[0].estimate),
    )
    calls = [*range(1, min(count, len(states)) + 1), len(states)]
    return [(call, states[call - 1]) for call in calls]


def plans_side_by_side(loop: Tensor, chosen: Tensor, out: Path) -> None:
    """Draw the actions of every plan (P, horizon, A): the loop's as lines, the solver's as dots."""
    from matplotlib.figure import Figure

    names = ("x", "y", "z", "gripper")
    figure = Figure(figsize=(1.6 * len(loop) + 1, 2.4), layout="constrained")
    for index, axes in enumerate(figure.subplots(1, len(loop), sharey=True, squeeze=False)[0]):
        for entry in range(loop.shape[-1]):
            color = f"C{entry}"
            axes.plot(loop[index, :, entry].numpy(), color=color, linewidth=1, label=names[entry])
            axes.plot(chosen[index, :, entry].numpy(), ".", color=color, markersize=4)
        axes.set_title(f"plan {index + 1}", fontsize=9)
        axes.set_xlabel("time step", fontsize=8)
    figure.axes[0].set_ylabel("action, of [-1, 1]", fontsize=8)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle("Plans of one episode: lines by the loop, dots side by side in time", fontsize=10)
    figure.savefig(out / "policy.png", dpi=120)


def rounds_strip(rounds: Sequence[Tensor], sequential: Sequence[tuple[int, Tensor]], out: Path) -> None:
    """Draw the digit after every round, numbered, and below it what the loop has after as many calls."""
    from matplotlib.figure import Figure

    columns = len(sequential)
    figure = Figure(figsize=(0.62 * columns + 0.8, 1.9), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, (number, image) in zip(grid[0], enumerate(rounds, 1), strict=False):
        axes.imshow(image.squeeze().numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes.set_title(str(number), fontsize=8)
    for axes in grid[0][len(rounds) :]:
        axes.set_visible(False)
    for axes, (call, image) in zip(grid[1], sequential, strict=True):
        axes.imshow(image.squeeze().numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes.set_title(str(call), fontsize=8)
    grid[0][0].set_ylabel("rounds", fontsize=8)
    grid[1][0].set_ylabel("loop's calls", fontsize=8)
    figure.savefig(out / "rounds.png", dpi=120)


def main() -> None:
    """Draw both, print a sentence for each, write figures and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--plans", type=int, help="only the first ones of the episode")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the digit (default: %(default)s)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    # Calls this small are slower on two cores than on one.
    torch.set_num_threads(1)
    found = {"policy": policy(out, arguments.plans)}
    print(sentence(f"policy {POLICY}", "a plan", found["policy"]), flush=True)
    found["digits"] = digits(out, arguments.steps)
    print(sentence("digits", "a sample", found["digits"]))
    (out / "sample.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"wrote {out / 'sample.json'}, {out / 'policy.png'}, {out / 'rounds.png'}")


if __name__ == "__main__":
    main()
