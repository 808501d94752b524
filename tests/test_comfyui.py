"""Any sampler function of k-diffusion's signature in parallel, and the ComfyUI nodes, on what ComfyUI documents."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import parataxis as px
from ksamplers import dpmpp_2m, dpmpp_sde, euler, euler_ancestral, heun, model, state
from parataxis import kdiffusion

SIGMAS = torch.from_numpy(px.karras(0.03, 14.0).grid(20).sigma).float()
LOOPS = {loop.__name__: loop for loop in (euler, euler_ancestral, heun, dpmpp_2m, dpmpp_sde)}
SHAPE = (4, 4)


def relative(x, y):
    x, y = x.double().flatten(1), y.double().flatten(1)
    return float(((x - y).norm(dim=1) / y.norm(dim=1)).max())


def noise():
    return state(torch.float32)


def both(loop, model=model, sigmas=SIGMAS, extra_args=None, solver=None, *, tolerance=1e-2, boundaries=(), **options):
    """Return the sequential sample, the parallel one, and the parallel function."""
    run = kdiffusion.parallel(loop, solver, tolerance=tolerance, boundaries=boundaries)
    torch.manual_seed(3)
    expected = loop(model, noise(), sigmas, extra_args, disable=True, **options)
    torch.manual_seed(3)
    return expected, run(model, noise(), sigmas, extra_args, disable=True, **options), run


@pytest.mark.parametrize("name", LOOPS)
def test_any_sampler_function_gives_its_own_sample_in_fewer_rounds(name):
    expected, x, run = both(LOOPS[name])
    assert relative(x, expected) <= 1e-2
    assert run.report.mode == "recurrence"
    assert run.report.converged
    assert run.report.rounds < 0.8 * run.report.steps
    assert x.dtype == torch.float32


@pytest.mark.parametrize("name", LOOPS)
def test_with_tolerance_zero_the_sample_is_the_functions_own(name):
    expected, x, run = both(LOOPS[name], tolerance=0)
    assert relative(x, expected) <= 1e-5
    assert run.report.peak_width == 8


@pytest.mark.parametrize("name", LOOPS)
def test_a_window_of_one_is_the_function_to_the_bit(name):
    expected, x, run = both(LOOPS[name], sigmas=SIGMAS[6:], solver=px.Secant(window=1))
    assert torch.equal(x, expected)
    assert run.report.rounds == run.report.steps > 8


def test_options_of_the_function_go_through():
    for loop, options in [(euler, {"s_churn": 6.0, "s_noise": 1.1}), (dpmpp_sde, {"eta": 0.5, "r": 0.4})]:
        expected, x, run = both(loop, tolerance=1e-4, **options)
        assert relative(x, expected) <= 1e-4
        assert run.report.mode == "recurrence"
    assert run.__name__ == "dpmpp_sde"


def test_the_callback_is_called_once_a_step_in_order_with_that_steps_states():
    for loop in (heun, dpmpp_sde):
        theirs, ours = [], []
        both_options = {"extra_args": {}, "disable": True}
        torch.manual_seed(3)
        loop(model, noise(), SIGMAS, callback=theirs.append, **both_options)
        torch.manual_seed(3)
        run = kdiffusion.parallel(loop, tolerance=1e-4)
        run(model, noise(), SIGMAS, callback=ours.append, **both_options)
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
        run(model, noise(), SIGMAS, callback=interrupt, disable=True)
    rounds = []

    def count(settled, levels):
        rounds.append((settled, levels))
        if len(rounds) == 3:
            raise InterruptedError

    run = kdiffusion.parallel(euler, on_round=count)
    with pytest.raises(InterruptedError):
        run(model, noise(), SIGMAS, disable=True)
    assert [levels for _, levels in rounds] == [20] * 3
    assert run(model, noise(), SIGMAS, disable=True).isfinite().all()
    assert rounds[-1] == (20, 20)


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

    expected = dpmpp_sde(model, noise(), SIGMAS, noise_sampler=sampler())
    order, asked[:] = list(asked), []
    run = kdiffusion.parallel(dpmpp_sde, tolerance=1e-4)
    x = run(model, noise(), SIGMAS, disable=True, noise_sampler=sampler())
    assert relative(x, expected) <= 1e-4
    assert asked == order


def test_generators_are_left_where_the_loop_leaves_them():
    def sampler(generator):
        return lambda sigma, after: torch.randn(3, *SHAPE, generator=generator) + 0.1 * torch.randn(3, *SHAPE)

    ends = []
    for function in (euler_ancestral, kdiffusion.parallel(euler_ancestral, tolerance=1e-4)):
        generator = torch.Generator().manual_seed(4)
        torch.manual_seed(3)
        x = function(model, noise(), SIGMAS, disable=True, noise_sampler=sampler(generator))
        ends.append((x, torch.randn(4), torch.randn(4, generator=generator)))
    assert relative(ends[1][0], ends[0][0]) <= 1e-4
    assert torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][2], ends[1][2])


def test_the_loop_reads_and_writes_the_models_own_attributes():
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
    assert wrapper.last == len(SIGMAS)


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
        assert run(net, noise(), SIGMAS, disable=True).shape == x.shape
        assert run.report.mode == "recurrence"
    assert set(net.__dict__) == before


def test_what_is_known_of_a_model_is_kept_for_the_next_call_of_the_same_form():
    rows = []

    def counted(x, sigma, shift=None, unused=None):
        rows.append(len(x))
        return model(x, sigma, shift)

    expected, _, run = both(dpmpp_2m, counted)
    first = run.report.calls
    assert relative(run(counted, noise(), SIGMAS, disable=True), expected) <= 1e-2
    assert run.report.calls == run.report.rounds + 1 < first  # one to see that the model is still merged rightly
    other = torch.cat([SIGMAS[:10], SIGMAS[10:] * 0.9])
    again = run(counted, noise(), other, disable=True)
    assert relative(again, dpmpp_2m(counted, noise(), other)) <= 1e-2
    shift = torch.tensor([0.0, 1.0, -2.0])
    shifted = run(counted, noise(), SIGMAS, {"shift": shift}, disable=True)
    assert relative(shifted, dpmpp_2m(counted, noise(), SIGMAS, {"shift": shift})) <= 1e-2
    for i in range(20):
        run(counted, noise(), SIGMAS[9:], {"unused": torch.zeros(i)}, disable=True)
    assert len(run._loops) == 16


def test_a_loop_that_listens_inside_its_models_call_runs_sequentially_and_says_so():
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


class Base(torch.nn.Module):
    """The model itself, which stays while guiders come and go."""

    model_sampling = SimpleNamespace(noise_scaling=lambda sigma, x: sigma * x)


BASE = Base()


class Guider:
    """Chooses the conditionings of a call by the sigma of its first row, as ComfyUI does."""

    def __init__(self, cfg=2.0, **conds):
        self.conds, self.cfg = conds, cfg
        self.inner_model = BASE
        self.sigmas = []  # of the rows of every call

    def __call__(self, x, sigma, model_options=None, seed=None):
        self.sigmas.append(sigma.tolist())
        positive, negative = (self.predict(self.conds[name], x, sigma) for name in ("positive", "negative"))
        denoised = negative + self.cfg * (positive - negative)
        for hear in (model_options or {}).get("sampler_post_cfg_function", ()):
            denoised = hear({"denoised": denoised, "sigma": sigma, "input": x})
        return denoised

    def predict(self, conds, x, sigma):
        total, count = torch.zeros_like(x), 0
        for cond in conds:
            if sigma[0] > cond.get("timestep_start", float("inf")) or sigma[0] < cond.get("timestep_end", 0.0):
                continue
            shift = cond["shift"].repeat(-(-len(x) // len(cond["shift"])))[: len(x)]
            denoised = model(x, sigma, shift)
            if "control" in cond:
                denoised = denoised + cond["control"].get_control(sigma)
            total, count = total + denoised, count + 1
        return total / count


class Control:
    """Adds something within a range of sigmas, on top of another."""

    def __init__(self, first, last, previous=None):
        self.timestep_range, self.previous_controlnet = (first, last), previous

    def get_control(self, sigma):
        before = self.previous_controlnet.get_control(sigma) if self.previous_controlnet else 0.0
        return before + (0.3 if self.timestep_range[1] <= sigma[0] <= self.timestep_range[0] else 0.0)


class Inpaint:
    """Keeps what a mask keeps, with one image and one noise a sample."""

    def __init__(self, guider, sigmas):
        self.inner_model, self.sigmas = guider, sigmas

    def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
        if denoise_mask is not None:
            kept = self.latent_image + self.noise * sigma.view(-1, *[1] * (x.ndim - 1))
            x = x * denoise_mask + kept * (1 - denoise_mask)
        denoised = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        if denoise_mask is not None:
            denoised = denoised * denoise_mask + self.latent_image * (1 - denoise_mask)
        return denoised


class KSampler:
    """A SAMPLER."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function = sampler_function
        self.extra_options, self.inpaint_options = extra_options or {}, inpaint_options or {}

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None):
        seen = Inpaint(guider, sigmas)
        seen.latent_image, seen.noise = latent_image, noise
        extra_args = {**extra_args, "denoise_mask": denoise_mask}
        x = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise)
        steps = len(sigmas) - 1

        def tell(told):
            if callback is not None:
                callback(told["i"], told["denoised"], told["x"], steps)

        return self.sampler_function(
            seen, x, sigmas, extra_args=extra_args, callback=tell, disable=True, **self.extra_options
        )


