"""Every scheduler of the installed diffusers is read, and then is its own loop, or is refused with its reason.

``python tests/samplers/test_from_scheduler.py`` writes docs/schedulers.md anew.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import parataxis as px
import problems
from parataxis.denoisers import mixture
from parataxis.samplers.schedules import Variance

PAGE = Path(__file__).parents[2] / "docs" / "schedulers.md"
STEPS = 12
PLACES = diffusers, diffusers.schedulers
# Some versions of diffusers list names that they do not have.
NAMES = sorted({name for place in PLACES for name in dir(place) if name.endswith("Scheduler") and hasattr(place, name)})
pytestmark = [  # what diffusers itself warns of
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]

# What a scheduler cannot be made or set without.
NEEDED = {
    "AmusedScheduler": {"mask_token_id": 0},
    "HeliosDMDScheduler": {"stages": 1},
    "HeliosScheduler": {"stages": 1},
    "RFD4ProteinaScheduler": {
        "schedule_mode": "log",
        "noise_mode": "1/t",
        "tsr_k": 1.0,
        "tsr_sigma": 1.0,
        "tail_steps": 2,
    },
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}
SETTING = {
    "ConsistencyDecoderScheduler": {"num_inference_steps": 2},
    "SCMScheduler": {"num_inference_steps": STEPS, "intermediate_timesteps": None},
}
ENDS = ("SCMScheduler",)  # the last of its timesteps is where the loop ends, not a step

# Common options, of the scheduler or of its step: a scheduler is read with each that it has, beside its defaults.
V = {"prediction_type": "v_prediction"}
OPTIONS = [
    {},
    V,
    {"prediction_type": "sample"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"clip_sample": False},
    {"clip_denoised": False},
    {"thresholding": True, "sample_max_value": 1.5},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V},
    {"solver_order": 1},
    {"solver_order": 3},
    {"algorithm_type": "sde-dpmsolver++"},
    {"skip_prk_steps": True},
    {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    {"scheduler_type": "euler"},
    {"stochastic_sampling": True},
    {"shift": 3.0},
    {"variance_type": "learned_range"},
    {"eta": 1.0},
    {"s_churn": 2.0},
    {"use_clipped_model_output": True},
]


def find(name):
    return getattr(diffusers, name, None) or getattr(diffusers.schedulers, name)


def knows(name):
    """Return the options of a scheduler and of its step."""
    cls = find(name)
    step = inspect.getattr_static(cls, "step", find)
    return set(inspect.signature(cls.__init__).parameters), set(inspect.signature(step).parameters)


def make(name, options):
    """Return the scheduler with its timesteps set, and the options of its step."""
    made, _ = knows(name)
    scheduler = _made(name, tuple((key, value) for key, value in options.items() if key in made))
    return copy.deepcopy(scheduler), {key: value for key, value in options.items() if key not in made}


def visited(scheduler):
    """Return the times that the scheduler's loop visits."""
    times = getattr(scheduler, "timesteps", None)
    return times[:-1] if type(scheduler).__name__ in ENDS else times


@cache
def _made(name, options):
    scheduler = find(name)(**NEEDED.get(name, {}), **dict(options))
    if hasattr(scheduler, "set_timesteps"):
        scheduler.set_timesteps(**SETTING.get(name, {"num_inference_steps": STEPS}))
    return scheduler


CASES = [(name, options) for name in NAMES for options in OPTIONS if set(options) <= set.union(*knows(name))]


def attempt(name, options):
    """Return the sampler that is read, why it is refused, or None for options that diffusers itself refuses."""
    return _attempt(name, tuple(options.items()))


@cache
def _attempt(name, options):
    try:
        scheduler, step = make(name, dict(options))
    except ImportError as error:
        return f"it r{re.search(r'equires the .* library', str(error)).group(0)}, which is not installed here"
    except (ValueError, NotImplementedError):
        return None
    try:
        return px.from_scheduler(scheduler, timesteps=visited(scheduler), **step)
    except (TypeError, ValueError) as error:
        refused = options and isinstance(error.__cause__, (ValueError, NotImplementedError))
        return None if refused else str(error)


