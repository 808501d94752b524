"""Any loop, unmodified: recorded, solved, replayed. The loops and networks here are small and belong to no library."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import parataxis as px
from parataxis.loops.batch import Merging
from parataxis.loops.runner import LoopRunner
from parataxis.parallel import parallel

DIM = 48
LEVELS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt()


class Net(nn.Module):
    """A network with a time, a condition and a slope of order one; it counts its rows."""

    def __init__(self, dim=DIM, out=None):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.inner = nn.Parameter(torch.randn(dim, dim, generator=generator) / dim**0.5, requires_grad=False)
        self.outer = nn.Parameter(torch.randn(dim, out or dim, generator=generator) / dim**0.5, requires_grad=False)
        self.rows = []

    def forward(self, x, t, condition=None):
        self.rows.append(len(x))
        hidden = x.float() @ self.inner + torch.sin(torch.as_tensor(t).float() / 100).reshape(-1, 1)
        if condition is not None:
            hidden = hidden + condition.float()
        output = torch.tanh(hidden) @ self.outer
        output[:, : x.shape[1]] += 0.7 * x.float()
        return output.to(x.dtype)


def steps(count):
    """Return (time, alpha, sigma, alpha', sigma') of each step of a variance-preserving loop."""
    for i in range(count):
        t, after = (999 * (count - i)) // count, (999 * (count - i - 1)) // count
        a = float(LEVELS[t])
        b = float(LEVELS[after]) if i < count - 1 else 1.0
        yield t, a, (1 - a**2) ** 0.5, b, (1 - b**2) ** 0.5


def ddim(net, batch=2, count=20, *, eta=0.0, clip=None, dtype=torch.float32, predict=None):
    """The loop of the tests: DDIM with any way to call the network."""
    x = torch.randn(batch, DIM).to(dtype)
    for t, a, s, b, r in steps(count):
        f = net(x, t) if predict is None else predict(net, x, t)
        clean = (x - s * f) / a
        if clip is not None:
            clean = clean.clamp(-clip, clip)
        noise = eta * r / s * max(1 - a**2 / b**2, 0) ** 0.5
        x = b * clean + (r**2 - noise**2) ** 0.5 * f
        if noise:
            x = x + noise * torch.randn_like(x)
    return x


def guided(net, x, t):
    condition = torch.linspace(-1, 1, 2 * len(x) * DIM).view(-1, DIM)
    without, with_ = net(torch.cat([x] * 2), t, condition.to(x.dtype)).chunk(2)
    return without + 3 * (with_ - without)


def guided_by_two_calls(net, x, t):
    condition = torch.linspace(-1, 1, len(x) * DIM).view(-1, DIM).to(x.dtype)
    with_, without = net(x, t, condition), net(x, t, -condition)
    return without + 3 * (with_ - without)


def guided_and_rescaled(net, x, t):
    condition = torch.linspace(-1, 1, 2 * len(x) * DIM).view(-1, DIM).to(x.dtype)
    without, with_ = net(torch.cat([x] * 2), t, condition).chunk(2)
    both = without + 3 * (with_ - without)
    return both * with_.std(1, keepdim=True) / both.std(1, keepdim=True)


def guided_in_between(net, x, t):
    return guided(net, x, t) if 200 < t < 800 else net(x, t, torch.zeros_like(x))


def second_order(net, batch=2, count=20):
    """DPM-Solver++ 2M on a noise prediction: a step remembers the data prediction before."""
    x, before = torch.randn(batch, DIM), None
    for i, (t, a, s, b, r) in enumerate(steps(count)):
        clean = (x - s * net(x, t)) / a
        mixed = clean if before is None or i == count - 1 else 1.5 * clean - 0.5 * before
        x, before = r / s * x + (b - a * r / s) * mixed, clean
    return x


def heun(net, batch=2, count=10):
    """Heun's method, two evaluations a step, in coordinates of its own."""
    x = torch.randn(batch, DIM) * 10
    sigmas = [10 * (1 - i / count) ** 2 for i in range(count + 1)]
    for s, r in itertools.pairwise(sigmas):
        slope = net(x / (s**2 + 1) ** 0.5, s)
        guess = x + (r - s) * slope
        if r > 0:
            slope = (slope + net(guess / (r**2 + 1) ** 0.5, r)) / 2
        x = x + (r - s) * slope
    return x


