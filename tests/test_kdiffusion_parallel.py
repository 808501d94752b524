"""Any sampler function in k-diffusion's signature, unmodified, gives its sample in fewer rounds."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

import parataxis as px
from ksamplers import (
    SAMPLERS,
    SHAPE,
    SIGMAS_20,
    both,
    dpmpp_2m,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    model,
    noise,
    relative,
)
from parataxis import kdiffusion


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_sampler_function_gives_its_own_sample_in_fewer_rounds(name):
    expected, x, run = both(SAMPLERS[name])
    assert relative(x, expected) <= 1e-2
    assert run.report.mode == "recurrence"
    assert run.report.converged
    assert run.report.rounds < 0.8 * run.report.steps
    assert x.dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_with_tolerance_zero_the_sample_is_the_functions_own(name):
    expected, x, run = both(SAMPLERS[name], tolerance=0)
    assert relative(x, expected) <= 1e-5
    assert run.report.peak_width == 8


@pytest.mark.parametrize("name", SAMPLERS)
def test_window_of_one_is_the_function_to_the_bit(name):
    """A window of one is the function to the bit."""
    expected, x, run = both(SAMPLERS[name], sigmas=SIGMAS_20[6:], solver=px.Secant(window=1))
    assert torch.equal(x, expected)
    assert run.report.rounds == run.report.steps > 8


def test_options_of_the_function_go_through():
    for loop, options in [(euler, {"s_churn": 6.0, "s_noise": 1.1}), (dpmpp_sde, {"eta": 0.5, "r": 0.4})]:
        expected, x, run = both(loop, tolerance=1e-4, **options)
        assert relative(x, expected) <= 1e-4
        assert run.report.mode == "recurrence"
    assert run.__name__ == "dpmpp_sde"


def test_callback_is_called_once_a_step_in_order_with_that_steps_states():
    """The callback is called once a step in order with that steps states."""
    for loop in (heun, dpmpp_sde):
        theirs, ours = [], []
        both_options = {"extra_args": {}, "disable": True}
        torch.manual_seed(3)
        loop(model, noise(), SIGMAS_20, callback=theirs.append, **both_options)
        torch.manual_seed(3)
        run = kdiffusion.parallel(loop, tolerance=1e-4)
        run(model, noise(), SIGMAS_20, callback=ours.append, **both_options)
        assert [told["i"] for told in ours] == list(range(20))
        assert run.report.rounds < run.report.steps
        for told, expected in zip(ours, theirs, strict=True):
            assert told["sigma"] == expected["sigma"]
            assert relative(told["x"], expected["x"]) <= 1e-3
            assert relative(told["denoised"], expected["denoised"]) <= 1e-2


def test_what_a_callback_or_a_round_raises_ends_the_sampling():
    def interrupt(told):
        if told["i"] == 3:
            raise InterruptedError

    run = kdiffusion.parallel(euler)
    with pytest.raises(InterruptedError):
        run(model, noise(), SIGMAS_20, callback=interrupt, disable=True)
    rounds = []

    def count(settled, levels):
        rounds.append((settled, levels))
        if len(rounds) == 3:
            raise InterruptedError

    run = kdiffusion.parallel(euler, on_round=count)
    with pytest.raises(InterruptedError):
        run(model, noise(), SIGMAS_20, disable=True)
    assert [levels for _, levels in rounds] == [20] * 3
    assert run(model, noise(), SIGMAS_20, disable=True).isfinite().all()
    assert rounds[-1] == (20, 20)


def test_calls_have_the_numbers_of_rows_that_are_allowed():
    """A model that is compiled for few shapes meets no others."""
    counts = []

    def counting(x, sigma, **extra):
        counts.append(len(x))
        return model(x, sigma, **extra)

    expected = euler(model, noise(), SIGMAS_20, extra_args={}, disable=True)
    rows = len(noise())
    run = kdiffusion.parallel(euler, buckets=(4 * rows, 8 * rows))
    for _ in range(2):
        counts.clear()
        assert relative(run(counting, noise(), SIGMAS_20, extra_args={}, disable=True), expected) <= 1e-2
    assert run.report.mode == "recurrence"
    assert set(counts) <= {rows, 4 * rows, 8 * rows}
    with pytest.raises(ValueError, match="max_rows"):
        kdiffusion.parallel(euler, max_rows=0)


def test_noise_of_a_seed_and_of_a_sampler_with_a_state_is_the_loops_own():
    def forward(x, sigma, seed):
        return model(x, sigma)

    expected, x, _ = both(dpmpp_sde, forward, extra_args={"seed": 5}, tolerance=1e-4)
    assert relative(x, expected) <= 1e-4
    drawn = [torch.randn(3, *SHAPE) for _ in range(40)]
    asked = []

    def sampler():
        prepared = iter(drawn)

        def draw(sigma, after):
            asked.append((float(sigma), float(after)))
            return next(prepared)

        return draw

    expected = dpmpp_sde(model, noise(), SIGMAS_20, noise_sampler=sampler())
    order, asked[:] = list(asked), []
    run = kdiffusion.parallel(dpmpp_sde, tolerance=1e-4)
    x = run(model, noise(), SIGMAS_20, disable=True, noise_sampler=sampler())
    assert relative(x, expected) <= 1e-4
    assert asked == order


def test_generators_are_left_where_the_loop_leaves_them():
    def sampler(generator):
        return lambda sigma, after: torch.randn(3, *SHAPE, generator=generator) + 0.1 * torch.randn(3, *SHAPE)

    ends = []
    for function in (euler_ancestral, kdiffusion.parallel(euler_ancestral, tolerance=1e-4)):
        generator = torch.Generator().manual_seed(4)
        torch.manual_seed(3)
        x = function(model, noise(), SIGMAS_20, disable=True, noise_sampler=sampler(generator))
        ends.append((x, torch.randn(4), torch.randn(4, generator=generator)))
    assert relative(ends[1][0], ends[0][0]) <= 1e-4
    assert torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][2], ends[1][2])


def test_loop_reads_and_writes_the_models_own_attributes():
    """The loop reads and writes the models own attributes."""

    class Wrapper:
        def __init__(self):
            self.inner_model = SimpleNamespace(model_sampling=SimpleNamespace(shift=0.5))
            self.last = None

        def __call__(self, x, sigma):
            return model(x, sigma, torch.full((len(x),), self.inner_model.model_sampling.shift))

    def loop(model, x, sigmas, extra_args=None, callback=None, disable=None):
        x = euler(model, x + model.inner_model.model_sampling.shift, sigmas, extra_args, callback, disable)
        model.last = len(sigmas)
        return x

    wrapper = Wrapper()
    expected, x, run = both(loop, wrapper)
    assert relative(x, expected) <= 1e-2
    assert run.report.mode == "recurrence"
    assert wrapper.last == len(SIGMAS_20)


def test_models_that_are_modules_keep_their_own_calls():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)

        def forward(self, x, sigma):
            assert len(list(self.parameters())) == 2
            return model(x, sigma)

    net = Module().requires_grad_(False)
    before = set(net.__dict__)
    for _ in range(2):
        expected, x, run = both(euler, net)
        assert relative(x, expected) <= 1e-2
        assert run(net, noise(), SIGMAS_20, disable=True).shape == x.shape
        assert run.report.mode == "recurrence"
    assert set(net.__dict__) == before


def test_what_is_known_of_a_model_is_kept_for_the_next_call_of_the_same_form():
    rows = []

    def counted(x, sigma, shift=None, unused=None):
        rows.append(len(x))
        return model(x, sigma, shift)

    expected, _, run = both(dpmpp_2m, counted)
    first = run.report.calls
    assert relative(run(counted, noise(), SIGMAS_20, disable=True), expected) <= 1e-2
    assert run.report.calls == run.report.rounds + 1 < first  # one to see that the model is still merged rightly
    other = torch.cat([SIGMAS_20[:10], SIGMAS_20[10:] * 0.9])
    again = run(counted, noise(), other, disable=True)
    assert relative(again, dpmpp_2m(counted, noise(), other)) <= 1e-2
    shift = torch.tensor([0.0, 1.0, -2.0])
    shifted = run(counted, noise(), SIGMAS_20, {"shift": shift}, disable=True)
    assert relative(shifted, dpmpp_2m(counted, noise(), SIGMAS_20, {"shift": shift})) <= 1e-2
    for i in range(20):
        run(counted, noise(), SIGMAS_20[9:], {"unused": torch.zeros(i)}, disable=True)
    assert len(run.loops) == 16


def test_loop_that_listens_inside_its_models_call_runs_sequentially():
    """A loop that listens inside its models call runs sequentially and says so."""

    def listened(x, sigma, model_options):
        denoised = model(x, sigma)
        for heard in model_options.get("sampler_post_cfg_function", []):
            denoised = heard({"denoised": denoised, "uncond_denoised": 0.9 * denoised})
        return denoised

    def euler_cfg_pp(model, x, sigmas, extra_args=None, callback=None, disable=None):
        last = None

        def hear(args):
            nonlocal last
            last = args["uncond_denoised"]
            return args["denoised"]

        options = {**extra_args["model_options"], "sampler_post_cfg_function": [hear]}
        for sigma, after in itertools.pairwise(sigmas):
            denoised = model(x, sigma * x.new_ones(len(x)), model_options=options)
            x = denoised + after * (x - last) / sigma
        return x

    with pytest.warns(RuntimeWarning, match=r"runs sequentially: .*hooks into"):
        expected, x, run = both(euler_cfg_pp, listened, extra_args={"model_options": {}})
    assert torch.equal(x, expected)
    assert run.report.mode == "sequential"


def test_sampling_under_inference_mode_is_the_same():
    with torch.inference_mode():
        for loop in (euler_ancestral, dpmpp_2m):
            expected, x, run = both(loop)
            assert relative(x, expected) <= 1e-2
            assert run.report.mode == "recurrence"


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="k-diffusion's signature, got 3"):
        kdiffusion.parallel(3)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        kdiffusion.parallel(euler, tolerance=-1)


# --- ComfyUI, as documented: conditionings chosen by the first row's sigma, masks, SAMPLER objects ------------------
