"""Every sampler, step by step, against the installed diffusers scheduler of the same configuration."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import parataxis as px
from parataxis import samplers
from parataxis.samplers.schedules import Flow, Grid, Variance

STEPS = 20
SHAPE = (2, 3, 4)
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def double(scheduler):
    """Give a scheduler the tables that it rounds to float32 in float64, and return our schedule of the same numbers."""
    config = scheduler.config
    if config.beta_schedule == "squaredcos_cap_v2":
        exact = px.cosine(config.num_train_timesteps)
    else:
        exact = px.vp(config.num_train_timesteps, config.beta_start, config.beta_end, config.beta_schedule)
    assert np.allclose(exact.alphas_cumprod, scheduler.alphas_cumprod.double().numpy(), rtol=2e-4)
    bar = torch.from_numpy(exact.alphas_cumprod)
    scheduler.alphas_cumprod = bar
    scheduler.betas = 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])
    scheduler.alphas = 1 - scheduler.betas
    scheduler.one = torch.ones((), dtype=torch.float64)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.one if config.set_alpha_to_one else bar[0]
    if hasattr(scheduler, "alpha_t"):
        scheduler.alpha_t, scheduler.sigma_t = bar.sqrt(), (1 - bar).sqrt()
    return exact


def theirs(scheduler, noise, outputs, generator, **kwargs):
    """Return diffusers' states after every step and what its network is told, for given outputs."""
    x = noise * scheduler.init_noise_sigma
    states, inputs = [x], []
    for t, f in zip(scheduler.timesteps, outputs, strict=True):
        inputs.append(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x)
        kwargs_now = {**kwargs, **({"generator": generator} if generator is not None else {})}
        x = scheduler.step(f, t, x, **kwargs_now).prev_sample
        states.append(x)
    return torch.stack(states), torch.stack(inputs)


def trajectory(sampler, noise, outputs, generator):
    """Return our states and network inputs, by forward substitution in the dense table."""
    table = sampler.recurrence(noise, generator)
    base, (_, weight) = table.base(), sampler.coefficients.dense()
    states, entered = [base[:, 0]], []
    for i in range(sampler.steps):
        entered.append(sampler.output(torch.full((len(noise),), i), states[-1], outputs[i]))
        row = torch.from_numpy(weight[i + 1, : i + 1]).to(noise)
        states.append(base[:, i + 1] + torch.einsum("k,kb...->b...", row, torch.stack(entered)))
    scale = torch.from_numpy(sampler.coefficients.scale).to(noise).view(-1, *(1,) * noise.ndim)
    return torch.stack(states) / scale, torch.stack(states)[:-1]


def compare(scheduler, sampler, tolerance, *, inputs=True, stochastic=False, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    outputs = torch.randn(sampler.steps, *SHAPE, generator=generator, dtype=torch.float64)
    own = [torch.Generator().manual_seed(7) if stochastic else None for _ in range(2)]
    expected, told = theirs(scheduler, noise, outputs, own[0], **kwargs)
    states, given = trajectory(sampler, noise, outputs, own[1])
    assert len(scheduler.timesteps) == sampler.steps
    assert np.allclose(scheduler.timesteps.numpy(), sampler.times, atol=1e-3, rtol=1e-6)
    for i in range(sampler.steps + 1):
        error = (states[i] - expected[i]).norm() / expected[i].norm()
        assert error <= tolerance, f"state {i}: {error:.2e}"
    if inputs:
        assert (given - told).norm() / told.norm() <= max(tolerance, 1e-7)


SPACINGS = [("trailing", 0), ("leading", 1), ("linspace", 0)]
NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_is_diffusers(spacing, offset, prediction, eta, exact):
    scheduler = diffusers.DDIMScheduler(
        **SCALED,
        clip_sample=False,
        prediction_type=NAMES[prediction],
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=eta == 0,
    )
    schedule = double(scheduler) if exact else Variance(scheduler.alphas_cumprod.double().numpy())
    scheduler.set_timesteps(STEPS)
    sampler = px.samplers.ddim(
        schedule,
        STEPS,
        eta=eta,
        prediction=prediction,
        spacing=spacing,
        offset=offset,
        final="zero" if eta == 0 else "first",
    )
    if spacing == "linspace":
        # diffusers steps to t - T // N there, which is not the next time of the grid: compare the grids alone.
        assert np.array_equal(scheduler.timesteps.numpy(), sampler.times)
        return
    # In float32 tables 1 - alpha^2/alpha'^2 of neighbouring last levels keeps four digits: hence 2e-6 where it enters.
    compare(scheduler, sampler, 1e-10 if exact else 2e-6 if eta else 1e-6, eta=eta, stochastic=eta > 0)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_is_diffusers(spacing, offset, prediction, variance, exact):
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2" if exact else "linear",
        clip_sample=False,
        prediction_type=NAMES[prediction],
        timestep_spacing=spacing,
        steps_offset=offset,
        variance_type=variance,
    )
    schedule = double(scheduler) if exact else Variance(scheduler.alphas_cumprod.double().numpy())
    scheduler.set_timesteps(STEPS)
    sampler = px.samplers.ddpm(
        schedule, STEPS, variance=variance, prediction=prediction, spacing=spacing, offset=offset
    )
    # diffusers adds the last step's noise unless its time is 0; none of these grids but trailing with T / N = 1 and
    # linspace ends there, and its fixed variances are then clamped to 1e-20.
    if spacing != "linspace" and variance == "fixed_large":
        last = sampler.coefficients.noise_std[-1]
        assert last == 0
        return _compare_but_last(scheduler, sampler, exact)
    # diffusers clamps the variance to 1e-20: a last step of ours without noise has 1e-10 of it there.
    compare(scheduler, sampler, 1e-9 if exact else 1e-6, stochastic=True)
    return None


