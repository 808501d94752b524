"""Which proposals are accepted, and what is drawn where one is not: numbers of one dimension, on the host.

The formulas stand in :mod:`.speculative`.
"""

from __future__ import annotations

import math

import numpy as np

from ..arrays import Array, Indices

__all__ = ["accept", "accept_block", "crossing", "mass_below", "residual_draw"]


def accept(log_ratio: Array, uniforms: Array, tests: Indices) -> Indices:
    """Return (S,) how many proposals to accept: those before the first that is rejected."""
    accepted = np.log(uniforms[:, : log_ratio.shape[1]]) <= log_ratio
    accepted &= np.arange(log_ratio.shape[1]) < tests[:, None]
    return np.asarray(np.argmin(np.append(accepted, np.zeros((len(tests), 1), bool), 1), 1))


def accept_block(ratios: Array, sizes: Array, uniforms: Array) -> tuple[int, float]:
    """Return how many proposals to accept of the block, and P behind them."""
    log_probabilities = [0.0]  # log P
    for ratio in ratios:
        log_probabilities.append(min(0.0, log_probabilities[-1] + float(ratio)))
    for count in range(len(ratios), 0, -1):
        chance = math.exp(log_probabilities[count])
        if count < len(ratios) and chance < 1:
            size = float(sizes[count])
            mass = mass_below(crossing(chance, size), chance, size)
            chance = mass / (mass + 1 - chance)
        if uniforms[count - 1] <= chance:
            return count, math.exp(log_probabilities[count])
    return 0, 1.0


def crossing(chance: float, size: float) -> float:
    """Return the a below which chance phi(a + size) exceeds phi(a)."""
    return math.log(chance) / size - size / 2 if chance > 0 and size > 0 else -math.inf


def mass_below(a: float, chance: float, size: float) -> float:
    """Return the integral of chance phi(a + size) - phi(a) up to ``a``."""
    return 0.5 * (chance * math.erfc(-(a + size) / math.sqrt(2)) - math.erfc(-a / math.sqrt(2)))


def residual_draw(chance: float, size: float, uniform: float) -> float:
    """Return a draw from the density (chance phi(a + size) - phi(a))_+, normalised: its distribution inverted."""
    high = crossing(chance, size)
    low, share = high - size - 40.0, uniform * mass_below(high, chance, size)
    for _ in range(100):
        middle = (low + high) / 2
        if mass_below(middle, chance, size) < share:
            low = middle
        else:
            high = middle
    return high
