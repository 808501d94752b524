"""When a run is stopped early, from estimates written by hand."""

from __future__ import annotations

import pytest
import torch

from parataxis import stopping


class Run:
    """What a rule looks at."""

    def __init__(self, rounds=0):
        self.rounds, self.estimate = rounds, torch.zeros(4)


def answers(rule, values):
    """Return what a rule says of a run whose estimates have these values, one after another."""
    run, said = Run(), []
    for value in values:
        run.estimate = torch.full((4,), float(value))
        said.append(rule(run))
    return said


def test_change_of_the_estimate_is_relative():
    assert answers(stopping.error_below(1e-2), [100, 102, 102.5]) == [False, False, True]
    assert answers(stopping.error_below(1e-2), [1e-3, 1.02e-3, 1.025e-3]) == [False, False, True]
    with pytest.raises(ValueError, match="the bound must be positive, got 0"):
        stopping.error_below(0)


def test_previews_have_settled_when_two_in_a_row_hardly_change():
    """At 40 dB a change of 0.02 in a range of 2."""
    assert answers(stopping.preview_settled(), [0, 1, 1.01, 1.015, 1.016]) == [False, False, False, True, True]
    assert not any(answers(stopping.preview_settled(), [0, 1, 1.01, 1.1, 1.11, 1.2]))


def test_previews_that_stand_still_before_the_sample_forms_do_not_count():
    """Their changes are small, but grow."""
    assert not any(answers(stopping.preview_settled(), [0, 0.001, 0.003, 0.006, 0.011]))