LINEAR = {
    "ddim": ddim,
    "ddpm": lambda net: ddim(net, eta=1.0),
    "guided": lambda net: ddim(net, predict=guided),
    "guided by two calls": lambda net: ddim(net, predict=guided_by_two_calls),
    "guided in between": lambda net: ddim(net, predict=guided_in_between),
    "guided ddpm": lambda net: ddim(net, eta=1.0, predict=guided),
    "second order": second_order,
    "heun": heun,
}
OTHER = {
    "clipped": lambda net: ddim(net, clip=1.0),
    "clipped ddpm": lambda net: ddim(net, eta=1.0, clip=1.0),
    "rescaled guidance": lambda net: ddim(net, predict=guided_and_rescaled),
}
LOOPS = LINEAR | OTHER


def relative(x, y):
    x, y = x.double().flatten(1), y.double().flatten(1)
    return float(((x - y).norm(dim=1) / y.norm(dim=1)).max())


def both(loop, net, solver=None, seed=0, **options):
    """Return the sequential result, the parallel one, and the callable."""
    torch.manual_seed(seed)
    expected = loop(net)
    run = parallel(loop, solver or px.Secant(window=8), denoisers=[net], **options)
    torch.manual_seed(seed)
    return expected, run(net), run


@pytest.mark.parametrize("name", LOOPS)
def test_window_one_is_the_sequential_loop_to_the_bit_and_every_output_came_through_the_stub(name):
    net = Net()
    expected, result, run = both(LOOPS[name], net, px.Secant(window=1))
    report = run.report
    assert torch.equal(result, expected)
    assert report.mode == "replay"
    assert report.rounds == report.steps
    assert report.error_estimate == 0
    # Every call once as it was, two for each form of a call to see what it returns, one level's again for the floor:
    # none by the loop itself.
    forms, called = 2 * len(run.loop.outputs), len(net.rows) - report.calls
    assert report.calls == called + forms + called // report.steps
    assert sorted(net.rows[called + forms :][:called]) == sorted(net.rows[:called])
    assert run.loop.layouts == {}


def test_a_sample_that_is_scaled_at_the_end_is_as_exact_as_one_that_is_not():
    # A decoder wants latents of another size; the tolerance is relative to whatever it is given.
    one, scaled = (both(lambda net, scale=scale: scale * guided_loop(net), Net()) for scale in (1.0, 8.0))
    assert scaled[2].report.rounds == one[2].report.rounds
    assert relative(*scaled[:2]) <= 1.01 * relative(*one[:2]) + 1e-6


def guided_loop(net):
    return ddim(net, predict=guided)


@pytest.mark.parametrize("name", LOOPS)
def test_with_tolerance_zero_the_result_is_sequential(name):
    expected, result, run = both(LOOPS[name], Net(), tolerance=0)
    assert relative(result, expected) <= 1e-5
    assert run.report.mode == ("recurrence" if name in LINEAR else "replay")
    assert run.report.rounds <= run.report.steps
    assert run.report.converged


@pytest.mark.parametrize("name", LOOPS)
def test_the_default_tolerance_is_certified(name):
    expected, result, run = both(LOOPS[name], Net())
    assert run.report.converged
    assert run.report.error_estimate <= 1e-2
    assert relative(result, expected) <= 1e-2
    assert run.report.rounds < 0.8 * run.report.steps


