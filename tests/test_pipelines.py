"""Diffusers pipelines, unmodified: tiny ones with random weights, and the shipped model through its own pipeline."""

from __future__ import annotations

import copy
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

import parataxis as px
import zoo
from loop_problems import DIM, Net
from parataxis import pipelines
from parataxis.models import FOLDER

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers as df

df.utils.logging.set_verbosity_error()

LINEAR_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
BLOCKS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}


def decoder(**options):
    return df.AutoencoderKL(
        **BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **options,
    )


def stable_diffusion(scheduler=None, dtype=torch.float32, *, control=False):
    torch.manual_seed(0)
    unet = df.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    parts = {}
    if control:
        parts["controlnet"] = df.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
        for value in parts["controlnet"].parameters():
            value.data.add_(0.05 * torch.randn_like(value))
    kind = df.StableDiffusionControlNetPipeline if control else df.StableDiffusionPipeline
    pipe = kind(
        unet=unet.to(dtype),
        vae=decoder().to(dtype),
        scheduler=scheduler or df.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **LINEAR_BETAS),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    return quiet(pipe)


def quiet(pipe):
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(run, seed=0, dtype=torch.float32, steps=20, **options):
    """Call Stable Diffusion, guided, with two prompts."""
    prompts = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(9)).to(dtype)
    call = {"output_type": "pt", "guidance_scale": 4.0, "height": 16, "width": 16} | options
    generator = torch.Generator().manual_seed(seed)
    return run(
        prompt_embeds=prompts,
        negative_prompt_embeds=-prompts,
        num_inference_steps=steps,
        generator=generator,
        **call,
    ).images


def controlled(run, **options):
    return picture(run, image=torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), **options)


def stable_diffusion_3():
    torch.manual_seed(0)
    transformer = df.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
    )
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    return quiet(
        df.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=df.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=decoder(shift_factor=0.1, scaling_factor=1.5),
            **dict.fromkeys(names),
        )
    )


def picture_3(run, seed=0, **options):
    generator = torch.Generator().manual_seed(9)
    prompts, pooled = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 8, generator=generator)
    call = {"output_type": "pt", "guidance_scale": 3.0, "height": 16, "width": 16, "num_inference_steps": 20} | options
    return run(
        prompt_embeds=prompts,
        negative_prompt_embeds=-prompts,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=-pooled,
        generator=torch.Generator().manual_seed(seed),
        **call,
    ).images


def dit():
    torch.manual_seed(0)
    transformer = df.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        attention_bias=True,
    )
    for value in transformer.parameters():
        value.data.add_(0.05 * torch.randn_like(value))
    return quiet(df.DiTPipeline(transformer=transformer, vae=decoder(), scheduler=df.DDIMScheduler(clip_sample=False)))


def picture_of_classes(run, seed=0, **options):
    call = {"class_labels": [1, 2], "num_inference_steps": 20, "output_type": "np"} | options
    return torch.from_numpy(run(generator=torch.Generator().manual_seed(seed), **call).images)


SCHEDULERS = {
    "ddpm": lambda: df.DDPMScheduler(clip_sample=False, **LINEAR_BETAS),
    "euler": lambda: df.EulerDiscreteScheduler(**LINEAR_BETAS),
    "ancestral": lambda: df.EulerAncestralDiscreteScheduler(**LINEAR_BETAS),
    "2M": lambda: df.DPMSolverMultistepScheduler(**LINEAR_BETAS),
    "UniPC": lambda: df.UniPCMultistepScheduler(**LINEAR_BETAS),
    "PNDM": lambda: df.PNDMScheduler(skip_prk_steps=True, **LINEAR_BETAS),
    "LCM": lambda: df.LCMScheduler(**LINEAR_BETAS),
}
PIPELINES = {
    "stable diffusion": (stable_diffusion, picture, "one pass"),
    "rescaled guidance": (stable_diffusion, lambda run, **more: picture(run, guidance_rescale=0.7, **more), "replay"),
    "latents": (stable_diffusion, lambda run, **more: picture(run, output_type="latent", **more), "one pass"),
    "control": (lambda: stable_diffusion(control=True), controlled, "one pass"),
    "stable diffusion 3": (stable_diffusion_3, picture_3, "one pass"),
    "dit": (dit, picture_of_classes, "one pass"),
} | {name: (lambda make=make: stable_diffusion(make()), picture, "one pass") for name, make in SCHEDULERS.items()}


@cache
def made(name):
    return PIPELINES[name][0]()


def relative(x, y):
    x, y = x.double().flatten(1), y.double().flatten(1)
    return float(((x - y).norm(dim=1) / y.norm(dim=1)).max())


