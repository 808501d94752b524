"""A parallel loop leaves the world as the loop itself leaves it, however often its Python has run."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch

import stateful_loops
from parataxis.loops.world import World
from parataxis.parallel import parallel


def differ(left, right, tolerance):
    """Return whether what two loops left behind differs: plain values at all, numbers by more than the tolerance."""
    if isinstance(left, (list, tuple, dict)):
        if isinstance(left, dict):
            left, right = list(left.items()), list(right.items())
        return len(left) != len(right) or any(differ(a, b, tolerance) for a, b in zip(left, right, strict=True))
    if isinstance(left, (torch.Tensor, np.ndarray)):
        left, right = torch.as_tensor(left).double(), torch.as_tensor(right).double()
        return left.shape != right.shape or bool((left - right).norm() > tolerance * right.norm())
    if isinstance(left, float):
        return abs(left - right) > tolerance * max(1, abs(right))
    return left != right


@pytest.mark.parametrize("name", stateful_loops.MAKERS)
def test_parallel_loop_leaves_the_world_as_the_loop_does(name):
    """Three calls in a row give what the loop gives and leave what it leaves."""
    _, loop, look = stateful_loops.make(name)
    expected = [(loop().clone(), copy.deepcopy(look())) for _ in range(3)]
    net, loop, look = stateful_loops.make(name)
    run, exact = parallel(loop, tolerance=1e-3, denoisers=[net]), True
    for result, state in expected:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = run()
        caught = [warning for warning in caught if "slower" not in str(warning.message)]  # than such a tiny network
        # A loop that runs sequentially is the loop, to the bit, and says so.
        exact &= run.report.mode == "sequential"
        assert not differ(value, result, 0 if exact else 1e-3)
        assert not differ(look(), state, 0 if exact else 2e-2)
        assert run.report.error_estimate <= 1e-3 or not run.report.converged
        assert all("runs sequentially" in str(warning.message) for warning in caught)


SEQUENTIAL = {
    "noise from an iterator": "the iterator noises",
    "noise from a generator function": "the generator noises",
    "attribute of the network between steps": r"changes its denoiser between steps: Net.gain .* at call 6",
    "weights scaled between steps": r"changes its denoiser between steps: Net._parameters\['weight'\]",
    "buffer between steps": r"changes its denoiser between steps: Net._buffers\['shift'\]",
    "module exchanged between steps": "changes its denoiser between steps: .*extra",
    "hook added between steps": "changes its denoiser between steps: Net._forward_hooks",
    "network that counts": "counts its calls and reads the count",
    "hook that counts": r"counts its calls and reads the count .*'calls'",
    "closure that counts in a part": "hidden state",
}


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_what_cannot_be_put_back_is_named(name):
    net, loop, _ = stateful_loops.make(name)
    with pytest.warns(RuntimeWarning, match=f"runs sequentially: .*{SEQUENTIAL[name]}"):
        parallel(loop, denoisers=[net])()


def test_most_stateful_loops_are_parallel():
    """Only loops whose state cannot be put back run sequentially."""
    for name in ("list", "queue", "counter on self", "observation normalised in place", "step index of a scheduler"):
        net, loop, _ = stateful_loops.make(name)
        run = parallel(loop, denoisers=[net])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*slower.*")  # than such a tiny network
            run()
        assert run.report.mode != "sequential", name


def test_open_file_is_an_obstacle(tmp_path):
    with (tmp_path / "log.txt").open("w") as log:
        assert World([("log", [log])]).obstacles == [f"the open file log[0] ({log.name!r})"]
    assert World([("log", [log, io.StringIO()])]).obstacles == []  # closed, and in memory


def test_everything_is_put_back():
    """What a world holds is put back in place, also where objects hold one another."""
    array, tensor, shared = np.arange(3), torch.arange(3.0), []
    held = {"array": array, "tensor": tensor, "list": shared}
    shared.append(held)
    world = World([("held", held)])
    array[0], held["more"], held["tensor"] = 7, 1, None
    tensor.add_(1)
    shared.clear()
    assert len(list(world.changes())) == 5
    assert world.restore()
    assert list(held) == ["array", "tensor", "list"]
    assert held["tensor"] is tensor
    assert tensor.tolist() == array.tolist() == [0, 1, 2]
    assert shared[0] is held
    assert not list(world.changes())
