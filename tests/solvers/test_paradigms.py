"""Beside diffusers' own parallel pipeline, ParaDiGMS, on the same tiny Stable Diffusion with the same schedulers.

Its rounds are calls of the network; ours too, and both evaluate two rows a level, for guidance.
"""

from __future__ import annotations

import pytest
import torch

import parataxis as px
import zoo
from zoo import diffusers

STEPS, WINDOW = 50, 16
SCHEDULERS = {
    "DDIM": (diffusers.DDIMParallelScheduler, {"set_alpha_to_one": True}),
    "DDPM": (diffusers.DDPMParallelScheduler, {}),
}


@pytest.fixture(scope="module")
def parts():
    pipe, call = zoo.PIPELINES["stable_diffusion"](torch.float32)
    del call["generator"]
    return {name: part for name, part in pipe.components.items() if name != "image_encoder"}, call


def both(parts, name, **config):
    """Return the plain pipeline and ParaDiGMS on the same parts, with the same scheduler."""
    kind, own = SCHEDULERS[name]
    config = {"steps_offset": 1, "clip_sample": False, "prediction_type": "v_prediction"} | own | config
    components = parts[0] | {"scheduler": kind(**zoo.BETAS, **config)}
    pipes = []
    for one in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionParadigmsPipeline):
        pipes.append(one(**components, requires_safety_checker=False))
        pipes[-1].set_progress_bar_config(disable=True)
    return pipes


def draw(parts, run, **options):
    call = parts[1] | {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    return run(**call | options).images


def paradigms(parts, pipe, tolerance, **options):
    """Return its sample, and what it took: (rounds, evaluations)."""
    rows = []
    hook = parts[0]["unet"].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        sample = draw(parts, pipe, parallel=WINDOW, tolerance=tolerance, **options)
    finally:
        hook.remove()
    return sample, (len(rows), sum(rows) // 2)


def error(x, y):
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_error_takes_no_more_rounds_and_evaluations_than_paradigms_needs(parts, name):
    """The same error takes no more rounds and evaluations than paradigms needs."""
    plain, theirs = both(parts, name)
    expected = draw(parts, plain)
    ours = px.parallel(plain, px.Secant(window=WINDOW))
    reached = error(draw(parts, ours), expected)
    assert reached <= 1e-2
    for threshold in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4):
        sample, (rounds, evaluations) = paradigms(parts, theirs, threshold)
        if error(sample, expected) <= reached:
            break
    assert error(sample, expected) <= reached
    assert ours.report.rounds <= rounds
    assert ours.report.evaluations <= evaluations


def test_callback_sees_every_step_in_order_where_paradigms_crashes(parts):
    """A callback sees every step in order where paradigms crashes."""
    plain, theirs = both(parts, "DDIM")
    with pytest.raises(IndexError):
        paradigms(parts, theirs, 0.1, callback=lambda step, time, latents: None)
    seen = []

    def watch(pipe, step, time, values):
        seen.append((step, int(time), values["latents"].clone()))
        return {}

    expected = draw(parts, plain, callback_on_step_end=watch)
    sequential, seen = seen, []
    assert error(draw(parts, px.parallel(plain), callback_on_step_end=watch), expected) <= 1e-2
    assert [one[:2] for one in seen] == [one[:2] for one in sequential]
    assert all(error(one[2], two[2]) <= 2e-2 for one, two in zip(seen, sequential, strict=True))


@pytest.mark.parametrize(
    ("name", "config"),
    [("DDIM", {"set_alpha_to_one": False}), ("DDPM", {"timestep_spacing": "linspace"})],
    ids=["the last alpha is not one", "times that are not evenly spaced"],
)
def test_scheduler_steps_as_it_does_alone_where_paradigms_steps_otherwise(parts, name, config):
    """The scheduler steps as it does alone where paradigms steps otherwise."""
    plain, theirs = both(parts, name, **config)
    expected = draw(parts, plain)
    sample, _ = paradigms(parts, theirs, 1e-5)
    assert error(sample, expected) > 1e-3
    assert error(draw(parts, px.parallel(plain, tolerance=1e-4)), expected) <= 1e-4


def test_outputs_that_are_not_numbers_are_named_where_paradigms_returns_them(parts):
    plain, theirs = both(parts, "DDIM")

    def spoil(module, args, output):
        time = torch.as_tensor(args[1]).reshape(-1)
        spoilt = torch.where(time < 500, torch.nan, 1.0).expand(len(output[0]))
        return (output[0] * spoilt.view(-1, 1, 1, 1),)

    hook = parts[0]["unet"].register_forward_hook(spoil)
    try:
        sample, _ = paradigms(parts, theirs, 0.1)
        assert sample.isnan().all()
        with pytest.warns(RuntimeWarning, match="runs sequentially: .*NaN or Inf at step 24 of 49"):
            assert draw(parts, px.parallel(plain)).isnan().all()
    finally:
        hook.remove()
