"""The front door: what is understood without being spelt out, and what is answered in one sentence."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DModel
from torch import nn

import parataxis as px
from parataxis.denoisers import mixture

network = mixture(dim=8).network(px.vp())
noise = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
sampler = px.samplers.ddim(steps=6)


def scheduler(steps=6):
    made = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    if steps:
        made.set_timesteps(steps)
    return made


def test_solver_has_a_default():
    assert px.sample(network, noise, sampler)[0].solver == px.Secant(window=8)
    [(_, solution)] = px.stream(network, [noise[0]], sampler, rows_per_round=8)
    assert solution.solver == px.Secant(window=8)


@pytest.mark.parametrize("name", [*px.SOLVERS, "auto"])
def test_solvers_are_known_by_name(name):
    solver = px.sample(network, noise, sampler, name)[0].solver
    assert name == "auto" or solver == px.SOLVERS[name]()


def test_solvers_are_known_by_name_around_loops():
    def draw():
        return noise

    assert px.parallel(draw, "picard").solver == px.Picard()
    [(_, solution)] = px.stream(network, [noise[0]], sampler, "picard", rows_per_round=8)
    assert solution.solver == px.Picard()


def test_scheduler_is_read_as_a_sampler():
    by_hand = px.sample(network, noise, px.from_scheduler(scheduler()))
    assert torch.equal(px.sample(network, noise, scheduler()).x, by_hand.x)
    assert px.plan(network, noise, scheduler()).steps == 6
    assert px.numerical_floor(network, noise, scheduler()) >= 0


class Module(nn.Module):
    """Has a long repr."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))

    def forward(self, x, t):
        return self.layers(x)

    def forward_with_cfg(self, x, t):
        return x


def yielding(x, t):
    yield x


async def waiting(x, t):
    return x


ORDER = r"write parataxis.sample\(network, noise, sampler, solver\) in this order, got \("


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((noise, network, sampler), ORDER + r"a tensor \(2, 8\) of float32, the function denoise, a Sampler\)"),
        ((network, sampler, noise), ORDER),
        ((sampler, noise, network), ORDER),
        ((network, noise, px.Secant(), sampler), ORDER),
        ((Module(), Module(), sampler), ORDER + "a Module, a Module"),
        ((Module, noise, sampler), r"denoise is the class Module: make a network of it first, network = Module\("),
        ((yielding, noise, sampler), "denoise must return its prediction, and the function yielding yields or awaits"),
        ((waiting, noise, sampler), "the function waiting yields or awaits"),
        ((Module().forward_with_cfg, noise, sampler), r"forward_with_cfg reads both halves of its batch.*guided\("),
        (("unet", noise, sampler), r"can be called as denoise\(x, t\), got 'unet'"),
        ((network, noise, "ddim"), r"got 'ddim': write parataxis.samplers.ddim\(steps=50\)"),
        ((network, noise, px.samplers.heun), r"the function heun: write parataxis.samplers.heun\(steps=50\)"),
        ((network, noise, DDIMScheduler), "sampler is the class DDIMScheduler: make one"),
        ((network, noise, scheduler(0)), r"the timesteps of this DDIMScheduler are not set: call scheduler.set_time"),
        ((network, noise, EulerDiscreteScheduler()), "the timesteps of this EulerDiscreteScheduler are not set"),
        ((network, noise, None), "sampler must be a sampler with its steps, or a diffusers scheduler, got None"),
        ((network, noise, sampler, px.Secant), r"solver is the class Secant: make one, Secant\(\)"),
        ((network, noise, sampler, "secnat"), "there is no solver 'secnat'. Did you mean 'secant'?"),
        ((network, noise, sampler, 8), "solver must be a name such as 'secant'.*got 8"),
        ((network, noise.tolist(), sampler), "noise must be a floating-point tensor"),
        ((network, noise.long(), sampler), r"noise must be .*got a tensor \(2, 8\) of int64"),
    ],
)
def test_slip_is_answered_in_one_sentence_with_the_line_to_write(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        px.sample(*arguments)
    assert len(str(raised.value)) < 260
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (UNet2DModel, r"target is the class UNet2DModel: make one first, UNet2DModel.from_pretrained\("),
        (Module(), r"target is a network, a Module: .* parataxis.sample\(network, noise, sampler\)"),
        (scheduler(), r"target is a scheduler, a DDIMScheduler: .* parataxis.sample\(network, noise, scheduler\)"),
        (yielding, "target must return its sample, and the function yielding yields or awaits"),
        (waiting, "the function waiting yields or awaits"),
        (
            noise,
            r"target must be a function that runs a sampling loop, or a pipeline, got a tensor \(2, 8\) of float32",
        ),
    ],
)
def test_slip_around_a_loop_is_answered_in_one_sentence(target, message):
    with pytest.raises(TypeError, match=message) as raised:
        px.parallel(target)
    assert len(str(raised.value)) < 260
    assert "\n" not in str(raised.value)


def test_reprs_are_short():
    things = [px.vp(), px.flow(), px.cosine(), px.karras(), sampler, sampler.coefficients, px.vp().grid(4)]
    result = px.sample(network, noise, sampler)
    for thing in [*things, result, result[0], result[0].problem, sampler.recurrence(noise)]:
        assert len(repr(thing)) < 200, type(thing)
        assert "array" not in repr(thing)


def test_noise_that_somebody_has_scaled_is_warned_about():
    """Loops of diffusers multiply it by init_noise_sigma; the sampler does so by itself."""
    steps = EulerDiscreteScheduler()
    steps.set_timesteps(12)
    draws = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    px.sample(network, draws, steps)
    with pytest.warns(RuntimeWarning, match=r"root mean square of \d+\.?\d*, expected about 1: .* init_noise_sigma"):
        px.sample(network, draws * steps.init_noise_sigma, steps)
