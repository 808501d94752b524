"""Loops and networks that cannot be solved in parallel run sequentially and say why."""

from __future__ import annotations

import contextlib
import copy
import random
import time
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from loop_problems import (
    DIM,
    Net,
    both,
    ddim,
    relative,
    steps,
    with_gradients,
)
from parataxis.parallel import parallel
from parataxis.solvers import Secant


class Caching(Net):
    def forward(self, x, t):
        self.last = super().forward(x, t)
        return self.last


class Writing(Net):
    def forward(self, x, t, cache):
        cache[str(t)] = x.clone()
        return super().forward(x, t)


class Filling(Net):
    def forward(self, x, t, memory):
        memory.entries.append(x.clone())
        return super().forward(x, t) + 0.01 * memory.entries[0]


class Memory:
    def __init__(self):
        self.entries = []


class Dropping(Net):
    def forward(self, x, t):
        return torch.dropout(super().forward(x, t), 0.1, self.training)


class Overwriting(Net):
    def forward(self, x, t):
        output = super().forward(x, t)
        x.mul_(0.5)
        return output


class Normalising(Net):
    """Batch normalisation in training mode, whose statistics no output depends on."""

    def __init__(self):
        super().__init__()
        self.normalise = nn.BatchNorm1d(DIM, affine=False)

    def forward(self, x, t):
        self.normalise(x)
        return super().forward(x, t)


class Collecting(Net):
    """With a hook that collects outputs, which it never looks at."""

    def __init__(self):
        super().__init__()
        self.collected = []
        self.register_forward_hook(lambda module, args, output: module.collected.append(output))


class Deciding(Net):
    """Draws Python's random numbers, which no output depends on."""

    def forward(self, x, t):
        random.random()
        return super().forward(x, t)


class Summing(Net):
    """Returns a number of all rows, too: of their values, or of their times."""

    def __init__(self, summary):
        super().__init__()
        self.summary = summary

    def forward(self, x, t):
        output = super().forward(x, t)
        return output, self.summary(output, t)


def adaptive(net):
    x, t = torch.randn(2, DIM), 1.0
    while t > 0:
        f = net(x, t * 999)
        step = 0.05 / (1 + float(f[0, 0].abs()))
        x, t = x - step * f, t - step
    return x


def checked(net):
    def predict(net, x, t):
        f = net(x, t)
        if torch.cosine_similarity(x, f).min() < 0.4:
            raise ValueError("the network diverged")
        return f

    return ddim(net, predict=predict)


def infinite(net):
    x = torch.randn(2, DIM)
    for t, a, s, b, r in steps(20):
        f = net(x, t)
        a = 0.0 if t == 999 else a
        x = torch.where(torch.isfinite(y := b * (x - s * f) / a + r * f), y, y)
    return x


REFUSED = {
    "hidden state": (Caching, ddim, "hidden state"),
    "a cache among the arguments": (
        Writing,
        lambda net: ddim(net, predict=lambda net, x, t, cache={}: net(x, t, cache)),
        "writes into its arguments",
    ),
    "a cache object": (
        Filling,
        lambda net: ddim(net, predict=lambda net, x, t, memory=Memory(): net(x, t, memory)),  # noqa: B008
        "hidden state",
    ),
    "random numbers": (Dropping, ddim, r"draws random numbers.*eval\(\)"),
    "random numbers of Python": (Deciding, ddim, "draws random numbers"),
    "an input that is overwritten": (Overwriting, ddim, "writes into a tensor that it is given"),
    "running statistics": (Normalising, ddim, r"hidden state: .*running_\w+'\]\. Call its eval\(\) first"),
    "collected outputs": (Collecting, ddim, "hidden state: .*collected"),
    "gradients": (Net, with_gradients, "gradients through the denoiser"),
    "adaptive steps": (Net, adaptive, "depends on"),
    "outputs at random": (Net, checked, r"raised ValueError\('the network diverged'\) on trial outputs"),
    "an infinite step": (Net, infinite, "not finite although every output was"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_loops_run_sequentially(name):
    """What cannot be solved in parallel runs sequentially and says why."""
    make, loop, reason = REFUSED[name]
    net = make()
    torch.manual_seed(0)
    expected = loop(net)
    run = parallel(loop, denoisers=[net])
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match=f"runs sequentially: .*{reason}"):
        result = run(net)
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())
    assert run.report.mode == "sequential"
    assert "_compiled_call_impl" not in net.__dict__


