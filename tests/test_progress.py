"""A loop that runs in parallel says how far it is."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import parataxis as px


class Network(torch.nn.Module):
    def forward(self, x, t):
        return torch.tanh(x)


network = Network()


def draw():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(12)
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


def test_bar_shows_accepted_steps_and_rounds(capsys):
    fast = px.parallel(draw, progress=True, denoisers=[network])
    with torch.no_grad():
        fast()
    shown = capsys.readouterr().err
    assert "draw: " in shown
    assert "12/12" in shown
    # The last round may be a real call by itself, behind which nothing is accepted any more.
    assert any(f"round={fast.report.rounds - late}" in shown for late in (0, 1))


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_logger_says_how_a_call_went(caplog, capsys, level):
    fast = px.parallel(draw, denoisers=[network])
    with torch.no_grad(), caplog.at_level(level, logger="parataxis"):
        fast()
    messages = [record.getMessage() for record in caplog.records if record.name == "parataxis"]
    assert messages[-1] == f"draw: {fast.report}"
    rounds = [message for message in messages if "steps accepted" in message]
    assert bool(rounds) == (level == logging.DEBUG)
    assert capsys.readouterr().err == ""


@pytest.fixture
def pipeline():
    """A pipeline whose bar is drawn at every move."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        8, 3, 3, block_out_channels=(8,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"],
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    pipe = DDIMPipeline(unet.eval().requires_grad_(False), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(mininterval=0, desc="own")
    return pipe


def draw_by(run):
    return run(num_inference_steps=12, generator=torch.Generator().manual_seed(0), output_type="pt").images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bar_of_a_pipeline_moves_with_what_is_accepted(pipeline, dtype, capsys):
    """In one pass the pipeline moves it; where the loop is recorded, in 16 bits, what is accepted does."""
    pipeline.to(dtype)
    capsys.readouterr()
    fast = px.parallel(pipeline)
    draw_by(fast)
    assert (fast.report.mode == "one pass") == (dtype == torch.float32)
    places = [int(place) for place in re.findall(r"own: .*?(\d+)/12", capsys.readouterr().err)]
    assert places[-1] == 12
    assert len({place for place in places if 0 < place < 12}) >= 3


def test_pipeline_has_one_bar(pipeline, capsys):
    """``progress=True`` shows ours in the place of the pipeline's."""
    draw_by(px.parallel(pipeline, progress=True))
    shown = capsys.readouterr().err
    assert "own: " not in shown
    assert "DDIMPipeline: " in shown


def test_pipeline_of_several_pipelines_has_no_bar_of_its_own(pipeline):
    """Such a one hands its bar on to its parts, and returns none."""

    class Combined(DDIMPipeline):
        def progress_bar(self, iterable=None, total=None):
            return iterable

    pipe = Combined(pipeline.unet.bfloat16(), pipeline.scheduler)
    fast = px.parallel(pipe)
    draw_by(fast)
    assert fast.report.mode in ("recurrence", "replay")
    assert fast.report.rounds
