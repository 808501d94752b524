"""The samples that a command draws: model, sampler, labels and noise; all is checked before the work starts."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import Wrong, choose
from .options import SAMPLER_NAMES, sampler_options

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..models import Model
    from ..samplers.sampler import Sampler

__all__ = ["Problem"]

SEEDS = 2**62
NOISE_SEED = 2**32  # of the noise that samplers add: beyond any seed of the first noise that people choose
STATES = 8  # copies of a state that a solve holds at least: noise, states, outputs, their last ones, corrections


@dataclass(frozen=True)
class Problem:
    """What is drawn.

    Attributes:
        model: With its network on the device.
        sampler: The equation.
        labels: (count,) or None.
        guidance: Of the network.
        count: Number of samples.
        seed: Sample i has the seed plus i.
        device: Of the network.
    """

    model: Model
    sampler: Sampler
    labels: Tensor | None
    guidance: float
    count: int
    seed: int
    device: str

    @classmethod
    def load(
        cls,
        *,
        model: str,
        sampler: str,
        steps: int,
        options: dict[str, str],
        tolerance: float,
        label: str | None,
        guidance: float,
        count: int,
        device: str,
        seed: int = 0,
        window: int | None = None,
    ) -> Problem:
        """Read what the flags name.

        Raises:
            Wrong: For whatever does not fit, in one sentence.
            ValueError: Likewise, from the library.
        """
        choose("sampler", sampler, SAMPLER_NAMES)
        if count < 1:
            raise Wrong(f"--count must be at least 1, got {count}.")
        if not math.isfinite(tolerance):
            raise Wrong(f"--tolerance must be a finite number, got {tolerance}.")
        if abs(seed) > SEEDS:
            raise Wrong(f"--seed must lie in -2^62..2^62, got {seed}.")
        _check_memory(count, steps, 1, window)
        chosen_options = sampler_options(sampler, options)
        import torch

        from .. import models

        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:  # what torch says without CUDA is an AssertionError
            raise Wrong(f"--device {device} cannot be used ({str(error).splitlines()[0]}): choose another.") from error
        name = model if Path(model).is_dir() else choose("model", model, models.available())
        loaded = models.load(name, device=device)
        _check_memory(count, steps, math.prod(loaded.shape), window)
        labels = _labels(label, loaded.classes, count)
        return cls(
            model=loaded,
            sampler=loaded.sampler(sampler, steps, **chosen_options),
            labels=None if labels is None else labels.to(device),
            guidance=guidance,
            count=count,
            seed=seed,
            device=device,
        )

    @property
    def denoise(self) -> Any:
        """The network with guidance."""
        return self.model.denoiser(self.guidance)

    def generators(self) -> list[Generator]:
        """Return the sources of the noise that samplers add, one a sample; each call begins them anew."""
        return _generators(self.seed + NOISE_SEED, self.count)

    def noise(self) -> Tensor:
        """Return (count, *shape) on the device."""
        import torch

        drawn = [torch.randn(self.model.shape, generator=source) for source in _generators(self.seed, self.count)]
        return torch.stack(drawn).to(self.device)


def _generators(seed: int, count: int) -> list[Generator]:
    import torch

    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def _check_memory(count: int, steps: int, dim: int, window: int | None) -> None:
    """Raise if so many samples cannot fit into this machine at all."""
    total = math.inf
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not all systems say
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    states = min(steps, window or steps) + 1
    needed = 4 * dim * count * states * STATES + 8 * max(steps, 0)
    if needed > total:
        raise Wrong(
            f"{count} samples of {steps} steps need at least {needed / 2**30:,.0f} GiB of memory, and this machine has "
            f"{total / 2**30:,.0f}: lower --count or --steps."
        )


def _labels(text: str | None, classes: int | None, count: int) -> Tensor | None:
    """Return the classes of the samples, or None for a model without."""
    import torch

    if classes is None:
        if text is not None:
            raise Wrong("this model is unconditional: leave --label out.")
        return None
    try:
        chosen = list(range(classes)) if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise Wrong(f"--label must be integers separated by commas, got {text!r}.") from None
    if not all(0 <= label <= classes for label in chosen):
        raise Wrong(f"--label must lie in 0..{classes - 1} (or {classes} for none), got {text!r}.")
    return torch.tensor([chosen[i % len(chosen)] for i in range(count)])
