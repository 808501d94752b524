"""The shipped models: they load, they obey the laws, and a damaged file is said to be one."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from functools import cache

import pytest
import torch

import parataxis as px
import problems
from parataxis import models

NAMES = models.available()
VARIANTS = problems.variants()


def test_promised_models_ship():
    """The promised models ship."""
    assert {"digits", "digits-flow", "digits-unconditional", "digits-v", "digits-edm"} <= set(NAMES)


def samplers_of(model):
    if isinstance(model.schedule, px.samplers.schedules.Karras):
        return ["euler", "euler_ancestral"]
    if model.prediction == "v":  # the others are much like the eps-prediction's
        return ["ddpm", "dpmpp_2m"]
    if isinstance(model.schedule, px.samplers.schedules.Variance):
        return [name for name in px.SAMPLERS if name != "flow_euler"]
    return ["flow_euler"]


CASES = [(name, sampler) for name in NAMES for sampler in samplers_of(models.load(name))]


def draw(name, sampler, solver, **options):
    model = models.load(name)
    noise = problems.noise(2, torch.float32, shape=model.shape)
    labels = None if model.classes is None else torch.tensor([3, 7])
    steps = 8 if sampler == "heun" else 15
    return px.sample(
        model.denoiser(),
        noise,
        model.sampler(sampler, steps),
        solver,
        condition=labels,
        generator=problems.generators(2),
        **options,
    )


@cache
def sequential(name, sampler):
    return draw(name, sampler, px.Sequential()).x


# Every solver on one network, with and without noise; the default one on all networks with all their samplers.
PAIRS = [(name, sampler, px.Secant(window=8)) for name, sampler in CASES]
PAIRS += [
    ("digits", sampler, solver)
    for sampler in ("ddim", "ddpm")
    for solver in VARIANTS
    if getattr(solver, "window", 0) != 1 and ("digits", sampler, solver) not in PAIRS
]


@pytest.mark.parametrize(("name", "sampler", "solver"), PAIRS, ids=str)
def test_laws_hold_on_trained_networks(name, sampler, solver):
    """The laws hold on trained networks."""
    if not problems.works(solver, sampler):
        pytest.skip("not supported: see docs/supported.md")
    expected = sequential(name, sampler)
    exact = draw(name, sampler, solver, tolerance=0)
    assert problems.relative(exact.x, expected) <= 1e-5
    assert exact.rounds <= exact[0].steps
    loose = draw(name, sampler, solver, tolerance=1e-2)
    assert problems.relative(loose.x, expected) <= 2e-2  # the tolerance bounds an estimate of first order
    assert loose.rounds <= exact.rounds


@pytest.mark.parametrize("name", NAMES)
def test_model_is_small_and_says_what_it_is(name):
    """A model is small and says what it is."""
    model = models.load(name)
    (weights,) = model.folder.glob("*/diffusion_pytorch_model.safetensors")
    assert weights.stat().st_size <= 5_000_000
    card = (model.folder / "README.md").read_text()
    for word in ("MNIST", "licence", "training/digits.py", "MFLOP"):
        assert word in card
    from torch.utils.flop_counter import FlopCounterMode

    label = None if model.classes is None else torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.network(torch.zeros(1, *model.shape), torch.zeros(1), class_labels=label)
    assert counter.get_total_flops() <= 150e6


def test_unconditional_model_is_a_pipeline_that_diffusers_opens_unmodified():
    """The unconditional model is a pipeline that diffusers opens unmodified."""
    import diffusers

    with warnings.catch_warnings():
        # What diffusers warns of when it opens any pipeline is not ours to settle.
        warnings.simplefilter("ignore")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(models.FOLDER / "digits-unconditional"))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(28, 28)] * 2


def test_unknown_model_is_named_with_the_list():
    """An unknown model is named with the list."""
    with pytest.raises(ValueError, match=r"no model 'digit': choose one of digits, digits-edm, digits-flow"):
        models.load("digit")


def test_damaged_weight_file_is_said_to_be_one(tmp_path):
    """A damaged weight file is said to be one."""
    folder = tmp_path / "broken"
    shutil.copytree(models.FOLDER / "digits", folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot be read .*the file is damaged"):
        models.load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        models.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": [2**22, 2**22, 2**22]}, "does not fit its weights"),  # terabytes
        ({"layers_per_block": 10**9}, "does not fit its weights: layers_per_block is 1000000000"),
        ({"in_channels": 3}, "does not fit its weights: conv_in.weight is"),
        ({"down_block_types": ["Nothing"]}, "is not of a UNet2DModel"),
        ("[1, 2]", "must hold a JSON object, got list"),
        ("{", "cannot be read"),
    ],
)
def test_configuration_that_is_not_of_the_weights_is_refused(changes, message, tmp_path):
    """Nothing is allocated before the form is known."""
    folder = tmp_path / "broken"
    shutil.copytree(models.FOLDER / "digits", folder)
    path = folder / "unet" / "config.json"
    if isinstance(changes, dict):
        changes = json.dumps(json.loads(path.read_text()) | changes)
    path.write_text(changes)
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_missing_extra_is_named(monkeypatch):
    """A missing extra is named."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'parataxis\[models\]'"):
        models.load("digits")
    from parataxis import plots

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'parataxis\[plots\]'"):
        plots.image_grid(torch.zeros(1, 1, 4, 4))


def test_sampler_that_the_schedule_does_not_admit_raises():
    """A sampler that the schedule does not admit is refused."""
    with pytest.raises(ValueError, match="variance-preserving schedule, which flow_euler is not for"):
        models.load("digits").sampler("flow_euler", 10)
    with pytest.raises(ValueError, match="flow-matching schedule, which ddim is not for: choose one of flow_euler"):
        models.load("digits-flow").sampler("ddim", 10)
    with pytest.raises(ValueError, match="variance-exploding schedule, which ddim is not for: choose one of euler, "):
        models.load("digits-edm").sampler("ddim", 10)
    with pytest.raises(ValueError, match="there is no sampler 'dd': choose one of ddim, ddpm"):
        models.load("digits").sampler("dd", 10)
    for guidance in ("a", float("nan")):
        with pytest.raises(ValueError, match=f"guidance must be a finite number, got {guidance!r}"):
            models.load("digits").denoiser(guidance)
    with pytest.raises(ValueError, match="no classes, so guidance must be 1"):
        models.load("digits-unconditional").denoiser(2.0)