def stepping(kind, count, *, copied=False):
    """Return a loop of a scheduler; the network is given the state itself, or a copy."""

    def loop(net):
        scheduler = kind(clip_sample=False)
        scheduler.set_timesteps(count)
        x = torch.randn(2, DIM)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x.clone() if copied else x, t), t, x).prev_sample
        return x

    return loop


@pytest.mark.parametrize("make", [Caching, Dropping, Deciding, Normalising, Collecting])
def test_one_pass_leaves_a_stateful_network_and_random_numbers_as_the_loop_does(make):
    """Where a loop is run once, what a check of its network has drawn and written is put back before it goes on."""
    loop = stepping(DDPMScheduler, 12)

    def run(call, net):
        torch.manual_seed(0)
        random.seed(0)
        x = call(net)
        numbers = [tensor for name, tensor in net.state_dict().items() if "normalise" in name]
        return x, torch.rand(()), torch.tensor(random.random()), *numbers, *getattr(net, "collected", ())

    torch.manual_seed(1)
    net = make()
    expected = run(loop, copy.deepcopy(net))
    with pytest.warns(RuntimeWarning, match="runs sequentially"):
        result = run(parallel(loop, denoisers=[net]), net)
    assert len(result) == len(expected)
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("copied", [False, True])
def test_input_that_is_overwritten_is_what_a_loop_goes_on_from(copied):
    """A loop that is run once goes on from what its network leaves in its state, or has left in a copy of it."""
    loop, net = stepping(DDIMScheduler, 24, copied=copied), Overwriting()
    torch.manual_seed(0)
    expected = loop(net)
    run = parallel(loop, denoisers=[net])
    for _ in range(2):
        torch.manual_seed(0)
        with (
            contextlib.nullcontext()
            if copied
            else pytest.warns(RuntimeWarning, match="runs sequentially: .*writes into a")
        ):
            assert relative(run(net), expected) <= 1e-2
    assert run.report.mode == ("one pass" if copied else "sequential")


SUMMARIES = {
    "a tensor": lambda output, t: output.std(),
    "a tensor of one element": lambda output, t: output.std().reshape(1),
    "a number": lambda output, t: float(output.std()),
    "of time": lambda output, t: torch.as_tensor(t).float().mean(),
}


@pytest.mark.parametrize("name", SUMMARIES)
@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize("scheduled", [False, True])
def test_numbers_of_no_row_are_those_of_the_loops_own_calls(name, window, scheduled):
    """A mean or a loss that a network returns beside its rows is of one call, not of a batch of them."""
    net, seen = Summing(SUMMARIES[name]), []

    def predict(net, x, t):
        output, summary = net(x, t)
        seen.append(float(summary))
        return output

    def loop(net):
        if not scheduled:
            return ddim(net, predict=predict)
        scheduler = DDPMScheduler(clip_sample=False)
        scheduler.set_timesteps(12)
        x = torch.randn(1, DIM)
        for t in scheduler.timesteps:
            x = scheduler.step(predict(net, x, t), t, x).prev_sample
        return x

    torch.manual_seed(0)
    expected, of_loop = loop(net), seen.copy()
    seen.clear()
    run = parallel(loop, Secant(window=window), denoisers=[net])
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # most of them run sequentially
        result = run(net)
    assert relative(result, expected) <= 1e-2
    assert seen == pytest.approx(of_loop, 1e-2)


