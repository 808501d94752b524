"""Train the digit models that ship with the package, on the CPU.

    python training/digits.py DATA digits                # VP, eps-prediction, class-conditional
    python training/digits.py DATA digits-flow           # flow matching, velocity, class-conditional
    python training/digits.py DATA digits --start MODELS/digits/unet --steps 2000 --rate 5e-4 --emphasis 20
    python training/digits.py DATA digits-unconditional --steps 1500 --rate 5e-4 --emphasis 20
    python training/digits.py DATA digits-v --steps 700 --batch 32 --rate 3e-3    # cosine, v-prediction
    python training/digits.py DATA digits-edm --steps 700 --batch 32 --rate 3e-3  # variance-exploding (EDM)

DATA is a folder with the MNIST files `t10k-images-idx3-ubyte.gz` and `t10k-labels-idx1-ubyte.gz`. The second stage
of `digits` weighs high noise up: with the plain loss the network's relative error there, small as it is, leaves noise
in some samples. The unconditional model is a complete DDPM pipeline and starts from the `digits` weights with their
null class. `digits-v` and `digits-edm` are other kinds of network for the same data, small enough to be trained in some
minutes.

A run keeps its state in `--state` and goes on from there when it is started again (remove it before another stage);
the exponential moving average of the weights is written in half precision, in diffusers' own format, to `--out`.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor
from tqdm import tqdm

MODELS = Path(__file__).resolve().parent.parent / "src" / "parataxis" / "models"
CLASSES = 10
TRAINING_STEPS = 1000
TRANSFORMERS = ("digits-v", "digits-edm")


def mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Return images (n, 1, 28, 28) in [-1, 1] and labels (n,)."""

    def idx(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=header)

    labels = idx("t10k-labels-idx1-ubyte.gz", 8)
    images = idx("t10k-images-idx3-ubyte.gz", 16).reshape(len(labels), 1, 28, 28)
    return torch.tensor(images).float() / 127.5 - 1, torch.tensor(labels).long()


def network(classes: int | None, name: str = "digits") -> UNet2DModel | DiTTransformer2DModel:
    """Build a U-Net of 0.7 M parameters and 144 MFLOP a row, or a transformer of 0.3 M; class CLASSES is none."""
    if name in TRANSFORMERS:
        return DiTTransformer2DModel(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            patch_size=4,
            num_layers=3,
            num_attention_heads=4,
            attention_head_dim=16,
            num_embeds_ada_norm=classes,
        )
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=None if classes is None else classes + 1,
    )


def unconditional(source: UNet2DModel) -> UNet2DModel:
    """Fold the null class into the time embedding: an unconditional network with the same outputs."""
    target = network(None)
    weights = source.state_dict()
    null = weights.pop("class_embedding.weight")[CLASSES]
    weights["time_embedding.linear_2.bias"] += null
    target.load_state_dict(weights)
    return target


def vp_loss(
    model: UNet2DModel, images: Tensor, labels: Tensor | None, scheduler: DDPMScheduler, emphasis: float
) -> Tensor:
    """Mean squared error of the predicted noise at uniform times, weighed by clamp(sigma / alpha, 1, emphasis)."""
    noise = torch.randn_like(images)
    t = torch.randint(TRAINING_STEPS, (len(images),), device=images.device)
    noisy = scheduler.add_noise(images, noise, t)
    error = (model(noisy, t, class_labels=labels).sample.float() - noise).square().mean((1, 2, 3))
    bar = scheduler.alphas_cumprod.to(t.device)[t]
    return (error * ((1 - bar) / bar).sqrt().clamp(1, emphasis)).mean()


def flow_loss(model: UNet2DModel, images: Tensor, labels: Tensor | None) -> Tensor:
    """Mean squared error of the velocity noise - image at logit-normal times."""
    noise = torch.randn_like(images)
    sigma = torch.randn(len(images)).sigmoid()
    level = sigma[:, None, None, None]
    noisy = (1 - level) * images + level * noise
    output = model(noisy, sigma * TRAINING_STEPS, class_labels=labels).sample
    return (output.float() - (noise - images)).square().mean()


def v_loss(model: UNet2DModel, images: Tensor, labels: Tensor | None, scheduler: DDPMScheduler) -> Tensor:
    """Mean squared error of the velocity alpha eps - sigma x at uniform times (2202.00512)."""
    noise = torch.randn_like(images)
    t = torch.randint(TRAINING_STEPS, (len(images),))
    noisy = scheduler.add_noise(images, noise, t)
    output = model(noisy, t, class_labels=labels).sample
    return (output.float() - scheduler.get_velocity(images, noise, t)).square().mean()


