"""Train ``photos``: class-conditional colour photographs of 32x32, VP, eps-prediction; on one GPU in twelve minutes.

    python training/photos.py DATA [--seconds 700] [--out out/photos]

DATA is `cifar10-train-jpeg.npz`: `bytes` (uint8, all JPEG files end to end), `offset` (n + 1,), `label` (n,) and the
names `classes`. The decoded images are kept beside it, or in `--cache` where DATA cannot be written to.

The U-Net has 10 M parameters and trains in bfloat16 with float32 weights, batch 512, horizontal flips, a tenth of the
labels replaced by the null class. The rate falls along a cosine of the *time* that is left, so the run ends when its
seconds do, on any device. The moving average of the weights is written in half precision, in diffusers' format: load
it with ``parataxis.models.load("out/photos")``. It stays outside of the wheel, which has room for small models only.
"""

from __future__ import annotations

import argparse
import io
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from digits import CLASSES, TRAINING_STEPS, drop_labels, set_rate, update, vp_loss


def decoded(path: Path, cache: Path) -> tuple[Tensor, Tensor]:
    """Return images (n, 3, 32, 32) uint8 and labels (n,); decodes once and keeps what it decoded."""
    with np.load(path) as data:
        labels = torch.from_numpy(data["label"].astype(np.int64))
        if not cache.exists():
            files, ends = data["bytes"], data["offset"]
            images = np.stack(
                [
                    np.asarray(Image.open(io.BytesIO(files[first:last].tobytes())).convert("RGB"))
                    for first, last in itertools.pairwise(ends)
                ]
            )
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.save(cache, images.transpose(0, 3, 1, 2))
    return torch.from_numpy(np.load(cache)), labels


def network(width: int) -> UNet2DModel:
    """Build the U-Net, of 10 M parameters where ``width`` is 96; class CLASSES is the null class."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=width // 2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=CLASSES + 1,
    )


def main() -> None:
    """Train until the time is over, and write the averaged weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=700.0, help="of training, decoding apart")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--cache", type=Path, default=Path("out/photos-decoded.npy"))
    parser.add_argument("--out", type=Path, default=Path("out/photos"))
    options = parser.parse_args()

    torch.manual_seed(0)
    images, labels = (value.to(options.device) for value in decoded(options.data, options.cache))
    model = network(options.width).to(options.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    scheduler = DDPMScheduler(num_train_timesteps=TRAINING_STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    begun, step = time.perf_counter(), 0
    with tqdm(mininterval=20) as progress:
        while (spent := (time.perf_counter() - begun) / options.seconds) < 1:
            set_rate(optimizer, options.rate, step, spent)
            chosen = torch.randint(len(images), (options.batch,), device=options.device)
            x = images[chosen].float() / 127.5 - 1
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x, x.flip(3))
            with torch.autocast(x.device.type, torch.bfloat16):
                loss = vp_loss(model, x, drop_labels(labels[chosen]), scheduler, 5.0)
            update(model, optimizer, loss)
            average.update_parameters(model)
            step += 1
            if step % 100 == 0:  # reading the loss waits for the device
                progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            progress.update()
    average.module.half().save_pretrained(options.out / "unet")
    scheduler.save_pretrained(options.out / "scheduler")
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size / 1e6:.1f} M parameters, {step} steps, last loss {loss.item():.4f}; {options.out}")


if __name__ == "__main__":
    main()