def test_number_of_no_row_that_never_changes_is_no_obstacle():
    """A number that is the same in all calls is answered."""
    net = Summing(lambda output, t: torch.tensor(0.5))
    expected, result, run = both(lambda net: ddim(net, predict=lambda net, x, t: torch.mul(*net(x, t))), net)
    assert relative(result, expected) <= 1e-2
    assert run.report.mode != "sequential"


class EverySecond(Net):
    """Answers every second call with what it said before, as feature caches do."""

    count, before = 0, None

    def forward(self, x, t):
        if self.count % 2 == 0 or self.before.shape != x.shape:
            self.before = super().forward(x, t)
        self.count += 1
        return self.before


class Written(Net):
    """Likewise, with a buffer."""

    count = 0

    def __init__(self):
        super().__init__()
        self.register_buffer("before", torch.zeros(2, DIM))

    def forward(self, x, t):
        if self.count % 2 == 0:
            self.before.copy_(super().forward(x, t))
        self.count += 1
        return self.before.clone()


class Growing(Net):
    """Counts its calls, and answers by their number."""

    count = 0

    def forward(self, x, t):
        self.count += 1
        return super().forward(x, t) * (1 + 0.05 * (self.count % 30))


class Momentum(Net):
    last = 0

    def forward(self, x, t):
        self.last = super().forward(x, t) + 0.3 * self.last
        return self.last


class Noisy(Net):
    def __init__(self):
        super().__init__()
        self.source = torch.Generator()

    def forward(self, x, t):
        output = super().forward(x, t)
        return output + 0.3 * torch.randn(output.shape, generator=self.source)


class Hidden(Net):
    """Likewise, where nobody looks: in a part of the standard library."""

    def forward(self, x, t):
        output = Net.forward(self, x, t)
        return output + 0.3 * (time.perf_counter_ns() % 1_000_003) / 1_000_003


@pytest.mark.parametrize("make", [EverySecond, Written, Growing, Momentum, Noisy])
def test_stateful_network_runs_sequentially_from_its_state(make):
    """A network that keeps state runs sequentially from the state that it was in."""
    torch.manual_seed(0)
    expected = ddim(make())
    run = parallel(ddim, denoisers=[net := make()])
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match="hidden state|draws random numbers"):
        assert torch.equal(run(net), expected)


def test_attributes_set_by_the_loop_are_restored_before_it_runs_sequentially():
    """What a loop has set on its network is put back before it runs sequentially."""
    net = Net()
    net.activation = torch.tanh

    def loop(net):
        before, net.activation = net.activation, torch.sin
        x = with_gradients(net)
        net.activation = before
        return x

    with pytest.warns(RuntimeWarning, match="runs sequentially"):
        parallel(loop, denoisers=[net])(net)
    assert net.activation is torch.tanh


def test_network_that_answers_the_same_input_in_different_ways_runs_sequentially():
    """A network that answers the same input in different ways runs sequentially."""
    with pytest.warns(RuntimeWarning, match="answers the same input in different ways"):
        parallel(ddim, denoisers=[net := Hidden()])(net)


def test_large_tensors_written_by_the_network_are_warned_about():
    """Large tensors that a network has written to are told of."""

    class Adding(Net):
        def __init__(self):
            super().__init__()
            self.memory = torch.zeros(1 << 21)

        def forward(self, x, t):
            self.memory.add_(1)
            return super().forward(x, t)

    net = Adding()
    with pytest.warns(RuntimeWarning, match="hidden state.*written to large tensors, so the result may differ"):
        parallel(ddim, denoisers=[net])(net)


def test_tables_that_fill_in_on_the_first_call_are_no_state():
    class Filling(Net):
        table = None

        def forward(self, x, t):
            if self.table is None:
                self.table = torch.linspace(0, 1, DIM)
            return super().forward(x, t) + self.table

    expected, result, run = both(ddim, Filling())
    assert relative(result, expected) <= 1e-2
    assert run.report.mode == "recurrence"


