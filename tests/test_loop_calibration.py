"""Calibrations of loops that belong to somebody else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import parataxis as px
from loop_problems import DIM, Net, ddim, guided
from parataxis.fingerprint import loop_fingerprint

NET = Net()


def draw(label, generator, count=20, scale=1.0):
    """A loop with a condition, a generator and numbers."""
    x = torch.randn(1, DIM, generator=generator) + label

    def shifted(net, x, t):
        return net(x, t, scale * label.expand_as(x))

    torch.manual_seed(int(x.abs().sum() * 1e4) % 2**31)
    return ddim(NET, batch=1, count=count, predict=shifted)


def call(seed, **options):
    return {"label": torch.full((1, 1), seed / 10), "generator": torch.Generator().manual_seed(seed), **options}


@pytest.fixture(scope="module")
def calibration():
    settings = [px.Setting(px.Secant(window=8), scale) for scale in (1.0, 4.0)]
    return px.calibrate_loop(draw, [call(seed) for seed in range(6)], settings, denoisers=[NET])


def test_calibrated_loop_keeps_the_tolerance(calibration):
    """Conditions and seeds may differ from those of the calibration; its scale and its bound are used."""
    assert calibration.setting.scale > 1
    assert calibration.promised == pytest.approx(0.05 ** (1 / 6), abs=1e-6)
    run = px.parallel(draw, calibration, denoisers=[NET])
    for seed in range(20, 22):
        expected, x = draw(**call(seed)), run(**call(seed))
        assert (x - expected).norm() / expected.norm() <= 1e-2
        assert run.report.rounds < 20


def test_fewer_steps_or_other_weights_are_refused(calibration):
    run = px.parallel(draw, calibration, denoisers=[NET])
    with pytest.raises(ValueError, match="argument count: none -> 10"):
        run(**call(20, count=10))
    NET.outer[0, 0] += 0.01
    with pytest.raises(ValueError, match="guarantees nothing here: parameters: "):
        run(**call(20))
    NET.outer[0, 0] -= 0.01


def test_pipeline_call_by_tuples_and_the_loop_s_own_random_numbers():
    """Each run draws its own noise from torch's random numbers, the same with every setting."""
    calibrated = px.calibrate_loop(ddim_guided, [(NET,)] * 2, [px.Setting(px.Secant(window=8))], denoisers=[NET])
    (trial,) = calibrated.trials
    assert trial.failures == 0
    assert 0 < trial.worst <= 1e-2
    before = torch.get_rng_state()
    px.calibrate_loop(ddim_guided, [(NET,)] * 2, [px.Setting(px.Picard(window=8))], denoisers=[NET])
    assert torch.equal(torch.get_rng_state(), before)


def ddim_guided(net):
    return ddim(net, predict=guided)


def test_what_cannot_be_calibrated_says_why():
    with pytest.raises(TypeError, match="a tuple of positional or a dict of keyword ones"):
        px.calibrate_loop(draw, [call(0), 3], denoisers=[NET])
    with pytest.raises(ValueError, match="runs sequentially, so there is nothing to calibrate: the loop has only"):
        px.calibrate_loop(draw, [call(seed, count=3) for seed in range(2)], denoisers=[NET])

    def silent(net):
        ddim(net)

    with pytest.raises(ValueError, match="returned NoneType, without a tensor, array or image"):
        px.calibrate_loop(silent, [(NET,)], denoisers=[NET])


def test_calibration_holds_in_another_process():
    """diffusers lists in the order of a set which values of a configuration were defaults: it is another every time."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)

    def loop(x):
        for t in scheduler.timesteps:
            x = scheduler.step(NET(x, t, x), t, x).prev_sample
        return x

    before = loop_fingerprint(loop, (torch.zeros(1, DIM),), {})
    scheduler.config["_use_default_values"].reverse()
    assert loop_fingerprint(loop, (torch.zeros(1, DIM),), {}) == before
    scheduler.register_to_config(clip_sample=True)
    assert loop_fingerprint(loop, (torch.zeros(1, DIM),), {}) != before


def test_all_settings_start_from_the_same_state_of_the_loop():
    """Numbers drawn from numpy or from a generator of an object, and lists that grow, are the same in all runs."""

    class Policy:
        def __init__(self):
            self.calls, self.generator = [], torch.Generator().manual_seed(0)

        def act(self, scale):
            self.calls.append(scale)
            x = ddim(NET, batch=1)
            drawn = torch.from_numpy(np.random.standard_normal(x.shape))  # noqa: NPY002
            return len(self.calls) * x + drawn + torch.randn(x.shape, generator=self.generator)

    policy = Policy()
    numpy_state, state = np.random.get_state()[1].copy(), policy.generator.get_state()  # noqa: NPY002
    settings = [px.Setting(px.Secant(window=8))]
    (trial,) = px.calibrate_loop(policy.act, [(0.5,)] * 2, settings, denoisers=[NET]).trials
    assert trial.failures == 0
    assert policy.calls == []
    assert torch.equal(policy.generator.get_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
