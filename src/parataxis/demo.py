"""A page to watch a solve converge, on gradio (``pip install 'parataxis[demo]'``); ``parataxis demo`` opens it.

The page is for one person on this machine: it listens on the loopback address unless told otherwise, every setting is
checked here and not only in the browser, one solve runs at a time, and only files of its own folder are served.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import models, plots
from .engine.latency import format_seconds
from .engine.run import Run
from .engine.solution import Solutions
from .planning import plan
from .sample import sample
from .samplers import SAMPLERS
from .solvers import SOLVERS, as_solver
from .solvers.sequential import Sequential

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Replay", "Settings", "build", "launch", "replay"]

MAX_STEPS = 200
MAX_QUEUE = 8
MAX_ROWS = 64  # of one network call
SEEDS = 2**31
ZOOM = 8
GUIDANCE = 2.0  # where a model has classes


@dataclass(frozen=True)
class Settings:
    """What is drawn, as chosen on the page.

    Attributes:
        model: One of the shipped models.
        label: Its class, or None for a model without.
        sampler: One of :data:`parataxis.SAMPLERS`.
        steps: N, at most 200.
        solver: One of :data:`parataxis.SOLVERS`.
        window: Steps of a round; 0 for all.
        tolerance: Relative error of the sample.
        seed: Of the noise.
    """

    model: str = "digits"
    label: int | None = 7
    sampler: str = "ddim"
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
        for name, known in (("model", models.available()), ("sampler", SAMPLERS), ("solver", SOLVERS)):
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
        pictures: The estimate before the first round, which is noise, and after each round.
        sequential: The loop's sample.
        error: Relative, of the solver's sample to the loop's.
        forecast: What a plan expects, or None.
    """

    result: Solutions
    loop: Solutions
    pictures: tuple[Image, ...]
    sequential: Image
    error: float
    forecast: str | None = None

    @property
    def rows(self) -> list[list[str]]:
        """What is compared: heads, the loop, the solver."""
        solution = self.result[0]
        return [
            ["rounds", str(self.loop.rounds), str(self.result.rounds)],
            ["evaluations", str(self.loop.evaluations), str(self.result.evaluations)],
            ["seconds", format_seconds(self.loop.seconds), format_seconds(self.result.seconds)],
            ["relative error", "0", f"{self.error:.1e}"],
            ["estimated error", "-", f"{solution.error_estimate:.1e}" if solution.converged else "not known"],
        ]


@functools.lru_cache(maxsize=4)
def _load(name: str) -> models.Model:
    return models.load(name)


def replay(settings: Settings, *, forecast: bool = False) -> Replay:
    """Draw a sample by the loop and by the solver, and keep its estimate after every round.

    Raises:
        ValueError: If the settings do not fit together, such as a sampler and the schedule of the model.
    """
    model = _load(settings.model)
    sampler = model.sampler(settings.sampler, settings.steps)
    condition = None
    if model.classes is not None:
        label = 0 if settings.label is None else settings.label
        if not isinstance(label, int) or not 0 <= label < model.classes:
            raise ValueError(f"label must lie in 0..{model.classes - 1}, got {label!r:.40}.")
        condition = torch.tensor([label])
    noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(settings.seed))
    denoise = model.denoiser(1.0 if model.classes is None else GUIDANCE)
    solver: Any = as_solver(settings.solver)
    if hasattr(solver, "window"):
        solver = type(solver)(window=settings.window or None)
    estimates: list[Tensor] = [noise]

    def draw(method: Any, on_round: Any = None) -> Solutions:
        generator = torch.Generator().manual_seed(settings.seed + 1)
        options: dict[str, Any] = {"condition": condition, "generator": generator, "on_round": on_round}
        return sample(denoise, noise, sampler, method, tolerance=settings.tolerance, max_rows=MAX_ROWS, **options)

    def remember(runs: Any) -> None:
        run: Run = runs[0]
        estimates.append(run.estimate[None])

    loop, result = draw(Sequential()), draw(solver, remember)
    expected = None
    if forecast:
        made = plan(denoise, noise, sampler, tolerance=settings.tolerance, condition=condition, max_rows=MAX_ROWS)
        expected = str(made)
    error = float((result.x - loop.x).norm() / loop.x.norm())
    pictures = tuple(plots.image_grid(estimate, zoom=ZOOM) for estimate in estimates)
    return Replay(result, loop, pictures, plots.image_grid(loop.x, zoom=ZOOM), error, expected)


def _figure(shown: Replay, number: int) -> Image:
    """Return the figure of the rounds, with the present one marked."""
    figure = shown.result.plot()
    for axes in figure.axes:
        axes.axvline(max(number, 0.5), color="#e03131", linewidth=1.5)
    return plots.figure_image(figure)