def network(scheduler):
    """Return the exact network of a scheduler's kind for a mixture, or just a smooth one where the kind is unknown."""
    config = scheduler.config
    mixture = problems.mixtures()["power law"]
    kind = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}.get(config.get("prediction_type"))
    if config.get("sigma_data") is not None and kind == "eps":

        def edm(u, t):
            sigma, data = torch.exp(4 * t.double())[:, None], config.sigma_data
            size = (sigma**2 + data**2).sqrt()
            x = u.double().flatten(1) * size
            xhat = mixture.data_prediction(x, torch.ones(len(x)).double(), sigma[:, 0])
            return ((xhat - data**2 / size**2 * x) * size / (sigma * data)).view(u.shape).to(u)

        return edm
    if kind and hasattr(scheduler, "alphas_cumprod"):
        return mixture.network(Variance(scheduler.alphas_cumprod.double().clamp(min=1e-8).numpy()), kind)
    if "Flow" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction":
        return mixture.network(px.flow(), "flow")

    def smooth(u, t):
        phase = torch.sin(t.double() / 50).to(u).view(-1, *(1,) * (u.ndim - 1))
        return torch.tanh(u.flip(-1) + phase) - 0.3 * u

    return smooth


def own_loop(scheduler, step, denoise, noise, generator, first=0):
    """Return the sample of the scheduler's own loop from its step ``first``."""
    scheduler = copy.deepcopy(scheduler)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step = {**step, "generator": generator}
    for t in visited(scheduler)[first:]:
        u = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(denoise(u, t.expand(len(u))), t, x, **step).prev_sample
    return x


def keeps_double(scheduler, step):
    """Return whether the scheduler computes its first steps in float64: they scale with what they are given."""
    x = 1e-4 * torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = []
    for factor in (1, 3):
        own, state, generator = copy.deepcopy(scheduler), factor * x[0], torch.Generator().manual_seed(0)
        options = {**step, "generator": generator} if "generator" in inspect.signature(own.step).parameters else step
        for t in own.timesteps[:2]:
            if hasattr(own, "scale_model_input"):
                own.scale_model_input(state, t)
            with ScaledNoise(factor):
                state = own.step(factor * x[1], t, state, **options).prev_sample
        ends.append(state / factor)
    return problems.relative(*ends) <= 1e-12


