"""The sampler: its recurrence with the noise that it adds, and the transform of outputs before they enter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Indices, upload
from .coefficients import Coefficients
from .recurrence import Recurrence
from .redrawn import RedrawnNoise, draw_steps, own_generator, rows_of

__all__ = ["OutputTransform", "Prediction", "Sampler", "data_prediction"]


Array = NDArray[np.float64]

Prediction = Literal["eps", "x0", "v", "flow", "edm"]


@dataclass(frozen=True, eq=False)
class OutputTransform:
    """Makes of an output what enters the recurrence: y = xhat + gain (clipped(xhat) - xhat), xhat = p u + q f.

    Attributes:
        x0_from_input: (N,) p.
        x0_from_output: (N,) q.
        gain: (N,) 1 where the recurrence uses the clipped prediction alone.
        clip: c in clipping to [-c, c], or None.
        quantile: Dynamic thresholding instead (Imagen, 2205.11487): s = max(1, this quantile of |xhat|) of each sample,
            clip to [-s, s] and divide by s; or None.
        largest: Upper bound of s.
    """

    x0_from_input: Array
    x0_from_output: Array
    gain: Array
    clip: float | None = None
    quantile: float | None = None
    largest: float = float("inf")

    def __call__(self, step: Indices, u: Tensor, f: Tensor) -> Tensor:
        """Transform outputs f (R, *shape) at inputs u (R, *shape) of the steps (R,)."""
        return self.apply(upload(self.columns[:, step], f), u, f)

    @cached_property
    def columns(self) -> Array:
        """(3, N) p, q and gain."""
        return np.stack([self.x0_from_input, self.x0_from_output, self.gain])

    def apply(self, columns: Tensor, u: Tensor, f: Tensor) -> Tensor:
        """Transform outputs f (R, *shape) at inputs u (R, *shape) with the columns (3, R) of their steps."""
        p, q, gain = columns.view(3, -1, *(1,) * (f.ndim - 1)).unbind()
        data = (q * f).addcmul_(p, u)
        if self.quantile is not None:
            limit = torch.quantile(data.flatten(1).abs(), self.quantile, dim=1).clamp(1.0, self.largest)
            limit = limit.view(-1, *(1,) * (f.ndim - 1))
            clipped = torch.minimum(torch.maximum(data, -limit), limit) / limit
        elif self.clip is not None:
            clipped = data.clamp(-self.clip, self.clip)
        else:
            return data
        return clipped if self._is_whole else data + gain * (clipped - data)

    @cached_property
    def _is_whole(self) -> bool:
        """Whether the recurrence uses the clipped prediction alone, at all steps."""
        return bool((self.gain == 1).all())

    def coefficients(self, local: Coefficients) -> Coefficients:
        """Return the coefficients, without a data prediction where these outputs are not one: where a gain is not 1."""
        return local if (self.gain == 1).all() else replace(local, x0_from_input=None, x0_from_output=None)


@dataclass(frozen=True, eq=False)
class Sampler:
    """A sampler with its grid: the equation that defines the sample.

    Attributes:
        name: Name of the function that made it.
        times: (N,) timesteps.
        coefficients: Of every step.
        start_scale: First state over standard normal noise, in the coordinates of the network's input.
        transform: Of outputs before they enter the recurrence, or None.
        draws: The steps that each draw of noise enters and its factors there, in the loop's order; None for one draw
            for each step that adds noise.
        draw_dtype: What the loop draws noise in, or None for the dtype of its states.
        draw_steps: The step that makes each of these draws, or None where they are not listed.
    """

    name: str
    times: Array
    coefficients: Coefficients
    start_scale: float = 1.0
    transform: OutputTransform | None = None
    draws: tuple[tuple[tuple[int, float], ...], ...] | None = None
    draw_dtype: torch.dtype | None = None
    draw_steps: tuple[int, ...] | None = None

    @property
    def steps(self) -> int:
        """N, the number of network evaluations of the sequential loop."""
        return self.coefficients.steps

    def network_times(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``times`` as the network receives them: int64 if all are integers, else at least float32."""
        times = torch.from_numpy(self.times.copy())
        whole = bool((times == times.round()).all())
        return times.long() if whole else times.to(torch.promote_types(dtype, torch.float32))

    def recurrence(
        self,
        noise: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        dtype: torch.dtype | None = None,
        *,
        block: int | None = None,
    ) -> Recurrence:
        """Draw the noise that the steps add and return the recurrence of a batch.

        Args:
            noise: (B, *shape) standard normal; its dtype is the states'.
            generator: One for the batch: each step draws (B, *shape) in the order of the loop, as diffusers does; or
                one for each sample, which makes a sample independent of its batch.
            dtype: Of the states of the loop whose draws are wanted; default that of ``noise``.
            block: Hold the noise of some blocks of so many steps only, and draw others again, to the same bits, when a
                solver comes to them. None holds all, and so does a solver that does not go forward step by step.

        Raises:
            ValueError: If there are not as many generators as samples.
        """
        start = noise * self.start_scale
        if not self.coefficients.noise_std.any():
            return Recurrence(self.coefficients, start)
        dtype = self.draw_dtype or dtype or noise.dtype
        sources: list[torch.Generator | None] = [None]
        if isinstance(generator, torch.Generator):
            sources = [generator]
        elif generator is not None:
            if len(generator) != len(noise):
                raise ValueError(f"pass one generator a sample: {len(noise)} samples, {len(generator)} generators.")
            sources = list(generator)
        draws = self._draws()
        wanted = [entries[0][0] for entries in draws if len(entries) == 1]
        if len(set(wanted)) < len(draws):  # a draw enters several steps, or none
            return Recurrence(self.coefficients, start, self._combined(noise, sources, dtype))
        factors = np.zeros(self.steps)
        factors[wanted] = [entries[0][1] for entries in draws]
        owned = [own_generator(noise.device) if source is None else source for source in sources]
        if block is not None and wanted == sorted(wanted) and None not in owned:
            redrawn = RedrawnNoise(noise, factors, wanted, cast("list[torch.Generator]", owned), dtype, block)
            return Recurrence(self.coefficients, start, redrawn=redrawn)
        drawn = noise.new_zeros(len(noise), self.steps, *noise.shape[1:])
        for rows, source in zip(rows_of(sources), sources, strict=True):
            draw_steps(drawn[rows], wanted, source, dtype)
        drawn *= upload(factors, noise).view(-1, *(1,) * (noise.ndim - 1))
        return Recurrence(self.coefficients, start, drawn)

    def _draws(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """Return what is drawn; see the class."""
        if self.draws is not None:
            return self.draws
        deviations = self.coefficients.noise_std
        return tuple(((int(i), float(deviations[i])),) for i in np.flatnonzero(deviations))

    def _combined(self, noise: Tensor, sources: Sequence[torch.Generator | None], dtype: torch.dtype) -> Tensor:
        """Return the noise (B, N, *shape) of steps that share their draws."""
        drawn = noise.new_zeros(len(noise), self.steps, *noise.shape[1:])
        for rows, source in zip(rows_of(sources), sources, strict=True):
            device = noise.device if source is None else source.device
            buffer = torch.empty(noise[rows].shape, device=device, dtype=dtype)
            for entries in self._draws():  # one after another, as the loop draws
                normal = buffer.normal_(generator=source).to(noise)
                for i, factor in entries:
                    drawn[rows, i] += factor * normal
        return drawn

    def tail(self, first: int) -> Sampler:
        """Return the sampler of the steps from ``first`` on, which begins at u_first: its ``start_scale`` is 1.

        Outputs of earlier steps have no part in it: what they add is to be added to its noise. It is made once, as it
        holds what solvers derive from coefficients.
        """
        tails: dict[int, Sampler] = self.__dict__.setdefault("_tails", {})
        if first not in tails:
            local, draws = self.coefficients, self.draws
            cut = {
                field.name: getattr(local, field.name)[first:]
                for field in fields(local)
                if getattr(local, field.name) is not None
            }
            # Step i of the rest has i outputs before it.
            cut["output_weight"] = np.tril(cut["output_weight"])
            transform = self.transform
            if transform is not None:
                parts = (transform.x0_from_input, transform.x0_from_output, transform.gain)
                p, q, gain = (part[first:] for part in parts)
                transform = replace(transform, x0_from_input=p, x0_from_output=q, gain=gain)
            if draws is not None:
                made_by = self.draw_steps or tuple(min((i for i, _ in draw), default=first) for draw in draws)
                draws = tuple(
                    tuple((i - first, factor) for i, factor in draw)
                    for step, draw in zip(made_by, draws, strict=True)
                    if step >= first
                )
            tails[first] = replace(
                self,
                times=self.times[first:],
                coefficients=replace(local, **cut),
                start_scale=1.0,
                transform=transform,
                draws=draws,
                draw_steps=None,
            )
        return tails[first]

    def output(self, step: Tensor, u: Tensor, f: Tensor) -> Tensor:
        """Return what enters the recurrence for the network's outputs f at inputs u; the engine applies it."""
        return f if self.transform is None else self.transform(step.numpy(), u, f)

    def __repr__(self) -> str:
        """Return the name and the number of steps, without arrays."""
        return f"Sampler({self.name}, {self.steps} steps)"


def data_prediction(kind: str, alpha: Array, sigma: Array, sigma_data: float = 0.5) -> tuple[Array, Array]:
    """Return p and q of xhat = p x + q f at signal alpha and noise level sigma, all (N,).

    Args:
        kind: A :data:`Prediction`.
        alpha: Signal.
        sigma: Noise.
        sigma_data: Standard deviation of the data in EDM's preconditioning.

    Raises:
        ValueError: For an eps-prediction at alpha = 0, a flow with alpha + sigma != 1, or another kind.
    """
    size = np.sqrt(alpha**2 + sigma**2)
    if kind == "eps":
        if (alpha == 0).any():
            raise ValueError("an eps-prediction is undefined where alpha = 0: use flow or v prediction there.")
        return 1 / alpha, -sigma / alpha
    if kind == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if kind == "v":
        return alpha / size**2, -sigma / size
    if kind == "flow":
        if not np.allclose(alpha + sigma, 1):
            raise ValueError("flow prediction needs alpha + sigma = 1: use the schedule flow().")
        return np.ones_like(alpha), -sigma
    if kind == "edm":
        total = sigma**2 + sigma_data**2
        return sigma_data**2 / total, sigma * sigma_data / np.sqrt(total)
    raise ValueError(f"prediction must be 'eps', 'x0', 'v', 'flow' or 'edm', got {kind!r}.")