@pytest.mark.parametrize("name", PIPELINES)
def test_unmodified_pipeline_gives_the_sequential_picture(name):
    """An unmodified pipeline gives the sequential picture."""
    _, call, mode = PIPELINES[name]
    pipe = made(name)
    expected = call(pipe)
    run = px.parallel(pipe, px.Secant(window=8))
    for _ in range(2):
        assert relative(call(run), expected) <= 1e-2
        assert run.report.mode == mode
        assert run.report.converged
        assert run.report.rounds < 0.75 * run.report.steps
        if mode == "one pass":
            assert run.report.passes == 1
            assert run.report.real_calls == (2 if name == "control" else 1)
            assert not run.report.misses
    exact = px.parallel(pipe, px.Secant(window=8), tolerance=0)
    assert relative(call(exact), expected) <= 1e-5


@pytest.mark.parametrize(
    "name", ["stable diffusion", "control", "stable diffusion 3", "ancestral", "rescaled guidance"]
)
def test_window_one_is_the_sequential_pipeline_to_the_bit(name):
    _, call, _ = PIPELINES[name]
    pipe = made(name)
    run = px.parallel(pipe, px.Secant(window=1))
    if name == "rescaled guidance":
        with pytest.warns(RuntimeWarning, match="not a combination"):
            call(run)
    assert torch.equal(call(run), call(pipe))
    assert run.report.rounds == run.report.steps == 20


@pytest.mark.filterwarnings("ignore:the result may be .* away from the loop")
@pytest.mark.parametrize("name", ["ddpm", "euler", "2M"])
def test_half_precision_pipelines_end_within_their_own_floor(name):
    pipe = stable_diffusion(SCHEDULERS[name](), torch.bfloat16)

    def call(run):
        return picture(run, dtype=torch.bfloat16, output_type="latent")

    run = px.parallel(pipe)
    assert relative(call(run), call(pipe)) <= max(1e-2, 2 * run.report.floor)
    assert run.report.mode == "recurrence"  # whose passes measure the floor


def test_within_the_context_the_pipeline_itself_is_parallel():
    """Within the context the pipeline itself is parallel and after it is what it was."""
    pipe = made("stable diffusion")
    expected = picture(pipe)  # a first call makes attributes of the pipeline's own
    kind, attributes = type(pipe), dict(pipe.__dict__)
    inner = {name: dict(part.__dict__) for name, part in pipe.components.items() if hasattr(part, "__dict__")}
    with px.parallel(pipe) as report:
        assert isinstance(pipe, df.StableDiffusionPipeline)
        assert type(pipe).__name__ == kind.__name__
        assert relative(picture(pipe), expected) <= 1e-2
        assert report.mode == "one pass"
        assert report.steps == 20
        with pytest.raises(RuntimeError, match="enabled already"):
            pipelines.enable(pipe)
    assert type(pipe) is kind
    assert pipe.__dict__.keys() == attributes.keys()
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            assert part.__dict__ == inner[name]
    with pytest.raises(RuntimeError, match="is not enabled"):
        pipelines.disable(pipe)
    assert torch.equal(picture(pipe), expected)


def test_decoder_and_callbacks_run_once():
    """The decoder and callbacks run once and errors of callbacks leave nothing behind."""
    pipe = made("stable diffusion")
    expected, seen, decoded = picture(pipe), [], []
    hook = pipe.vae.post_quant_conv.register_forward_pre_hook(lambda module, args: decoded.append(1))

    def watch(pipe, step, time, values):
        seen.append((step, int(time)))
        return {}

    def fail(pipe, step, time, values):
        if step == 7:
            raise LookupError("enough")
        return {}

    report = pipelines.enable(pipe)
    try:
        assert relative(picture(pipe, callback_on_step_end=watch), expected) <= 1e-2
        assert [step for step, _ in seen] == list(range(20))
        assert len(decoded) == 1
        assert report.passes == 1
        with pytest.raises(LookupError, match="enough"):
            picture(pipe, callback_on_step_end=fail)
    finally:
        pipelines.disable(pipe)
        hook.remove()
    assert "_compiled_call_impl" not in pipe.unet.__dict__
    assert "decode" not in pipe.vae.__dict__
    assert torch.equal(picture(pipe), expected)


