"""Read the digits that a model draws, with a classifier fitted on the real ones.

    python training/evaluate.py DATA

DATA is the folder with the MNIST files. For every class-conditional model: 200 samples, 50 steps of DDIM or flow
Euler, guidance 2; the share that a support vector machine reads as the class asked for, and a picture of them under
`out/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.svm import SVC

import parataxis as px
from digits import mnist
from parataxis import models
from parataxis.plots import image_grid


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args()
    images, labels = mnist(options.data)
    reader = SVC(C=5, gamma="scale").fit(images[:8000].flatten(1).numpy(), labels[:8000].numpy())
    real = reader.score(images[8000:].flatten(1).numpy(), labels[8000:].numpy())
    print(f"real digits it was not fitted on: {real:.1%}")
    for name in models.available():
        model = models.load(name)
        if model.classes is None:
            continue
        asked = torch.arange(options.count) % model.classes
        noise = torch.randn(options.count, *model.shape, generator=torch.Generator().manual_seed(0))
        sampler = model.sampler("ddim" if model.prediction == "eps" else "flow_euler", 50)
        x = px.sample(model.denoiser(options.guidance), noise, sampler, px.Sequential(), condition=asked).x.clamp(-1, 1)
        read = torch.from_numpy(reader.predict(x.flatten(1).numpy()))
        path = Path("out") / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        image_grid(x[:100], zoom=3).save(path)
        print(f"{name}: {(read == asked).float().mean():.1%} of {options.count} read as asked; {path}")


if __name__ == "__main__":
    main()
