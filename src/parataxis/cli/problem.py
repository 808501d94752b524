"""The samples that a command draws: model, sampler, labels and noise; all is checked before the work starts."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import flags
from .errors import Wrong, choose
from .options import SAMPLER_NAMES, sampler_options, with_parameters

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..engine.solution import Solutions
    from ..models import Model
    from ..samplers.sampler import Sampler

__all__ = ["Problem", "Wanted", "with_problem"]

SEEDS = 2**62
# Of the noise that samplers add: far from the seeds of the first noise that people choose. Within 32 bits, as torch's
# generators on the CPU look at no others.
NOISE_SEED = 2**31
STATES = 8  # copies of a state that a solve holds at least: noise, states, outputs, their last ones, corrections
TABLES = 24  # numbers of every step that sampler and solver hold at least: coefficients, schedule, tables


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn; each field is a flag of the commands that have :func:`with_problem`."""

    model: flags.ModelName = "digits"
    sampler: flags.Sampler = "ddim"
    steps: flags.Steps = 50
    tolerance: flags.Tolerance = 1e-2
    label: flags.Label = None
    guidance: flags.Guidance = 1.0
    count: flags.Count = 1
    seed: flags.Seed = 0
    max_rows: flags.MaxRows = 128
    device: flags.Device = "cpu"


def with_problem(omit: tuple[str, ...] = (), **defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of :class:`Wanted`; it takes them together as ``wanted``.

    Args:
        omit: Fields that are no flag of this command.
        defaults: Of fields, where they are others here.
    """
    hints = typing.get_type_hints(Wanted, include_extras=True)
    added = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, field.default),
            annotation=hints[field.name],
        )
        for field in fields(Wanted)
        if field.name not in omit
    ]
    return with_parameters(added, "wanted", lambda values: Wanted(**{**defaults, **values}), first=True)


@dataclass(frozen=True)
class Problem:
    """What is drawn.

    Attributes:
        wanted: The flags.
        model: With its network on the device.
        sampler: The equation.
        labels: (count,) or None.
    """

    wanted: Wanted
    model: Model
    sampler: Sampler
    labels: Tensor | None

    @classmethod
    def load(cls, wanted: Wanted, options: dict[str, str], *, window: int | None = None) -> Problem:
        """Read what the flags name.

        Args:
            wanted: The flags.
            options: Those of samplers, as they were typed.
            window: Steps of a round, for what a solve needs at least of memory; None for all.

        Raises:
            Wrong: For whatever does not fit, in one sentence.
            ValueError: Likewise, from the library.
        """
        count, steps, device = wanted.count, wanted.steps, wanted.device
        choose("sampler", wanted.sampler, SAMPLER_NAMES)
        if count < 1:
            raise Wrong(f"--count must be at least 1, got {count}.")
        if not math.isfinite(wanted.tolerance):
            raise Wrong(f"--tolerance must be a finite number, got {wanted.tolerance}.")
        if abs(wanted.seed) > SEEDS:
            raise Wrong(f"--seed must lie in -2^62..2^62, got {wanted.seed}.")
        _check_memory(count, steps, 1, window)
        chosen_options = sampler_options(wanted.sampler, options)
        import torch

        from .. import models

        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:  # what torch says without CUDA is an AssertionError
            raise Wrong(f"--device {device} cannot be used ({str(error).splitlines()[0]}): choose another.") from error
        name = wanted.model
        loaded = models.load(name if Path(name).is_dir() else choose("model", name, models.available()), device=device)
        _check_memory(count, steps, math.prod(loaded.shape), window)
        labels = _labels(wanted.label, loaded.classes, count)
        return cls(
            wanted=wanted,
            model=loaded,
            sampler=loaded.sampler(wanted.sampler, steps, **chosen_options),
            labels=None if labels is None else labels.to(device),
        )

    def draw(self, solver: Any, **options: Any) -> Solutions:
        """Draw the samples by a solver; the same ones each time."""
        from .. import sample

        arguments = self.denoise, self.noise, self.sampler, solver
        options |= {"condition": self.labels, "generator": self.generators(), "max_rows": self.wanted.max_rows}
        return sample(*arguments, tolerance=self.wanted.tolerance, **options)

    def warm_up(self, rows: int) -> None:
        """Call the network once with one sample and once with so many, as first calls take longer than others."""
        import torch

        times = self.sampler.network_times(self.noise.dtype)[:1].to(self.noise.device)
        for count in (1, rows):
            labels = () if self.labels is None else (self.labels[:1].expand(count),)
            with torch.no_grad():
                self.denoise(self.noise[:1].expand(count, *self.model.shape), times.expand(count), *labels)

    @functools.cached_property
    def denoise(self) -> Any:
        """The network with guidance."""
        return self.model.denoiser(self.wanted.guidance)

    @functools.cached_property
    def noise(self) -> Tensor:
        """(count, *shape) on the device."""
        import torch

        sources = _generators(self.wanted.seed, self.wanted.count)
        return torch.stack([torch.randn(self.model.shape, generator=source) for source in sources]).to(
            self.wanted.device
        )

    def generators(self) -> list[Generator]:
        """Return the sources of the noise that samplers add, one a sample; each call begins them anew."""
        return _generators(self.wanted.seed + NOISE_SEED, self.wanted.count)


def _generators(seed: int, count: int) -> list[Generator]:
    import torch

    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def _check_memory(count: int, steps: int, dim: int, window: int | None) -> None:
    """Raise if so many samples cannot fit into this machine at all."""
    total = math.inf
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not all systems say
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    states = min(steps, window or steps) + 1
    needed = 4 * dim * count * states * STATES + 8 * TABLES * max(steps, 0)
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