def guider(**more):
    """Two prompts that take turns, one over all steps, and a negative one."""
    here = float(SIGMAS[9]) + 0.01
    return Guider(
        positive=[
            {"shift": torch.tensor([1.0]), "timestep_start": 999999999.9, "timestep_end": here},
            {"shift": torch.tensor([-1.0]), "timestep_start": here, "timestep_end": 0.0, **more},
            {"shift": torch.tensor([0.3])},
        ],
        negative=[{"shift": torch.tensor([0.0]), "timestep_end": float(SIGMAS[13]), "timestep_start": 999999999.9}]
        + [{"shift": torch.tensor([0.1]), "timestep_start": float(SIGMAS[13])}],
    )


def sides(sigmas, boundaries):
    return {tuple((sigma > b) - (sigma < b) for b in boundaries) for sigma in sigmas}


def test_steps_on_different_sides_of_a_boundary_never_share_a_call():
    loud = guider()
    boundaries = [float(SIGMAS[9]) + 0.01, float(SIGMAS[13])]
    for loop in (euler, dpmpp_2m, dpmpp_sde):
        expected, x, run = both(loop, loud, tolerance=0, boundaries=lambda model, extra_args: boundaries)
        assert relative(x, expected) <= 1e-5
        assert run.report.peak_rows > 3
        for sigmas in loud.sigmas:
            assert len(sides(sigmas, boundaries)) == 1


