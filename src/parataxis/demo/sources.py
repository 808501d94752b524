"""What the page can draw: the shipped models, and robot policies where they are found.

The policies are those of ``examples/policy``. A wheel has two of them in ``parataxis/policies``; a clone has all.
"""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .. import models, plots
from ..samplers import SAMPLERS
from ..samplers.from_scheduler import from_scheduler
from ..samplers.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

__all__ = ["Source", "names", "source"]

GUIDANCE = 2.0  # where a model has classes
SIDE = 224  # pixels of a picture
PACKAGE = Path(__file__).parents[1]
POLICY_FOLDERS = (PACKAGE / "policies", PACKAGE.parents[1] / "examples" / "policy")
POLICY = "policy: "
COLOURS = ("#e03131", "#2f9e44", "#1c7ed6", "#9c36b5")  # of the entries of an action


class Source(Protocol):
    """Something that can be drawn.

    Attributes:
        shape: Of a sample.
        classes: How many there are, or None.
        samplers: Those that fit.
        max_steps: Of them.
        explanation: What its pictures show, where they do not show it themselves.
        denoise: ``denoise(x, t)``, or with :meth:`condition` ``denoise(x, t, condition)``.
    """

    shape: tuple[int, ...]
    classes: int | None
    samplers: list[str]
    max_steps: int
    explanation: str
    denoise: Callable[..., Tensor]

    def sampler(self, name: str, steps: int) -> Sampler:
        """Return a sampler of :attr:`samplers`, or raise a ValueError that names those that fit."""
        ...

    def condition(self, label: int | None) -> Tensor | None:
        """Return what the network is given besides states and times, one row, or raise a ValueError."""
        ...

    def picture(self, x: Tensor, target: Tensor) -> Image:
        """Return the picture of an estimate (1, *shape); ``target`` is the loop's sample."""
        ...


def names() -> list[str]:
    """Return what can be drawn: models first, then policies."""
    return [*models.available(), *(f"{POLICY}{name}" for name in _policies())]


@functools.lru_cache(maxsize=4)
def source(name: str) -> Source:
    """Load one of :func:`names`."""
    if name.startswith(POLICY):
        return PolicySource(_policies()[name.removeprefix(POLICY)])
    return ModelSource(name)


def _policies() -> dict[str, Path]:
    """Return the folders of the policies by their names."""
    root = next((folder for folder in POLICY_FOLDERS if (folder / "diffusion_policy.py").is_file()), None)
    weights = [] if root is None else sorted((root / "weights").glob("*/model.safetensors"))
    return {path.parent.name: path.parent for path in weights}


class ModelSource:
    """A shipped model: images with classes."""

    explanation = ""

    def __init__(self, name: str) -> None:
        self.model = models.load(name)
        self.shape, self.classes, self.max_steps = self.model.shape, self.model.classes, 200
        self.denoise = self.model.denoiser(1.0 if self.classes is None else GUIDANCE)
        self.samplers = [sampler for sampler in SAMPLERS if self._fits(sampler)]

    def _fits(self, name: str) -> bool:
        try:
            self.model.sampler(name, 2)
        except ValueError:
            return False
        return True

    def sampler(self, name: str, steps: int) -> Sampler:
        """Return a sampler of the model's schedule."""
        return self.model.sampler(name, steps)

    def condition(self, label: int | None) -> Tensor | None:
        """Return the class."""
        if self.classes is None:
            return None
        label = 0 if label is None else label
        if not isinstance(label, int) or not 0 <= label < self.classes:
            raise ValueError(f"label must lie in 0..{self.classes - 1}, got {label!r:.40}.")
        return torch.tensor([label])

    def picture(self, x: Tensor, target: Tensor) -> Image:
        """Return the image, enlarged."""
        return plots.image_grid(x, zoom=SIDE // self.shape[-1])


class PolicySource:
    """A robot policy: plans of actions, for the first observation of a recorded episode."""

    classes: int | None = None
    explanation = "Each curve is an entry of the robot's actions over the plan; grey is the plan of the loop."

    def __init__(self, folder: Path) -> None:
        policy = _policy_module(folder.parents[1]).load(folder)
        self.config = policy.config
        self.shape: tuple[int, ...] = (policy.network.horizon, policy.network.action_dim)
        self.denoise = policy.network
        self.observation: Tensor = policy.recorded(folder)[0]
        self.samplers = ["ddpm" if self.config.noise_scheduler_type == "DDPM" else "flow_euler"]
        self.max_steps = int(self.config.num_train_timesteps)

    def sampler(self, name: str, steps: int) -> Sampler:
        """Return the sampler of the policy's own scheduler."""
        if name not in self.samplers:
            raise ValueError(f"this policy was trained for {self.samplers[0]}, which {name} is not: choose that.")
        if steps > self.max_steps:
            raise ValueError(f"this policy was trained with {self.max_steps} steps, got {steps}: choose fewer.")
        scheduler = self.config.scheduler()
        scheduler.set_timesteps(steps)
        return from_scheduler(scheduler)

    def condition(self, label: int | None) -> Tensor | None:
        """Return the observation."""
        return self.observation

    def picture(self, x: Tensor, target: Tensor) -> Image:
        """Return the plan as curves, one for each entry of its actions, over that of the loop in grey."""
        return curves(x[0], target[0])


def curves(plan: Tensor, target: Tensor) -> Image:
    """Draw plans (T, A) in [-1, 1] over time: the target in grey, the plan in colours over it."""
    from PIL import Image, ImageDraw

    side = 4 * SIDE  # drawn large and made smaller, which smooths the lines
    canvas = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(canvas)
    pen.line([(0, side / 2), (side, side / 2)], fill="#dee2e6", width=4)
    for values, colours, width in ((target, ["#adb5bd"], 28), (plan, COLOURS, 10)):
        heights = (0.5 - 0.45 * values.float().clamp(-1.1, 1.1)) * side
        for entry, column in enumerate(heights.T.tolist()):
            points = [((0.03 + 0.94 * i / (len(column) - 1)) * side, y) for i, y in enumerate(column)]
            pen.line(points, fill=colours[entry % len(colours)], width=width, joint="curve")
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


@functools.lru_cache(maxsize=1)
def _policy_module(folder: Path) -> Any:
    """Import the policies' own code, which imports its network by its bare name."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("diffusion_policy")
    finally:
        sys.path.remove(str(folder))
