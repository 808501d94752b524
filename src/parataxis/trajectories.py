"""Save and load trajectories, to start other solves from them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .samplers.sampler import Sampler

__all__ = ["load_trajectory", "save_trajectory"]


def save_trajectory(path: str | Path, trajectory: Tensor, sampler: Sampler) -> None:
    """Write trajectories (B, N + 1, *shape) as safetensors, with the sampler's name and times.

    Raises:
        TypeError: If the trajectory is not a tensor.
        ValueError: If the trajectory is not of this sampler's length, or cannot be written.
    """
    if not isinstance(trajectory, Tensor):
        raise TypeError(
            f"trajectory must be a tensor (B, N + 1, *shape), got {type(trajectory).__name__}: pass the .trajectory of "
            "what parataxis.sample returned with keep_trajectory=True."
        )
    if trajectory.ndim < 3 or trajectory.shape[1] != sampler.steps + 1:
        raise ValueError(
            f"trajectory must be (B, {sampler.steps + 1}, *shape) for this sampler, got {tuple(trajectory.shape)}."
        )
    metadata = {"sampler": sampler.name, "times": json.dumps(sampler.times.tolist())}
    try:
        save_file({"trajectory": trajectory.contiguous()}, str(path), metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be written ({error}): choose another path.") from error


def load_trajectory(path: str | Path, sampler: Sampler) -> Tensor:
    """Read trajectories for ``guess=`` of :func:`parataxis.sample`.

    Raises:
        ValueError: If the file cannot be read, holds no trajectories, or was written for other times.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            trajectory: Tensor = file.get_tensor("trajectory")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a trajectory ({error}): save it with save_trajectory.") from error
    if trajectory.ndim < 3 or trajectory.shape[1] != sampler.steps + 1 or not trajectory.is_floating_point():
        raise ValueError(
            f"{path} holds {str(trajectory.dtype)[6:]} {tuple(trajectory.shape)}, expected trajectories "
            f"(B, {sampler.steps + 1}, *shape) for this sampler: save them with save_trajectory."
        )
    try:
        times = json.loads(metadata.get("times", "[]"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has times that cannot be read ({error}): save it with save_trajectory.") from error
    if times != sampler.times.tolist():
        raise ValueError(
            f"{path} was written for {metadata.get('sampler', 'another sampler')} with other times: use the same "
            "schedule, steps and spacing."
        )
    return trajectory
