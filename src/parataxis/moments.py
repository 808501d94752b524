r"""A first guess of a trajectory from the mean and the covariance of the data.

For Gaussian data N(m, C), C = U diag(s) U^T + v (I - U U^T), the exact data prediction at x = alpha x_clean + sigma n:

    xhat = m + alpha C (alpha^2 C + sigma^2 I)^{-1} (x - alpha m)

a scalar in every direction of U and one for all others. The sampler is rolled through it with the run's own noise,
which costs no network call. A trained network is close to that at high noise (2412.09726), where a guess that knows
nothing is worst.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .samplers.coefficients import Coefficients
from .samplers.recurrence import Recurrence

__all__ = ["Moments"]

MOST = 32  # directions: what they cost grows with them, what they add falls
PSEUDO = 4.0  # samples that the mean of all counts for in the mean of a class


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of samples, float32 on the CPU.

    Attributes:
        means: (K, dim) of every class, or (1, dim).
        basis: (dim, r) orthonormal directions U.
        variances: (r,) s.
        remainder: v.
        classes: (K,) the conditions that the means belong to, or None.
    """

    means: Tensor
    basis: Tensor
    variances: Tensor
    remainder: float
    classes: Tensor | None = None

    @classmethod
    def of(cls, samples: Tensor, condition: object = None) -> Moments:
        """Estimate the moments of samples (n, *shape), n > 1.

        Half as many directions as samples are kept, the variance of the others is the mean of what remains. Where the
        condition is one whole number a sample, each class has its own mean, drawn towards the mean of all.
        """
        x = samples.detach().cpu().flatten(1).double()
        count, dim = x.shape
        whole = x.mean(0, keepdim=True)
        means, classes = whole, None
        if isinstance(condition, Tensor) and _is_class(condition):
            classes, index = torch.unique(condition.detach().cpu(), return_inverse=True)
            member = torch.nn.functional.one_hot(index, len(classes)).double()
            means = (member.T @ x + PSEUDO * whole) / (member.sum(0)[:, None] + PSEUDO)
            x = x - means[index]
        else:
            x = x - whole
        freedom = max(count - len(means), 1)
        rank = min(MOST, count // 2, dim)
        _, singular, directions = torch.linalg.svd(x / freedom**0.5, full_matrices=False)
        squares = singular.square()
        remainder = float(squares[rank:].sum()) / max(dim - rank, 1)
        return cls(means.float(), directions[:rank].T.contiguous().float(), squares[:rank].float(), remainder, classes)

    @staticmethod
    def supports(local: Coefficients) -> bool:
        """Return whether a sampler says what its states and outputs mean."""
        levels = (local.alpha, local.sigma, local.scale, local.x0_from_input, local.x0_from_output)
        return all(values is not None for values in levels)

    def trajectory(self, recurrence: Recurrence, condition: object = None) -> Tensor:
        """Return the trajectories (B, N + 1, *shape) of a sampler on Gaussian data, with the recurrence's own noise.

        Raises:
            ValueError: If the sampler does not know its noise levels, or the states have another size.
        """
        local, start = recurrence.coefficients, recurrence.start
        if not self.supports(local) or start[0].numel() != self.means.shape[1]:
            raise ValueError(
                f"moments of {self.means.shape[1]} elements give no guess for states {tuple(start.shape[1:])} of "
                "this sampler: they need the same elements and a sampler that knows alpha and sigma."
            )
        alpha, sigma, scale = local.alpha, local.sigma, local.scale
        p, q = local.x0_from_input, local.x0_from_output
        assert alpha is not None and sigma is not None and scale is not None  # noqa: PT018
        assert p is not None and q is not None  # noqa: PT018
        u = start.flatten(1)
        mean, basis, variances = self._mean(condition, len(u)).to(u), self.basis.to(u), self.variances.to(u)
        states, outputs = [u], []
        for i in range(local.steps):
            signal, square, v = float(alpha[i]), float(sigma[i]) ** 2, self.remainder
            away = u / float(scale[i]) - signal * mean
            others = signal * v / (signal**2 * v + square)
            along = signal * variances / (signal**2 * variances + square) - others
            prediction = mean + others * away + ((away @ basis) * along) @ basis.T
            outputs.append((prediction - float(p[i]) * u) / float(q[i]))
            u = float(local.state_weight[i]) * u
            for lag in range(min(local.lags, i) + 1):
                u = u + float(local.output_weight[i, lag]) * outputs[i - lag]
            added = recurrence.added(i)
            if added is not None:
                u = u + added.flatten(1)
            states.append(u)
        return torch.stack(states, 1).view(len(u), local.steps + 1, *start.shape[1:])

    def _mean(self, condition: object, count: int) -> Tensor:
        """Return the mean of each sample's class, (B, dim) or (1, dim); that of all where a class was not met."""
        if self.classes is None or not _is_class(condition):
            return self.means.mean(0, keepdim=True)
        assert isinstance(condition, Tensor)
        match = condition.detach().cpu()[:, None] == self.classes
        index = match.int().argmax(1)
        return torch.where(match.any(1)[:, None], self.means[index], self.means.mean(0, keepdim=True))


def _is_class(condition: object) -> bool:
    return isinstance(condition, Tensor) and condition.ndim == 1 and not condition.is_floating_point()
