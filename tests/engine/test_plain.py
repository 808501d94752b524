"""What ranks send one another is data: it comes back as it was, and nothing else is made of it."""

import json
import math

import numpy as np
import pytest

import parataxis as px
from parataxis.engine.distributed.plain import from_json, to_json
from parataxis.engine.latency import Latency


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        0.1,
        "a",
        [1, (2, None)],
        {"a": 1, 3: (4,)},
        math.inf,
        px.Secant(window=4),
        px.CoarseToFine(px.Picard(window=3), strides=(4, 2)),
        Latency((1, 2), (0.1, 0.2), limit=None),
    ],
)
def test_values_come_back(value):
    """Numbers, texts, containers and the named classes come back equal."""
    assert from_json(to_json(value), [*px.SOLVERS.values(), Latency]) == value


def test_numpy_numbers_become_numbers():
    """A number of numpy is sent as Python's."""
    assert from_json(to_json({"n": np.float64(0.5)})) == {"n": 0.5}


def test_other_classes_are_not_made():
    """A class that the reader has not named is refused, on both sides."""
    with pytest.raises(ValueError, match="another rank sent 'Secant', expected one of Picard"):
        from_json(to_json(px.Secant()), [px.Picard])
    with pytest.raises(ValueError, match="another rank sent 'system'"):
        from_json(json.dumps({"class": "system", "fields": {"command": "id"}}))
    with pytest.raises(TypeError, match="cannot be sent to other ranks"):
        to_json(print)
