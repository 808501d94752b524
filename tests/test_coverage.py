"""A sample of what benchmarks/pipelines.py tries in full: every other option once, with one of the checks in turn.

``make matrix`` fills the table that docs/coverage.md shows.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

import pipelines
import zoo

# Some of diffusers' schedulers hand tensors to numpy 2; dynamo warns of a cache in torch itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning"),
]
TABLE = pipelines.rows()
FLOAT32 = [label for label, check in pipelines.CHECKS.items() if check.dtype == torch.float32]
SLOW = {"stable_diffusion", "wan"}  # to compile


def sample():
    """Return (pipeline, option, check): options by their rarity, with the pipeline that was taken least so far."""
    takes = {}
    for name, option, check in TABLE:
        if check == "default":
            takes.setdefault(option, []).append(name)
    taken, checks, cases = Counter(), itertools.cycle(FLOAT32), []
    for option, names in sorted(takes.items(), key=lambda item: len(item[1])):
        slow = SLOW if option == "compiled" else ()
        name = min(names, key=lambda name: (name in slow, taken[name]))
        taken[name] += 1
        cases.append((name, option, next(checks)))
    return cases[::2]  # the others in `make matrix`


def short_of(name, option, check):
    """Return what falls short in a check that is made now, and the mode."""
    row = pipelines.Case(name, option, pipelines.CHECKS[check].dtype).run(pipelines.CHECKS[check])
    return row["falls_short"], row["mode"]


@pytest.mark.parametrize(("name", "option", "check"), sample())
def test_option_of_a_pipeline_passes_a_check_in_float32_but_for_what_the_page_says(name, option, check):
    """An option of a pipeline passes a check in float32 but for what the page says."""
    assert short_of(name, option, check)[0] == TABLE[name, option, check]["falls_short"]


@pytest.mark.parametrize("name", list(zoo.PIPELINES)[1::26])
def test_pipeline_ends_within_its_floor_in_bfloat16_but_for_what_the_page_says(name):
    """A pipeline ends within its floor in bfloat16 but for what the page says."""
    row = TABLE[name, "plain", "bfloat16"]
    assert short_of(name, "plain", "bfloat16") == (row["falls_short"], row["mode"])


def test_page_shows_the_table():
    """The page shows the table, which has every pipeline under every check."""
    assert pipelines.PAGE.read_text() == pipelines.page(TABLE.values())
    assert {name for name, _, _ in TABLE} == set(zoo.PIPELINES)
    assert {(name, "plain", check) for name in zoo.PIPELINES for check in pipelines.CHECKS} <= set(TABLE)
