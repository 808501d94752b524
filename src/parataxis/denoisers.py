r"""Denoisers with known answers, and guidance.

For a mixture of Gaussians sum_k w_k N(mu_k, S_k) the state x = alpha x_clean + sigma n is again a mixture, and
the best data prediction is known in closed form. With S_k = U_k diag(s_k) U_k^T and y = U_k^T (x - alpha mu_k),

    xhat(x) = sum_k r_k(x) [mu_k + U_k (alpha s_k / (alpha^2 s_k + sigma^2)) y],
    r_k(x)  proportional to  w_k N(x; alpha mu_k, alpha^2 S_k + sigma^2 I)
    score(x) = (alpha xhat - x) / sigma^2

Samplers on such a network have no training error, so tests can tell a wrong sample from a bad network. Covariances
should be anisotropic: on isotropic ones the slope near a mode is a scalar, which flatters secant solvers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .samplers.schedules import Schedule

__all__ = ["Mixture", "empirical", "guided", "mixture"]

Denoiser = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of Gaussians, in float64.

    Attributes:
        weights: (K,) summing to 1.
        means: (K, dim).
        variances: (K, dim) eigenvalues s_k of the covariances.
        bases: (K, dim, dim) orthonormal U_k in columns, or None for the identity.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    bases: Tensor | None = None

    @property
    def dim(self) -> int:
        """Number of elements of a state."""
        return self.means.shape[1]

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw (count, dim) exact samples."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.dim, generator=generator, dtype=torch.float64) * self.variances[which].sqrt()
        if self.bases is not None:
            z = torch.einsum("nde,ne->nd", self.bases[which], z)
        return self.means[which] + z

    def data_prediction(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return xhat (R, dim) at states x (R, dim), signal alpha and noise level sigma (R,); sigma > 0."""
        a, s = alpha[:, None, None], sigma[:, None, None]
        away = x[:, None] - a * self.means  # (R, K, dim)
        if self.bases is not None:
            away = torch.einsum("kde,rkd->rke", self.bases, away)
        total = a**2 * self.variances + s**2
        logits = self.weights.log() - 0.5 * (away**2 / total + total.log()).sum(-1)
        pull = a * self.variances / total * away
        if self.bases is not None:
            pull = torch.einsum("kde,rke->rkd", self.bases, pull)
        return (logits.softmax(1)[..., None] * (self.means + pull)).sum(1)

    def score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the gradient of the log density of x = alpha x_clean + sigma n, (R, dim)."""
        xhat = self.data_prediction(x, alpha, sigma)
        return (alpha[:, None] * xhat - x) / sigma[:, None] ** 2

    def network(self, schedule: Schedule, prediction: str = "eps", *, scaled: bool = False) -> Denoiser:
        """Return ``denoise(u, t)`` as a perfect network of this kind would answer.

        Args:
            schedule: Tells alpha and sigma at the times t.
            prediction: ``eps``, ``x0``, ``v`` or ``flow``.
            scaled: The network works in coordinates alpha = 1 and is given u = x / sqrt(sigma^2 + 1), as Euler samplers
                do on variance-preserving schedules; u and the answers are then the same as without.

        The input may have any shape (R, *shape) with dim elements a row; the answer has its shape and dtype.
        """
        if prediction not in ("eps", "x0", "v", "flow"):
            raise ValueError(f"prediction must be 'eps', 'x0', 'v' or 'flow', got {prediction!r}.")

        def denoise(u: Tensor, t: Tensor, condition: object = None) -> Tensor:
            levels = schedule.alpha_sigma(t.detach().cpu().numpy().astype(np.float64))
            alpha, sigma = (torch.from_numpy(np.asarray(level)) for level in levels)
            x = u.detach().cpu().double().flatten(1)
            if scaled:
                # x / sqrt(sigma^2 + alpha^2) is the same state whatever alpha is scaled to.
                x = x * (alpha**2 + sigma**2).sqrt()[:, None]
            xhat = self.data_prediction(x, alpha, sigma)
            a, s = alpha[:, None], sigma[:, None]
            eps = (x - a * xhat) / s
            size = (a**2 + s**2).sqrt()
            answers = {"eps": eps, "x0": xhat, "v": (a * eps - s * xhat) / size, "flow": eps - xhat}
            return answers[prediction].view(u.shape).to(u)

        return denoise


def mixture(dim: int = 64, components: int = 10, *, power: float = 1.0, scale: float = 0.3, seed: int = 0) -> Mixture:
    """Return a mixture with standard normal means and power-law covariances in random directions.

    The eigenvalues of each covariance are scale^2 dim i^-power / sum_j j^-power, i = 1..dim: as anisotropic as images
    (power 1 to 2); 0 gives isotropic ones.

    Args:
        dim: Number of elements of a state.
        components: K, of equal weight.
        power: Exponent of the spectrum.
        scale: Root mean square of a component's deviation from its mean.
        seed: Of the means and directions.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(components, dim, generator=generator, dtype=torch.float64)
    spectrum = torch.arange(1, dim + 1, dtype=torch.float64) ** -power
    variances = (scale**2 * dim * spectrum / spectrum.sum()).expand(components, dim).contiguous()
    frames = torch.randn(components, dim, dim, generator=generator, dtype=torch.float64)
    bases = torch.linalg.qr(frames).Q
    return Mixture(torch.full((components,), 1 / components, dtype=torch.float64), means, variances, bases)


def empirical(data: Tensor, deviation: float = 0.0) -> Mixture:
    """Return the empirical distribution of a data set (n, *shape), each point blurred by ``deviation``.

    Its denoiser is the ideal one for the data set itself: it reproduces the data.
    """
    points = data.detach().cpu().double().flatten(1)
    count = len(points)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    return Mixture(weights, points, torch.full_like(points, deviation**2))


def guided(denoise: Denoiser, scale: float, null: Tensor | float | int) -> Denoiser:
    """Classifier-free guidance (2207.12598): null + scale (conditional - null), two rows in one call.

    Args:
        denoise: ``denoise(x, t, condition)``.
        scale: 1 is the conditional output alone, which then costs one row.
        null: The condition that stands for none: one entry, or a tensor that is expanded to the rows.

    Returns:
        A denoiser with the same signature; the condition is a tensor (R, ...).
    """
    if scale == 1:
        return denoise

    def both(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        empty = torch.as_tensor(null, dtype=condition.dtype, device=condition.device).expand_as(condition)
        output = denoise(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, empty]))
        with_condition, without = output.chunk(2)
        return without + scale * (with_condition - without)

    return both
