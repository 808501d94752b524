"""Rows of recorded calls share network calls, and outputs do not depend on that."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from loop_problems import (
    DIM,
    LINEAR,
    Net,
    both,
    ddim,
    guided,
    relative,
    steps,
)
from parataxis.loops.batch import Merging
from parataxis.parallel import parallel


def test_out_of_memory_halves_batches():
    """Rounds are merged calls and memory that runs out makes them smaller."""

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
def test_out_of_memory_while_layouts_are_tried(room, error):
    """Memory that runs out when layouts are tried leaves smaller calls or the loop itself."""

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
            with pytest.warns(RuntimeWarning, match="runs sequentially: memory, max_rows or buckets allow fewer rows"):
                assert torch.equal(run(net), expected)
        else:
            assert relative(run(net), expected) <= 1e-2
            assert run.report.peak_rows == room


def test_layout_is_tried_again_after_out_of_memory():
    """A layout is not given up for ever because memory ran out."""

    class Small(Net):
        room = 2

        def forward(self, x, t):
            if len(x) > self.room:
                raise torch.OutOfMemoryError("no room")
            return super().forward(x, t)

    def loop(net):
        return ddim(net, batch=1, predict=lambda net, x, t: net(x.repeat(2, 1), t)[:1])

    net = Small()
    with pytest.warns(RuntimeWarning, match="memory, max_rows or buckets"):
        run = both(loop, net)[2]
    net.room = 100
    assert relative(run(net), loop(net)) < 2
    assert run.report.mode == "recurrence"


def test_out_of_memory_for_single_calls_raises():
    """No memory for the loop itself is an error."""

    class None_(Net):
        def forward(self, x, t, condition=None):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        parallel(ddim, denoisers=[net := None_()])(net)


def test_guidance_rows_stay_together():
    """Rows that look at their partner of the same sample stay partners."""

    class Perturbed(Net):
        def forward(self, x, t, condition=None):
            first, second = super().forward(x, t, condition).chunk(2)
            return torch.cat([first, second + 0.2 * torch.tanh(first)])

    expected, result, run = both(lambda net: ddim(net, batch=3, predict=guided), Perturbed(), tolerance=1e-4)
    assert relative(result, expected) <= 1e-4
    assert run.report.peak_rows == 3 * 2 * 8


def test_rows_that_read_other_samples_stay_together():
    """Rows that look at other samples are never torn apart."""

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


def in_python(network):
    """Return a class of networks that look at a value in Python, so that nothing can be mapped over them."""

    class InPython(network):
        def forward(self, x, *args):
            assert float(x.sum()) < 1e6
            return super().forward(x, *args)

    return InPython


MAPPED = {
    "rows that look at one another": (Mixing, ddim, "batching calls of the denoiser changes its outputs"),
    "one time": (OneTime, ddim, "a batch of its denoiser's calls raised AssertionError.*one time at a time"),
    "the first time": (FirstTime, ddim, "read only the first timestep"),
    "no dimension for samples": (Flat, flat, "no batch dimension"),
}
UNMERGED = {name: (in_python(make), loop, reason) for name, (make, loop, reason) in MAPPED.items()} | {
    "words that differ": (Reading, told_in_words, "differ in more than rows and numbers"),
}


@pytest.mark.parametrize("name", MAPPED)
def test_networks_whose_rows_cannot_be_joined_are_mapped_over_whole_calls(name):
    make, loop, _ = MAPPED[name]
    expected, result, run = both(loop, make(), tolerance=1e-4)
    assert relative(result, expected) <= 1e-4
    assert run.report.rounds < run.report.steps
    assert {layout.merging for layout in run.loop.layouts.values()} == {Merging.MAPPED}


class Bonds(nn.Module):
    """A graph in one flat batch: an index says which atoms are beside one another, another one whose they are."""

    def forward(self, x, t, bonds, molecule):
        i, j = bonds
        away = x[i] - x[j]
        time = t[molecule][i][:, None] / 1000 if t.ndim else t / 1000
        return torch.zeros_like(x).index_add(0, i, torch.tanh(away * time)) + 0.5 * x


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", ["one pass", "recurrence"])
def test_graphs_in_one_flat_batch(kind, each):
    """Neither atoms nor the times of three molecules are rows."""
    net, molecule = Bonds(), torch.tensor([0] * 4 + [1] * 6 + [2] * 5)
    pairs = [(i, j) for i in range(15) for j in range(15) if i != j and molecule[i] == molecule[j]]
    scheduler = DDIMScheduler(clip_sample=False)

    def loop(x):
        scheduler.set_timesteps(24)
        for t in scheduler.timesteps:
            f = net(x, t.expand(3) if each else t, torch.tensor(pairs).T, molecule)
            x = scheduler.step(f, t, x).prev_sample if kind == "one pass" else 0.97 * x + 0.05 * f
        return x

    x = torch.randn(15, 3, generator=torch.Generator().manual_seed(0))
    run = parallel(loop, denoisers=[net], tolerance=1e-3)
    assert relative(run(x), loop(x)) <= 1e-3
    assert run.report.mode == kind
    assert run.report.rounds < 18


def test_operators_that_can_only_be_mapped_one_by_one_are_not():
    """They would take as long as single calls."""

    class Slow(Mixing):
        def forward(self, x, t, condition=None):
            return super().forward(x, t, condition) + 0 * torch.histc(x.sum(1), 4).sum()

    with pytest.warns(RuntimeWarning, match="runs sequentially: batching calls"):
        expected, result, _ = both(ddim, Slow())
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", UNMERGED)
def test_calls_that_cannot_be_batched_run_sequentially(name):
    """A loop whose calls cannot be merged runs sequentially and says why."""
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


def test_outputs_may_be_overwritten_by_the_next_call():
    """What is returned may be overwritten by the next call."""
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


def test_changed_network_is_detected_by_one_more_call():
    """A network that changes between calls is found out by one call more."""

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
    assert relative(run(net), expected) <= 1e-4
    assert {layout.merging for layout in run.loop.layouts.values()} == {Merging.MAPPED}


def test_times_that_multiply_the_input_become_a_column():
    class Scaling(Net):
        def forward(self, x, t):
            return super().forward(x, 0) * (1 - t / 2000)

    expected, result, run = both(ddim, Scaling(), tolerance=1e-4)
    assert relative(result, expected) <= 1e-4
    assert run.report.peak_rows == 16


class TwoBatches(nn.Module):
    """States (n, b, dim): n samples for each of b conditions; time and condition broadcast along both."""

    def forward(self, x, condition, t):
        batch = torch.broadcast_shapes(x.shape[:-1], condition.shape[:-1])
        x, condition = x.expand(*batch, -1), condition.expand(*batch, -1)
        return torch.tanh(x + condition) * (1 + t.expand(batch)[..., None])


@pytest.mark.parametrize("samples", [1, 5])
def test_states_with_two_batch_dimensions_have_times_along_the_first(samples):
    """Numbers are tried with every count of dimensions; an outer product of rows is no batch."""
    net, condition = TwoBatches(), torch.full((1, DIM), 0.3)

    def loop(samples):
        x = torch.randn(samples, 1, DIM, generator=torch.Generator().manual_seed(0))
        for k in range(24):
            x = 0.95 * x + 0.05 * net(x, condition, torch.tensor(1 - k / 24))
        return x

    run = parallel(loop, "secant", denoisers=[net])
    assert relative(run(samples), loop(samples)) <= 1e-2
    assert run.report.rounds < 24
    assert run.report.peak_rows > samples


def test_equal_rows_are_found_among_hundreds():
    """Rows that begin alike are samples of their own, if they differ later."""
    net = Net()
    x = torch.randn(300, DIM, generator=torch.Generator().manual_seed(0))
    x[7] = x[3]

    def loop(x):
        for k in range(12):
            x = 0.9 * x + 0.1 * net(x, torch.full((len(x),), 1 - k / 12))
            x[7] += 0.01
        return x

    run = parallel(loop, "secant", denoisers=[net])
    assert relative(run(x.clone()), loop(x.clone())) <= 1e-2
    assert run.report.rounds < 12


@pytest.mark.filterwarnings("ignore:the result may be .* away from the loop")
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


@pytest.mark.filterwarnings("ignore:the result may be .* away from the loop")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_users_default_device_does_not_matter(dtype):
    """The users default device does not matter."""

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


def test_networks_with_fewer_bits_than_their_input_are_batched():
    """Networks that compute in fewer bits than they are given are merged."""

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
    assert {layout.merging for layout in run.loop.layouts.values()} == {Merging.ROWS, Merging.MAPPED}
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


@pytest.mark.parametrize("kind", ["rows", "guided", "mapped"])
def test_recorded_calls_are_padded_to_buckets(kind):
    """Batches of recorded calls have the numbers of rows that are allowed, also those that torch.vmap maps."""

    class Mean(Net):
        def forward(self, x, t, condition=None):
            output = super().forward(x, t, condition)
            return output - output.mean()  # rows of other calls must not enter it

    net = Mean() if kind == "mapped" else Net()

    def loop(net):
        return ddim(net, batch=1, predict=guided) if kind == "guided" else ddim(net, batch=1)

    run = parallel(loop, denoisers=[net], buckets=(4, 16))
    free = parallel(loop, denoisers=[net])
    for _ in range(2):
        torch.manual_seed(0)
        expected = loop(net)
        net.rows = []
        torch.manual_seed(0)
        result = run(net)
        seen = set(net.rows)
        torch.manual_seed(0)
        assert relative(result, free(net)) < 1e-4
        assert relative(result, expected) <= 1e-2
    assert run.report.mode == "recurrence"
    single = 2 if kind == "guided" else 1
    assert seen <= ({single} if kind == "mapped" else {single, 4, 16})  # a mapped network sees one call at a time
    assert run.report.calls <= free.report.calls + 1  # the check of the layout may not fit beside a full round


@pytest.mark.parametrize(("limits", "message"), [({"max_rows": 0}, "max_rows"), ({"buckets": (2, "a")}, "buckets")])
def test_limits_of_rows_are_numbers(limits, message):
    """What is no number of rows is said at once."""
    with pytest.raises(ValueError, match=message):
        parallel(ddim, denoisers=[Net()], **limits)


def test_max_rows_split_rounds():
    """No call has more rows than the caller allows."""
    net = Net()
    run = parallel(lambda net: ddim(net, batch=1), "picard", denoisers=[net], max_rows=5)
    run(net)
    torch.manual_seed(0)
    expected = ddim(net, batch=1)
    torch.manual_seed(0)
    before = len(net.rows)
    assert relative(run(net), expected) <= 1e-2
    assert max(net.rows[before:]) == run.report.peak_rows == 5
