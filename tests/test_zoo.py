"""The zoo is what it says: the same bits every time, networks that matter, options that do what they are named."""

from __future__ import annotations

import pytest
import torch

import zoo

# Some of diffusers' schedulers hand tensors to numpy 2, and some of its pipelines use what it will remove.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.(FluxPosEmbed|callback_steps). is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("name", [name for i, name in enumerate(zoo.PIPELINES) if i < 78 or i % 4 == 0])
def test_pipeline_gives_the_same_bits_twice_and_its_networks_matter(name):
    """A pipeline gives the same bits twice and its networks matter."""
    x = zoo.run(*zoo.make(name))
    same, calls = zoo.watched(name, "plain", 1.0)
    assert torch.equal(x, same)
    assert calls >= 8
    # The stages of Stable Cascade draw latents that nothing has scaled.
    assert 0.1 < x.std() < (200 if name.startswith("stable_cascade") else 20)
    moved, _ = zoo.watched(name, "plain", 1.001)
    assert 0.1 < 1e3 * zoo.change(moved, x) < 10


@pytest.mark.parametrize("name", ["pixart_sigma", "flux"])
def test_every_option_changes_the_sample_but_for_those_that_only_look(name):
    # The global random state of a run is that of the generator, and one scheduler is the pipeline's own.
    idle = {
        "plain",
        "callback reads",
        "no generator",
        "offloaded",
        "DPM++ 2M" if name == "pixart_sigma" else "flow Euler",
    }
    plain = zoo.run(*zoo.make(name))
    # What a compiler does to the last bits is its own affair.
    for label in [label for label, _ in zoo.variants(name) if label != "compiled"]:
        x = zoo.run(*zoo.make(name, label))
        assert x.isfinite().all(), label
        assert (x.shape == plain.shape and torch.equal(x, plain)) == (label in idle), label


@pytest.mark.parametrize("name", ["stable_diffusion", "z_image", "dit"])
def test_batch_holds_different_samples(name):
    """A batch holds different samples and a list of generators draws each from its own."""
    three = zoo.run(*zoo.make(name, "three prompts"))
    listed = zoo.run(*zoo.make(name, "generator list"))
    assert len(three) == len(listed) == 3
    assert not torch.equal(listed[0], listed[1])
    # The first generator is the one of the plain call, and so is the first prompt.
    torch.testing.assert_close(listed[:1], zoo.run(*zoo.make(name)), rtol=1e-3, atol=1e-3)


def test_callbacks_are_called_after_each_step_and_an_interrupted_loop_ends():
    pipe, call = zoo.make("flux", "callback reads")
    zoo.run(pipe, call)
    assert len(pipe.seen) == zoo.STEPS
    assert zoo.watched("flux", "callback interrupts", 1.0)[1] == zoo.STEPS // 2 + 1


def test_both_experts_are_called():
    pipe, call = zoo.make("wan_two_experts")
    called = []
    for name, net in zoo.denoisers(pipe).items():
        net.register_forward_hook(lambda *told, name=name: called.append(name))
    zoo.run(pipe, call)
    assert set(called) == {"transformer", "transformer_2"}
    assert called == sorted(called)


def test_text_runs_through_the_text_encoder():
    """A text runs through the text encoder."""
    pipe, call = zoo.make("stable_diffusion", "text")
    lengths = []
    pipe.text_encoder.register_forward_hook(lambda net, told, out: lengths.append(out[0].shape[1]))
    zoo.run(pipe, call)
    assert lengths == [8, 8]


@pytest.mark.parametrize(("name", "label"), zoo.BROKEN)
def test_what_is_left_out_still_fails(name, label):
    modify = dict(zoo.variants(name, broken=True))[label]
    with pytest.raises((RuntimeError, TypeError, AttributeError, FutureWarning)):
        zoo.run(*modify(*zoo.PIPELINES[name]()))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1)])
def test_weights_are_the_same_in_every_dtype_up_to_rounding(dtype, near):
    x = zoo.run(*zoo.make("stable_diffusion_3", "given latents", dtype))
    assert x.dtype == dtype
    assert zoo.change(x, zoo.run(*zoo.make("stable_diffusion_3", "given latents"))) < near


def test_build_and_a_run_leave_the_random_state_alone():
    """A build and a run leave the random state alone."""
    before = torch.get_rng_state()
    zoo.run(*zoo.make("flux", "no generator"))
    assert torch.equal(before, torch.get_rng_state())
