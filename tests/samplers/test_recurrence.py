"""The recurrence: its two forms agree, and a coarse step is what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import parataxis as px
import problems
from parataxis.samplers.coefficients import Coefficients
from parataxis.samplers.recurrence import Recurrence

NAMES = list(px.SAMPLERS)


def affine(recurrence, states, outputs, slopes):
    """Run the loop with each output f_q + d_q (u - u_q)."""
    local = recurrence.coefficients
    new = [states[0]]
    models = []
    for i in range(local.steps):
        models.append(outputs[i] + slopes[i] * (new[i] - states[i]))
        row = local.state_weight[i] * new[i]
        for lag in range(min(local.lags, i) + 1):
            row = row + local.output_weight[i, lag] * models[i - lag]
        new.append(row if recurrence.noise is None else row + recurrence.noise[0, i])
    return torch.stack(new), torch.stack(models)


def made(name, points=12):
    sampler = problems.sampler(name, points)
    recurrence = sampler.recurrence(problems.noise(1), problems.generators(1))
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(sampler.steps + 1, problems.DIM, generator=generator, dtype=torch.float64)
    outputs = torch.randn(sampler.steps, problems.DIM, generator=generator, dtype=torch.float64)
    slopes = torch.rand(sampler.steps, generator=generator, dtype=torch.float64).numpy()
    states[0] = recurrence.start[0]
    return sampler, recurrence, states, outputs, slopes


@pytest.mark.parametrize("name", NAMES)
def test_dense_form_is_the_same_loop(name):
    sampler, recurrence, _, outputs, _ = made(name)
    _, weight = sampler.coefficients.dense()
    dense = recurrence.base()[0] + torch.from_numpy(weight) @ outputs
    local, _ = affine(recurrence, dense, outputs, np.zeros(sampler.steps))
    assert torch.allclose(dense, local, rtol=1e-10)
    assert recurrence.residual(dense[None], outputs[None]).abs().max() <= 1e-10 * dense.abs().max()
    assert np.allclose(np.triu(weight), 0)


@pytest.mark.parametrize("name", NAMES)
def test_dense_table_has_the_local_form_it_came_from(name):
    """A dense table has the local form it came from."""
    sampler, recurrence, _, outputs, _ = made(name)
    _, weight = sampler.coefficients.dense()
    again = Recurrence.from_dense(weight, recurrence.base())
    # A_i is found where earlier outputs enter; the first steps and Heun's alternation need not have a single lag.
    assert again.coefficients.lags >= sampler.coefficients.lags or sampler.coefficients.lags == 1
    restored = again.base()[0] + torch.from_numpy(again.coefficients.dense()[1]) @ outputs
    expected = recurrence.base()[0] + torch.from_numpy(weight) @ outputs
    assert torch.allclose(restored, expected, rtol=1e-8, atol=1e-10)
    if sampler.coefficients.lags == 0:
        assert again.coefficients.lags == 0
        assert np.allclose(again.coefficients.state_weight[1:], sampler.coefficients.state_weight[1:], rtol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_gain_is_the_effect_of_each_output_on_the_sample(name):
    sampler, recurrence, states, outputs, slopes = made(name)
    gain = sampler.coefficients.gain(slopes)
    new, _ = affine(recurrence, states, outputs, slopes)
    for point in (0, 5, sampler.steps - 1):
        pushed = outputs.clone()
        pushed[point] += 1.0
        moved, _ = affine(recurrence, states, pushed, slopes)
        assert torch.allclose(moved[-1] - new[-1], torch.full_like(new[-1], gain[point]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "flow_euler"])
def test_coarse_step_of_one_step_is_the_step(name):
    """Coarse step of one step is the step and with a constant prediction all steps."""
    sampler, recurrence, states, outputs, _ = made(name)
    stepped = recurrence.step(states[None], outputs[None])[0]
    for i in (0, 4, sampler.steps - 1):
        coarse = recurrence.coarse_step(i, i + 1, states[None, i], outputs[None, i])
        assert torch.allclose(coarse[0], stepped[i], rtol=1e-9, atol=1e-12)
    # A network whose data prediction is constant: one coarse is the whole way.
    local = sampler.coefficients
    data = torch.randn(problems.DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = recurrence.start[0]
    for i in range(sampler.steps):
        f = (data - local.x0_from_input[i] * x) / local.x0_from_output[i]
        x = recurrence.step(x.expand(1, sampler.steps + 1, -1), f.expand(1, sampler.steps, -1))[0, i]
    f = (data - local.x0_from_input[0] * recurrence.start[0]) / local.x0_from_output[0]
    assert torch.allclose(recurrence.coarse_step(0, sampler.steps, recurrence.start, f[None])[0], x, rtol=1e-8)


def test_coarse_step_needs_a_one_step_sampler_and_goes_forward():
    _, recurrence, states, outputs, _ = made("dpmpp_2m")
    with pytest.raises(ValueError, match="multistep"):
        recurrence.coarse_step(0, 3, states[None, 0], outputs[None, 0])
    _, recurrence, states, outputs, _ = made("ddim")
    with pytest.raises(ValueError, match="forward"):
        recurrence.coarse_step(3, 3, states[None, 0], outputs[None, 0])


def test_invalid_coefficients_and_noise_are_named():
    with pytest.raises(ValueError, match="strictly lower triangular"):
        Coefficients.from_dense(np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"\(N, L \+ 1\)"):
        Coefficients(np.ones(3), np.ones((2, 1)), np.zeros(3))
    with pytest.raises(ValueError, match="weight of step 1 is not finite"):
        Coefficients(np.ones(2), np.array([[1.0], [np.inf]]), np.zeros(2))
    local = Coefficients(np.ones(3), np.ones((3, 1)), np.zeros(3))
    with pytest.raises(ValueError, match=r"noise must have the shape .*\(2, 3, 5\)"):
        Recurrence(local, torch.zeros(2, 5), torch.zeros(2, 4, 5))
