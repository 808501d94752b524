"""Go from one digit to another, starting each solve from the trajectory of the first: what that saves.

Run it: ``python examples/transition.py``. Writes ``out/transition.png``: the first digit, variations in which fewer and
fewer of its noisy states stay as they are, and the second digit.
"""

from pathlib import Path

import torch

import parataxis as px
from parataxis.models import load
from parataxis.plots import image_grid

model = load("digits")
sampler = model.sampler("ddim", 50)
denoise = model.denoiser(guidance=2.0)
noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(5))
four, nine = torch.tensor([4]), torch.tensor([9])
solver = px.Anderson()


def draw(label: torch.Tensor, **options: object) -> px.Solutions:
    """Draw the digit from the same noise."""
    return px.sample(denoise, noise, sampler, solver, condition=label, keep_trajectory=True, tolerance=1e-2, **options)


source = draw(four)
cold = draw(nine)
warm = draw(nine, guess=source.trajectory)
print(f"9 from nothing: {cold.rounds} rounds; from the trajectory of 4, all states free: {warm.rounds} rounds")

pictures = [source.x]
for frozen in (35, 25, 15):
    variation = draw(nine, guess=source.trajectory, frozen_steps=frozen)
    print(f"the {frozen} noisiest states stay: {variation.rounds} rounds")
    pictures.append(variation.x)
pictures.append(warm.x)
path = Path("out") / "transition.png"
path.parent.mkdir(exist_ok=True)
image_grid(torch.cat(pictures), columns=len(pictures), zoom=3).save(path)
print(f"wrote {path}")
