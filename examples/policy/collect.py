"""Demonstrations of Meta-World's scripted experts, one small file a task. Needs the extra ``policy``.

Run it: ``python examples/policy/collect.py reach-v3``. Noise pushes the hand off the expert's way, its scale drawn anew
for each episode. What is recorded is the action that the expert takes from there, so the demonstrations say how to come
back.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from simulator import Array, Simulator

HERE = Path(__file__).parent
FIRST_SEED = 10_000  # evaluation takes seeds from 0
CURRENT = [*range(18), 36, 37, 38]  # this step's entries and the goal; 18 to 35 are those of the step before
LONGEST, AFTER_SUCCESS = 250, 10  # steps of an episode; steps recorded after it is solved


def episode(
    simulator: Simulator, seed: int, noise: float, generator: np.random.Generator
) -> tuple[Array, Array] | None:
    """Return observations (T, 39) and the expert's actions (T, 4) of one episode, or None if it was not solved.

    Args:
        simulator: The task.
        seed: Where things are.
        noise: Standard deviation of what is added to the displacements that the hand makes.
        generator: Source of that noise. It is the same for some steps, as pushes are.
    """
    observation = simulator.reset(seed)
    observations, actions, push, left = [], [], np.zeros(4), AFTER_SUCCESS
    for _ in range(LONGEST):
        action = simulator.expert(observation)
        observations.append(observation)
        actions.append(action)
        push[:3] = 0.7 * push[:3] + noise * generator.standard_normal(3)
        observation, solved = simulator.step(action + push)
        if solved or left < AFTER_SUCCESS:
            left -= 1
            if not left:
                return np.array(observations), np.array(actions)
    return None


def informative(observations: Array, smallest: float = 5e-3) -> list[int]:
    """Return the entries of observations (T, 39) that move by more than ``smallest`` and repeat no earlier entry."""
    kept: list[int] = []
    for i in CURRENT:
        if np.ptp(observations[:, i]) < smallest:
            continue
        if all(abs(np.corrcoef(observations[:, i], observations[:, j])[0, 1]) < 0.9999 for j in kept):
            kept.append(i)
    return kept


def scaled(values: Array) -> tuple[Array, Array, Array]:
    """Return values (T, D) scaled to [-1, 1], entry by entry, and the least and greatest (D,) value of each."""
    low, high = values.min(0), values.max(0)
    high = np.where(high - low < 1e-6, low + 1, high)  # constant entries become -1
    return 2 * (values - low) / (high - low) - 1, low, high


def main() -> None:
    """Record, scale and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--noise", type=float, default=0.4, help="largest standard deviation of the pushes")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "Constant")  # the experts' actions are clipped, as they say
    simulator, generator = Simulator(arguments.task), np.random.default_rng(0)
    episodes, seed = [], FIRST_SEED
    while len(episodes) < arguments.episodes:
        found = episode(simulator, seed, arguments.noise * generator.random(), generator)
        episodes += [found] if found else []
        seed += 1
    observations, actions = (np.concatenate(parts) for parts in zip(*episodes, strict=True))
    kept = informative(observations)
    observation, observation_low, observation_high = scaled(observations[:, kept])
    action, action_low, action_high = scaled(actions)
    tensors = {
        "observation": observation.astype(np.float16),
        "action": action.astype(np.float16),
        "episode_ends": np.cumsum([len(o) for o, _ in episodes]).astype(np.int32),
        "observation_entries": np.array(kept, np.int32),
        "observation_low": observation_low.astype(np.float32),
        "observation_high": observation_high.astype(np.float32),
        "action_low": action_low.astype(np.float32),
        "action_high": action_high.astype(np.float32),
    }
    path = HERE / "demonstrations" / f"{arguments.task}.safetensors"
    tensors = {
        name: np.ascontiguousarray(value) for name, value in tensors.items()
    }  # safetensors writes memory as it lies
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, {"task": arguments.task, "source": "Meta-World 3.1.1, scripted expert"})
    print(f"{arguments.task}: {len(episodes)} episodes of seeds {FIRST_SEED} to {seed - 1}, {len(observations)} steps")
    print(f"  entries {kept}, actions from {action_low.round(2)} to {action_high.round(2)}")
    print(f"  {path.name}: {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
