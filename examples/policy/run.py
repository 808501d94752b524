"""Draw the plans of one recorded episode, by the plain loop and side by side in time. No simulator is needed.

Run it: ``python examples/policy/run.py reach-v3``. The observations were recorded while the policy drove the arm; here
every plan is drawn again from the same noise, both ways in turn, and timed.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from diffusion_policy import Plan, Policy, folder_of, load, plain_loop
from torch import Tensor

import parataxis as px

from_scheduler = px.from_scheduler


def parallel(policy: Policy, window: int, tolerance: float, rounds: list[int]) -> Plan:
    """Return the library's sampler, as a function of conditions (B, C) and B generators to plans (B, horizon, A).

    Args:
        policy: Gives network and scheduler.
        window: Steps that are solved side by side.
        tolerance: Relative error allowed in a plan.
        rounds: The rounds of every call are appended here.
    """
    sampler, solver = from_scheduler(policy.config.scheduler()), px.Secant(window=window)

    def plan(condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        noise = policy.noise(generators)
        result = px.sample(
            policy.network, noise, sampler, solver, tolerance=tolerance, condition=condition, generator=generators
        )
        rounds.append(result.rounds)
        return result.x

    return plan


def timed(plan: Plan, condition: Tensor, seed: int) -> tuple[Tensor, float]:
    """Return the plan (horizon, A) and the seconds that it took."""
    generators = [torch.Generator().manual_seed(seed)]
    clock = time.perf_counter()
    drawn = plan(condition, generators)
    return drawn[0], time.perf_counter() - clock


def main() -> None:
    """Print seconds both ways, the speed-up and the largest deviation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="button-press-topdown-v3", help="a folder, or one of weights/")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--plans", type=int, help="only the first ones of the episode")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    folder = folder_of(arguments.name)
    policy, rounds = load(folder), []
    conditions = policy.recorded(folder)[: arguments.plans]
    loop, library = plain_loop(policy), parallel(policy, arguments.window, arguments.tolerance, rounds)
    for plan in (loop, library):  # the first calls are slower
        timed(plan, conditions[0], 0)
    rounds.clear()
    # In turn, so that whatever else the machine does slows both.
    both = [(timed(loop, c, seed), timed(library, c, seed)) for seed, c in enumerate(conditions)]
    plain, found = zip(*both, strict=True)
    seconds = [statistics.median(seconds for _, seconds in drawn) for drawn in (plain, found)]
    deviation = max(float((a - b).abs().max()) for (a, _), (b, _) in zip(plain, found, strict=True))
    steps = policy.config.num_inference_steps
    print(f"{arguments.name}: {len(conditions)} plans of {policy.config.horizon} actions, {steps} steps each")
    print(f"  plain loop: {1e3 * seconds[0]:.0f} ms a plan, {steps} calls of the network")
    print(f"  parataxis:  {1e3 * seconds[1]:.0f} ms a plan, {statistics.median(rounds):.0f} rounds")
    print(f"  {seconds[0] / seconds[1]:.1f} x sooner; largest deviation of an action {deviation:.0e}, of a range of 2")


if __name__ == "__main__":
    main()
