"""A loop that runs in parallel says how far it is."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import DDIMScheduler

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
    assert f"round={fast.report.rounds}" in shown


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
