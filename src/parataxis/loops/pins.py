"""Entries that a loop sets to the same values before every call: the first point of a robot's plan, a known region."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arrays import Array, upload
from ..engine.rows import EvalBatch
from ..samplers.sampler import Sampler

__all__ = ["Pins"]


@dataclass(frozen=True, eq=False)
class Pins:
    """Entries of the state that stay as they are, whatever the scheduler makes of them.

    Attributes:
        mask: (B, dim) which entries.
        values: (B, dim) what they are; anything elsewhere.
    """

    mask: Tensor
    values: Tensor

    @classmethod
    def between(cls, returned: Tensor, entered: Tensor) -> Pins | None:
        """Return the entries of a state (B, *shape) that are others at the next call than the scheduler returned.

        None if all are the same, or all others: a state that the loop scales or replaces is not pinned.
        """
        if returned.shape != entered.shape:
            return None
        values = entered.flatten(1)
        mask = returned.to(entered.dtype).flatten(1) != values
        count = int(mask.sum())
        return cls(mask, values.clone()) if 0 < count < mask.numel() else None

    def put(self, states: Tensor) -> Tensor:
        """Return states (.., B, dim) with the entries in their places."""
        return torch.where(self.mask, self.values.to(states.dtype), states)

    @staticmethod
    def can_hold(sampler: Sampler) -> bool:
        """Return whether the recurrence of a sampler can be solved with pins; see :meth:`around`."""
        if sampler.transform is not None and sampler.transform.quantile is not None:
            return False  # a threshold depends on what the network says of pinned entries, too
        q = _data_prediction(sampler)[1]
        return q is not None and bool(q.all())

    def around(
        self, evaluate: Callable[[EvalBatch], Tensor], sampler: Sampler, *, joint: bool
    ) -> Callable[[EvalBatch], Tensor]:
        """Return a network that is given pinned states, and whose outputs make of pinned entries what they are.

        The recurrence knows nothing of pins. Its own value u of such an entry is free, and must not grow: the output
        there is the f of the data prediction p u + q f that is the pinned value.
        """
        p, q = _data_prediction(sampler)
        assert p is not None
        assert q is not None

        def pinned(rows: EvalBatch) -> Tensor:
            x = rows.x
            mask, values = self.mask, self.values.to(x.dtype)
            if not joint:
                index = upload(rows.sample, x.device)
                mask, values = mask[index], values[index]
            mask, values = mask.view(-1, *x.shape[1:]), values.view(-1, *x.shape[1:])
            outputs = evaluate(rows._replace(x=torch.where(mask, values, x)))
            of_step = (len(x), *(1,) * (x.ndim - 1))
            by_state, by_output = (upload(part[rows.step.numpy()], x).view(of_step) for part in (p, q))
            return torch.where(mask, (values - by_state * x) / by_output, outputs)

        return pinned


def _data_prediction(sampler: Sampler) -> tuple[Array | None, Array | None]:
    """Return p and q of the network's own outputs, before a transform."""
    of = sampler.coefficients if sampler.transform is None else sampler.transform
    return of.x0_from_input, of.x0_from_output