def test_a_model_that_looks_at_its_first_row_and_names_no_boundary_runs_sequentially_and_says_so():
    loud = guider()
    run = kdiffusion.parallel(euler)
    expected = euler(loud, noise(), SIGMAS)
    for most in (40, 20):
        loud.sigmas.clear()
        with pytest.warns(RuntimeWarning, match=r"runs sequentially: .*read only the first timestep"):
            x = run(loud, noise(), SIGMAS, disable=True)
        assert torch.equal(x, expected)
        assert len(loud.sigmas) <= most


@pytest.fixture
def package(monkeypatch):
    """The nodes, with the parts of ComfyUI that they use."""
    comfy = types.ModuleType("comfy")
    comfy.model_management = types.ModuleType("comfy.model_management")
    comfy.utils = types.ModuleType("comfy.utils")
    comfy.model_management.throw_exception_if_processing_interrupted = lambda: None
    comfy.shown = []

    class ProgressBar:
        def __init__(self, total, node_id=None):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            comfy.shown.append((value, total))

    comfy.utils.ProgressBar = ProgressBar
    latest = types.ModuleType("comfy_api.latest")
    latest.ComfyExtension = type("ComfyExtension", (), {})
    latest.io = SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=lambda **fields: SimpleNamespace(**fields),
        NodeOutput=lambda *values: SimpleNamespace(result=values),
        **{name: kind(name) for name in ("Sampler", "Int", "Float", "Combo")},
    )
    modules = {
        "comfy": comfy,
        "comfy.model_management": comfy.model_management,
        "comfy.utils": comfy.utils,
        "comfy_api": types.ModuleType("comfy_api"),
        "comfy_api.latest": latest,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield load
    for name in [name for name in sys.modules if name.split(".")[0] == "custom_node"]:
        del sys.modules[name]


def kind(name):
    """An input and output type of the V3 API."""

    def given(id, **options):  # its name
        return SimpleNamespace(kind=name, id=id, **options)

    return SimpleNamespace(Input=given, Output=lambda **options: SimpleNamespace(kind=name, **options))


def load():
    folder = Path(__file__).parents[1] / "integrations" / "comfyui"
    spec = importlib.util.spec_from_file_location(
        "custom_node", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_node"] = module
    spec.loader.exec_module(module)
    return module


def test_both_apis_have_the_same_node(package):
    nodes = package()
    (name,) = nodes.NODE_CLASS_MAPPINGS
    assert set(nodes.NODE_DISPLAY_NAME_MAPPINGS) == {name}
    old = nodes.NODE_CLASS_MAPPINGS[name]
    (new,) = asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list())
    schema = new.define_schema()
    assert schema.node_id == name
    assert schema.display_name == nodes.NODE_DISPLAY_NAME_MAPPINGS[name]
    assert [given.id for given in schema.inputs] == list(old.INPUT_TYPES()["required"])
    assert [given.kind.upper() for given in schema.outputs] == list(old.RETURN_TYPES)
    sampler = KSampler(euler, {"s_churn": 1.0}, {"random": True})
    given = {"sampler": sampler, "window": 4, "tolerance": 0.01, "solver": "secant"}
    for result in (getattr(old(), old.FUNCTION)(**given)[0], new.execute(**given).result[0]):
        assert isinstance(result, KSampler)
        assert result.extra_options == {"s_churn": 1.0}
        assert result.inpaint_options == {"random": True}
        assert result.sampler_function.__name__ == "euler"
        assert result.sampler_function is not euler
    assert sampler.sampler_function is euler


def test_without_the_new_api_the_old_one_is_there(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    nodes = package()
    assert nodes.NODE_CLASS_MAPPINGS
    assert not hasattr(nodes, "comfy_entrypoint")


def test_the_defaults_of_the_inputs_are_what_the_node_takes(package):
    nodes = package()
    (old,) = nodes.NODE_CLASS_MAPPINGS.values()
    inputs = old.INPUT_TYPES()["required"]
    given = {name: options[0]["default"] for name, (_, *options) in inputs.items() if options}
    for solver in inputs["solver"][0]:
        (sampler,) = old().execute(KSampler(euler), solver=solver, **given)
        expected, x = (drawn(one, guider()) for one in (KSampler(euler), sampler))
        assert relative(x, expected) <= 1e-2


def drawn(sampler, guide, callback=None, mask=None, options=None):
    extra_args = {"model_options": options or {}, "seed": 3}
    clean = torch.linspace(-1, 1, 48).view(3, *SHAPE)
    torch.manual_seed(3)
    return sampler.sample(guide, SIGMAS, extra_args, callback, noise() / 14, clean, mask)


def wrapped(nodes, sampler, window=8, tolerance=0.0):
    (node,) = nodes.NODE_CLASS_MAPPINGS.values()
    return node().execute(sampler, window=window, tolerance=tolerance, solver="secant")[0]


@pytest.mark.parametrize("name", LOOPS)
def test_a_wrapped_sampler_with_ranges_and_a_mask_samples_what_the_sampler_does(package, name, caplog):
    control = Control(float(SIGMAS[2]), float(SIGMAS[5]), Control(float(SIGMAS[11]), float(SIGMAS[16])))

    def skipping(sigma_start, sigma_end):
        def change(args):
            inside = sigma_end <= args["sigma"][0].item() <= sigma_start
            return 1.1 * args["denoised"] if inside else args["denoised"]

        return change

    options = {"sampler_post_cfg_function": [skipping(float(SIGMAS[6]), float(SIGMAS[7]) - 0.01)]}
    mask = torch.ones(3, *SHAPE)
    mask[0, :2], mask[2, :, 1] = 0, 0.5
    sampler = KSampler(LOOPS[name])
    told, expected_told, guide = [], [], guider(control=control)
    expected = drawn(sampler, guider(control=control), lambda *one: expected_told.append(one), mask, options)
    parallel = wrapped(package(), sampler)
    with caplog.at_level(logging.INFO, "parataxis"):
        x = drawn(parallel, guide, lambda *one: told.append(one), mask, options)
    assert relative(x, expected) <= 1e-5
    assert [(i, steps) for i, _, _, steps in told] == [(i, 20) for i in range(20)]
    assert all(relative(one[1], two[1]) <= 1e-3 for one, two in zip(told, expected_told, strict=True))
    assert f"{name}: recurrence: " in caplog.text
    assert parallel.sampler_function.report.peak_rows > 3


def test_a_ranged_sampler_takes_fewer_rounds(package):
    sampler = wrapped(package(), KSampler(dpmpp_2m), tolerance=1e-2)
    expected = drawn(KSampler(dpmpp_2m), guider())
    assert relative(drawn(sampler, guider()), expected) <= 1e-2
    report = sampler.sampler_function.report
    assert report.rounds < 0.7 * report.steps
    drawn(sampler, guider())
    assert report.passes <= 4


def test_conditionings_of_several_samples_follow_them(package):
    def guide(rows):
        return Guider(positive=[{"shift": torch.linspace(-1, 1, rows)}], negative=[{"shift": torch.zeros(1)}])

    sampler = wrapped(package(), KSampler(euler), tolerance=1e-3)
    for rows in (1, 3, 1):
        assert relative(drawn(sampler, guide(rows)), drawn(KSampler(euler), guide(rows))) <= 1e-3
        assert sampler.sampler_function.report.peak_rows > 3


def test_hooks_that_count_their_steps_run_sequentially(package, caplog):
    group = SimpleNamespace(hooks=[SimpleNamespace(hook_keyframe=SimpleNamespace(keyframes=[0, 1]))])
    guide = guider(hooks=group)
    with caplog.at_level(logging.INFO, "parataxis"):
        x = drawn(wrapped(package(), KSampler(euler)), guide)
    assert len(guide.sigmas) == 20
    assert "euler: sequential: hooks with several keyframes" in caplog.text
    assert torch.equal(x, drawn(KSampler(euler), guider()))


def test_progress_is_shown_and_an_interrupt_ends_the_rounds(package):
    sampler = wrapped(package(), KSampler(euler))
    drawn(sampler, guider())
    comfy = sys.modules["comfy"]
    assert comfy.shown[-1] == (20, 20)

    def interrupt():
        raise InterruptedError

    comfy.model_management.throw_exception_if_processing_interrupted = interrupt
    with pytest.raises(InterruptedError):
        drawn(sampler, guide := guider())
    assert len(guide.sigmas) <= 4


def test_a_wrapped_sampler_is_not_wrapped_twice_and_others_are_refused(package):
    nodes = package()
    twice = wrapped(nodes, wrapped(nodes, KSampler(euler)))
    assert twice.sampler_function.sequential is euler
    with pytest.raises(TypeError, match=r"must have a sampler_function.*got a object"):
        wrapped(nodes, object())
