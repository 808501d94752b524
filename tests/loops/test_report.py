"""Seconds of a call of a loop, and of the loop that it stands for."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from torch import nn

import parataxis as px
from parataxis.engine.latency import format_seconds

N = 40


class Sleeper(nn.Module):
    """A network whose calls take a time of their own, whatever their number of rows, or in proportion to it."""

    def __init__(self, call=0.0, row=0.0):
        super().__init__()
        self.call, self.row = call, row
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x, t):
        time.sleep(self.call + self.row * len(x))
        return torch.tanh(self.scale * x)


def loop_of(network, own=0.0):
    """An Euler loop whose own Python takes ``own`` seconds a step."""

    def draw():
        x = torch.linspace(-2, 2, 64).view(1, 64)
        for i in range(N):
            time.sleep(own)
            x = x - network(x, torch.tensor([float(i)])) / N
        return x

    return draw


def test_report_says_seconds_and_speedup_first():
    draw = px.parallel(loop_of(Sleeper(call=4e-3)), px.Secant(window=16))
    draw()
    draw()  # the first call records
    report = draw.report
    assert report.seconds > 4e-3 * report.rounds
    assert report.speedup == report.sequential_seconds / report.seconds
    assert str(report).startswith(f"{format_seconds(report.seconds)}, ")
    assert "times as fast as the loop (about " in str(report)


def test_estimate_of_the_loop_is_its_network_calls_and_its_own_python():
    network = Sleeper(call=2e-3)
    loop = loop_of(network, own=1e-3)
    draw = px.parallel(loop, px.Secant(window=16))
    draw()
    started = time.perf_counter()
    loop()
    measured = time.perf_counter() - started
    assert draw.report.estimated
    assert N * 3e-3 <= draw.report.sequential_seconds <= 4 * measured  # either may have been disturbed


def test_loop_that_runs_sequentially_is_measured():
    draw = px.parallel(loop_of(Sleeper(call=1e-3)), px.Sequential())
    draw()
    assert N * 1e-3 <= draw.report.sequential_seconds <= draw.report.seconds
    assert not draw.report.estimated
    assert 0 < draw.report.speedup <= 1


@pytest.mark.filterwarnings("default:running in parallel was slower:RuntimeWarning")
def test_slower_call_says_so_once_and_what_to_do():
    draw = px.parallel(loop_of(Sleeper(row=1e-3)), px.Secant(window=16))
    with pytest.warns(RuntimeWarning, match="was slower: the call took .* Pass solver='auto'"):
        draw()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw()
    assert draw.report.speedup < 0.9


def test_faster_call_says_nothing():
    assert px.Report(seconds=1.0, sequential_seconds=2.0).slower() is None
    assert px.Report(seconds=1.0, sequential_seconds=0.95).slower() is None  # within what timings are worth
    assert px.Report(seconds=1.0).slower() is None  # not known


def test_report_without_a_call_has_no_speedup():
    report = px.parallel(loop_of(Sleeper())).report
    assert str(report) == "none: not run yet"
    assert report.speedup != report.speedup