def test_generators_of_other_devices_are_restored(monkeypatch):
    """Generators of other devices are seen and put back."""
    device = torch.Generator()  # stands for a device's own
    monkeypatch.setattr(torch.cuda, "default_generators", (device,))

    class Sampling(Net):
        def forward(self, x, t):
            return super().forward(x, t) + torch.randn(x.shape, generator=device)

    net, encoder = Net(), Sampling()

    def loop():
        condition = encoder(torch.ones(2, DIM), 0)
        x = ddim(net, predict=lambda net, x, t: net(x, t, condition))
        return x + torch.randn(x.shape, generator=device)

    def both(run):
        torch.manual_seed(0)
        device.manual_seed(0)
        return run(), device.get_state()

    expected, after = both(loop)
    run = parallel(loop, denoisers=[net], tolerance=1e-4)
    for _ in range(2):
        result, state = both(run)
        assert relative(result, expected) <= 1e-4
        assert torch.equal(state, after)
    with pytest.warns(RuntimeWarning, match="draws random numbers"):
        parallel(ddim, denoisers=[encoder])(encoder)


def test_network_put_in_training_mode_later_is_tried_again():
    """A network put in training mode later is tried again."""

    class Dropout(Net):
        def forward(self, x, t):
            return torch.dropout(super().forward(x, t), 0.1, self.training)

    net = Dropout().eval()
    run = parallel(ddim, denoisers=[net])
    run(net)
    assert run.report.mode == "recurrence"
    net.train()
    with pytest.warns(RuntimeWarning, match="draws random numbers"):
        run(net)


def test_loop_that_ends_when_its_network_says_so_runs_sequentially():
    """A loop that ends when its network says so runs sequentially."""

    def loop(net):
        x = torch.randn(2, DIM)
        for t, a, s, b, r in steps(20):
            f = net(x, t)
            if t < 500 and float(torch.cosine_similarity(x, f).min()) > 0.4:
                break
            x = b * (x - s * f) / a + r * f
        return x

    net = Net()
    torch.manual_seed(0)
    expected = loop(net)
    assert len(net.rows) < 20
    run = parallel(loop, denoisers=[net])
    for _ in range(2):
        torch.manual_seed(0)
        with pytest.warns(RuntimeWarning, match="number of denoiser calls changes from pass to pass"):
            assert torch.equal(run(net), expected)


@pytest.mark.parametrize("large", [False, True])
def test_loop_whose_network_makes_it_longer_says_so(large):
    """A loop whose network makes it longer says so."""

    def loop(net):
        x, i = torch.randn(2, DIM), 0
        while i < 40:
            f = net(x, 500)
            x = x - 0.05 * f
            # Outputs at random are faster: whatever they are, or where they are not small.
            i += 1 + int(f.abs().max() > 1.5 if large else torch.cosine_similarity(x, f).min() < 0.4)

    run = parallel(loop, denoisers=[net := Net()])
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="number of denoiser calls changes .* on the outputs"):
            run(net)


def test_loop_that_does_not_call_its_denoiser_says_so():
    """A loop that does not call its denoiser says so."""
    net, other = Net(), nn.Linear(2, 2)
    torch.manual_seed(0)
    expected = ddim(net)
    run = parallel(lambda: ddim(net), denoisers=[other])
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match=r"calls none of its denoisers \(Linear\): pass those"):
        assert torch.equal(run(), expected)


def test_method_of_a_module_that_calls_a_part_of_it_names_its_parts():
    """A class of diffusion models is a module itself; its network is one of its parts."""

    class Diffusion(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Net()

        def sample(self):
            return ddim(self.model)

    diffusion = Diffusion()
    with pytest.warns(RuntimeWarning, match=r"none of its denoisers \(Diffusion\).*; its parts are model\."):
        parallel(diffusion.sample)()
    run = parallel(diffusion.sample, denoisers=[diffusion.model])
    run()
    assert run.report.mode == "recurrence"
