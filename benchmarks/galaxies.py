"""Score networks of galaxies that somebody else trained, as a test of what was never tuned on them.

    pip install --no-deps galaxygrad==0.1.9
    python benchmarks/galaxies.py          # what there is, and a check of every network

The package (M. Sampson and others, Princeton) holds eight MLP mixers: HSC and ZTF at 32 and 64 pixels, an earlier pair
for HSC, LSST at 60 and lensed quasars at 72. Its files are numpy arrays one after another, in the order of the fields
of its Equinox modules; nothing of it is part of this repository, and later versions carry no weights. Needed are the
files alone, so jax is not.

A network gives the score at tau, where x = exp(-tau/2) x_clean + sqrt(1 - exp(-tau)) n and tau is at most 10. That is
the linear schedule of DDPM, tau(t) = -log alpha_bar(t), which ends at 10.1; so eps = -sigma score is a denoiser for
:func:`parataxis.vp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import parataxis as px

__all__ = ["FILES", "available", "load"]

FILES = {
    "hsc-32": "eqx_hsc_ScoreNet32.eqx",
    "hsc-64": "eqx_hsc_ScoreNet64.eqx",
    "hsc-log-32": "eqx_hsc_LogNet32.eqx",
    "hsc-log-64": "eqx_hsc_LogNet64.eqx",
    "ztf-32": "eqx_ZTF_ScoreNet32.eqx",
    "ztf-64": "eqx_ZTF_ScoreNet64.eqx",
    "lsst-60": "eqx_lsst_ScoreNet60.eqx",
    "quasar-72": "eqx_quasar_lens72.eqx",
}
LONGEST = 10.0  # tau of the noisiest level that the networks were trained on; they are given tau over this


def _parameters(tensors: list[Tensor]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(tensor, requires_grad=False) for tensor in tensors])


class MixerBlock(nn.Module):
    """y + mlp_p(norm(y)) over the patches, then the same over the channels."""

    def __init__(self, arrays: Iterator[Tensor]) -> None:
        super().__init__()
        self.patch, self.hidden = (_parameters([next(arrays) for _ in range(4)]) for _ in range(2))
        self.norms = _parameters([next(arrays) for _ in range(4)])

    def forward(self, y: Tensor) -> Tensor:
        """Mix y (R, channels, patches)."""
        for norm, (w1, b1, w2, b2) in ((self.norms[:2], self.patch), (self.norms[2:], self.hidden)):
            normal = functional.layer_norm(y, y.shape[1:], *norm)
            y = y + functional.linear(functional.relu(functional.linear(normal, w1, b1)), w2, b2)
            y = y.transpose(1, 2)
        return y


class ScoreNet(nn.Module):
    """The score (R, 1, size, size) at x (R, 1, size, size) and tau (R,)."""

    def __init__(self, arrays: Iterator[Tensor], blocks: int = 4) -> None:
        super().__init__()
        self.enter = _parameters([next(arrays), next(arrays).flatten()])
        weight, bias = next(arrays), next(arrays)
        # Equinox keeps a transposed convolution as the convolution that it is, so it stands the other way round here.
        self.leave = _parameters([weight.flip(2, 3).transpose(0, 1).contiguous(), bias.flatten()])
        self.blocks = nn.ModuleList(MixerBlock(arrays) for _ in range(blocks))
        self.norm = _parameters([next(arrays), next(arrays)])
        self.longest = float(next(arrays))

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        """Return the score."""
        time = (tau / self.longest).to(x).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        patch = self.enter[0].shape[-1]
        y = functional.conv2d(torch.cat([x, time], 1), *self.enter, stride=patch)
        rows, columns = y.shape[2:]
        y = y.flatten(2)
        for block in self.blocks:
            y = block(y)
        y = functional.layer_norm(y, y.shape[1:], *self.norm).unflatten(2, (rows, columns))
        return functional.conv_transpose2d(y, *self.leave, stride=patch)


def available() -> list[str]:
    """Return the names of the networks, or none where the package is not installed."""
    try:
        distribution("galaxygrad")
    except PackageNotFoundError:
        return []
    return list(FILES)


def arrays_of(path: Path) -> Iterator[Tensor]:
    """Yield the arrays of a file."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(0)
        while file.tell() < end:
            yield torch.from_numpy(np.asarray(np.load(file)))


def load(name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]:
    """Return an eps-denoiser on the schedule :func:`parataxis.vp`, and the shape of a sample.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """
    if name not in available():
        raise ModuleNotFoundError(
            f"the network {name!r} needs its package: choose one of {', '.join(FILES)}, after "
            "pip install --no-deps galaxygrad==0.1.9"
        )
    arrays = arrays_of(Path(str(distribution("galaxygrad").locate_file("galaxygrad"))) / FILES[name])
    network = ScoreNet(arrays)
    assert network.longest == LONGEST
    assert next(arrays, None) is None, "the file holds more arrays than the network has"
    size = 4 * round(network.norm[0].shape[1] ** 0.5)  # patches of 4 x 4 pixels
    bar = torch.from_numpy(px.vp().alphas_cumprod)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = bar[t.long()]
        sigma = (1 - alpha_bar).sqrt().to(x).view(-1, 1, 1, 1)
        return -sigma * network(x, -alpha_bar.log())

    return denoise, (1, size, size)


def main() -> None:
    """Print each network's relative error in predicting the noise of its own samples, which a wrong reading ruins."""
    for name in FILES:
        denoise, shape = load(name)
        noise = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
        sample = px.sample(denoise, noise, px.SAMPLERS["ddim"](steps=50), px.Sequential()).x
        bar = float(px.vp().alphas_cumprod[300])
        noisy = bar**0.5 * sample + (1 - bar) ** 0.5 * noise
        error = (denoise(noisy, torch.full((8,), 300)) - noise).norm() / noise.norm()
        print(f"{name}: {shape}, samples of rms {sample.square().mean().sqrt():.2f}, relative error {error:.3f}")


if __name__ == "__main__":
    main()
