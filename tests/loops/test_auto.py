"""A loop that is planned: which solver it is given, if any, and what happens if that was wrong."""

from __future__ import annotations

import time

import pytest
import torch

import parataxis as px
from loop_problems import Net, ddim, relative


class Costly(Net):
    """A network whose calls take so long, by their rows."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x, t, condition=None):
        time.sleep(self.seconds(len(x)))
        return super().forward(x, t, condition)


def flat(rows):
    return 15e-3


def linear(rows):
    return 4e-3 * rows  # well above what a busy machine adds to a sleep


def loop_with(network):
    def draw():
        torch.manual_seed(0)
        return ddim(network, batch=1, count=40)

    return draw


def test_plan_of_a_loop_takes_what_its_network_costs_within_it():
    free, costly = (px.plan(loop_with(Costly(seconds))) for seconds in (flat, linear))
    assert free.solver.window >= 8
    assert free.speedup.median > 1.5
    assert free.loop_seconds == pytest.approx(40 * 15e-3, rel=0.6)
    assert costly.solver == px.Sequential()
    assert "a loop of 40 calls of 1 rows" in str(costly)


def test_auto_solves_a_loop_that_pays_and_leaves_one_that_does_not():
    for seconds, pays in ((flat, True), (linear, False)):
        loop = loop_with(Costly(seconds))
        draw, expected = px.parallel(loop, "auto"), loop()
        for _ in range(2):  # as planned, and as remembered
            assert relative(draw(), expected) <= (1e-2 if pays else 0)
            assert (draw.report.mode != "sequential") == pays
        if pays:
            assert draw.report.rounds < 40
        else:
            assert "the network's batch is not free" in draw.report.reason


def test_auto_gives_up_what_turns_out_slower():
    """Here every call of more than one row takes longer once it has been planned."""
    network = Costly(flat)
    draw = px.parallel(loop_with(network), "auto")
    draw()
    assert draw.report.mode != "sequential"
    network.seconds = lambda rows: 1e-3 if rows == 1 else 0.12
    for _ in range(4):
        draw()
    assert draw.report.mode == "sequential"
    assert "took longer than the loop" in draw.report.reason


def test_loop_that_cannot_be_planned_says_why():
    with pytest.raises(ValueError, match="cannot be solved in parallel: the loop has only 5 steps"):
        px.plan(lambda network: ddim(network, batch=1, count=5), Net())


def test_plan_takes_what_parallel_made(monkeypatch):
    draw = px.parallel(loop_with(Costly(flat)), tolerance=1e-3)
    assert "tolerance 0.001" in px.plan(draw).setting
    with pytest.raises(TypeError, match="target must be a function"):
        px.plan(3)
