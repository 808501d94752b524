"""A cover of what benchmarks/pipelines.py tries in full: every pipeline and every option, under every check.

``make matrix`` fills the table that docs/coverage.md shows.
"""

from __future__ import annotations

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


def cover():
    """Return (pipeline, option): every option once, the rarest first, with the pipeline that was taken least so far."""
    takes = {}
    for name in zoo.PIPELINES:
        for option, _ in zoo.variants(name):
            takes.setdefault(option, []).append(name)
    taken, pairs = Counter(), []
    for option, names in sorted(takes.items(), key=lambda item: len(item[1])):
        name = min(names, key=lambda name: (taken[name], SLOW.get(name, 0)))
        taken[name] += 1
        pairs.append((name, option))
    return pairs + [(name, "plain") for name in zoo.PIPELINES if not taken[name]]


SLOW = {"stable_diffusion": 2, "wan": 1}  # to compile


def short(rows):
    """Return what falls short in rows, as the table has it, by check."""
    return {row["check"]: row["falls_short"] for row in rows if row.get("falls_short")}


def told(name, option, *checks):
    """Return the rows of the table."""
    known = pipelines.rows()
    return [known[name, option, check] for check in checks]


@pytest.mark.parametrize(("name", "option"), cover())
def test_option_of_a_pipeline_passes_every_check_in_float32_but_for_what_the_page_says(name, option):
    """An option of a pipeline passes every check in float32 but for what the page says."""
    rows = pipelines.attempt(name, option, torch.float32)
    assert [row["check"] for row in rows] == ["window 1", "tolerance 0", "default"]
    assert rows[0].get("error") == "0.0e+00"
    assert short(rows) == short(told(name, option, "window 1", "tolerance 0", "default"))


@pytest.mark.parametrize("name", list(zoo.PIPELINES)[::3])  # the others in `make matrix`
def test_pipeline_ends_within_its_floor_in_bfloat16_but_for_what_the_page_says(name):
    """A pipeline ends within its floor in bfloat16 but for what the page says."""
    rows = pipelines.attempt(name, "plain", torch.bfloat16)
    assert rows[0]["mode"] == told(name, "plain", "bfloat16")[0]["mode"]
    assert short(rows) == short(told(name, "plain", "bfloat16"))


def test_cover_has_every_pipeline_and_every_option():
    """The cover has every pipeline and every option."""
    pairs = cover()
    assert {name for name, _ in pairs} == set(zoo.PIPELINES)
    assert {option for _, option in pairs} == {option for name in zoo.PIPELINES for option, _ in zoo.variants(name)}


def test_page_shows_the_table():
    """The page shows the table."""
    rows = pipelines.rows()
    assert pipelines.PAGE.read_text() == pipelines.page(rows.values())
    assert {key[:2] for key in rows} <= {(name, option) for name in zoo.PIPELINES for option, _ in zoo.variants(name)}
    assert {(name, "plain", check) for name in zoo.PIPELINES for check in pipelines.CHECKS} <= set(rows)
