"""Roll a policy out in the simulator: success over seeds, and one recorded episode. Needs the extra ``policy``.

Run it: ``python examples/policy/evaluate.py reach-v3 --episodes 100``. ``MUJOCO_GL=osmesa`` (or ``egl``) and
``--record`` keep one episode beside the weights, as ``episode.safetensors`` and ``episode.png``. Where things are and
the noise of every plan follow from the episode's seed, so two ways to draw plans can be compared episode by episode.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusion_policy import Plan, Policy, folder_of, load, plain_loop
from numpy.typing import NDArray
from safetensors.numpy import save_file
from simulator import Array, Simulator

LONGEST = 250  # steps until an episode counts as failed; the experts take 40 to 110
PLANS_PER_EPISODE = 1000  # more than there are: plan i of episode s has the noise of seed 1000 s + i


@dataclass
class Episode:
    """What happened in one episode.

    ``observations`` holds T + 1 of (39,), ``actions`` T of (4,), in the simulator's units; ``plans`` holds P plans
    (horizon, action_dim), scaled to [-1, 1], and ``seconds`` what each call of the sampler took.
    """

    seed: int
    solved: bool = False
    observations: list[Array] = field(default_factory=list)
    actions: list[Array] = field(default_factory=list)
    plans: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def generator_of_plan(seed: int, index: int) -> torch.Generator:
    """Return the source of all noise of the plan ``index`` of the episode ``seed``."""
    return torch.Generator().manual_seed(PLANS_PER_EPISODE * seed + index)


def roll_out(
    policy: Policy,
    simulators: Sequence[Simulator],
    seeds: Sequence[int],
    plan: Plan,
    longest: int = LONGEST,
) -> list[Episode]:
    """Return one episode for each seed; they go on side by side, and their plans are drawn in one batch.

    Args:
        policy: Says which actions of a plan are taken.
        simulators: One for each seed. Pass one simulator and one seed to time single plans.
        seeds: Where things are, and the noise.
        plan: From conditions (B, C) and B generators to plans (B, horizon, action_dim).
        longest: Steps until an episode counts as failed.
    """
    episodes = [Episode(seed) for seed in seeds]
    for episode, simulator in zip(episodes, simulators, strict=True):
        episode.observations.append(simulator.reset(episode.seed))
    going = list(zip(episodes, simulators, strict=True))
    while going:
        condition = torch.cat([policy.condition(episode.observations) for episode, _ in going])
        generators = [generator_of_plan(episode.seed, len(episode.plans)) for episode, _ in going]
        clock = time.perf_counter()
        plans = plan(condition, generators)
        seconds = time.perf_counter() - clock
        for (episode, simulator), drawn in zip(going, plans, strict=True):
            episode.plans.append(drawn)
            episode.seconds.append(seconds)
            for action in policy.actions(drawn):
                observation, episode.solved = simulator.step(action)
                episode.observations.append(observation)
                episode.actions.append(action)
                if episode.solved or len(episode.actions) == longest:
                    break
        going = [pair for pair in going if not pair[0].solved and len(pair[0].actions) < longest]
    return episodes


def film_strip(task: str, episode: Episode, pictures: int = 6) -> NDArray[np.uint8]:
    """Return pictures of an episode, from first to last step, side by side; its actions are taken once more."""
    simulator, shown = Simulator(task, render=True), []
    steps = np.linspace(0, len(episode.actions), pictures).round()
    simulator.reset(episode.seed)
    for step in range(len(episode.actions) + 1):
        if step in steps:
            shown.append(simulator.picture())
        if step < len(episode.actions):
            simulator.step(episode.actions[step])
    return np.concatenate(shown, 1)


def record(policy: Policy, seed: int, folder: Path) -> None:
    """Write an episode's observations (T + 1, 39) and the steps (P,) at which plans were drawn, and a film strip."""
    from PIL import Image

    task = policy.config.task
    (episode,) = roll_out(policy, [Simulator(task)], [seed], plain_loop(policy))
    steps = np.arange(len(episode.plans), dtype=np.int32) * policy.config.n_action_steps
    tensors = {"observations": np.array(episode.observations, np.float32), "plan_steps": steps}
    save_file(tensors, folder / "episode.safetensors", {"task": task, "seed": str(seed)})
    Image.fromarray(film_strip(task, episode)).quantize(64).save(folder / "episode.png", optimize=True)
    print(f"recorded seed {seed}: {len(episode.actions)} steps, {len(steps)} plans, solved: {episode.solved}")


def main() -> None:
    """Print the success rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a folder, or one of weights/")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--batch", type=int, default=25, help="episodes side by side")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "Constant")
    torch.set_grad_enabled(False)
    folder = folder_of(arguments.name)
    policy = load(folder)
    if arguments.record:
        return record(policy, arguments.first, folder)
    episodes: list[Episode] = []
    simulators = [Simulator(policy.config.task) for _ in range(arguments.batch)]
    seeds, clock = range(arguments.first, arguments.first + arguments.episodes), time.perf_counter()
    for begin in range(0, arguments.episodes, arguments.batch):
        chosen = seeds[begin : begin + arguments.batch]
        episodes += roll_out(policy, simulators[: len(chosen)], chosen, plain_loop(policy))
        solved = [episode.solved for episode in episodes]
        print(
            f"{arguments.name}: {sum(solved)} of {len(solved)} solved, {time.perf_counter() - clock:.0f} s", flush=True
        )
    steps = [len(episode.actions) for episode in episodes if episode.solved]
    print(f"  in {np.median(steps or [0]):.0f} steps (median); failed: {[e.seed for e in episodes if not e.solved]}")
    return None


if __name__ == "__main__":
    main()
