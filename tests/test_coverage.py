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


@pytest.mark.parametrize(("name", "option"), cover())
def test_an_option_of_a_pipeline_passes_every_check_in_float32(name, option):
    rows = pipelines.attempt(name, option, torch.float32)
    assert len(rows) == 3
    assert {row["check"]: row["falls_short"] for row in rows if row["falls_short"]} == {}


@pytest.mark.parametrize(("name", "option"), [pair for pair in cover() if pair[1] != "compiled"])
def test_an_option_of_a_pipeline_ends_within_its_floor_in_bfloat16(name, option):
    (row,) = pipelines.attempt(name, option, torch.bfloat16)
    assert not row.get("falls_short")
    assert row["mode"] != "none" or "BFloat16" in row["reason"] or "bfloat16" in row["reason"].lower()


def test_the_cover_has_every_pipeline_and_every_option():
    pairs = cover()
    assert {name for name, _ in pairs} == set(zoo.PIPELINES)
    assert {option for _, option in pairs} == {option for name in zoo.PIPELINES for option, _ in zoo.variants(name)}


def test_the_table_is_full_and_the_page_shows_it():
    rows = pipelines.rows()
    assert pipelines.PAGE.read_text() == pipelines.page(rows.values())
    every = {(n, option, check) for n in zoo.PIPELINES for option, _ in zoo.variants(n) for check in pipelines.CHECKS}
    assert set(rows) == every
