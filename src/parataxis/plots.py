"""Image grids and figures; needs the extra ``plots``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from .engine.latency import Latency
    from .engine.solution import Solution

__all__ = ["image_grid", "figure_image", "latency", "rounds", "trace_grid", "work_precision"]

STATES = {"not evaluated yet": "#f1f3f5", "evaluated in this round": "#f59f00", "accepted": "#a5d8ff"}
FIVE_DECADES = 1e-5  # of residuals; smaller ones look alike


def image_grid(x: Tensor, columns: int = 10, zoom: int = 2) -> Image:
    """Lay images out in rows.

    Args:
        x: (B, 1 or 3, height, width) in [-1, 1]; values outside are clipped.
        columns: Images in a row.
        zoom: Pixels on a side for each of the image's.

    Raises:
        ValueError: If ``x`` is not a batch of grey or colour images.
        ModuleNotFoundError: If Pillow is not installed.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 1 or 3, height, width), got {tuple(x.shape)}.")
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need Pillow: install it with  pip install 'parataxis[plots]'") from error
    columns = min(columns, len(x))
    rows = -(-len(x) // columns)
    batch, channels, height, width = x.shape
    levels = ((x.detach().float().cpu().nan_to_num().clamp(-1, 1) + 1) * 127.5).round().byte()
    canvas = torch.full((rows * columns, channels, height + 1, width + 1), 128, dtype=torch.uint8, device="cpu")
    canvas[:batch, :, :height, :width] = levels
    grid = canvas.view(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    grid = grid.reshape(channels, rows * (height + 1), columns * (width + 1))[:, :-1, :-1]
    array = grid.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
    picture = Image.fromarray(array)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def trace_grid(rounds: Sequence[Tensor], columns: int = 10, zoom: int = 2) -> Image:
    """Show the estimates after every round: one row of images a round, the first round on top.

    Args:
        rounds: One (B, 1 or 3, height, width) tensor a round.
        columns: How many samples to show.
        zoom: Pixels on a side for each of the image's.
    """
    if not rounds:
        raise ValueError("there is no round to show: pass at least one estimate.")
    shown = [estimate[:columns] for estimate in rounds]
    return image_grid(torch.cat(shown), len(shown[0]), zoom)


def rounds(result: Any, sample: int = 0) -> Figure:
    """Show how the solve of a sample went: which steps were evaluated and accepted in every round, and its error.

    Args:
        result: What :func:`parataxis.sample` returned, or one of its solutions. With ``keep_residuals=True`` the steps
            are coloured by how far they were from obeying the sampler's equation.
        sample: Which of a batch.

    Raises:
        ValueError: If the result has no rounds.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    solution = result[sample] if isinstance(result, Sequence) else result
    if not solution.history:
        raise ValueError(f"there is no round to show: this sample is {solution.reason!r}.")
    figure = _figure()
    from matplotlib.ticker import MaxNLocator

    map_of_steps, errors = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_steps(figure, map_of_steps, solution)
    _draw_errors(errors, solution)
    map_of_steps.set_title(f"{_name(solution.solver)}: {solution.rounds} rounds for {solution.steps} steps", loc="left")
    errors.set_xlabel("round (network calls that wait for one another)")
    errors.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return _signed(figure)


def _draw_steps(figure: Figure, axes: Axes, solution: Solution) -> None:
    """Draw the states or residuals of all steps, a column for each round, and what is accepted after it."""
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    history, steps, residuals = solution.history, solution.steps, solution.residuals
    raster = np.zeros((len(history), steps))
    for number, entry in enumerate(history):
        raster[number, : entry.accepted] = 2
        raster[number, entry.accepted : entry.accepted + entry.width] = 1
    options: dict[str, Any] = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
    options["extent"] = (0.5, len(history) + 0.5, 0, steps)
    axes.imshow(raster.T, cmap=ListedColormap(list(STATES.values())), vmin=0, vmax=2, **options)
    shown = dict(STATES)
    if residuals is not None:
        del shown["evaluated in this round"]
        known = np.where(np.isfinite(residuals), residuals, np.nan)
        # A residual of 0 is that of a step which obeys its equation already.
        image = axes.imshow(
            np.clip(known, FIVE_DECADES, 1).T, cmap="inferno_r", norm=LogNorm(FIVE_DECADES, 1), **options
        )
        figure.colorbar(image, ax=axes, label="residual / state", pad=0.01, extend="both")
    accepted = [entry.accepted for entry in history[1:]] + [steps if solution.converged else history[-1].accepted]
    axes.step(range(1, len(accepted) + 1), accepted, where="mid", color="black", label="accepted after the round")
    patches = [Patch(facecolor=colour, edgecolor="grey", label=name) for name, colour in shown.items()]
    front = axes.get_legend_handles_labels()[0]
    axes.legend(handles=[*patches, *front], fontsize="small", loc="lower right")
    axes.set_ylabel("step of the sampler")


def _draw_errors(axes: Axes, solution: Solution) -> None:
    """Draw the error that is estimated of what is accepted, and the tolerance."""
    known = [(number, entry.error) for number, entry in enumerate(solution.history) if 0 < entry.error < math.inf]
    if 0 < solution.error_estimate < math.inf:
        known.append((len(solution.history), solution.error_estimate))
    if known:
        axes.semilogy(*zip(*known, strict=True), marker=".", color="black", label="estimated error")
    if solution.problem.tolerance > 0:
        axes.axhline(solution.problem.tolerance, color="#e03131", linestyle="--", label="tolerance")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, 0.95))
    axes.set_ylabel("error")


def latency(measured: Latency) -> Figure:
    """Show the seconds of a network call against its rows, and what one row at a time would take."""
    figure = _figure()
    axes = figure.subplots()
    rows, times = list(measured.rows), [1e3 * seconds for seconds in measured.times]
    axes.loglog(rows, times, marker="o", label="one call, measured")
    axes.loglog(rows, [times[0] / rows[0] * count for count in rows], "--", color="grey", label="one row after another")
    axes.set_xlabel("rows of the call")
    axes.set_ylabel("milliseconds")
    axes.set_title(f"batch headroom b* = {measured.batch_headroom:.2g}", loc="left")
    axes.legend()
    return _signed(figure)


def work_precision(curves: Mapping[str, Sequence[tuple[float, float]]], work: str = "rounds") -> Figure:
    """Show error against work, a curve for each method: lower and further left is better.

    Args:
        curves: By the name of the method, its points (work, relative error); points without an error are left out.
        work: What is counted, with its unit: ``rounds``, ``seconds``, ``evaluations / N``.
    """
    if not curves:
        raise ValueError("there is no curve to show: pass at least one method.")
    figure = _figure()
    axes = figure.subplots()
    for name, points in curves.items():
        known = sorted(point for point in points if point[1] > 0)
        if known:
            axes.loglog(*zip(*known, strict=True), marker="o", label=name)
    axes.set_xlabel(work)
    axes.set_ylabel("relative error to the sequential sample")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    return _signed(figure)


def figure_image(figure: Figure) -> Image:
    """Return a figure as a Pillow image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: install it with  pip install 'parataxis[plots]'") from error
    return Figure(figsize=(7.0, 4.0), layout="constrained")  # not of pyplot, which would keep it and need a display


def _name(solver: Any) -> str:
    name = type(solver).__name__
    if not hasattr(solver, "window"):
        return name
    return f"{name}, all steps at once" if solver.window is None else f"{name}, window {solver.window}"


def _signed(figure: Figure) -> Figure:
    """Say in a corner what has measured it."""
    from importlib.metadata import version

    source = f"measured by parataxis with torch {version('torch')}"
    figure.supxlabel(source, x=0.99, ha="right", fontsize="xx-small", color="grey")
    return figure
