r"""What n runs prove of the next one: exact binomial bounds and the quantile of split conformal prediction.

Of n runs that do not depend on one another, f failed. The chance of a failure is then at most the p for which f or
fewer would be rare,

    P(Binomial(n, p) <= f) = 1 - confidence        (Clopper and Pearson 1934)

and for scores s_1 .. s_n and a next one that are exchangeable,

    P(s <= q) >= coverage,    q = the ceil((n + 1) coverage)-th smallest of s_1 .. s_n        (2107.07511, theorem 1)

which needs as many runs: at least coverage / (1 - coverage), 19 for 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["allowed_failures", "binomial_at_most", "conformal_quantile", "failure_bound", "failure_interval"]


def binomial_at_most(failures: int, runs: int, chance: float) -> float:
    """Return P(Binomial(runs, chance) <= failures)."""
    if failures >= runs or chance <= 0:
        return 1.0
    if chance >= 1:
        return 0.0
    log, log1p = math.log(chance), math.log1p(-chance)
    terms = [_log_choose(runs, k) + k * log + (runs - k) * log1p for k in range(failures + 1)]
    largest = max(terms)
    return min(1.0, math.exp(largest) * math.fsum(math.exp(term - largest) for term in terms))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def allowed_failures(runs: int, coverage: float, confidence: float) -> int:
    """Return how many of the runs may fail if the chance of success is to be at least ``coverage``; -1 if none may.

    59, 93 and 124 runs prove a coverage of 95 % with a confidence of 95 % if 0, 1 and 2 fail.
    """
    failures = -1
    while failures < runs and binomial_at_most(failures + 1, runs, 1 - coverage) <= 1 - confidence:
        failures += 1
    return failures


def failure_bound(failures: int, runs: int, confidence: float) -> float:
    """Return the largest chance of a failure that these runs do not rule out with this confidence."""
    low, high = failures / runs, 1.0
    for _ in range(60):  # bisection to the last bit
        middle = (low + high) / 2
        if binomial_at_most(failures, runs, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def failure_interval(failures: int, runs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided interval of Clopper and Pearson for the chance of a failure."""
    one_sided = 1 - (1 - confidence) / 2
    low = 0.0 if failures == 0 else 1 - failure_bound(runs - failures, runs, one_sided)
    return low, 1.0 if failures == runs else failure_bound(failures, runs, one_sided)


def conformal_quantile(scores: Sequence[float], coverage: float) -> float:
    """Return the score that the next one is below with probability ``coverage``; inf if there are too few."""
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return sorted(scores)[rank - 1] if rank <= len(scores) else math.inf
