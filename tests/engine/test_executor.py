"""Rows reach the network in calls of a bounded size, and what comes back does not depend on it."""

from __future__ import annotations

import pytest
import torch

import parataxis as px
import problems
from parataxis.engine.executor import Executor
from parataxis.engine.latency import seconds_of
from parataxis.engine.rows import EvalBatch


def rows(count):
    return EvalBatch(torch.randn(count, 3), torch.arange(count), torch.zeros(count, dtype=torch.int64))


class Memory:
    """A network, row by row, whose memory does for so many rows; a record of its calls."""

    def __init__(self, most, fail):
        self.most, self.fail, self.sizes, self.failed = most, fail, [], 0

    def __call__(self, u, t=None):
        if len(u) > self.most:
            self.failed += 1
            self.fail()
        self.sizes.append(len(u))
        return torch.tanh(u) * 0.5


def cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu():
    torch.empty(2**46)  # more than any machine has


def python():
    raise MemoryError


def cudnn():
    raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


@pytest.mark.parametrize("fail", [cuda, cpu, python, cudnn])
def test_call_that_runs_out_of_memory_is_halved_and_the_limit_kept(fail):
    """A call that runs out of memory is halved and the limit kept."""
    network = Memory(5, fail)
    execute = Executor(lambda own: network(own.x))
    asked = rows(100)
    for _ in range(3):
        assert torch.equal(execute(asked), torch.tanh(asked.x) * 0.5)
    assert network.failed == 5  # 100, 50, 25, 12, 6
    assert execute.limit == 3
    assert set(network.sizes) == {3, 1}


def test_solve_backs_off_without_changing_its_result():
    """A solve backs off without changing its result."""
    noise, sampler = problems.noise(3), px.samplers.ddpm(steps=40)
    for solver in (px.Picard(), px.Secant(window=16)):
        free, tight = Memory(10**9, cuda), Memory(7, cuda)
        expected = px.sample(free, noise, sampler, solver, generator=problems.generators(3))
        result = px.sample(tight, noise, sampler, solver, generator=problems.generators(3))
        assert torch.equal(result.x, expected.x)
        assert result.rounds == expected.rounds
        assert max(free.sizes) > 40
        assert max(tight.sizes) <= 7
        assert tight.failed <= 7  # 2^7 > 3 x 40


def test_without_memory_for_one_row_it_is_said():
    with pytest.raises(torch.OutOfMemoryError, match=r"a single row of shape \(16,\) and torch.float64 on cpu: free"):
        px.sample(Memory(0, cpu), problems.noise(2), px.samplers.ddim(steps=10), px.Picard())
    network = Memory(3, cuda)
    with pytest.raises(torch.OutOfMemoryError, match="with the smallest bucket, 4 rows, of shape"):
        Executor(lambda own: network(own.x), buckets=(8, 4))(rows(5))
    assert network.failed == 2


def test_error_that_is_not_about_memory_is_left_alone():
    """An error that is not about memory is left alone."""

    def broken(own):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Executor(broken)(rows(4))


@pytest.mark.parametrize("max_rows", [None, 5, 100])
def test_calls_have_the_sizes_of_the_buckets_and_padding_is_cut_off(max_rows):
    network = Memory(10**9, cuda)
    seen = []

    def evaluate(own):
        seen.append(own)
        return network(own.x)

    execute = Executor(evaluate, buckets=(1, 4, 8), max_rows=max_rows)
    for count in (1, 2, 5, 8, 21):
        asked = rows(count)
        assert torch.equal(execute(asked), torch.tanh(asked.x) * 0.5)
        assert set(seen[-1].step.tolist()) <= set(range(count))  # a padding row repeats a real one
    assert set(network.sizes) == ({1, 4} if max_rows == 5 else {1, 4, 8})
    assert len(seen[-1].x) == len(seen[-1].step) == len(seen[-1].sample)


def test_buckets_are_left_downwards_when_memory_runs_out():
    network = Memory(9, cuda)
    execute = Executor(lambda own: network(own.x), buckets=(1, 4, 8, 16, 32))
    asked = rows(40)
    assert torch.equal(execute(asked), torch.tanh(asked.x) * 0.5)
    assert network.failed == 2
    assert network.sizes == [8] * 5


@pytest.mark.parametrize("limits", [{"max_rows": 3}, {"buckets": (1, 2, 4)}])
def test_outputs_may_lie_in_memory_that_the_next_call_writes_to(limits):
    memory = {}

    def replayed(own):
        kept = memory.setdefault(len(own.x), torch.empty_like(own.x))
        return kept.copy_(torch.tanh(own.x))

    asked = rows(10)
    assert torch.equal(Executor(replayed, **limits)(asked), torch.tanh(asked.x))


def test_output_of_another_form_raises_and_not_spread_over_the_rows_of_a_call():
    """An output of another form is refused and not spread over the rows of a call."""
    with pytest.raises(px.OutputError, match=r"returned the shape \(1, 3\), expected that of its input, \(2, 3\)"):
        Executor(lambda own: own.x[:1], max_rows=2)(rows(4))
    with pytest.raises(px.OutputError, match=r"returned the shape \(1, 3\), expected that of its input, \(4, 3\)"):
        Executor(lambda own: own.x[:1], buckets=(4,))(rows(1))


def test_clock_waits_for_the_device_of_the_rows(monkeypatch):
    """The clock waits for the device of the rows."""
    waited = []
    monkeypatch.setattr(torch.cpu, "synchronize", waited.append)
    seconds_of(lambda: waited.append("call"), torch.device("cpu", 1))
    assert waited == [torch.device("cpu", 1), "call", torch.device("cpu", 1)]
    assert seconds_of(lambda: None, torch.device("meta")) >= 0


def test_another_default_device_leaves_what_belongs_to_the_cpu_there():
    noise, sampler = problems.noise(2), px.samplers.ddim(steps=20)
    torch.set_default_device("meta")
    try:
        for solver in (px.Secant(window=8), "auto"):
            assert px.sample(lambda x, t: 0.1 * x, noise, sampler, solver, buckets=(1, 2, 6)).x.device == noise.device
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("option", "value"), [("max_rows", 0), ("max_rows", 2.5), ("buckets", ()), ("buckets", (0, 4)), ("buckets", (2.5,))]
)
def test_limits_are_at_least_one(option, value):
    with pytest.raises(ValueError, match=rf"{option} must be .*at least 1.*got"):
        Executor(lambda own: own.x, **{option: value})


def test_buckets_that_are_all_larger_than_the_limit_raise():
    """Buckets that are all larger than the limit are refused."""
    with pytest.raises(ValueError, match=r"smallest of buckets=\(4, 8\) must be at most max_rows=3"):
        Executor(lambda own: own.x, max_rows=3, buckets=(4, 8))


def test_what_is_no_tensor_is_said_whatever_the_limit():
    with pytest.raises(px.OutputError, match="returned list, expected a tensor"):
        px.sample(lambda x, t: [x], problems.noise(2), px.samplers.ddim(steps=10), px.Picard(), max_rows=3)
