"""Sample with a network of your own: any callable from states and times to outputs.

Run it: ``python examples/own_network.py``. The "network" here is the exact denoiser of a Gaussian mixture.
"""

import torch

import parataxis as px
from parataxis.denoisers import mixture

network = mixture(dim=64).network(px.vp())  # network(x, t) -> predicted noise
noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
sampler = px.samplers.ddim(px.vp(), steps=100)

sequential = px.sample(network, noise, sampler, px.Sequential())
parallel = px.sample(network, noise, sampler, px.Picard(), tolerance=1e-3)

error = (parallel.x - sequential.x).norm(dim=1) / sequential.x.norm(dim=1)
print(f"rounds: {sequential.rounds} one after another, {parallel.rounds} side by side")
print(f"relative error to the sequential samples: at most {error.max():.1e}")
