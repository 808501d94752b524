"""Passes of a loop leave its arguments, modules, generators and memory as the loop itself leaves them."""

from __future__ import annotations

import gc
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import parataxis as px
from loop_problems import (
    DIM,
    LOOPS,
    Net,
    both,
    ddim,
    relative,
    steps,
    with_gradients,
)
from parataxis.loops.runner import LoopRunner
from parataxis.parallel import parallel


def test_random_state_afterwards_is_that_of_the_sequential_loop():
    """The random state afterwards is that of the sequential loop."""
    net = Net()
    hidden = torch.Generator()
    numbers, dice = np.random.default_rng(0), random.Random(0)

    class Holder:
        source = hidden

    def loop():
        x = torch.randn(2, DIM, generator=Holder.source) + float(numbers.normal()) + dice.random()
        for t, _, s, b, r in steps(20):
            f = net(x, t)
            x = b * (x - s * f) + r * f + 0.1 * torch.randn(2, DIM, generator=Holder.source)
            x = x + 0.01 * torch.randn_like(x) + 0.01 * float(np.random.normal()) + 0.01 * random.random()  # noqa: NPY002
        return x

    def seed():
        torch.manual_seed(0)
        hidden.manual_seed(1)
        np.random.seed(2)  # noqa: NPY002
        random.seed(3)
        dice.seed(4)
        numbers.bit_generator.state = start

    def state():
        return torch.randn(1).item(), torch.randn(1, generator=hidden).item(), dice.random(), numbers.normal()

    start = numbers.bit_generator.state
    run = parallel(loop, tolerance=1e-4, denoisers=[net])
    for _ in range(2):
        seed()
        expected, after = loop(), state()
        seed()
        assert relative(run(), expected) <= 1e-4
        assert state() == after
        assert run.report.mode == "recurrence"


def test_one_module_that_a_function_can_see_is_its_denoiser():
    """The one module that a function can see is its denoiser."""
    net = Net()
    torch.manual_seed(0)
    expected = ddim(net)
    run = parallel(lambda count: ddim(net, count=count))
    torch.manual_seed(0)
    assert relative(run(20), expected) <= 1e-2
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"found 2 modules in the loop.*denoisers=\[\.\.\.\]"):
        parallel(lambda: (ddim(net), other))()


# --- what networks and loops do -----------------------------------------------------------------------------------


def test_arguments_that_the_loop_writes_to_are_kept_as_they_were():
    net = Net()

    def loop(net):
        x, t, condition = torch.randn(2, DIM), torch.zeros(2), torch.zeros(2, DIM)
        for time, a, s, b, r in steps(20):
            t.fill_(time)
            condition.add_(0.05)
            f = net(x, t, condition)
            x.sub_(f, alpha=s).div_(a).mul_(b).add_(f, alpha=r)
        return x

    expected, result, run = both(loop, net, tolerance=1e-4)
    assert relative(result, expected) <= 1e-4
    assert run.report.mode == "recurrence"


def test_containers_that_the_network_empties_are_full_at_every_evaluation():
    class Popping(Net):
        def forward(self, x, t, options):
            scale = options.pop("scale")
            return super().forward(x, t) * scale[0]

    net = Popping()
    expected, result, run = both(
        lambda net: ddim(net, predict=lambda net, x, t: net(x, t, {"scale": [0.9]})), net, tolerance=1e-4
    )
    assert relative(result, expected) <= 1e-4
    assert run.report.peak_rows > 2


def test_attributes_set_by_the_loop_hold_for_all_evaluations():
    """What the loop sets on its network holds for all evaluations and is put back."""

    class Modal(Net):
        def __init__(self):
            super().__init__()
            self.activation = torch.tanh

        def forward(self, x, t):
            return self.activation(super().forward(x, t))

    net = Modal()

    def loop(net, clip):
        before = net.activation
        net.activation = torch.sin
        x = ddim(net, clip=clip)
        net.activation = before
        return x

    for clip in (None, 1.0):
        for solver in (px.Secant(window=8), px.Secant(window=1)):
            expected, result, _ = both(lambda net, clip=clip: loop(net, clip), net, solver, tolerance=1e-4)
            assert relative(result, expected) <= 1e-4
            assert net.activation is torch.tanh


def test_other_modules_run_once_before_the_loop_and_once_after_it():
    net, encoder, decoder = Net(), Net(), Net()

    def loop():
        condition = encoder(torch.ones(2, DIM), 0)
        return decoder(ddim(net, predict=lambda net, x, t: net(x, t, condition)), 0)

    torch.manual_seed(0)
    expected = loop()
    encoder.rows.clear(), decoder.rows.clear()
    run = parallel(loop, tolerance=1e-4, denoisers=[net])
    torch.manual_seed(0)
    assert relative(run(), expected) <= 1e-4
    assert encoder.rows == [2]
    assert decoder.rows == [2]