def test_callback_that_changes_every_state_ends_the_speculation():
    """A callback that changes every state is right at once; from the second call on it runs in every pass."""
    pipe = made("stable diffusion")

    def shift(pipe, step, time, values):
        return {"latents": values["latents"] * 0.9}

    expected = picture(pipe, callback_on_step_end=shift)
    run = px.parallel(pipe)
    with pytest.warns(RuntimeWarning, match="changes the state between the scheduler's steps"):
        assert relative(picture(run, callback_on_step_end=shift), expected) <= 1e-2
    for _ in range(2):
        assert relative(picture(run, callback_on_step_end=shift), expected) <= 1e-2
        assert "callback changes what the loop does" in run.report.reason


class Fading:
    """A callback that weakens a layer in the middle, in a way that versions of tensors do not show."""

    def __init__(self, network):
        self.weight = network.conv_out.weight

    def __call__(self, pipe, step, time, values):
        if step == 8:
            self.weight.data.mul_(0.5)
        return {}


@pytest.mark.parametrize("solver", [px.Secant(), px.Secant(window=8)])
def test_weights_that_a_callback_writes_past_their_version_are_noticed(solver):
    pipe = made("stable diffusion")
    before = pipe.unet.conv_out.weight.detach().clone()
    expected = picture(pipe, callback_on_step_end=Fading(pipe.unet))
    for _ in range(2):
        pipe.unet.conv_out.weight.data.copy_(before)
        run = px.parallel(pipe, solver)
        with pytest.warns(RuntimeWarning, match="changes its denoiser between steps"):
            result = picture(run, callback_on_step_end=Fading(pipe.unet))
        assert relative(result, expected) <= 1e-6


def test_callback_may_end_the_loop():
    """A callback may end the loop."""
    pipe = made("stable diffusion")

    def stop(pipe, step, time, values):
        pipe._interrupt = step == 11
        return {}

    expected = picture(pipe, callback_on_step_end=stop)
    assert relative(picture(px.parallel(pipe), callback_on_step_end=stop), expected) <= 1e-2


def test_two_pipelines_that_share_a_denoiser_do_not_disturb_each_other():
    one = made("stable diffusion")
    two = df.StableDiffusionImg2ImgPipeline(**one.components, requires_safety_checker=False)
    two.set_progress_bar_config(disable=True)

    def other(run):
        image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        prompts = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(9))
        generator = torch.Generator().manual_seed(3)
        return run(
            image=image,
            strength=0.8,
            prompt_embeds=prompts,
            negative_prompt_embeds=-prompts,
            generator=generator,
            num_inference_steps=20,
            output_type="pt",
        ).images

    expected = picture(one), other(two)
    with px.parallel(one) as report:
        assert torch.equal(other(two), expected[1])
        assert report.mode == "none"
        with px.parallel(two) as second:
            assert relative(picture(one), expected[0]) <= 1e-2
            assert relative(other(two), expected[1]) <= 1e-2
        assert report.steps == 20
        assert second.steps == 16


def test_parallel_call_from_a_callback_of_another_raises():
    """A parallel call from a callback of another is refused and leaves nothing behind."""
    pipe = made("stable diffusion")
    expected = picture(pipe)

    def again(pipe, step, time, values):
        return {"latents": picture(px.parallel(pipe), output_type="latent")}

    with pytest.raises(RuntimeError, match="loops that share modules"):
        picture(px.parallel(pipe), callback_on_step_end=again)
    assert "_compiled_call_impl" not in pipe.unet.__dict__
    assert torch.equal(picture(pipe), expected)


def test_copy_of_an_enabled_pipeline_runs_its_own_network():
    """A copy of an enabled pipeline runs its own network."""
    pipe, other = made("stable diffusion"), stable_diffusion()
    for value in other.unet.parameters():
        value.data.mul_(0.9)
    expected = picture(other)
    with px.parallel(pipe) as report:
        two = copy.copy(pipe)
        two.unet = other.unet
        assert torch.equal(picture(two), expected)
        assert report.mode == "none"
        with pytest.raises(RuntimeError, match="is not enabled"):
            pipelines.disable(two)
        with px.parallel(two) as second:
            assert relative(picture(two), expected) <= 1e-2
            assert second.mode == "one pass"
    assert torch.equal(picture(two), expected)


def test_what_is_no_pipeline_is_named():
    with pytest.raises(TypeError, match="a diffusers pipeline, got 3"):
        pipelines.enable(3)
    with pytest.raises(TypeError, match=r"got \[\]"):
        pipelines.enable(made("stable diffusion"), denoisers=[])


def test_rows_of_one_sample_that_the_pipeline_mixes_stay_together():
    pipe, call = zoo.make("stable_diffusion_pag", "three prompts")

    def drawn(run):
        return zoo.run(run, call | {"num_inference_steps": 20, "generator": zoo.generator(0)})

    run = px.parallel(pipe)
    assert relative(drawn(run), drawn(pipe)) <= 1e-2
    assert run.report.samples == 3
    assert run.report.rounds < 0.75 * run.report.steps


