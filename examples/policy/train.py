"""Train a policy on the demonstrations; no simulator is needed.

Run it: ``python examples/policy/train.py reach-v3``. Stopped, it goes on where it was: its state is kept under
``out/policy``. The weights, an exponential moving average, go to ``examples/policy/weights/<task>`` (``<task>-flow``);
those of other sizes than the shipped one go to ``out/policy/<task>-<size>``.
"""

import argparse
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from diffusion_policy import Config, Policy
from network import SIZES, parameters
from safetensors.torch import load_file
from torch import Tensor

HERE, STATES = Path(__file__).parent, Path("out/policy")
FLOW = {"noise_scheduler_type": "FlowMatchEuler", "prediction_type": "velocity", "clip_sample": False}
KEEP_EVERY, PRINT_EVERY = 500, 250


def windows(demonstrations: dict[str, Tensor], config: Config) -> tuple[Tensor, Tensor]:
    """Return conditions (N, n_obs_steps * D) and plans (N, horizon, A), one of each step; ends of episodes repeat."""
    ends = demonstrations["episode_ends"].long()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    step = torch.arange(int(ends[-1]))
    episode = torch.bucketize(step, ends, right=True)
    first, last = starts[episode][:, None], ends[episode][:, None] - 1
    back = torch.arange(config.horizon) - (config.n_obs_steps - 1)
    index = (step[:, None] + back).clamp(first, last)
    seen = demonstrations["observation"].float()[index[:, : config.n_obs_steps]]
    return seen.flatten(1), demonstrations["action"].float()[index]


def loss(config: Config, network: torch.nn.Module, plan: Tensor, condition: Tensor, alphas: Tensor) -> Tensor:
    """Return the mean squared error of the predicted noise, or of the predicted velocity, at random times.

    Args:
        config: Says which of the two.
        network: The network.
        plan: (B, horizon, A) actions of the demonstrations.
        condition: (B, C) what the robot saw.
        alphas: (num_train_timesteps,) the scheduler's ``alphas_cumprod``.
    """
    noise = torch.randn_like(plan)
    if config.noise_scheduler_type == "DDPM":
        t = torch.randint(0, config.num_train_timesteps, (len(plan),), device=plan.device)
        alpha = alphas[t][:, None, None]
        noisy, target = alpha.sqrt() * plan + (1 - alpha).sqrt() * noise, noise
    else:
        sigma = torch.rand(len(plan), device=plan.device)
        noisy, target = torch.lerp(plan, noise, sigma[:, None, None]), noise - plan
        t = config.num_train_timesteps * sigma
    return (network(noisy, t, global_cond=condition) - target).square().mean()


def main() -> None:
    """Train, keeping the state, and save the averaged weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", help="such as reach-v3")
    parser.add_argument("--objective", choices=["ddpm", "flow"], default="ddpm")
    parser.add_argument("--size", choices=list(SIZES), default="0.5M")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder of the weights")
    arguments = parser.parse_args()

    demonstrations = load_file(HERE / "demonstrations" / f"{arguments.task}.safetensors")
    scales = ("observation_entries", "observation_low", "observation_high", "action_low", "action_high")
    config = Config(
        task=arguments.task,
        **{name: demonstrations[name].tolist() for name in scales},
        down_dims=list(SIZES[arguments.size]),
        **FLOW if arguments.objective == "flow" else {},
        training={name: getattr(arguments, name) for name in ("objective", "size", "steps", "batch", "rate")},
    )
    name = arguments.task + ("-flow" if arguments.objective == "flow" else "")
    shipped = HERE / "weights" / name
    folder = arguments.out or (shipped if arguments.size == "0.5M" else STATES / f"{name}-{arguments.size}")
    state_path = STATES / f"{name}-{arguments.size}.pt"
    state_path.parent.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    device = torch.device(arguments.device)
    network = config.network().to(device)
    average = deepcopy(network)
    condition, plan = (tensor.to(device) for tensor in windows(demonstrations, config))
    alphas = getattr(config.scheduler(), "alphas_cumprod", torch.empty(0)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), arguments.rate, betas=(0.95, 0.999), weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.rate, arguments.steps, pct_start=0.05, cycle_momentum=False
    )
    parts = {"network": network, "average": average, "optimizer": optimizer, "schedule": schedule}
    begin, seconds = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, map_location=device)
        if state["config"] == str(config):
            for key, part in parts.items():
                part.load_state_dict(state[key])
            begin, seconds = state["step"], state["seconds"]
            torch.manual_seed(begin)
    print(f"{name}: {parameters(network) / 1e6:.2f} M parameters, {len(plan)} steps of demonstrations, from {begin}")

    clock = time.perf_counter() - seconds
    for step in range(begin, arguments.steps):
        chosen = torch.randint(0, len(plan), (arguments.batch,), device=device)
        value = loss(config, network, plan[chosen], condition[chosen], alphas)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for old, new in zip(average.parameters(), network.parameters(), strict=True):
                old.lerp_(new, 1 - decay)
        if step % PRINT_EVERY == 0 or step == arguments.steps - 1:
            print(f"  {step:6d} loss {value.item():.4f}, {time.perf_counter() - clock:.0f} s", flush=True)
        if (step + 1) % KEEP_EVERY == 0 or step == arguments.steps - 1:
            seconds = time.perf_counter() - clock
            state = {key: part.state_dict() for key, part in parts.items()}
            torch.save(state | {"config": str(config), "step": step + 1, "seconds": seconds}, state_path)
            trained = replace(config, training=config.training | {"seconds": round(seconds)})
            Policy(trained, deepcopy(average)).save(folder)


if __name__ == "__main__":
    main()