def test_module_that_does_not_depend_on_outputs_is_memoized():
    """A module along the way that does not depend on outputs is remembered."""
    net, encoder = Net(), Net()

    def loop():
        def predict(net, x, t):
            return net(x, t, encoder(torch.ones(2, DIM), 0))

        return ddim(net, predict=predict)

    torch.manual_seed(0)
    expected = loop()
    encoder.rows.clear()
    run = parallel(loop, tolerance=1e-4, denoisers=[net])
    torch.manual_seed(0)
    assert relative(run(), expected) <= 1e-4
    assert encoder.rows == [2]
    assert run.report.rounds < 20


def test_network_that_feeds_another_runs_in_front_of_it():
    """A network that feeds another runs in front of it."""

    class Control(Net):
        def forward(self, x, t):
            return [super().forward(x, t), torch.tanh(x)]

    class Fed(Net):
        def forward(self, x, t, residuals):
            return super().forward(x, t) + 0.1 * residuals[0] * residuals[1]

    control, net = Control(), Fed()

    def loop():
        return ddim(net, predict=lambda net, x, t: net(x, t, control(x, t)))

    torch.manual_seed(0)
    expected = loop()
    run = parallel(loop, tolerance=1e-4, denoisers=[control, net])
    torch.manual_seed(0)
    assert relative(run(), expected) <= 1e-4
    assert run.report.mode == "recurrence"
    assert run.report.rounds < 20


@pytest.mark.parametrize("what", ["the loop", "its step"])
def test_compiled_loops_are_compiled_around_their_stubs(what):
    net = Net()

    def step(x, t):
        return x - 0.05 * net(x, t)

    def run(x):
        for i in range(12):
            x = (compiled if what == "its step" else step)(x, torch.tensor(50.0 * i))
        return x

    compiled = torch.compile(step if what == "its step" else run, backend="eager")
    loop, x = (run if what == "its step" else compiled), torch.randn(2, DIM)
    fast = parallel(loop, denoisers=[net])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*slower.*")
        assert relative(fast(x), loop(x)) <= 1e-2
    assert fast.report.mode == "recurrence"


def test_compiled_networks_run_compiled():
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph.forward(*args)

        return run

    class Plain(nn.Module):
        def forward(self, x, t):
            return 0.7 * x + torch.tanh(x.roll(1, 1))

    by_method, wrapped = Plain(), torch.compile(Plain(), backend=backend, dynamic=True)
    by_method.compile(backend=backend, dynamic=True)
    for net in (by_method, wrapped):
        before = dict(net.__dict__)
        expected, result, run = both(lambda net: ddim(net, count=12), net, tolerance=1e-4)
        assert net.__dict__ == before
        calls.clear()
        torch.manual_seed(0)
        assert relative(run(net), expected) <= 1e-4
        assert len(calls) == run.report.calls
        assert relative(result, expected) <= 1e-4


def test_what_is_compiled_is_not_compiled_again():
    """A network that is compiled in place has one graph of a single call, and one of a bucket."""
    shapes = []

    def backend(graph, inputs):
        shapes.append([tuple(value.shape) for value in inputs if value.ndim == 2])
        return graph

    class Plain(nn.Module):
        def forward(self, x, t):
            return 0.7 * x + torch.tanh(x.roll(1, 1)) * (1 + t.reshape(-1, 1) / 1000)

    net, x = Plain(), torch.randn(1, DIM)
    net.compile(backend=backend, dynamic=False)

    def loop(x):
        with torch.no_grad():
            for i in range(24):
                x = x - 0.05 * net(x, torch.tensor([50.0 * i]))
        return x

    expected = loop(x)
    assert len(shapes) == 1
    run = parallel(loop, px.Secant(window=8), denoisers=[net], buckets=(8,))
    for _ in range(3):
        assert relative(run(x), expected) <= 1e-2
    assert "sequential" not in run.report.mode
    assert relative(loop(x), expected) == 0
    assert len(shapes) == 2, shapes


def test_autocast_of_the_loop_holds_for_its_evaluations():
    seen = []

    class Casting(Net):
        def forward(self, x, t):
            seen.append((x @ self.inner).dtype)
            return super().forward(x, t)

    def loop(net):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ddim(net)

    expected, result, run = both(loop, Casting())
    assert set(seen) == {torch.bfloat16}
    assert relative(result, expected) <= max(1e-2, 2 * run.report.floor)


def test_states_of_few_elements_are_recorded_more_often():
    net = Net(4)

    def loop(net):
        x = torch.randn(1, 4)
        for t, a, s, b, r in steps(30):
            f = net(x, t)
            x = b * (x - s * f) / a + r * f
        return x

    expected, result, run = both(loop, net, tolerance=1e-4)
    assert relative(result, expected) <= 1e-4
    assert run.report.mode == "recurrence"


# --- what is refused ----------------------------------------------------------------------------------------------


