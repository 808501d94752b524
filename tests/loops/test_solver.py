"""Any loop, unmodified: recorded, solved, replayed."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import parataxis as px
from loop_problems import (
    DIM,
    LINEAR,
    LOOPS,
    Net,
    both,
    ddim,
    guided,
    relative,
    steps,
)
from parataxis.parallel import parallel


@pytest.mark.parametrize("name", LOOPS)
def test_window_one_is_the_sequential_loop_to_the_bit(name):
    """Window one is the sequential loop to the bit and every output came through the stub."""
    net = Net()
    expected, result, run = both(LOOPS[name], net, px.Secant(window=1))
    report = run.report
    assert torch.equal(result, expected)
    assert report.mode == "replay"
    assert report.rounds == report.steps
    assert report.error_estimate == 0
    # Every call once as it was, two for each form of a call to see what it returns, one level's again for the floor:
    # none by the loop itself.
    forms = 2 * len(run.loop.outputs)  # these leave nothing behind
    called = len(net.rows) - (report.calls - forms)
    assert report.calls == called + forms + called // report.steps
    assert sorted(net.rows[called:][:called]) == sorted(net.rows[:called])
    assert run.loop.layouts == {}


def test_sample_that_is_scaled_at_the_end_is_as_exact_as_one_that_is_not():
    # A decoder wants latents of another size; the tolerance is relative to whatever it is given.
    """A sample that is scaled at the end is as exact as one that is not."""
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
def test_default_tolerance_is_kept(name):
    """The default tolerance is certified."""
    expected, result, run = both(LOOPS[name], Net())
    assert run.report.converged
    assert run.report.error_estimate <= 1e-2
    assert relative(result, expected) <= 1e-2
    assert run.report.rounds < 0.8 * run.report.steps


@pytest.mark.filterwarnings("ignore:the result may be .* away from the loop")
@pytest.mark.filterwarnings("ignore:the loop runs sequentially")
@pytest.mark.parametrize("predict", [None, guided], ids=["plain", "guided"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_half_precision_loops_end_within_their_own_floor(eta, predict):
    def loop(net):
        return ddim(net, eta=eta, dtype=torch.bfloat16, predict=predict)

    expected, result, run = both(loop, Net())
    assert result.dtype == torch.bfloat16
    if eta and predict:  # what it makes of its rounding leaves no round for another solve
        assert "takes as many rounds as it has steps" in run.report.reason
        assert torch.equal(result, expected)
        return
    assert run.report.mode == "recurrence"
    assert run.report.rounds <= run.report.steps
    assert run.report.converged == (run.report.error_estimate <= 1e-2)  # a floor above it is no excuse
    assert run.report.floor > 1e-3
    assert relative(result, expected) <= max(1e-2, 2 * run.report.floor)


def jittered(net, seed):
    """Add noise of one unit in the last place to the outputs of a network."""
    random = torch.Generator().manual_seed(seed)

    def hook(net, told, out):
        size = torch.finfo(out.dtype).eps * out.float().square().mean().sqrt()
        return (out + size * torch.randn(out.shape, generator=random)).to(out.dtype)

    return net.register_forward_hook(hook)


@pytest.mark.filterwarnings("ignore:the result may be .* away from the loop")
@pytest.mark.parametrize("grown", [0.1, 0.3, 1.0])
def test_floor_is_what_rounding_makes_of_the_loop_itself(grown):
    """The floor is what rounding makes of the loop itself."""
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


def test_loop_itself_runs_four_times_at_first_and_twice_from_the_second_call_on():
    """The loop itself runs four times at first and twice from the second call on."""
    net = Net()
    run = parallel(lambda net: ddim(net, predict=guided), denoisers=[net])
    for seed, passes in ((0, 4), (1, 2), (2, 2)):
        torch.manual_seed(seed)
        expected = ddim(net, predict=guided)
        torch.manual_seed(seed)
        assert relative(run(net), expected) <= 1e-2
        assert run.report.passes == passes
        assert run.report.mode == "recurrence"


def test_loop_whose_coefficients_changed_behind_its_arguments_is_still_right():
    """A loop whose coefficients changed behind its arguments is still right."""
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
        assert run.report.rounds < run.report.steps  # the passes have shown it, before any round


def test_learned_variances_are_replayed_where_they_are_used():
    """Learned variances are held where they are dropped and replayed where they are used."""

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


def test_two_state_inputs_are_solved_together():
    """Two live inputs are solved together."""

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


@pytest.mark.parametrize(("scattered", "mode"), [(False, "recurrence"), (True, "replay")])
def test_mask_over_the_state(scattered, mode):
    """Behind a mask in one piece the rest is the state; a scattered one is replayed."""
    element = torch.arange(DIM)

    def loop(net):
        known, mask = torch.linspace(-1, 1, DIM), (element % 2 if scattered else element < DIM // 2).float()
        x = torch.randn(2, DIM)
        for t, a, s, b, r in steps(20):
            f = net(x, t)
            x = b * (x - s * f) / a + r * f
            x = mask * (b * known + r * torch.randn(2, DIM)) + (1 - mask) * x
        return x

    expected, result, run = both(loop, Net(), tolerance=1e-3)
    assert relative(result, expected) <= 1e-3
    assert run.report.mode == mode


def test_parts_in_calls_of_their_own_that_mix_behind_them():
    """A call makes nothing of the one before it, which is the other part: its coefficients say nothing of growth.

    The sample was right to 1e-7, and its error said to be 2e8.
    """

    def loop(net):
        x = torch.randn(1, 2 * DIM)
        for t, a, s, b, r in steps(24):
            f = torch.cat([net(x[:, :DIM], t), net(x[:, DIM:], t)], 1)
            x = b * (x - s * f) / a + r * f
            x = x + 0.02 * x.roll(DIM, 1)
        return x

    expected, result, run = both(loop, Net(), tolerance=1e-3)
    assert relative(result, expected) <= run.report.error_estimate + 1e-6
    assert run.report.converged
    assert run.report.rounds <= run.report.steps / 2
    assert run.report.reason == "several parts of its state have calls of their own in turn."


def test_second_stage_of_another_shape_follows_the_first():
    """A second stage of another shape follows the first."""
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


def test_error_estimate_is_at_least_a_floor_above_the_tolerance():
    """Nothing is claimed below a floor above the tolerance."""

    class Rough(Net):
        """Its output depends on what lies below the rounding of its input."""

        def forward(self, x, t):
            return super().forward(x, t) * (1 + 0.04 * torch.sin(x * 1e7))

    with pytest.warns(RuntimeWarning, match="rounding alone, of the network's outputs"):
        _, _, run = both(ddim, Rough())
    assert not run.report.converged
    assert run.report.error_estimate >= run.report.floor > 1e-2
    assert "moves the result by more than the tolerance" in str(run.report)


def test_loop_remembers_its_latest_calls_only():
    """A loop remembers its latest calls only."""
    run = parallel(lambda net, seed: ddim(net, count=9), denoisers=[net := Net()])
    for seed in range(20):
        run(net, seed)
    assert len(run.loop.structures) == 16
    run(net, 4)
    assert run.report.passes == 2
    run(net, 3)
    assert run.report.passes == 4


def test_loop_of_more_steps_every_time_runs_sequentially():
    """A loop of more steps every time runs sequentially."""
    count = 20

    def loop(net):
        nonlocal count
        count += time.perf_counter_ns() % 7 + 1
        return ddim(net, count=count)

    def often(net):  # one of which may not notice
        return [parallel(loop, denoisers=[net])(net) for _ in range(3)]

    with pytest.warns(RuntimeWarning, match="number .*of (the )?denoiser('s)? calls (depends on|changes)"):
        often(Net())


def test_short_loops_run_sequentially_and_say_so():
    net = Net()
    expected, result, run = both(lambda net: ddim(net, count=8), net)
    assert torch.equal(result, expected)
    assert str(run.report).endswith("sequential: the loop has only 8 steps.")
    expected, result, run = both(ddim, net, px.Sequential())
    assert torch.equal(result, expected)
    assert run.report.mode == "sequential"


def test_solvers_that_need_a_recurrence_raise_without_one():
    """Solvers that need an equation say so of a loop without one."""
    for solver, message in ((px.Parareal(), "needs a loop that is linear"), (px.Anderson(order=3), "truncates")):
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
    with pytest.raises(TypeError, match="solver is the class Secant: make one"):
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


def test_result_without_gradients_is_warned_about():
    """A result without the gradients that the loop itself has is told of."""
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


class Imputing(nn.Module):
    """Observed values and the state are two channels of the input; the output has no channels."""

    def forward(self, pair, t):
        observed, x = pair[:, 0], pair[:, 1]
        return torch.tanh(0.7 * x + 0.5 * observed.mean((1, 2), keepdim=True) + t.view(-1, 1, 1) / 40)


def test_output_without_the_channels_of_its_input_is_answered():
    """Imputation of time series: a state that is masked before every call, two samples one after the other."""
    net, mask = Imputing(), torch.ones(1, 3, 8)
    mask[:, 0, 2:4] = mask[:, 2, -1] = 0

    def loop():
        samples = []
        for seed in range(2):
            x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed))
            for k in range(20):
                f = net(torch.stack([0.3 * (1 - mask), mask * x], 1), torch.tensor([20 - k]))
                x = 0.97 * x - 0.2 * f
            samples.append(x)
        return torch.cat(samples)

    run = parallel(loop, "secant", denoisers=[net])
    assert relative(run(), loop()) <= 1e-2
    assert run.report.rounds < 40
    assert run.report.peak_rows > 1


def test_tokens_behind_a_pinned_one_are_answered_in_their_places():
    class Tokens(nn.Module):
        def forward(self, x, t):
            return torch.tanh(x + 0.1 * x.mean(1, keepdim=True) + t[:, None, None] / 40)

    net = Tokens()

    def loop():
        x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
        x[:, 0] = 0.5
        for k in range(20):
            step = 0.97 * x - 0.2 * net(x, torch.full((2,), 20.0 - k))
            x = torch.cat([x[:, :1], step[:, 1:]], 1)
        return x

    run = parallel(loop, "secant", denoisers=[net])
    assert relative(run(), loop()) <= 1e-2
    assert "recurrence" in str(run.report)
    assert run.report.rounds < 20


@pytest.mark.parametrize("window", [3, 8])
@pytest.mark.parametrize("kind", ["linear", "clipped", "unstable"])
@pytest.mark.filterwarnings("ignore:.*runs sequentially|running in parallel was slower|the result may be")
def test_never_more_rounds_than_steps(kind, window):
    """At tolerance 0, or where errors grow without end: else the loop itself is faster."""
    net, x = Net(), torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))

    def loop(x):
        before = torch.zeros_like(x)
        for i in range(18):
            f = net(x, torch.tensor(50.0 * (18 - i)))
            change = 0.1 * f if kind != "unstable" else 3.0 * f - 2.9 * before
            x, before = x - change, f
            x = x.clamp(-1.5, 1.5) if kind == "clipped" else x
        return x

    run = parallel(loop, px.Secant(window=window), tolerance=0.0, denoisers=[net])
    result = run(x)
    assert run.report.rounds <= 18
    error = relative(result, loop(x))
    assert error <= max(1e-5, run.report.error_estimate)
    assert run.report.mode == "sequential" or not run.report.converged or error <= 1e-5