def _caption(shown: Replay, number: int) -> str:
    history, steps = shown.result[0].history, shown.result[0].steps
    accepted = history[number].accepted if number < len(history) else steps
    return f"after round {number} of {len(history)}: {accepted} of {steps} steps accepted"


def build(initial: Settings | None = None) -> Any:
    """Return the page, a ``gradio.Blocks``, with these settings to begin with.

    Raises:
        ModuleNotFoundError: If gradio is not installed, with the command that installs it.
    """
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs gradio: install it with  pip install 'parataxis[demo]'") from error

    first = initial or Settings()

    def run(*chosen: Any) -> tuple[Any, ...]:
        *values, forecast = chosen
        try:
            shown = replay(Settings.of(values), forecast=bool(forecast))
        except ValueError as error:
            raise gr.Error(str(error), duration=None) from None
        last = len(shown.pictures) - 1
        plan_text = "" if shown.forecast is None else f"```\n{shown.forecast}\n```"
        slider = gr.Slider(0, last, value=last, step=1, interactive=True)
        return shown, slider, *show(shown, last), shown.sequential, shown.rows, plan_text

    def show(shown: Replay | None, number: float) -> tuple[Any, ...]:
        if shown is None:
            return None, None, ""
        place = min(max(int(number), 0), len(shown.pictures) - 1)
        return shown.pictures[place], _figure(shown, place), _caption(shown, place)

    with gr.Blocks(title="parataxis: watch it converge", analytics_enabled=False) as page:
        gr.Markdown(
            "# Watch it converge\nThe same sample twice: by the sequential loop, and many time steps side by side."
        )
        state = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1):
                inputs = [
                    gr.Dropdown(models.available(), value=first.model, label="Model"),
                    gr.Slider(0, 9, value=first.label or 0, step=1, label="Class (models with classes)"),
                    gr.Dropdown(list(SAMPLERS), value=first.sampler, label="Sampler"),
                    gr.Slider(1, MAX_STEPS, value=first.steps, step=1, label="Steps"),
                    gr.Dropdown(list(SOLVERS), value=first.solver, label="Solver"),
                    gr.Slider(0, 64, value=first.window, step=1, label="Window (0: all steps)"),
                    gr.Number(value=first.tolerance, minimum=0, maximum=1, label="Tolerance (relative error)"),
                    gr.Number(value=first.seed, minimum=0, precision=0, label="Seed"),
                    gr.Checkbox(value=False, label="Forecast by a plan (measures some calls)"),
                ]
                button = gr.Button("Sample", variant="primary", elem_id="sample")
            with gr.Column(scale=2):
                with gr.Row():
                    parallel = gr.Image(label="parataxis", elem_id="parallel", format="png", height=260)
                    sequential = gr.Image(label="sequential loop", elem_id="sequential", format="png", height=260)
                slider = gr.Slider(0, 1, value=0, step=1, label="Round", interactive=True, elem_id="round")
                caption = gr.Markdown(elem_id="caption")
                counts = gr.Dataframe(
                    headers=["", "sequential", "parataxis"], interactive=False, elem_id="counts", label="What it took"
                )
                figure = gr.Image(show_label=False, elem_id="figure", format="png")
                expected = gr.Markdown(elem_id="plan")
        shown_parts = [parallel, figure, caption]
        button.click(
            run,
            [*inputs[:8], inputs[8]],
            [state, slider, *shown_parts, sequential, counts, expected],
            concurrency_limit=1,
        )
        slider.release(show, [state, slider], shown_parts, show_progress="hidden")
        slider.input(show, [state, slider], shown_parts, show_progress="hidden", trigger_mode="always_last")
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)
    return page


def launch(
    host: str = "127.0.0.1",
    port: int = 7860,
    *,
    initial: Settings | None = None,
    open_browser: bool = False,
    wait: bool = True,
) -> Any:
    """Serve the page until Ctrl-C.

    Args:
        host: Address to listen on; the loopback address by default.
        port: Of the page; 0 for any that is free.
        initial: Settings that the page begins with.
        open_browser: Open the page in a browser.
        wait: Return only when the server has ended.

    Returns:
        The page, which ``close()`` ends.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="parataxis-demo-")  # the only files that are served
    page = build(initial)
    import gradio as gr

    # Fonts of the system: gradio's own themes ask a server for theirs.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host,
        server_port=port or None,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        theme=theme,
        footer_links=[],
        max_file_size=1,
    )
    if wait:
        print(f"parataxis demo: {page.local_url} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return page