def test_default_device_is_not_where_the_library_draws():
    """The default device is not where the library draws."""

    class Plain(nn.Module):
        def forward(self, x):
            return 0.7 * x + torch.tanh(x.roll(1, 1))

    def loop(net):
        x = torch.linspace(-1, 1, 2 * DIM, device="cpu").view(2, DIM)
        for _ in range(20):
            x = 0.95 * x + 0.05 * net(x)
        return x

    net = Plain()
    expected = loop(net)
    torch.set_default_device("meta")  # stands for a device of another kind than the loop's
    try:
        run = parallel(loop, px.Secant(window=1), denoisers=[net])
        assert torch.equal(run(net), expected)
        assert run.report.mode == "replay"
    finally:
        torch.set_default_device(None)


def test_errors_of_the_loop_pass_through_and_leave_nothing_behind():
    net = Net()
    before = dict(net.__dict__)

    def loop(net, fail):
        def predict(net, x, t):
            if fail and t < 500:
                raise LookupError("the loop's own")
            return net(x, t)

        return ddim(net, predict=predict)

    run = parallel(loop, denoisers=[net])
    with pytest.raises(LookupError, match="the loop's own"):
        run(net, True)
    assert net.__dict__ == before
    torch.manual_seed(0)
    expected = ddim(net)
    torch.manual_seed(0)
    assert relative(run(net, False), expected) <= 1e-2


def test_parallel_loop_within_another_raises():
    """One parallel loop within another is refused."""
    net = Net()
    inner = parallel(ddim, denoisers=[net])
    with pytest.raises(RuntimeError, match="loops that share modules"):
        parallel(lambda net: inner(net) + ddim(net), denoisers=[net])(net)
    assert "_compiled_call_impl" not in net.__dict__


def test_another_thread_calls_the_network_itself():
    net, calling, called, found = Net(), threading.Event(), threading.Event(), []

    def call():
        calling.wait()
        found.append(net(torch.ones(2, DIM), 500.0))
        called.set()

    def loop(net):
        def predict(net, x, t):
            if t == 499:  # in the middle of every pass
                calling.set()
                called.wait()
            return net(x, t)

        return ddim(net, predict=predict)

    expected = net(torch.ones(2, DIM), 500.0)
    thread = threading.Thread(target=call)
    thread.start()
    parallel(loop, denoisers=[net])(net)
    thread.join()
    assert torch.equal(found[0], expected)


def test_second_thread_with_the_same_module_raises():
    """A second thread with the same module is refused and no stub stays."""
    net, encoder, errors = Net(), Net(), []

    def beside(run):
        try:
            run()
        except RuntimeError as error:
            errors.append(error)

    def second():
        return ddim(other, predict=lambda net, x, t: net(x, t, encoder(torch.ones(2, DIM), 0)))

    other = Net()
    runs = [lambda: parallel(ddim, denoisers=[net])(net), parallel(second, denoisers=[other])]

    def loop(run):
        def predict(net, x, t):
            if t == 499:
                thread = threading.Thread(target=beside, args=(run,))
                thread.start()
                thread.join()
            return net(x, t, encoder(torch.ones(2, DIM), 0))

        return ddim(net, predict=predict)

    for run in runs:
        assert parallel(loop, denoisers=[net])(run).isfinite().all()
    assert len(errors) == 2  # one for each run of the loop, however many passes it took
    assert all("nor in two threads at the same time" in str(error) for error in errors)
    assert not any("_compiled_call_impl" in one.__dict__ for one in (net, other, encoder))


def test_shared_denoiser_serves_another_loop_between_calls():
    """A shared denoiser serves another loop between calls."""
    net = Net()
    torch.manual_seed(0)
    expected = ddim(net)
    one, two = parallel(ddim, denoisers=[net]), parallel(ddim, denoisers=[net])
    for run in (one, two, one, lambda net: ddim(net), two):
        torch.manual_seed(0)
        assert relative(run(net), expected) <= 1e-2


@pytest.mark.parametrize("name", ["ddim", "clipped", "a loop that is refused"])
def test_runner_is_freed_without_the_garbage_collector(name):
    """What a call holds is let go without the garbage collector."""
    loop = LOOPS.get(name, with_gradients)
    run = parallel(loop, denoisers=[net := Net()])

    def runners():
        return sum(type(value) is LoopRunner for value in gc.get_objects())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at all objects touches deprecated ones
        gc.collect()
        gc.disable()
        try:
            before = runners()
            run(net)
            run(net)
            assert runners() == before
        finally:
            gc.enable()


def test_twenty_calls_leak_neither_memory_nor_hooks():
    net = Net()
    run = parallel(ddim, denoisers=[net])
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at all objects touches deprecated ones
        for call in range(20):
            run(net)
            if call % 6 != 1:
                continue
            gc.collect()
            counts.append(len([one for one in gc.get_objects() if type(one) is torch.Tensor]))
    assert counts[-1] == counts[0]
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