@pytest.mark.parametrize("predict", [None, guided], ids=["plain", "guided"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_half_precision_loops_end_within_their_own_floor(eta, predict):
    def loop(net):
        return ddim(net, eta=eta, dtype=torch.bfloat16, predict=predict)

    expected, result, run = both(loop, Net())
    assert run.report.mode == "recurrence"
    assert run.report.converged
    assert result.dtype == torch.bfloat16
    assert run.report.floor > 1e-3
    assert relative(result, expected) <= max(1e-2, 2 * run.report.floor)


def jittered(net, seed):
    """Add noise of one unit in the last place to the outputs of a network."""
    random = torch.Generator().manual_seed(seed)

    def hook(net, told, out):
        size = torch.finfo(out.dtype).eps * out.float().square().mean().sqrt()
        return (out + size * torch.randn(out.shape, generator=random)).to(out.dtype)

    return net.register_forward_hook(hook)


@pytest.mark.parametrize("grown", [0.1, 0.3, 1.0])
def test_the_floor_is_what_rounding_makes_of_the_loop_itself(grown):
    net = Net()

    def loop(net):
        return ddim(lambda *told: net(*told) * grown, dtype=torch.bfloat16)

    expected, _, run = both(loop, net)
    moved = []
    for seed in range(4):
        hook = jittered(net, seed)
        torch.manual_seed(0)
        moved.append(relative(loop(net), expected))
        hook.remove()
    assert min(moved) / 2.5 <= run.report.floor <= 2.5 * max(moved)


def test_the_loop_itself_runs_five_times_at_first_and_twice_from_the_second_call_on():
    net = Net()
    run = parallel(lambda net: ddim(net, predict=guided), denoisers=[net])
    for seed, passes in ((0, 5), (1, 2), (2, 2)):
        torch.manual_seed(seed)
        expected = ddim(net, predict=guided)
        torch.manual_seed(seed)
        assert relative(run(net), expected) <= 1e-2
        assert run.report.passes == passes
        assert run.report.mode == "recurrence"


def test_a_loop_whose_coefficients_changed_behind_its_arguments_is_still_right():
    net, scale = Net(), [3.0]

    def loop(net):
        def predict(net, x, t):
            condition = torch.linspace(-1, 1, 2 * len(x) * DIM).view(-1, DIM)
            without, with_ = net(torch.cat([x] * 2), t, condition).chunk(2)
            return without + scale[0] * (with_ - without)

        return ddim(net, predict=predict)

    run = parallel(loop, denoisers=[net], tolerance=1e-3)
    for scale[0] in (3.0, 1.5):
        torch.manual_seed(0)
        expected = loop(net)
        torch.manual_seed(0)
        assert relative(run(net), expected) <= 1e-3
        assert run.report.converged


def test_rounds_are_merged_calls_and_memory_that_runs_out_makes_them_smaller():
    class Small(Net):
        def forward(self, x, t, condition=None):
            if len(x) > 12:
                raise torch.OutOfMemoryError("12 rows are all there is room for")
            return super().forward(x, t, condition)

    net = Small()
    expected, result, run = both(lambda net: ddim(net, predict=guided), net)
    assert relative(result, expected) <= 1e-2
    assert 4 < run.report.peak_rows <= 12
    torch.manual_seed(0)
    before = len(net.rows)
    run(net)
    assert max(net.rows[before:]) <= 12


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")])
@pytest.mark.parametrize("room", [4, 6, 8, 16])
def test_memory_that_runs_out_when_layouts_are_tried_leaves_smaller_calls_or_the_loop_itself(room, error):
    class Small(Net):
        def forward(self, x, t, condition=None):
            if len(x) > room:
                raise error
            return super().forward(x, t, condition)

    def loop(net):
        return ddim(net, predict=guided)

    net = Small()
    run = parallel(loop, denoisers=[net])
    for _ in range(2):
        torch.manual_seed(0)
        expected = loop(net)
        torch.manual_seed(0)
        if room < 8:
            with pytest.warns(RuntimeWarning, match="runs sequentially: not enough memory to batch two"):
                assert torch.equal(run(net), expected)
        else:
            assert relative(run(net), expected) <= 1e-2
            assert run.report.peak_rows == room


def test_a_layout_is_not_given_up_for_ever_because_memory_ran_out():
    class Small(Net):
        room = 2

        def forward(self, x, t):
            if len(x) > self.room:
                raise torch.OutOfMemoryError("no room")
            return super().forward(x, t)

    def loop(net):
        return ddim(net, batch=1, predict=lambda net, x, t: net(x.repeat(2, 1), t)[:1])

    net = Small()
    with pytest.warns(RuntimeWarning, match="not enough memory"):
        run = both(loop, net)[2]
    net.room = 100
    assert relative(run(net), loop(net)) < 2
    assert run.report.mode == "recurrence"


def test_no_memory_for_the_loop_itself_is_an_error():
    class None_(Net):
        def forward(self, x, t, condition=None):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        parallel(ddim, denoisers=[net := None_()])(net)


def test_the_random_state_afterwards_is_that_of_the_sequential_loop():
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


def test_the_one_module_that_a_function_can_see_is_its_denoiser():
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


def test_rows_that_look_at_their_partner_of_the_same_sample_stay_partners():
    class Perturbed(Net):
        def forward(self, x, t, condition=None):
            first, second = super().forward(x, t, condition).chunk(2)
            return torch.cat([first, second + 0.2 * torch.tanh(first)])

    expected, result, run = both(lambda net: ddim(net, batch=3, predict=guided), Perturbed(), tolerance=1e-4)
    assert relative(result, expected) <= 1e-4
    assert run.report.peak_rows == 3 * 2 * 8


def test_what_the_loop_sets_on_its_network_holds_for_all_evaluations_and_is_put_back():
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


def test_rows_that_look_at_other_samples_are_never_torn_apart():
    class Mixing(Net):
        def forward(self, x, t, condition=None):
            output = super().forward(x, t, condition)
            return output - 0.5 * output.view(-1, 3, DIM).mean(1).repeat_interleave(3, 0)

    expected, result, run = both(lambda net: ddim(net, batch=3), Mixing(), tolerance=1e-4)
    assert relative(result, expected) <= 1e-4
    assert {layout.merging for layout in run.loop.layouts.values()} == {Merging.CALLS}
    assert run.report.peak_rows == 24


class Mixing(Net):
    """Every row looks at all rows of its call."""

    mixing = True

    def forward(self, x, t, condition=None):
        output = super().forward(x, t, condition)
        return output - 0.5 * output.mean(0) if self.mixing else output


class OneTime(Net):
    """Takes one time for all rows."""

    def forward(self, x, t, condition=None):
        assert not isinstance(t, torch.Tensor) or t.ndim == 0, "one time at a time"
        return super().forward(x, t, condition)


class FirstTime(Net):
    """Looks at the time of its first row."""

    def forward(self, x, t, condition=None):
        return super().forward(x, torch.as_tensor(t).reshape(-1)[0], condition)


def flat(net):
    """Give the network states without a dimension for samples."""
    return ddim(lambda x, t: net(x.flatten(), t)[None], batch=1)


class Flat(Net):
    def forward(self, x, t):
        return super().forward(x[None], t)[0]


def told_in_words(net):
    return ddim(lambda x, t: net(x, str(t)))


class Reading(Net):
    def forward(self, x, t):
        return super().forward(x, float(t))


UNMERGED = {
    "rows that look at one another": (Mixing, ddim, "batching calls of the denoiser changes its outputs"),
    "one time": (OneTime, ddim, "batching calls of the denoiser changes its outputs"),
    "the first time": (FirstTime, ddim, "read only the first timestep"),
    "no dimension for samples": (Flat, flat, "no batch dimension"),
    "words that differ": (Reading, told_in_words, "differ in more than rows and numbers"),
}


@pytest.mark.parametrize("name", UNMERGED)
def test_a_loop_whose_calls_cannot_be_merged_runs_sequentially_and_says_why(name):
    make, loop, reason = UNMERGED[name]
    net = make()
    torch.manual_seed(0)
    expected = loop(net)
    run = parallel(loop, denoisers=[net])
    for most in (40, 21):  # calls of the network, with and without those that tell
        before = len(net.rows)
        torch.manual_seed(0)
        with pytest.warns(RuntimeWarning, match=f"runs sequentially: .*{reason}"):
            assert torch.equal(run(net), expected)
        assert run.report.mode == "sequential"
        assert len(net.rows) - before <= most


def test_what_is_returned_may_be_overwritten_by_the_next_call():
    buffers = {}

    class Static(Net):
        """As CUDA graphs do: one output for each shape."""

        def forward(self, x, t, condition=None):
            output = super().forward(x, t, condition)
            return buffers.setdefault(output.shape, torch.empty_like(output)).copy_(output)

    for loop in (ddim, LINEAR["guided"]):
        expected, result, run = both(loop, net := Static(), tolerance=1e-4)
        assert relative(result, expected) <= 1e-4
        torch.manual_seed(0)
        assert relative(run(net), expected) <= 1e-4
        assert run.report.calls == run.report.rounds + 1


def test_a_network_that_changes_between_calls_is_found_out_by_one_call_more():
    class Changing(Mixing):
        mixing = False
        within = False

        def forward(self, x, t, condition=None):
            assert not self.within or len(x) % 2 == 0, "rows come in pairs"
            output = super().forward(x, t, condition)
            return output + 0.2 * output.view(-1, 2, DIM).flip(1).flatten(0, 1) if self.within else output

    net = Changing()
    run = parallel(ddim, denoisers=[net], tolerance=1e-4)
    counts = []
    for within in (False, False, True, True):
        net.within = within
        torch.manual_seed(0)
        expected = ddim(net)
        before = len(net.rows)
        torch.manual_seed(0)
        assert relative(run(net), expected) <= 1e-4
        assert run.report.mode == "recurrence"
        counts.append((len(net.rows) - before, run.report.rounds))
    for calls, rounds in counts[1::2]:
        assert calls == rounds + 1
    net.mixing = True
    torch.manual_seed(0)
    expected = ddim(net)
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match="runs sequentially: batching calls"):
        assert torch.equal(run(net), expected)


def test_times_that_multiply_the_input_become_a_column():
    class Scaling(Net):
        def forward(self, x, t):
            return super().forward(x, 0) * (1 - t / 2000)

    expected, result, run = both(ddim, Scaling(), tolerance=1e-4)
    assert relative(result, expected) <= 1e-4
    assert run.report.peak_rows == 16


@pytest.mark.parametrize("told", [float, torch.tensor])
def test_times_of_more_bits_than_the_network_has_become_a_column_of_its_dtype(told):
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(DIM, DIM, dtype=torch.bfloat16).requires_grad_(False)

        def forward(self, x, t):
            return torch.tanh(self.layer(x * (1 + t)))

    def loop(net):
        predict = lambda net, x, t: net(x, told(t / 1000))  # noqa: E731
        return ddim(net, dtype=torch.bfloat16, predict=predict)

    expected, result, run = both(loop, Strict())
    assert relative(result, expected) <= max(1e-2, 2 * run.report.floor)
    assert run.report.peak_rows == 16


def test_times_keep_the_bits_of_double_precision():
    class Scaling(nn.Module):
        def forward(self, x, t):
            return torch.tanh(x) * (1 + t)

    expected, result, _ = both(
        lambda net: ddim(net, dtype=torch.float64, predict=lambda net, x, t: net(x, t / 999)), Scaling(), tolerance=0
    )
    assert relative(result, expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_users_default_device_does_not_matter(dtype):
    class Scaling(nn.Module):
        def forward(self, x, t):
            return (0.7 * x + torch.tanh(x.roll(1, 1))) * (1 - t / 2000)

    def loop(net, x):
        for t, a, s, b, r in steps(20):
            f = net(x, t)
            x = b * (x - s * f) / a + r * f
        return x

    net, noise = Scaling(), torch.randn(2, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = loop(net, noise)
    run = parallel(loop, denoisers=[net])
    torch.set_default_device("meta")
    try:
        result = run(net, noise)
    finally:
        torch.set_default_device(None)
    assert relative(result, expected) <= max(1e-2, 2 * run.report.floor)
    assert run.report.mode == "recurrence"
    assert run.report.peak_rows > 2


def test_condition_channels_and_tokens_beside_the_state_are_no_part_of_it():
    def channels(net, x, t):
        return net(torch.cat([x, torch.full((len(x), 16), 0.5)], 1), t)[:, :DIM]

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(8)

        def forward(self, x, t):  # (B, tokens, 8); every token sees the mean of all
            mixed = (x + 0.5 * x.mean(1, keepdim=True)).flatten(0, 1)
            times = torch.as_tensor(t).reshape(-1).expand(len(x)).repeat_interleave(x.shape[1])
            return self.net(mixed, times).view(x.shape)

    def tokens(net, x, t):
        seen = torch.cat([x.view(len(x), -1, 8), torch.linspace(-1, 1, 24).expand(len(x), 24).view(-1, 3, 8)], 1)
        return net(seen, t)[:, : DIM // 8].reshape(x.shape)

    for net, predict in ((Net(DIM + 16), channels), (Tokens(), tokens)):
        expected, result, run = both(lambda net, predict=predict: ddim(net, predict=predict), net, tolerance=1e-4)
        assert relative(result, expected) <= 1e-4
        assert run.report.mode == "recurrence"
        assert run.report.peak_rows == 16


def test_networks_that_compute_in_fewer_bits_than_they_are_given_are_merged():
    class Rough(Net):
        """Like a float16 network in float32 clothes: batches of another size round another way."""

        def forward(self, x, t):
            output = super().forward(x, t)
            return output * (1 + 1e-3 * torch.sin(output * 1e3 * len(x)))

    class Rough_(Rough):
        """Its first row decides, too."""

        def forward(self, x, t):
            return super().forward(x, t) * (1.05 if torch.as_tensor(t).reshape(-1)[0] > 500 else 1.0)

    expected, result, run = both(ddim, Rough())
    assert relative(result, expected) <= 2e-2
    assert run.report.peak_rows > 2
    assert run.report.rounds < 0.8 * run.report.steps
    with pytest.warns(RuntimeWarning, match="runs sequentially: batching calls"):
        expected, result, run = both(ddim, Rough_(), tolerance=1e-3)
    assert torch.equal(result, expected)
    assert {layout.merging for layout in run.loop.layouts.values()} == {Merging.SINGLE}


@pytest.mark.parametrize("side", [False, True])
def test_each_value_of_an_argument_that_keeps_calls_apart_has_a_layout_of_its_own(side):
    class Sided(Net):
        def forward(self, x, t, early):
            if early == side and len(x) > 2:
                raise ValueError("two rows at a time on one side")
            return super().forward(x, t)

    def loop(net):
        return ddim(net, predict=lambda net, x, t: net(x, t, bool(t > (700 if side else 300))))

    expected, result, run = both(loop, Sided())
    assert relative(result, expected) <= 1e-2
    assert {layout.merging for layout in run.loop.layouts.values()} == {Merging.ROWS, Merging.SINGLE}
    assert run.report.peak_rows > 2


def test_conditions_with_several_rows_for_each_of_the_state_follow_it():
    class Frames(Net):
        def forward(self, x, t, condition):  # (3 B, DIM): one for each of three frames
            return super().forward(x, t, condition.view(len(x), 3, DIM).mean(1))

    def predict(net, x, t):
        condition = torch.linspace(-1, 1, 6 * len(x) * DIM).view(-1, DIM)
        without, with_ = net(torch.cat([x] * 2), t, condition).chunk(2)
        return without + 3 * (with_ - without)

    expected, result, run = both(lambda net: ddim(net, predict=predict), Frames(), tolerance=1e-4)
    assert relative(result, expected) <= 1e-4
    assert run.report.peak_rows == 32


def test_learned_variances_are_held_where_they_are_dropped_and_replayed_where_they_are_used():
    def dropped(net, x, t):
        return net(x, t)[:, :DIM]

    def used(net, x, t):
        mean, log = net(x, t).chunk(2, 1)
        return mean + 0.01 * torch.exp(0.1 * log)

    for predict, mode in ((dropped, "recurrence"), (used, "replay")):
        expected, result, run = both(
            lambda net, predict=predict: ddim(net, predict=predict), Net(out=2 * DIM), tolerance=1e-3
        )
        assert run.report.mode == mode
        assert relative(result, expected) <= 1e-3


def test_two_live_inputs_are_solved_together():
    class Pair(Net):
        def forward(self, x, y, t):
            one, two = super().forward(x, t), super().forward(y, t)
            return one + 0.1 * torch.tanh(two), two + 0.1 * torch.tanh(one)

    def loop(net):
        x, y = torch.randn(2, DIM), torch.randn(2, DIM)
        for t, a, s, b, r in steps(20):
            f, g = net(x, y, t)
            x, y = b * (x - s * f) / a + r * f, b * (y - s * g) / a + r * g
        return torch.cat([x, y], 1)

    expected, result, run = both(loop, Pair(), tolerance=1e-4)
    assert relative(result, expected) <= 1e-4
    assert run.report.rounds < 20


def test_a_mask_over_the_state_is_replayed():
    def loop(net):
        known, mask = torch.linspace(-1, 1, DIM), (torch.arange(DIM) < DIM // 2).float()
        x = torch.randn(2, DIM)
        for t, a, s, b, r in steps(20):
            f = net(x, t)
            x = b * (x - s * f) / a + r * f
            x = mask * (b * known + r * torch.randn(2, DIM)) + (1 - mask) * x
        return x

    expected, result, run = both(loop, Net(), tolerance=1e-3)
    assert relative(result, expected) <= 1e-3
    assert run.report.mode == "replay"


def test_a_second_stage_of_another_shape_follows_the_first():
    first, second = Net(), Net(2 * DIM)

    def loop(first, second):
        x = torch.cat([ddim(first)] * 2, 1)
        x = 0.5 * x + torch.randn_like(x)
        for t, a, s, b, r in steps(12):
            f = second(x, t)
            x = b * (x - s * f) / a + r * f
        return x

    torch.manual_seed(0)
    expected = loop(first, second)
    run = parallel(loop, tolerance=1e-4, denoisers=[first, second])
    for _ in range(2):
        torch.manual_seed(0)
        assert relative(run(first, second), expected) <= 1e-4
        assert run.report.steps == 32
        assert run.report.rounds < 32


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


def test_a_module_along_the_way_that_does_not_depend_on_outputs_is_remembered():
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


def test_a_network_that_feeds_another_runs_in_front_of_it():
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


def with_gradients(net):
    def predict(net, x, t):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            output = net(x, t)
        return output.detach() + 0.01 * torch.autograd.grad(output.square().sum(), x)[0]

    return ddim(net, predict=predict)


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
    "gradients": (Net, with_gradients, "gradients through the denoiser"),
    "adaptive steps": (Net, adaptive, "depends on"),
    "outputs at random": (Net, checked, r"raised ValueError\('the network diverged'\) on trial outputs"),
    "an infinite step": (Net, infinite, "not finite although every output was"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_solved_in_parallel_runs_sequentially_and_says_why(name):
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


class Hidden(Noisy):
    """Likewise, where nobody looks."""

    def __init__(self):
        super().__init__()
        generator = self.__dict__.pop("source")
        self.draw = lambda output: torch.randn(output.shape, generator=generator)

    def forward(self, x, t):
        output = Net.forward(self, x, t)
        return output + 0.3 * self.draw(output)


@pytest.mark.parametrize("make", [EverySecond, Written, Growing, Momentum, Noisy])
def test_a_network_that_keeps_state_runs_sequentially_from_the_state_that_it_was_in(make):
    torch.manual_seed(0)
    expected = ddim(make())
    run = parallel(ddim, denoisers=[net := make()])
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match="hidden state|draws random numbers"):
        assert torch.equal(run(net), expected)


def test_what_a_loop_has_set_on_its_network_is_put_back_before_it_runs_sequentially():
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


def test_a_network_that_answers_the_same_input_in_different_ways_runs_sequentially():
    with pytest.warns(RuntimeWarning, match="answers the same input in different ways"):
        parallel(ddim, denoisers=[net := Hidden()])(net)


def test_large_tensors_that_a_network_has_written_to_are_told_of():
    class Adding(Net):
        def __init__(self):
            super().__init__()
            self.memory = torch.zeros(1 << 17)

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


def test_generators_of_other_devices_are_seen_and_put_back(monkeypatch):
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


def test_a_network_put_in_training_mode_later_is_tried_again():
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


def test_a_loop_that_ends_when_its_network_says_so_runs_sequentially():
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
def test_a_loop_whose_network_makes_it_longer_says_so(large):
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


def test_a_loop_that_does_not_call_its_denoiser_says_so():
    net, other = Net(), nn.Linear(2, 2)
    torch.manual_seed(0)
    expected = ddim(net)
    run = parallel(lambda: ddim(net), denoisers=[other])
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match=r"calls none of its denoisers \(Linear\): pass those"):
        assert torch.equal(run(), expected)


def test_nothing_is_claimed_below_a_floor_above_the_tolerance():
    class Rough(Net):
        """Its output depends on what lies below the rounding of its input."""

        def forward(self, x, t):
            return super().forward(x, t) * (1 + 0.04 * torch.sin(x * 1e7))

    _, _, run = both(ddim, Rough())
    assert run.report.error_estimate >= run.report.floor > 1e-2
    assert "moves the result by more than the tolerance" in str(run.report)


def test_a_loop_remembers_its_latest_calls_only():
    run = parallel(lambda net, seed: ddim(net, count=9), denoisers=[net := Net()])
    for seed in range(20):
        run(net, seed)
    assert len(run.loop.structures) == 16
    run(net, 4)
    assert run.report.passes == 2
    run(net, 3)
    assert run.report.passes == 5


def test_the_default_device_is_not_where_the_library_draws():
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


def test_a_loop_of_more_steps_every_time_runs_sequentially():
    counts = itertools.count(20)
    run = parallel(lambda net: ddim(net, count=next(counts)), denoisers=[net := Net()])
    with pytest.warns(RuntimeWarning, match="number or the form of the denoiser's calls depends on"):
        run(net)
    assert run.report.mode == "sequential"


def test_short_loops_run_sequentially_and_say_so():
    net = Net()
    expected, result, run = both(lambda net: ddim(net, count=8), net)
    assert torch.equal(result, expected)
    assert str(run.report) == "sequential: the loop has only 8 steps."
    expected, result, run = both(ddim, net, px.Sequential())
    assert torch.equal(result, expected)
    assert run.report.mode == "sequential"


def test_solvers_that_need_an_equation_say_so_of_a_loop_without_one():
    for solver, message in ((px.Parareal(), "needs a loop that is linear"), (px.Anderson(order=3), "truncated")):
        with pytest.raises(ValueError, match=message):
            parallel(LOOPS["clipped"], solver, denoisers=[net := Net()])(net)
        expected, result, _ = both(ddim, Net(), solver)
        assert relative(result, expected) <= 1e-2
    for solver in (px.Anderson(), px.Picard(window=8)):
        for name in ("ddpm", "clipped"):
            expected, result, _ = both(LOOPS[name], Net(), solver)
            assert relative(result, expected) <= 1e-2


def test_wrong_options_are_named():
    with pytest.raises(TypeError, match="a function that runs a sampling loop"):
        parallel(3)
    with pytest.raises(TypeError, match="solver must be a solver"):
        parallel(ddim, px.Secant)
    for wrong in (-1, None, "a", float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"finite and at least 0, got {wrong!r}"):
            parallel(ddim, tolerance=wrong)
    for wrong, given in (
        ([], r"\[\]"),
        (nn.Linear(2, 2), "Linear"),
        ("unet", "str"),
        (["unet"], r"\[str\]"),
        ([ddim], r"\[function\]"),
    ):
        with pytest.raises(TypeError, match=f"list of the modules that the loop calls, such as .unet., got {given}"):
            parallel(ddim, denoisers=wrong)


def test_a_result_without_the_gradients_that_the_loop_itself_has_is_told_of():
    net = Net().requires_grad_()
    assert ddim(net).requires_grad
    run = parallel(ddim, denoisers=[net])
    with pytest.warns(RuntimeWarning, match=r"a parallel loop carries none: call it within torch\.no_grad"):
        assert not run(net).requires_grad
    assert run.report.mode == "recurrence"
    with torch.no_grad():
        run(net)
    with torch.inference_mode():
        run(net)


# --- what is left behind ------------------------------------------------------------------------------------------


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


def test_one_parallel_loop_within_another_is_refused():
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


def test_a_second_thread_with_the_same_module_is_refused_and_no_stub_stays():
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

    def loop():
        def predict(net, x, t):
            if t == 499 and len(errors) < len(runs):
                thread = threading.Thread(target=beside, args=(runs[len(errors)],))
                thread.start()
                thread.join()
            return net(x, t, encoder(torch.ones(2, DIM), 0))

        return ddim(net, predict=predict)

    assert parallel(loop, denoisers=[net])().isfinite().all()
    assert len(errors) == 2
    assert all("nor in two threads at the same time" in str(error) for error in errors)
    assert not any("_compiled_call_impl" in one.__dict__ for one in (net, other, encoder))


def test_a_shared_denoiser_serves_another_loop_between_calls():
    net = Net()
    torch.manual_seed(0)
    expected = ddim(net)
    one, two = parallel(ddim, denoisers=[net]), parallel(ddim, denoisers=[net])
    for run in (one, two, one, lambda net: ddim(net), two):
        torch.manual_seed(0)
        assert relative(run(net), expected) <= 1e-2


@pytest.mark.parametrize("name", ["ddim", "clipped", "a loop that is refused"])
def test_what_a_call_holds_is_let_go_without_the_garbage_collector(name):
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
