"""A sample drawn by the loop and by a solver, with its estimate after every round."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import plots
from ..engine.latency import format_seconds
from ..engine.run import Run
from ..engine.solution import Solutions
from ..html import figures
from ..planning import plan
from ..sample import sample
from ..samplers import SAMPLERS
from ..solvers import SOLVERS, as_solver
from ..solvers.sequential import Sequential
from .sources import Source, names, source

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Replay", "Settings", "replay"]

MAX_STEPS = 200
MAX_ROWS = 64  # of one network call
SEEDS = 2**31
MARK = "#e03131"
HIDDEN = 225  # of 255: how little later rounds shine through


@dataclass(frozen=True)
class Settings:
    """What is drawn, as chosen on the page.

    Attributes:
        model: One of the shipped models, or ``policy:`` and the name of a robot policy.
        label: Its class, or None for a model without.
        sampler: One of :data:`parataxis.SAMPLERS`.
        steps: N, at most 200.
        solver: One of :data:`parataxis.SOLVERS`.
        window: Steps of a round; 0 for all.
        tolerance: Relative error of the sample.
        seed: Of the noise.
    """

    model: str = "digits-flow"
    label: int | None = 7
    sampler: str = "flow_euler"
    steps: int = 100
    solver: str = "secant"
    window: int = 8
    tolerance: float = 1e-2
    seed: int = 0

    @classmethod
    def of(cls, values: Sequence[Any]) -> Settings:
        """Return settings from the values of the page's fields, in their order; whole numbers may come as floats."""
        whole = "label", "steps", "window", "seed"
        by_name = dict(zip(cls.__dataclass_fields__, values, strict=True))
        for name in whole:
            if isinstance(by_name[name], float) and by_name[name].is_integer():
                by_name[name] = int(by_name[name])
        return cls(**by_name)

    def __post_init__(self) -> None:
        """Raise a ValueError for a setting that the page does not offer: requests need not come from it."""
        for name, known in (("model", names()), ("sampler", SAMPLERS), ("solver", SOLVERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r:.40}.")
        ranges = {"steps": (1, MAX_STEPS), "window": (0, MAX_STEPS), "seed": (0, SEEDS)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number in {low}..{high}, got {value!r:.40}.")
        if not isinstance(self.tolerance, int | float) or not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance must lie in 0..1, got {self.tolerance!r:.40}.")


@dataclass(frozen=True)
class Replay:
    """A solve, round by round.

    Attributes:
        result: Of the solver.
        loop: Of the sequential loop.
        seconds: Of the solver, without what it takes to look at its estimates.
        pictures: The estimate before the first round, which is noise, and after each round.
        sequential: The loop's sample.
        explanation: What the pictures show, where they do not show it themselves.
        error: Relative, of the solver's sample to the loop's.
        forecast: What a plan expects, or None.
    """

    result: Solutions
    loop: Solutions
    seconds: float
    pictures: tuple[Image, ...]
    sequential: Image
    explanation: str
    error: float
    forecast: str | None = None

    @property
    def last(self) -> int:
        """The number of the last round."""
        return len(self.pictures) - 1

    @property
    def rows(self) -> list[list[str]]:
        """What is compared: heads, the loop, the solver."""
        solution = self.result[0]
        return [
            ["seconds", format_seconds(self.loop.seconds), format_seconds(self.seconds)],
            ["speed-up", "1", f"{self.loop.seconds / self.seconds:.2f}"],
            ["rounds", str(self.loop.rounds), str(self.result.rounds)],
            ["evaluations", str(self.loop.evaluations), str(self.result.evaluations)],
            ["relative error", "0", f"{self.error:.1e}"],
            ["estimated error", "0", f"{solution.error_estimate:.1e}" if solution.converged else "not known"],
        ]

    @property
    def table(self) -> str:
        """The same as a table in HTML."""
        compared = figures("What it took", [["", "loop", "parataxis"], *self.rows])
        style = "white-space: nowrap; font-size: 0.85em; font-variant-numeric: tabular-nums"
        return f'<div style="{style}">{compared}</div>'

    def caption(self, number: int) -> str:
        """Return how far the solve is after a round."""
        history, steps = self.result[0].history, self.result[0].steps
        accepted = history[number].accepted if number < len(history) else steps
        return f"after round {number} of {len(history)}: {accepted} of {steps} steps accepted. {self.explanation}"

    def figure(self, number: int) -> Image:
        """Return the figure of all rounds, in which those after this one are hidden."""
        from PIL import Image, ImageDraw

        figure, places, boxes = self._figure
        veil = Image.new("RGBA", figure.size)
        pen = ImageDraw.Draw(veil)
        for left, top, right, bottom in boxes:
            begin = max(places[number], left)
            if begin < right:
                pen.rectangle((begin, top, right, bottom), fill=(255, 255, 255, HIDDEN))
            pen.line([(begin, top), (begin, bottom)], fill=MARK, width=2)
        return Image.alpha_composite(figure.convert("RGBA"), veil).convert("RGB")

    @functools.cached_property
    def _figure(self) -> tuple[Image, list[float], list[tuple[float, float, float, float]]]:
        """The figure, drawn once; in pixels of it, where each round ends and the boxes that rounds are drawn in."""
        figure = self.result.plot()
        picture = plots.figure_image(figure)  # its layout is known afterwards
        axes = figure.axes[:2]
        ends = [float(axes[0].transData.transform((number + 0.5, 0))[0]) for number in range(self.last + 1)]
        extents = [part.get_window_extent() for part in axes]
        return picture, ends, [(box.x0, picture.height - box.y1, box.x1, picture.height - box.y0) for box in extents]


def replay(settings: Settings, *, forecast: bool = False) -> Replay:
    """Draw a sample by the loop and by the solver, and keep its estimate after every round.

    Raises:
        ValueError: If the settings do not fit together, such as a sampler and the schedule of the model.
    """
    drawn = source(settings.model)
    sampler, condition = drawn.sampler(settings.sampler, settings.steps), drawn.condition(settings.label)
    noise = torch.randn(1, *drawn.shape, generator=torch.Generator().manual_seed(settings.seed))
    solver: Any = as_solver(settings.solver)
    if hasattr(solver, "window"):
        solver = type(solver)(window=settings.window or None)
    estimates: list[Tensor] = [noise]
    looking = 0.0

    def draw(method: Any, **options: Any) -> Solutions:
        options |= {"condition": condition, "generator": torch.Generator().manual_seed(settings.seed + 1)}
        return sample(drawn.denoise, noise, sampler, method, tolerance=settings.tolerance, max_rows=MAX_ROWS, **options)

    def remember(runs: Sequence[Run]) -> None:
        nonlocal looking
        entered = time.perf_counter()
        estimates.append(runs[0].estimate[None])
        looking += time.perf_counter() - entered

    _warm_up(drawn, noise, sampler.network_times(noise.dtype)[:1], condition, settings.window)
    loop, result = draw(Sequential()), draw(solver, on_round=remember, keep_residuals=True)
    expected = None
    if forecast:
        options: dict[str, Any] = {"tolerance": settings.tolerance, "condition": condition, "max_rows": MAX_ROWS}
        expected = str(plan(drawn.denoise, noise, sampler, **options))
    return Replay(
        result=result,
        loop=loop,
        seconds=result.seconds - looking,
        pictures=tuple(drawn.picture(estimate, loop.x) for estimate in estimates),
        sequential=drawn.picture(loop.x, loop.x),
        explanation=drawn.explanation,
        error=float((result.x - loop.x).norm() / loop.x.norm()),
        forecast=expected,
    )


def _warm_up(drawn: Source, noise: Tensor, first_time: Tensor, condition: Tensor | None, window: int) -> None:
    """Call the network with one row and with those of a window: first calls take longer than others."""
    for rows in (1, min(window or MAX_ROWS, MAX_ROWS)):
        conditions = () if condition is None else (condition.expand(rows, *condition.shape[1:]),)
        with torch.no_grad():
            drawn.denoise(noise.expand(rows, *drawn.shape), first_time.expand(rows), *conditions)