def _compare_but_last(scheduler, sampler, exact):
    """Compare all steps but the last, at which diffusers adds noise to the finished sample if its time is not 0."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    outputs = torch.randn(sampler.steps, *SHAPE, generator=generator, dtype=torch.float64)
    expected, _ = theirs(scheduler, noise, outputs, torch.Generator().manual_seed(7))
    states, _ = trajectory(sampler, noise, outputs, torch.Generator().manual_seed(7))
    for i in range(sampler.steps):
        assert (states[i] - expected[i]).norm() / expected[i].norm() <= (1e-10 if exact else 1e-6)


@pytest.mark.parametrize("clipping", ["clip", "threshold", "clip_eps"])
@pytest.mark.parametrize("name", ["ddim", "ddim_eta", "ddpm"])
def test_clipping_and_thresholding_are_diffusers(name, clipping):
    if name == "ddpm" and clipping == "clip_eps":
        pytest.skip("DDPM uses the data prediction alone")
    options = {"clip_sample": clipping != "threshold", "clip_sample_range": 0.8, "timestep_spacing": "leading"}
    if clipping == "threshold":
        options |= {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1e6}
    chosen = {"quantile": 0.9} if clipping == "threshold" else {"clip": 0.8}
    if name == "ddpm":
        scheduler = diffusers.DDPMScheduler(**options)
        sampler = px.samplers.ddpm(double(scheduler), STEPS, spacing="leading", **chosen)
        kwargs = {}
    else:
        scheduler = diffusers.DDIMScheduler(**options)
        eta = 0.0 if name == "ddim" else 1.0
        clipped_eps = clipping == "clip_eps"
        sampler = px.samplers.ddim(
            double(scheduler), STEPS, spacing="leading", eta=eta, clipped_eps=clipped_eps, **chosen
        )
        kwargs = {"eta": eta, "use_clipped_model_output": clipped_eps}
    scheduler.set_timesteps(STEPS)
    compare(scheduler, sampler, 1e-10, stochastic=name != "ddim", **kwargs)


def test_output_that_carries_a_clipped():
    # Solvers measure the size of the data with it: with a gain of 4 they would accept errors 4 times too large.
    """An output that carries a clipped and an unclipped prediction is no data prediction."""
    both, one = (px.samplers.ddim(px.vp(), STEPS, clip=1.0, clipped_eps=clipped) for clipped in (False, True))
    assert both.transform.gain.max() > 4
    assert both.coefficients.x0_from_input is None
    assert both.coefficients.x0_from_output is None
    assert (one.coefficients.x0_from_output == 1).all()


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", ["euler", "heun", "euler_ancestral"])
def test_exploding_samplers_are_diffusers(name, prediction, spacing, offset, karras):
    classes = {
        "euler": diffusers.EulerDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
        "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    }
    options = {"prediction_type": NAMES[prediction], "timestep_spacing": spacing, "steps_offset": offset, **SCALED}
    if name != "euler_ancestral":
        options["use_karras_sigmas"] = karras
    elif karras:
        pytest.skip("diffusers has no karras spacing here")
    scheduler = classes[name](**options)
    schedule = Variance(scheduler.alphas_cumprod.double().numpy())
    scheduler.set_timesteps(STEPS)
    make = getattr(samplers, name)
    sampler = make(schedule, STEPS, prediction=prediction, spacing=spacing, offset=offset, karras=karras)
    compare(scheduler, sampler, 2e-6, stochastic=name == "euler_ancestral")
    if name != "heun":
        return  # the steps of the others cast states to float32
    # The same in double: diffusers computes steps from its noise levels, so give it ours.
    scheduler = classes[name](**options)
    scheduler.set_timesteps(STEPS)
    local = sampler.coefficients
    ratio = torch.from_numpy(local.sigma / local.alpha)
    assert scheduler.sigmas.shape == ratio.shape
    scheduler.sigmas = ratio
    compare(scheduler, sampler, 1e-10)


def test_edm_euler_is_diffusers():
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(STEPS)
    sampler = px.samplers.euler(px.karras(0.002, 80.0), STEPS, prediction="edm")
    compare(scheduler, sampler, 2e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_diffusers(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.init_noise_sigma = 1.0
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS))
    sampler = px.samplers.flow_euler(px.flow(shift), STEPS)
    compare(scheduler, sampler, 1e-6, inputs=False)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS))
    scheduler.sigmas = torch.from_numpy(sampler.coefficients.sigma)
    # The step itself casts states to float32, so double sigmas do not make it double.
    compare(scheduler, sampler, 1e-6, inputs=False)


def test_flow_euler_linspace_is_diffusers_default_grid():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    sampler = px.samplers.flow_euler(px.flow(), STEPS, spacing="linspace")
    assert np.allclose(scheduler.timesteps.numpy(), sampler.times, rtol=1e-6)


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("prediction", NAMES)
def test_dpmpp_2m_is_diffusers(spacing, offset, prediction):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SCALED,
        prediction_type=NAMES[prediction],
        timestep_spacing=spacing,
        steps_offset=offset,
        final_sigmas_type="zero",
    )
    schedule = Variance(scheduler.alphas_cumprod.double().numpy())
    sampler = px.samplers.dpmpp_2m(schedule, STEPS, prediction=prediction, spacing=spacing, offset=offset)
    scheduler.set_timesteps(STEPS)
    if spacing != "trailing":
        # diffusers spaces N + 1 times here and drops the last: give ours the same grid.
        times = scheduler.timesteps.numpy().astype(np.float64)
        sampler = _on_times(schedule, times, prediction)
    compare(scheduler, sampler, 1e-6)  # its step casts states to float32


def _on_times(schedule, times, prediction):
    class Given:
        def alpha_sigma(self, when):
            return schedule.alpha_sigma(when)

        def grid(self, steps, spacing, offset, *, whole=True):
            alpha, sigma = schedule.alpha_sigma(times)
            return Grid(times, np.append(alpha, 1.0), np.append(sigma, 0.0))

    return px.samplers.dpmpp_2m(Given(), len(times), prediction=prediction)


def test_dpmpp_2m_karras_is_diffusers():
    scheduler = diffusers.DPMSolverMultistepScheduler(**SCALED, use_karras_sigmas=True, timestep_spacing="trailing")
    schedule = Variance(scheduler.alphas_cumprod.double().numpy())
    scheduler.set_timesteps(STEPS)
    sampler = px.samplers.dpmpp_2m(schedule, STEPS, spacing="trailing", karras=True)
    compare(scheduler, sampler, 2e-6)


def test_flow_prediction_needs_a_flow():
    with pytest.raises(ValueError, match="use the schedule flow"):
        px.samplers.ddim(px.vp(), 10, prediction="flow")
    sampler = px.samplers.dpmpp_2m(Flow(), 10, prediction="flow", spacing="trailing")
    with pytest.raises(ValueError, match="alpha = 0"):
        px.samplers.ddim(Flow(), 10, prediction="eps")
    assert sampler.steps == 10
