"""What the rounds of a solve have evaluated, as far as steps wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Indices

__all__ = ["EvaluatedRounds"]


@dataclass(eq=False)
class _Evaluated:
    """Rows of one network call.

    Attributes:
        inputs: (n, dim) what the network was given.
        combined: (n, dim) the combined outputs.
        outputs: Output leaves; those that are batched are (G, n, ...), the first rows of all states, then the second.
    """

    inputs: Tensor
    combined: Tensor
    outputs: list[Any]


class EvaluatedRounds:
    """The latest evaluation of every step and sample.

    Args:
        shape: (N, S).
        batched: Which output leaves have rows.
    """

    def __init__(self, shape: tuple[int, int], batched: list[int]) -> None:
        self._batched = batched
        self._rounds: dict[int, _Evaluated] = {}
        self._count = 0
        self._round_of, self._row_in_round = np.full(shape, -1), np.zeros(shape, np.int64)

    def store(self, steps: Indices, samples: Indices, inputs: Tensor, combined: Tensor, outputs: list[Any]) -> None:
        """Store what rows (n,) of these steps and samples have given."""
        self._rounds[self._count] = _Evaluated(inputs, combined, outputs)
        self._round_of[steps, samples], self._row_in_round[steps, samples] = self._count, np.arange(len(steps))
        self._count += 1

    def supersede(self, steps: Indices, samples: Indices) -> None:
        """Let go of what these rows of steps and samples have given: they are about to be evaluated again."""
        self._round_of[steps, samples] = -1
        self._forget()

    def of(self, steps: range) -> tuple[Tensor, Tensor, list[Any]]:
        """Return inputs and combined outputs (M, S, dim) of steps, and their output leaves (M, G S, ...).

        They may be views: they are asked for once, when the steps are accepted.
        """
        chosen, batched = slice(steps.start, steps.stop), self._batched
        rounds, rows = self._round_of[chosen].ravel(), self._row_in_round[chosen].ravel()
        shape = len(steps), self._round_of.shape[1]
        if (rounds == rounds[0]).all() and (rows == rows[0] + np.arange(len(rows))).all():  # as windows move, mostly
            held, beside = self._rounds[int(rounds[0])], slice(int(rows[0]), int(rows[0]) + len(rows))
            inputs, combined = held.inputs[beside], held.combined[beside]
            outputs = [leaf[:, beside] if o in batched else leaf for o, leaf in enumerate(held.outputs)]
        else:
            places = [(self._rounds[number], row) for number, row in zip(rounds.tolist(), rows.tolist(), strict=True)]
            inputs = torch.stack([held.inputs[row] for held, row in places])
            combined = torch.stack([held.combined[row] for held, row in places])
            outputs = [
                torch.stack([held.outputs[o][:, row] for held, row in places], 1) if o in batched else leaf
                for o, leaf in enumerate(places[-1][0].outputs)
            ]
        for o in batched:
            leaf = outputs[o]
            if leaf.shape[0] == 1:
                outputs[o] = leaf.reshape(*shape, *leaf.shape[2:])
            else:
                outputs[o] = leaf.unflatten(1, shape).transpose(0, 1).flatten(1, 2)
        return inputs.reshape(*shape, -1), combined.reshape(*shape, -1), outputs

    def forget_before(self, step: int) -> None:
        """Let go of rounds that no later step waits for."""
        self._round_of[:step] = -1
        self._forget()

    def _forget(self) -> None:
        waiting = np.bincount(self._round_of.ravel() + 1, minlength=self._count + 1)
        for number in [number for number in self._rounds if not waiting[number + 1]]:
            del self._rounds[number]