def test_scheduler_whose_first_step_is_infinite_raises():
    """A scheduler whose first step is infinite is refused."""
    scheduler = df.DDIMScheduler(
        clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1
    )
    pipe = stable_diffusion(scheduler)
    run = px.parallel(pipe)
    with pytest.warns(RuntimeWarning, match=r"call 1 is not finite although every output was"):
        result = picture(run, output_type="latent")
    assert run.report.mode == "sequential"
    assert torch.equal(result.isfinite(), picture(pipe, output_type="latent").isfinite())
    assert not result.isfinite().all()


def test_caches_of_the_denoiser_raise():
    """Caches of the denoiser are refused."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    pipe = stable_diffusion_3()
    run = px.parallel(pipe)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 950),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    with pytest.warns(RuntimeWarning, match=r"keeps state from call to call .*disable its cache"):
        result = picture_3(run)
    assert run.report.mode == "sequential"
    for part in pipe.transformer.modules():
        if hasattr(part, "_diffusers_hook"):
            part._diffusers_hook.reset_stateful_hooks(recurse=False)
    assert torch.equal(picture_3(pipe), result)


def test_denoisers_that_no_name_gives_away_are_asked_for():
    class Holder:
        def __init__(self):
            self.components = {"thing": torch.nn.Linear(2, 2)}

        def register_modules(self):
            pass

    with pytest.raises(ValueError, match=r"no denoiser among the components thing.*denoisers=\[\.\.\.\]"):
        px.parallel(Holder())()


@pytest.mark.parametrize(
    ("scheduler", "steps", "known", "most"),
    [
        (df.DDIMScheduler, 16, lambda t: 0.5, 12),
        (df.DDIMScheduler, 100, lambda t: 0.5, 54),
        (df.DDPMScheduler, 100, lambda t: 0.5, 26),
        (df.DDPMScheduler, 100, lambda t: 0.5 + 0.02 * float(t), 45),
    ],
    ids=["ddim 16", "ddim 100", "ddpm 100", "other values at every step"],
)
def test_loop_of_a_robot_policy_runs_unchanged(scheduler, steps, known, most):
    """One pass solves for entries that stay as they are; where they change, the loop begins anew and is recorded."""
    net, clipped = Net(), scheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    clipped.set_timesteps(steps)

    def plan(generator):
        x = torch.randn(2, DIM, generator=generator)
        for t in clipped.timesteps:
            x[:, :4] = known(t)
            x = clipped.step(net(x, t), t, x, generator=generator).prev_sample
        return x

    run = px.parallel(plan, px.Secant(window=16), denoisers=[net])
    expected = plan(torch.Generator().manual_seed(0))
    for _ in range(2):
        assert relative(run(torch.Generator().manual_seed(0)), expected) <= 1e-2
        assert run.report.mode == ("one pass" if known(0) == known(1) else "replay")
        assert run.report.rounds <= most, run.report


@pytest.mark.parametrize(
    ("scheduler", "clip", "most"),
    [
        (df.DDIMScheduler, False, 0.30),
        (df.DDPMScheduler, False, 0.36),
        (df.DDIMScheduler, True, 0.34),
        (df.DDPMScheduler, True, 0.40),
    ],
)
def test_shipped_model_runs_in_parallel_through_its_own_pipeline(scheduler, clip, most):
    """The shipped model runs in parallel through its own pipeline."""
    pipe = df.DiffusionPipeline.from_pretrained(FOLDER / "digits-unconditional", low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    kind = df.DDIMPipeline if scheduler is df.DDIMScheduler else df.DDPMPipeline
    pipe = quiet(kind(unet=pipe.unet, scheduler=scheduler.from_config(pipe.scheduler.config, clip_sample=clip)))

    def call(run):
        generator = torch.Generator().manual_seed(3)
        images = run(batch_size=4, num_inference_steps=50, output_type="np", generator=generator).images
        return 2 * torch.from_numpy(images) - 1

    run = px.parallel(pipe, px.Secant(window=16))
    assert relative(call(run), call(pipe)) <= run.report.error_estimate <= 1e-2
    assert run.report.converged
    assert run.report.mode == "one pass"
    assert run.report.rounds <= most * 50, run.report


def test_first_lines_of_the_documentation_run(capsys):
    """The first lines of the documentation run."""
    text = (Path(__file__).parent.parent / "docs" / "pipelines.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    exec(code, {})
    assert re.search(r"one pass: 100 steps in \d\d rounds", capsys.readouterr().out)
