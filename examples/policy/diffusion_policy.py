"""A trained policy: its configuration, its network, how observations become conditions and plans become actions.

No simulator is needed here. The names are those of LeRobot's ``DiffusionConfig``. A plan is ``horizon`` actions, the
first of which belongs to the oldest of the ``n_obs_steps`` observations; the robot takes ``n_action_steps`` of them,
from the present one on.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from network import UNet1d, packed
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

Scheduler = DDPMScheduler | FlowMatchEulerDiscreteScheduler
Plan = Callable[[Tensor, Sequence[torch.Generator]], Tensor]


@dataclass
class Config:
    """What a policy was trained for; saved beside its weights.

    ``noise_scheduler_type`` is ``DDPM`` or ``FlowMatchEuler``; the fields about betas and clipping are of the former.
    ``observation_entries`` says which entries of the simulator's observation (39,) the policy sees; the lists of least
    and greatest values are of the demonstrations, and scale observations and actions to [-1, 1].
    """

    task: str
    observation_entries: list[int]
    observation_low: list[float]
    observation_high: list[float]
    action_low: list[float]
    action_high: list[float]
    down_dims: list[int]
    type: str = "diffusion"
    horizon: int = 16
    n_obs_steps: int = 2
    n_action_steps: int = 8
    noise_scheduler_type: str = "DDPM"
    num_train_timesteps: int = 100
    num_inference_steps: int = 100
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    kernel_size: int = 5
    n_groups: int = 8
    diffusion_step_embed_dim: int = 128
    use_film_scale_modulation: bool = True
    training: dict[str, float | int | str] = field(default_factory=dict)

    def network(self) -> UNet1d:
        """Return the network, untrained."""
        return UNet1d(
            len(self.action_low),
            self.horizon,
            self.n_obs_steps * len(self.observation_entries),
            self.down_dims,
            kernel_size=self.kernel_size,
            n_groups=self.n_groups,
            diffusion_step_embed_dim=self.diffusion_step_embed_dim,
            use_film_scale_modulation=self.use_film_scale_modulation,
        )

    def scheduler(self) -> Scheduler:
        """Return the scheduler, its timesteps set."""
        scheduler: Scheduler
        if self.noise_scheduler_type == "DDPM":
            scheduler = DDPMScheduler(
                self.num_train_timesteps,
                beta_schedule=self.beta_schedule,
                prediction_type=self.prediction_type,
                clip_sample=self.clip_sample,
                clip_sample_range=self.clip_sample_range,
            )
        else:
            scheduler = FlowMatchEulerDiscreteScheduler(self.num_train_timesteps)
        scheduler.set_timesteps(self.num_inference_steps)
        return scheduler


class Policy:
    """A network with its configuration."""

    def __init__(self, config: Config, network: UNet1d) -> None:
        self.config, self.network = config, network.eval().requires_grad_(False)

    def condition(self, observations: Sequence[ArrayLike]) -> Tensor:
        """Return ``global_cond`` (1, n_obs_steps * D) for the observations (39,) of an episode up to now."""
        config = self.config
        last = [observations[max(len(observations) - i, 0)] for i in range(config.n_obs_steps, 0, -1)]
        seen = np.asarray(last, float)[:, config.observation_entries]
        low, high = np.array(config.observation_low), np.array(config.observation_high)
        return torch.tensor((2 * (seen - low) / (high - low) - 1).reshape(1, -1), dtype=torch.float32)

    def recorded(self, folder: Path) -> list[Tensor]:
        """Return the conditions of the plans of the episode that lies in a folder."""
        episode = load_file(folder / "episode.safetensors")
        return [self.condition(episode["observations"][: step + 1]) for step in episode["plan_steps"].tolist()]

    def actions(self, plan: Tensor) -> NDArray[np.float64]:
        """Return the actions (n_action_steps, action_dim) that the robot takes of a plan (horizon, action_dim)."""
        config, first = self.config, self.config.n_obs_steps - 1
        taken = plan[first : first + config.n_action_steps].double().cpu().numpy()
        low, high = np.array(config.action_low), np.array(config.action_high)
        return low + (taken + 1) / 2 * (high - low)

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the plans (B, horizon, action_dim) that the loop starts from, one of each generator."""
        shape = (self.network.horizon, self.network.action_dim)
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(weights, folder / "model.safetensors")


def folder_of(name: str) -> Path:
    """Return where the policy lies: the folder of that path, or that of a shipped policy."""
    return Path(name) if Path(name).is_dir() else Path(__file__).parent / "weights" / name


def load(folder: Path, *, pack: bool = True) -> Policy:
    """Return the policy that :meth:`Policy.save` wrote, on the CPU.

    Args:
        folder: Where it lies.
        pack: For inference on the CPU: see :func:`network.packed`. Without, the network can be saved and trained.
    """
    config = Config(**json.loads((folder / "config.json").read_text()))
    network = config.network()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return Policy(config, packed(network) if pack else network)


def plain_loop(policy: Policy, scheduler: Scheduler | None = None) -> Plan:
    """Return the loop that policies run, as a function of conditions (B, C) and B generators to plans (B, horizon, A).

    Args:
        policy: Gives network and scheduler.
        scheduler: Another diffusers scheduler, its timesteps set.
    """
    scheduler = scheduler or policy.config.scheduler()

    def plan(condition: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        trajectory = policy.noise(generators)
        source = generators[0] if len(generators) == 1 else list(generators)
        scheduler.set_timesteps(len(scheduler.timesteps))  # flow matching counts its steps
        for t in scheduler.timesteps:
            output = policy.network(trajectory, t.expand(len(trajectory)), global_cond=condition)
            trajectory = scheduler.step(output, t, trajectory, generator=source).prev_sample
        return trajectory

    return plan