class ScaledNoise(TorchFunctionMode):
    """Multiplies what torch.randn draws."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 1e-4 * self.factor * result if func is torch.randn else result


def draw(dtype):
    return problems.noise(2, dtype, shape=(1, 4, 4))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_scheduler_is_its_own_loop_or_raises_with_the_reason(name, options):
    """A scheduler is its own loop or is refused with the reason."""
    sampler = attempt(name, options)
    if sampler is None:
        with pytest.raises((ValueError, NotImplementedError)):
            own_loop(*make(name, options), lambda u, t: u, draw(torch.float64), torch.Generator())
        return
    if isinstance(sampler, str):
        assert re.match(rf"{name} is not supported: .+\.$|scheduler must have|it requires the \w+ lib", sampler)
        return
    scheduler, step = make(name, options)
    denoise = network(scheduler)
    expected, errors = {}, {}
    for dtype in (torch.float64, torch.float32):
        expected[dtype] = own_loop(scheduler, step, denoise, draw(dtype), torch.Generator().manual_seed(3))
        result = px.sample(denoise, draw(dtype), sampler, px.Sequential(), generator=torch.Generator().manual_seed(3))
        errors[dtype] = problems.relative(result.x, expected[dtype])
    # Thresholding cuts at a level that most schedulers keep in float32 and do not tell.
    exact = keeps_double(scheduler, step) and "thresholding" not in options
    assert errors[torch.float64] <= (1e-8 if exact else 1e-5)
    # Both loops round, and where the scheduler's own comes out far from the one in float64, so does ours.
    floor = (
        0.0
        if sampler.coefficients.noise_std.any()
        else problems.relative(expected[dtype].double(), expected[torch.float64])
    )
    assert errors[dtype] <= max(1e-5, 2 * floor)
    solved = px.sample(
        denoise,
        draw(dtype),
        sampler,
        px.Secant(window=8),
        generator=torch.Generator().manual_seed(3),
        tolerance=1e-4,
    )
    # The tolerance bounds an estimate of first order.
    assert problems.relative(solved.x, expected[dtype]) <= 2e-4
    assert solved.converged


def test_page_is_what_reading_says():
    """The page is what reading says."""
    pytest.importorskip("transformers")  # with all that the schedulers of diffusers may need
    made = re.search(r"diffusers ([\d.]+):", PAGE.read_text()).group(1)
    if made != diffusers.__version__:
        pytest.skip(f"the page is of diffusers {made}; the tests above hold for {diffusers.__version__} as well")
    assert PAGE.read_text() == page()


def page():
    """Return the page: what becomes of every scheduler, and the reasons below."""
    reasons = []

    def mark(reason):
        reason = re.sub(r"^\w+ is not supported: ", "", reason).rstrip(".")
        reason = re.sub(r"got \w+Scheduler", "got one without", re.sub(r"\w+Scheduler\.step", "step", reason))
        if reason not in reasons:
            reasons.append(reason)
        return f"({reasons.index(reason) + 1})"

    lines = [
        "# Schedulers of diffusers",
        "",
        f"Made by `tests/samplers/test_from_scheduler.py` with diffusers {diffusers.__version__}:",
        "`px.from_scheduler` with the defaults and with common options, each compared with the scheduler's loop.",
        "",
        "*recurrence*: read by unit vectors. *replay*: not linear, or a loop of more than `step(output, t, sample)`;",
        "`px.parallel` can still replay such a loop, since its states are floating-point numbers. *not supported*: the",
        "states are not.",
        "",
        "| scheduler | | its steps | options that are not read |",
        "|---|---|---|---|",
    ]
    for name in NAMES:
        found = [(options, attempt(name, options)) for options in OPTIONS if (name, options) in CASES]
        read = [(options, sampler) for options, sampler in found if isinstance(sampler, px.Sampler)]
        failed = [(options, reason) for options, reason in found if isinstance(reason, str)]
        if not read:
            tokens = re.search(
                r"Long|long|vocab", str(inspect.signature(inspect.getattr_static(find(name), "step", find)))
            )
            reason = mark("its states are tokens, which are not numbers to be corrected" if tokens else failed[0][1])
            lines.append(f"| {name} | {'not supported' if tokens else 'replay'} {reason} | | |")
            continue
        others = "; ".join(
            f"{', '.join(f'`{key}={value!r}`' for key, value in options.items()) or 'defaults'} {mark(reason)}"
            for options, reason in failed
        )
        lines.append(f"| {name} | recurrence | {describe([sampler for _, sampler in read])} | {others} |")
    lines += ["", *[f"{number}. {reason}" for number, reason in enumerate(reasons, 1)], ""]
    return "\n".join(lines)


def describe(samplers):
    """Return what the tables of a scheduler are like."""
    lags = sorted({sampler.coefficients.lags for sampler in samplers})
    words = ["one output" if lags == [0] else f"{lags[0] + 1} to {lags[-1] + 1} outputs"]
    if len(lags) == 1 and lags != [0]:
        words = [f"{lags[0] + 1} outputs"]
    if any(sampler.coefficients.noise_std.any() for sampler in samplers):
        words.append("noise")
    if any(sampler.transform and (sampler.transform.clip or sampler.transform.quantile) for sampler in samplers):
        words.append("clipping")
    if all(sampler.coefficients.alpha is None for sampler in samplers):
        words.append("levels unknown")
    return ", ".join(words)


@pytest.mark.parametrize("name", ["DDPMScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler"])
def test_reading_leaves_the_scheduler_and_the_random_state_as_they_were(name):
    scheduler, _ = make(name, {})
    before, random = pickle.dumps(scheduler), torch.get_rng_state()
    px.from_scheduler(scheduler)
    assert pickle.dumps(scheduler) == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("cls", "options", "written"),
    [
        (diffusers.DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, px.SAMPLERS["ddim"]),
        (diffusers.DDPMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, px.SAMPLERS["ddpm"]),
        (diffusers.EulerDiscreteScheduler, {"beta_start": 1e-4, "beta_end": 0.02}, px.SAMPLERS["euler"]),
        (diffusers.HeunDiscreteScheduler, {"beta_start": 1e-4, "beta_end": 0.02}, px.SAMPLERS["heun"]),
        (diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}, px.SAMPLERS["dpmpp_2m"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_read_is_what_is_written(cls, options, written):
    scheduler = cls(**options)
    scheduler.set_timesteps(20)
    spacing = {"spacing": "trailing"} if cls is diffusers.DPMSolverMultistepScheduler else {}
    read, own = px.from_scheduler(scheduler), written(px.vp(), 20, **spacing)
    for field in (
        "state_weight",
        "output_weight",
        "noise_std",
        "alpha",
        "sigma",
        "scale",
        "x0_from_input",
        "x0_from_output",
    ):
        ours, theirs = getattr(read.coefficients, field), getattr(own.coefficients, field)
        assert np.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max()), field
    assert np.allclose(read.times, own.times, atol=1e-3)
    assert math.isclose(read.start_scale, own.start_scale, rel_tol=1e-5)
    assert px.Parareal().unsupported(read.coefficients) == px.Parareal().unsupported(own.coefficients)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_one_or_two_steps_are_read(name, steps):
    scheduler, _ = make(name, {})
    scheduler.set_timesteps(steps)
    expected = own_loop(scheduler, {}, network(scheduler), draw(torch.float64), None)
    result = px.sample(network(scheduler), draw(torch.float64), px.from_scheduler(scheduler), px.Sequential())
    assert problems.relative(result.x, expected) <= 1e-6


def test_thousand_steps_are_read():
    """A thousand steps are read."""
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    scheduler.set_timesteps(1000)

    def denoise(u, t):
        return torch.tanh(u.flip(-1))

    expected = own_loop(scheduler, {}, denoise, draw(torch.float32), torch.Generator().manual_seed(3))
    result = px.sample(
        denoise,
        draw(torch.float32),
        px.from_scheduler(scheduler),
        px.Sequential(),
        generator=torch.Generator().manual_seed(3),
    )
    assert problems.relative(result.x, expected) <= 1e-5


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_loop_that_starts_in_the_middle_is_read(name):
    """A loop that starts in the middle is read."""
    scheduler, _ = make(name, {})
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(4)  # as pipelines do that start from an image
    denoise, noise = network(scheduler), draw(torch.float64)
    sampler = px.from_scheduler(scheduler, timesteps=scheduler.timesteps[4:])
    expected = own_loop(scheduler, {}, denoise, noise, None, first=4)
    result = px.sample(denoise, noise, sampler, px.Sequential())
    assert problems.relative(result.x, expected) <= (1e-6 if name == "EulerDiscreteScheduler" else 1e-10)


def test_noise_is_drawn_in_the_dtype_of_the_loop():
    sampler = px.from_scheduler(make("DDPMScheduler", {})[0])
    noise = draw(torch.float32)
    table = sampler.recurrence(noise, torch.Generator().manual_seed(3), torch.bfloat16)
    first = torch.randn(noise.shape, generator=torch.Generator().manual_seed(3), dtype=torch.bfloat16)
    assert torch.allclose(table.noise[:, 0], float(sampler.coefficients.noise_std[0]) * first.float())
    # This one draws float32 noise for whatever states.
    sampler = px.from_scheduler(make("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})[0])
    assert sampler.draw_dtype == torch.float32


def test_one_generator_a_sample_makes_a_sample_independent_of_its_batch():
    sampler = px.from_scheduler(make("SASolverScheduler", {})[0])
    noise = draw(torch.float64)
    both = sampler.recurrence(noise, problems.generators(2))
    alone = sampler.recurrence(noise[1:], problems.generators(2)[1:])
    assert torch.equal(both.noise[1:], alone.noise)
    scheduler, _ = make("SASolverScheduler", {})
    expected = own_loop(scheduler, {}, network(scheduler), noise, problems.generators(2))
    result = px.sample(network(scheduler), noise, sampler, px.Sequential(), generator=problems.generators(2))
    assert problems.relative(result.x, expected) <= 1e-8


class Plain:
    """A scheduler of nobody's: x' = 0.9 x + 0.1 f."""

    timesteps = torch.arange(5).flip(0)

    def step(self, output, t, sample, generator=None):
        return SimpleNamespace(prev_sample=self.update(output, sample, generator))

    def update(self, output, sample, generator):
        return 0.9 * sample + 0.1 * output


def plain(update, **more):
    return type("Odd", (Plain,), {"update": lambda self, f, x, g: update(f, x, g), **more})()


def test_any_object_with_timesteps_and_a_step_can_be_read():
    local = px.from_scheduler(Plain()).coefficients
    assert np.allclose(local.state_weight, 0.9)
    assert np.allclose(local.output_weight, 0.1)
    assert local.alpha is None


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (plain(lambda f, x, g: x + 0.1 * f.tanh()), "step 0 is not linear"),
        (plain(lambda f, x, g: x + 0.1 * f.clamp(-30, 30)), "step 0 is not linear"),
        (plain(lambda f, x, g: x + 0.1 * f + 0.01), "step 0 is not linear"),
        (plain(lambda f, x, g: x + 0.1 * f.roll(1, -1)), "step 0"),
        (plain(lambda f, x, g: x + f / 0), "step 0 of 5 makes NaN or Inf"),
        (plain(lambda f, x, g: x[..., :2]), "does not return a floating-point state"),
        (plain(lambda f, x, g: x + torch.rand(x.shape, generator=g)), "draws with rand"),
        (plain(lambda f, x, g: x + torch.randn(x.shape)), "not from the generator"),
        (plain(lambda f, x, g: x + torch.randn(1, generator=g)), r"noise of shape \(1,\)"),
        (plain(lambda f, x, g: x.undefined), "raised AttributeError"),
        (
            plain(lambda f, x, g: x + f, scale_model_input=lambda self, x, t: x.abs()),
            "scale_model_input of step 0|linear",
        ),
        (plain(lambda f, x, g: x + f, timesteps=None), "call its set_timesteps first"),
        (plain(lambda f, x, g: x + f, step_index=3), "has taken 3 steps already"),
    ],
)
def test_what_is_not_a_table_raises_with_the_reason(scheduler, message):
    """What is not a table is refused with the reason."""
    with pytest.raises(ValueError, match=message):
        px.from_scheduler(scheduler)


def test_option_out_of_range_is_among_what_is_to_blame():
    """An option out of range is among what is to blame."""
    scheduler, _ = make("DDIMScheduler", {"clip_sample": False})
    with pytest.raises(ValueError, match=r"NaN or Inf of finite outputs, with eta=5.0, prediction_type='epsilon'"):
        px.from_scheduler(scheduler, eta=5.0)


def test_another_default_device_leaves_reading_on_the_cpu():
    scheduler, options = make("DDPMScheduler", {})
    torch.set_default_device("meta")
    try:
        assert px.from_scheduler(scheduler, **options).steps == STEPS
    finally:
        torch.set_default_device(None)


def test_what_is_no_scheduler_or_no_option_is_named():
    with pytest.raises(TypeError, match=r"must have timesteps and step\(output, t, sample\), .* got dict"):
        px.from_scheduler({})
    with pytest.raises(TypeError, match="takes no option 'eta'"):
        px.from_scheduler(Plain(), eta=1.0)


def test_growth_behind_a_window_is_not_trusted_where_outputs_are_clipped():
    """The growth behind a window is not trusted where outputs are clipped."""
    rounds = []
    for clip in (False, True):
        scheduler = diffusers.DDIMScheduler(clip_sample=clip, clip_sample_range=100.0)  # never reached
        scheduler.set_timesteps(100)
        noise = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
        net = mixture(16).network(px.vp())
        result = px.sample(net, noise, px.from_scheduler(scheduler), px.Secant(window=8))
        rounds.append(result.rounds)
        assert [one.problem.transformed for one in result] == [clip] * 2
    assert rounds[1] >= rounds[0]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(page())