def edm_loss(model: UNet2DModel, images: Tensor, labels: Tensor | None, scheduler: EDMEulerScheduler) -> Tensor:
    """Mean squared error of the preconditioned output at log-normal noise levels (2206.00364, table 1).

    x = x_clean + sigma n, input x / sqrt(sigma^2 + s^2), time log(sigma) / 4, output F in
    xhat = (s^2 x + sigma s sqrt(sigma^2 + s^2) F) / (sigma^2 + s^2). Levels spread wider than EDM's, since
    sampling begins at 80.
    """
    data = scheduler.config.sigma_data
    sigma = (1.7 * torch.randn(len(images), 1, 1, 1) - 0.6).exp()
    total = (sigma**2 + data**2).sqrt()
    noisy = images + sigma * torch.randn_like(images)
    target = (images - (data / total) ** 2 * noisy) * total / (sigma * data)
    output = model(noisy / total, sigma.flatten().log() / 4, class_labels=labels).sample
    return (output.float() - target).square().mean()


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, share: float) -> None:
    """Set the learning rate: up to its peak in 200 steps, down along a cosine; ``share`` of the training is over."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * share))


def drop_labels(labels: Tensor) -> Tensor:
    """Return labels of which a tenth is replaced by the null class."""
    return labels.masked_fill(torch.rand(len(labels), device=labels.device) < 0.1, CLASSES)


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step down the gradient, whose norm is at most 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def scheduler_of(name: str) -> Any:
    """Return the diffusers scheduler that says what a model was trained on."""
    if name == "digits-flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAINING_STEPS)
    if name == "digits-edm":
        return EDMEulerScheduler(num_train_timesteps=TRAINING_STEPS)
    if name == "digits-v":
        return DDPMScheduler(TRAINING_STEPS, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    return DDPMScheduler(num_train_timesteps=TRAINING_STEPS)


def loss_of(name: str, emphasis: float) -> Callable[[UNet2DModel, Tensor, Tensor | None, Any], Tensor]:
    """Return loss(model, images, labels, scheduler) of a model."""
    if name == "digits-flow":
        return lambda model, images, labels, scheduler: flow_loss(model, images, labels)
    known = {"digits-v": v_loss, "digits-edm": edm_loss}
    return known.get(name, partial(vp_loss, emphasis=emphasis))


def export(name: str, weights: dict[str, Tensor], classes: int | None, scheduler: object, out: Path) -> None:
    """Write the folder in diffusers' format, weights in float16."""
    model = network(classes, name)
    model.load_state_dict(weights)
    model = model.half()
    if name == "digits-unconditional":
        DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(out)
    else:
        model.save_pretrained(out / ("transformer" if name in TRANSFORMERS else "unet"))
        scheduler.save_pretrained(out / "scheduler")  # type: ignore[attr-defined]


def main() -> None:
    """Train one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the MNIST files")
    parser.add_argument("name", choices=["digits", "digits-flow", "digits-unconditional", "digits-v", "digits-edm"])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--emphasis", type=float, default=1.0, help="largest weight of high noise (VP models)")
    parser.add_argument("--start", type=Path, help="folder of a network to go on from")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: the package's own folder")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this long; go on another time")
    parser.add_argument("--state", type=Path, default=Path("out/training"))
    options = parser.parse_args()
    out = options.out or MODELS / options.name
    classes = None if options.name == "digits-unconditional" else CLASSES
    loss_for = loss_of(options.name, options.emphasis)

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    images, labels = mnist(options.data)
    model = network(classes, options.name)
    if options.name == "digits-unconditional":
        model = unconditional(UNet2DModel.from_pretrained(MODELS / "digits" / "unet"))
    if options.start is not None:
        model = UNet2DModel.from_pretrained(options.start)
    scheduler = scheduler_of(options.name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    first = 0
    options.state.mkdir(parents=True, exist_ok=True)
    state_path = options.state / f"{options.name}.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
        torch.manual_seed(options.seed + first)

    losses: list[float] = []
    begun = time.monotonic()
    progress = tqdm(range(first, options.steps), initial=first, total=options.steps, mininterval=20)
    for step in progress:
        set_rate(optimizer, options.rate, step, step / options.steps)
        chosen = torch.randint(len(images), (options.batch,))
        condition = None if classes is None else drop_labels(labels[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_for(model, images[chosen], condition, scheduler)
        update(model, optimizer, loss)
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-200:]):.4f}", refresh=False)
        stopping = time.monotonic() - begun > options.seconds
        if (step + 1) % 500 == 0 or step + 1 == options.steps or stopping:
            export(options.name, average, classes, scheduler, out)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save({**state, "step": step + 1}, state_path)
            tqdm.write(f"step {step + 1}: loss {np.mean(losses[-500:]):.4f}")
        if stopping:
            break


if __name__ == "__main__":
    main()
