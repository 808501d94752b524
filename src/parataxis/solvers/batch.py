"""The samples that one solver solves side by side: their tensors, and how far each has come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Array, Indices, largest, read, upload
from ..checks import OutputError
from ..samplers.recurrence import Recurrence
from .base import Problem
from .held_noise import HeldNoise

__all__ = ["Batch", "Member", "seeds"]


class Member(Protocol):
    """What a solver's working memory offers of a sample to those who look at it between rounds."""

    def estimate(self, sample: int) -> Tensor:
        """Return (dim,) the present guess of the sample."""
        ...

    def state(self, sample: int) -> dict[str, Any]:
        """Return tensors and arrays: all that the solver knows of the sample between two rounds."""
        ...

    def load(self, sample: int, state: dict[str, Tensor]) -> None:
        """Take such a state, with tensors instead of arrays; the solver then looks at its samples again."""
        ...


class Batch:
    """Places for samples; a solver fills in how far each has come.

    Attributes:
        problem: What all samples share.
        recurrence: Coefficients, starts and noise of all places.
        start: (S, dim) the first states.
        noise: (S, R, dim) what the steps add, or None; ``noise_rows`` (S R, dim) the same. R is N; where noise is drawn
            again, it is fewer, see :meth:`hold_noise`.
        guess: (S, N + 1, dim) trajectories to start from, or None.
        generator: Seeds what the solver draws, if it draws: one for the batch, or one for each place.
        accepted: (S,) how many steps are accepted.
        error: (S,) estimated relative error of the sample that has been accepted with them.
        finished: (S,) whether the sample is there, as far as the solver's own test goes.
        active: (S,) places whose samples are being solved; free places and ended samples are not.
        memory: The solver's working memory; None before it begins.
        trajectory: (S, N + 1, dim) accepted states, or None if they are not kept.
        residuals: Of every place and round the first step and the norms of the residuals, or None if they are not kept.
        output_rounding: Unit roundoff of the network, as its first outputs show it; 0 before.
        returns_errors: Whether an output that is not finite ends its sample only, instead of being raised.
        streams: Random streams of places that have been asked for.
        failures: Why samples have ended so, by their places.
        origin: Says of a place and a step which rank evaluated it, for errors.
        on_accept: Called with the arguments of every :meth:`keep`; or None.
    """

    def __init__(
        self,
        problem: Problem,
        recurrence: Recurrence,
        guess: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | dict[int, Any] | None = None,
        *,
        keep_trajectory: bool = False,
        keep_residuals: bool = False,
        returns_errors: bool = False,
    ) -> None:
        count = len(recurrence.start)
        self.returns_errors = returns_errors
        self.failures: dict[int, str] = {}
        self.problem, self.guess, self.generator = problem, guess, generator
        self.recurrence = recurrence
        self.output_rounding = 0.0
        self.accepted = np.zeros(count, np.int64)
        self.error = np.zeros(count)
        self.finished = np.zeros(count, bool)
        self.active = np.ones(count, bool)
        self.memory: Member | None = None
        self.bounded = np.ones(count, bool)  # whether the solver's estimate is within the tolerance, where it has one
        self.results: dict[int, Tensor] = {}  # samples that have ended
        self.origin: Callable[[int, int], str] = lambda place, step: ""
        self.numbers = list(range(count))  # of the samples, as errors name them
        self.refilled = False  # whether other samples take the places of those that end
        self.added: list[int] = []  # places that were filled after the solver had begun, for it to take up
        self.trajectory: Tensor | None = None
        self.residuals: list[list[tuple[int, Array]]] | None = [[] for _ in range(count)] if keep_residuals else None
        self.held: HeldNoise | None = None
        self.on_accept: Callable[[Indices, Indices, Tensor], None] | None = None
        self.noise_owner: Tensor | None = recurrence.noise  # the caller's, until a copy takes its place
        self.streams: dict[int, np.random.Generator] = {}
        if keep_trajectory:
            self.trajectory = self.start.new_zeros(count, problem.steps + 1, problem.dim)
            self.trajectory[:, 0] = self.start

    @property
    def recurrence(self) -> Recurrence:
        """Coefficients, starts and noise of all places."""
        return self._recurrence

    @recurrence.setter
    def recurrence(self, recurrence: Recurrence) -> None:
        self._recurrence = recurrence
        noise = recurrence.noise
        # Views of these, made once: (S, dim) the first states, (S, N, dim) and (S N, dim) what the steps add, or None.
        self.start = recurrence.start.detach().flatten(1)
        self.noise = None if noise is None else noise.flatten(2)
        self.noise_rows = None if self.noise is None else self.noise.view(-1, self.noise.shape[2])

    def hold_noise(self, reach: int) -> None:
        """Hold so many steps from where each sample stands, if noise is drawn again; solvers call this at first."""
        if self.recurrence.redrawn is not None:
            self.held = HeldNoise(self.recurrence.redrawn, self.start, reach)
            self.noise = self.held.rows
            self.noise_rows = self.noise.view(-1, self.noise.shape[2])

    def noise_at(self, places: Indices, first: Indices, steps: Indices) -> Indices:
        """Return where in R the noise of some steps lies, of samples (n,) that stand at the steps ``first`` (n,)."""
        if self.held is None:
            return steps
        self.held.load(places, first)
        return np.asarray(steps % self.held.steps)

    def recurrence_of(self, place: int, state: Tensor) -> Recurrence:
        """Return the recurrence of a sample, with a state (dim,) as its first."""
        redrawn, local = self.recurrence.redrawn, self.problem.coefficients
        if redrawn is not None:
            return Recurrence(local, state[None], redrawn=redrawn.sample(place))
        return Recurrence(local, state[None], None if self.noise is None else self.noise[place, None])

    def __len__(self) -> int:
        """Return the number of places."""
        return len(self.accepted)

    def copy_inputs(self, generator: torch.Generator | None) -> None:
        """Take copies of what the caller owns, as other samples will take its place."""
        noise = None if self.recurrence.noise is None else self.recurrence.noise.clone()
        self.recurrence = replace(self.recurrence, start=self.recurrence.start.clone(), noise=noise)
        self.generator, self.noise_owner, self.refilled = {0: generator}, None, True

    def grow(self, count: int) -> None:
        """Make room for so many samples."""
        extra = count - len(self)
        start, noise = self.recurrence.start, self.recurrence.noise
        start = torch.cat([start, start.new_zeros(extra, *start.shape[1:])])
        noise = None if noise is None else torch.cat([noise, noise.new_zeros(extra, *noise.shape[1:])])
        self.recurrence = replace(self.recurrence, start=start, noise=noise)
        self.accepted = np.append(self.accepted, np.zeros(extra, np.int64))
        self.error = np.append(self.error, np.zeros(extra))
        self.numbers += [0] * extra
        self.bounded = np.append(self.bounded, np.ones(extra, bool))
        self.finished, self.active = (np.append(flags, np.zeros(extra, bool)) for flags in (self.finished, self.active))
        if self.trajectory is not None:
            self.trajectory = torch.cat([self.trajectory, self.trajectory.new_zeros(extra, *self.trajectory.shape[1:])])

    def add(self, place: int, recurrence: Recurrence, generator: torch.Generator | None) -> None:
        """Put the sample of a recurrence of its own into a free place."""
        self.recurrence.start[place] = recurrence.start[0]
        if self.recurrence.noise is not None and recurrence.noise is not None:
            self.recurrence.noise[place] = recurrence.noise[0]
        self.streams.pop(place, None)
        self.results.pop(place, None)
        self.failures.pop(place, None)
        self.generator[place] = generator  # type: ignore[index]  # a dict since copy_inputs
        self.accepted[place], self.error[place] = 0, 0.0
        self.finished[place], self.active[place], self.bounded[place] = False, True, True
        if self.trajectory is not None:
            self.trajectory[place, 0] = self.start[place]
        self.added.append(place)

    def accept(self, places: Indices, counts: Indices, states: Tensor | None, error: Array) -> None:
        """Note that the next ``counts`` steps of these places are accepted.

        Args:
            places: (S',) increasing.
            counts: (S',) at least 0.
            states: What they lead to, see :meth:`keep`; None if that has been called.
            error: (S',) estimated relative error of the sample accepted so far.
        """
        if states is not None:
            self.keep(places, counts, states)
        self.accepted[places] += counts
        self.error[places] = error

    def keep(self, places: Indices, counts: Indices, states: Tensor) -> None:
        """Keep accepted states in the trajectory, and tell of them, before :meth:`accept` counts them.

        Args:
            places: (S',) increasing.
            counts: (S',) at least 0.
            states: (S', n, dim) behind the next ``counts`` steps, n at least the largest count; entries beyond a count
                are ignored.
        """
        if self.on_accept is not None:
            self.on_accept(places, counts, states)
        if self.trajectory is not None:
            offset = np.arange(states.shape[1])
            inside = offset < counts[:, None]
            place, step = (
                np.broadcast_to(values, inside.shape)[inside]
                for values in (places[:, None], self.accepted[places][:, None] + 1 + offset)
            )
            index = upload(place * (self.problem.steps + 1) + step, states.device)
            rows = states.reshape(-1, states.shape[2])[upload(np.flatnonzero(inside), states.device)]
            self.trajectory.view(-1, states.shape[2]).index_copy_(0, index, rows)

    def note_residuals(self, places: Indices, lo: Indices, width: Indices, norms: Array) -> None:
        """Keep the residuals of a round.

        Args:
            places: (S',) of the samples.
            lo: (S',) their first steps.
            width: (S',) how many steps each has; none where it is not evaluated in this round.
            norms: (S', W) of the residuals.
        """
        assert self.residuals is not None
        for place, first, count, row in zip(places.tolist(), lo.tolist(), width.tolist(), norms, strict=True):
            if count:
                self.residuals[place].append((first, row[:count].copy()))

    def fail_broken(
        self, places: Indices, steps: Indices, widths: Indices, outputs: Tensor, rounds: Indices | None = None
    ) -> NDArray[np.bool_]:
        """End the samples whose first output of a round is not finite, where errors are returned; the others go on.

        The first input of a sample is accepted, so the sequential loop meets that output too. What is known of the
        sample so far becomes its result.

        Args:
            places: (n,) samples that have been evaluated.
            steps: (n,) their first steps of this round.
            widths: (n,) their numbers of rows, at least 1.
            outputs: (R, dim) rows of all these samples, one sample behind the other.
            rounds: (n,) of each sample before this one, if known.

        Returns:
            (n,) which samples have ended.
        """
        first = upload(np.cumsum(widths) - widths, outputs.device)
        failed = ~np.isfinite(read(largest(outputs.index_select(0, first))))
        for row in np.flatnonzero(failed):
            place = int(places[row])
            error = self.output_error(place, int(steps[row]), None if rounds is None else int(rounds[row]) + 1)
            assert self.memory is not None
            self.failures[place], self.results[place] = str(error), self.memory.estimate(place).clone()
            self.active[place] = False
        return np.asarray(failed)

    def check_results(self, places: Sequence[int]) -> None:
        """Raise, or note where errors are returned, that the sample of a place is not finite."""
        finite = torch.isfinite(torch.stack([self.results[place] for place in places])).all(1).cpu().numpy()
        for place in np.array(places)[~finite].tolist():
            error = OutputError(
                f"sample {self.numbers[place]} is NaN or Inf though every output was finite, so the sequential loop "
                f"overflows too: the network's outputs are too large for states of {str(self.start.dtype)[6:]}."
            )
            if not self.returns_errors:
                raise error
            self.failures[place] = str(error)

    def output_error(self, place: int, step: int, rounds: int | None = None) -> OutputError:
        """Return the error for an output that is not finite though its input is accepted, in which round if known."""
        when = "" if rounds is None else f"round {rounds}, "
        return OutputError(
            f"the network returned NaN or Inf at step {step} of {self.problem.steps}, sample {self.numbers[place]}, "
            f"{self.origin(place, step)}{when}for an accepted input, so the sequential loop meets it too: check the "
            "network at that time, its dtype and its conditioning."
        )

    def stream(self, place: int) -> np.random.Generator:
        """Return the random stream of a place, which its generator seeds when it is first asked for."""
        if place not in self.streams:
            generator = self.generator
            if generator is None or isinstance(generator, torch.Generator):
                self.streams = {
                    index: np.random.default_rng(seed) for index, seed in enumerate(seeds(generator, len(self)))
                }
            else:
                self.streams[place] = np.random.default_rng(seeds(generator[place], 1)[0])
        return self.streams[place]

    def replace_noise(self, steps: Tensor, rows: Tensor) -> None:
        """Put other noise (n, dim) into the places and steps (n,), counted as place N + step."""
        noise = self.recurrence.noise
        assert noise is not None
        if noise is self.noise_owner:  # the caller's stays as it is
            noise = noise.clone()
            self.recurrence = replace(self.recurrence, noise=noise)
        noise.view(-1, rows.shape[1]).index_copy_(0, steps, rows)


def seeds(generator: torch.Generator | None, count: int) -> list[int]:
    """Draw seeds for random streams."""
    device = "cpu" if generator is None else generator.device
    drawn: list[int] = torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()
    return drawn
