"""The page itself.

It is for one person on this machine: it listens on the loopback address unless another one is given, every setting is
checked here and not only in the browser, one solve runs at a time, and only files of its own folder are served.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from ..samplers import SAMPLERS
from ..solvers import SOLVERS
from .replay import MAX_STEPS, Replay, Settings, replay
from .sources import names, source

__all__ = ["build", "launch"]

MAX_QUEUE = 8
SECONDS_A_ROUND = 0.5  # when played


def build(initial: Settings | None = None) -> Any:
    """Return the page, a ``gradio.Blocks``, with these settings to begin with.

    Raises:
        ModuleNotFoundError: If gradio is not installed, with the command that installs it.
    """
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs gradio: install it with  pip install 'parataxis[demo]'") from error

    with gr.Blocks(title="parataxis: watch it converge", analytics_enabled=False) as page:
        gr.Markdown(
            "# Watch it converge\nThe same sample twice: by the sequential loop, and many time steps side by side."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                inputs, forecast, button = _settings(gr, page, initial or Settings())
            with gr.Column(scale=3):
                parts = _result(gr)
        state, timer = gr.State(None), gr.Timer(SECONDS_A_ROUND, active=False)
        _connect(gr, [*inputs, forecast], button, parts, state, timer)
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)
    return page


def _settings(gr: Any, page: Any, first: Settings) -> tuple[list[Any], Any, Any]:
    """Return the fields in the order of :class:`Settings`, that of the forecast, and the button."""
    model = gr.Dropdown(names(), value=first.model, label="Model or policy")
    label = gr.Slider(0, 9, value=first.label or 0, step=1, label="Class")
    sampler = gr.Dropdown(list(SAMPLERS), value=first.sampler, label="Sampler")
    steps = gr.Slider(1, MAX_STEPS, value=first.steps, step=1, label="Steps")
    others = [
        gr.Dropdown(list(SOLVERS), value=first.solver, label="Solver"),
        gr.Slider(0, 64, value=first.window, step=1, label="Window (0: all steps)"),
        gr.Number(value=first.tolerance, minimum=0, maximum=1, label="Tolerance (relative error)"),
        gr.Number(value=first.seed, minimum=0, precision=0, label="Seed"),
    ]
    forecast = gr.Checkbox(value=False, label="Forecast by a plan (measures some calls)")
    button = gr.Button("Sample", variant="primary", elem_id="sample")

    def fit(name: str, present: str) -> tuple[Any, Any, Any]:
        """Offer what fits to a model: its classes, its samplers, its steps."""
        try:
            chosen = source(name) if name in names() else None
        except (ValueError, ModuleNotFoundError) as error:
            raise gr.Error(str(error), duration=None) from None
        if chosen is None:
            return gr.skip(), gr.skip(), gr.skip()
        fitting = chosen.samplers
        return (
            gr.Slider(visible=chosen.classes is not None),
            gr.Dropdown(fitting, value=present if present in fitting else fitting[0]),
            gr.Slider(maximum=min(MAX_STEPS, chosen.max_steps)),
        )

    for changed in (page.load, model.change):
        changed(fit, [model, sampler], [label, sampler, steps], show_progress="hidden")
    return [model, label, sampler, steps, *others], forecast, button


def _result(gr: Any) -> dict[str, Any]:
    """Return the parts that show a solve."""
    with gr.Row():
        parallel = gr.Image(label="parataxis", elem_id="parallel", format="png", height=270)
        sequential = gr.Image(label="sequential loop", elem_id="sequential", format="png", height=270)
        counts = gr.HTML(elem_id="counts", min_height=270)
    with gr.Row():
        play = gr.Button("Play", scale=0, min_width=100, elem_id="play")
        slider = gr.Slider(0, 1, value=0, step=1, label="Round", interactive=True, elem_id="round", scale=6)
    caption = gr.Markdown(elem_id="caption")
    figure = gr.Image(show_label=False, elem_id="figure", format="png")
    expected = gr.Markdown(elem_id="plan")
    return locals()


def _connect(gr: Any, inputs: list[Any], button: Any, parts: dict[str, Any], state: Any, timer: Any) -> None:
    """Say what follows when a person does something."""
    slider, shown_parts = parts["slider"], [parts["parallel"], parts["figure"], parts["caption"]]

    def run(*chosen: Any) -> tuple[Any, ...]:
        *values, forecast = chosen
        try:
            drawn = replay(Settings.of(values), forecast=bool(forecast))
        except (ValueError, ModuleNotFoundError) as error:
            raise gr.Error(str(error), duration=None) from None
        plan_text = "" if drawn.forecast is None else f"```\n{drawn.forecast}\n```"
        moved = gr.Slider(0, drawn.last, value=drawn.last, step=1, interactive=True)
        return drawn, moved, *show(drawn, drawn.last), drawn.sequential, drawn.table, plan_text, gr.Timer(active=False)

    def show(drawn: Replay | None, number: float) -> tuple[Any, ...]:
        if drawn is None:
            return None, None, ""
        place = min(max(int(number), 0), drawn.last)
        return drawn.pictures[place], drawn.figure(place), drawn.caption(place)

    def begin(drawn: Replay | None) -> tuple[Any, ...]:
        """Show the noise, and let the timer go on from there."""
        return 0, *show(drawn, 0), gr.Timer(active=drawn is not None)

    def advance(drawn: Replay | None, number: float) -> tuple[Any, ...]:
        following = int(number) + 1
        return following, *show(drawn, following), gr.Timer(active=drawn is not None and following < drawn.last)

    results = [state, slider, *shown_parts, parts["sequential"], parts["counts"], parts["expected"], timer]
    quiet = {"show_progress": "hidden"}
    button.click(run, inputs, results, concurrency_limit=1)
    slider.release(show, [state, slider], shown_parts, **quiet)
    slider.input(show, [state, slider], shown_parts, trigger_mode="always_last", **quiet)
    parts["play"].click(begin, [state], [slider, *shown_parts, timer], **quiet)
    timer.tick(advance, [state, slider], [slider, *shown_parts, timer], trigger_mode="once", **quiet)


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
