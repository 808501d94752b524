"""A zoo of diffusers pipelines with tiny random weights, made in memory: loops that must be parallelised as they are.

    pipe, call = zoo.PIPELINES["flux"](torch.float32)           # fresh: same bits every time
    pipe, call = zoo.make("flux", "two per prompt")             # the same with an option
    sample = zoo.run(pipe, call)                                # a tensor, from a fresh random state

`call` holds the arguments of a valid call with 10 steps on latents of 8 x 8; where the pipeline can return latents it
does. Prompts are random embeddings, two of whose tokens are masked where the pipeline takes masks. Each component draws
its weights from a generator of its own, zero initialisations included, so that outputs and slopes are of order one.

To add a pipeline: write a function that returns `(pipe, call)` under `@pipeline(shape of one sample's latents)`, name
the schedulers that suit its loop, and if it has options of its own, add them to `OWN`. Options that many pipelines take
are found by the signature. What diffusers itself cannot do goes to `BROKEN` with the reason. `python tests/zoo.py
[names]` runs all options of all pipelines or of those named, and prints what they are like.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
import time
import warnings
import zlib
from functools import cache

import diffusers
import pytest
import torch
from diffusers import callbacks
from torch import nn

STEPS = 10
PIPELINES = {}  # name -> build(dtype) -> (pipe, call)
LATENTS = {}  # name -> shape of one sample's latents, () where they cannot be given
SUITS = {}  # name -> labels in SCHEDULERS

IN_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {  # label -> class, what is changed in the configuration, what is changed in the call
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, {}),
    "DDIM eta": ("DDIMScheduler", {"clip_sample": False}, {"eta": 0.7}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}, {}),
    "Euler": ("EulerDiscreteScheduler", {}, {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "Heun": ("HeunDiscreteScheduler", {}, {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}, {}),
    "DPM++ 3M Karras": ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {"lower_order_final": True, "final_sigmas_type": "zero"}, {}),
    "UniPC": ("UniPCMultistepScheduler", {}, {}),
    "DEIS": ("DEISMultistepScheduler", {}, {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    "LMS": ("LMSDiscreteScheduler", {}, {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}, {}),
    "SA-Solver": ("SASolverScheduler", {}, {}),
    "LCM": ("LCMScheduler", {}, {}),
    "CogVideoX DDIM": ("CogVideoXDDIMScheduler", {}, {}),
    "CogVideoX DPM": ("CogVideoXDPMScheduler", {}, {}),
    "EDM Euler": ("EDMEulerScheduler", {}, {}),
    "EDM DPM++": ("EDMDPMSolverMultistepScheduler", {}, {}),
    "flow Euler": ("FlowMatchEulerDiscreteScheduler", {}, {}),
    "flow Euler Karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    "flow Euler stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    "flow Heun": ("FlowMatchHeunDiscreteScheduler", {}, {}),
    "flow LCM": ("FlowMatchLCMScheduler", {}, {}),
    "flow UniPC": ("UniPCMultistepScheduler", IN_FLOW, {}),
    "flow DPM++ 2M": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        {},
    ),
}
UNSCALED = ("DDIM", "DDPM", "DPM++ 2M SDE")  # their step takes a generator, and the loop need not scale its input
DIFFUSION = (*UNSCALED, "DDIM eta", "Euler", "Euler ancestral", "Heun", "DPM++ 2M", "DPM++ 3M Karras", "DPM++ 2S")
DIFFUSION = (*DIFFUSION, "UniPC", "DEIS", "PNDM", "LMS", "KDPM2 ancestral", "SA-Solver", "LCM")
SIGMAS = ("flow Euler", "flow Euler Karras", "flow Euler stochastic", "flow LCM", "flow UniPC")  # for given sigmas
FLOW = (*SIGMAS, "flow Heun", "flow DPM++ 2M")


def pipeline(*latents, schedulers=DIFFUSION):
    """Register a pipeline under its builder's name: weights, dtypes and common arguments are seen to here."""

    def register(builder):
        def build(dtype=torch.float32):
            with torch.random.fork_rng(devices=[]):
                pipe, call = builder()
            for name, part in pipe.components.items():
                if isinstance(part, nn.Module):
                    # A gentle decoder: pictures should not magnify the rounding of latents.
                    fill(part, zlib.crc32(name.encode()), 0.7 if name in ("vae", "movq") else 1.0)
                    cast(part, dtype)
                    part.eval().requires_grad_(False)
            pipe.set_progress_bar_config(disable=True)
            common = {"num_inference_steps": STEPS, "generator": generator(0), "output_type": "latent"}
            return pipe, {key: rounded(value, dtype) for key, value in (common | call).items()}

        PIPELINES[builder.__name__] = build
        LATENTS[builder.__name__] = latents
        SUITS[builder.__name__] = schedulers
        return build

    return register


def fill(module, seed, gain):
    """Draw all parameters: matrices of a gain, vectors that scale about one, small biases."""
    random = generator(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            draw = torch.randn(value.shape, generator=random)
            if value.squeeze().ndim > 1:
                # SiLU halves what passes from an embedding of time to the modulations: with gain one, blocks do little.
                modulates = re.search(r"time|t_embed|mod|adaln|norm\w*\.linear", name, re.IGNORECASE)
                value.copy_(gain * (1.5 if modulates else 1.0) * draw / math.sqrt(value[0].numel()))
            else:
                value.copy_(0.1 * draw + (0 if name.endswith("bias") else 1))


def cast(module, dtype):
    """Cast a module as `from_pretrained` does: what diffusers keeps in float32 stays so in 16 bits."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype.itemsize < 4 else set()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point() and kept.isdisjoint(name.split(".")):
            value.data = value.data.to(dtype)


def rounded(value, dtype):
    """Return an argument with its floating point tensors in a dtype."""
    if isinstance(value, list):
        return [rounded(one, dtype) for one in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def generator(seed):
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed):
    """Return standard normal numbers."""
    return torch.randn(shape, generator=generator(seed))


def prompt(length=5, width=16):
    """Return the embeddings of a prompt and of a negative one."""
    return {
        "prompt_embeds": normal(1, length, width, seed=1),
        "negative_prompt_embeds": normal(1, length, width, seed=2),
    }


def pooled(width=8):
    """Return the pooled embeddings of a prompt and of a negative one."""
    return {
        "pooled_prompt_embeds": normal(1, width, seed=3),
        "negative_pooled_prompt_embeds": normal(1, width, seed=4),
    }


def masks(name="prompt_attention_mask"):
    """Return masks of different lengths for a prompt and a negative one."""
    return {name: torch.tensor([[1, 1, 1, 1, 0]]), f"negative_{name}": torch.tensor([[1, 1, 1, 0, 0]])}


def size(pixels=16):
    """Return the size of a square picture."""
    return {"height": pixels, "width": pixels}


def picture():
    """Return a picture to start from or to be guided by."""
    return normal(1, 3, 16, 16, seed=5).sigmoid()


def hole():
    """Return the mask of what is to be painted in."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 6:] = 1
    return mask


# Parts that several pipelines share.

WIDTHS = (16, 32)
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": WIDTHS,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
VIDEO = {"z_dim": 4, "latents_mean": [0.1, -0.1, 0.2, 0.0], "latents_std": [1.0, 1.5, 2.0, 1.2]}
VIDEO = VIDEO | {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet(cls=diffusers.UNet2DConditionModel, **config):
    """Return a text-conditioned UNet."""
    config = {"sample_size": 8, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")} | BLOCKS | config
    known = inspect.signature(cls).parameters
    return cls(**{key: value for key, value in config.items() if key in known})


def kl(**config):
    """Return an autoencoder that halves each side."""
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
    }
    return diffusers.AutoencoderKL(**blocks | config)


def ddim(**config):
    """Return DDIM with Stable Diffusion's schedule, for v-prediction: the sample stays of order one."""
    defaults = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction"}
    return diffusers.DDIMScheduler(**BETAS | defaults | config)


def flow(shift=3.0, **config):
    """Return the flow-matching Euler scheduler."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **config)


def words():
    """Return a tokenizer of eight letters and CLIP's text encoder for it."""
    # Here, as no version of it goes with the oldest versions that are supported.
    transformers = pytest.importorskip("transformers")

    letters = "abcdefgh"
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = transformers.CLIPTokenizer(vocab=ids, merges=[], model_max_length=8)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {"tokenizer": tokenizer, "text_encoder": transformers.CLIPTextModel(config)}


# Latent diffusion with UNets.


def latent_diffusion(cls, **parts):
    """Return a pipeline with Stable Diffusion's parts."""
    defaults = {
        "vae": kl(),
        "unet": unet(),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return cls(**defaults | words() | parts)


@pipeline(4, 8, 8)
def stable_diffusion():
    return latent_diffusion(diffusers.StableDiffusionPipeline), prompt() | size()


@pipeline()
def stable_diffusion_img2img():
    return latent_diffusion(diffusers.StableDiffusionImg2ImgPipeline), prompt() | {"image": picture(), "strength": 0.95}


@pipeline(4, 8, 8)
def stable_diffusion_inpaint():
    pipe = latent_diffusion(diffusers.StableDiffusionInpaintPipeline)
    return pipe, prompt() | size() | {"image": picture(), "mask_image": hole()}


@pipeline(4, 8, 8)
def stable_diffusion_inpaint_9_channels():
    pipe = latent_diffusion(diffusers.StableDiffusionInpaintPipeline, unet=unet(in_channels=9))
    return pipe, prompt() | size() | {"image": picture(), "mask_image": hole()}


@pipeline(4, 8, 8)
def stable_diffusion_controlnet():
    control = diffusers.ControlNetModel(**BLOCKS, conditioning_embedding_out_channels=(8, 8))
    pipe = latent_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=control)
    return pipe, prompt() | size() | {"image": picture()}


@pipeline(4, 8, 8)
def stable_diffusion_pag():
    return latent_diffusion(diffusers.StableDiffusionPAGPipeline), prompt() | size()


@pipeline(4, 8, 8)
def instruct_pix2pix():
    pipe = latent_diffusion(diffusers.StableDiffusionInstructPix2PixPipeline, unet=unet(in_channels=8))
    return pipe, prompt() | {"image": picture()}


@pipeline(4, 8, 8, schedulers=("LCM",))
def latent_consistency():
    scheduler = diffusers.LCMScheduler(**BETAS, prediction_type="v_prediction")
    net = unet(time_cond_proj_dim=8)
    pipe = latent_diffusion(diffusers.LatentConsistencyModelPipeline, unet=net, scheduler=scheduler)
    return pipe, {"prompt_embeds": prompt()["prompt_embeds"]} | size()


@pipeline(4, 8, 8)
def stable_diffusion_xl():
    net = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        use_linear_projection=True,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=kl(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=net,
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    return pipe, prompt() | pooled() | size()


@pipeline(4, 8, 8, schedulers=UNSCALED)
def kandinsky():
    net = unet(
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=16,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
    )
    movq = diffusers.VQModel(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["AttnUpDecoderBlock2D"] * 2,
        block_out_channels=(32, 32),
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    pipe = diffusers.KandinskyV22Pipeline(net, ddim(beta_schedule="linear"), movq)
    call = {"image_embeds": normal(1, 16, seed=1), "negative_image_embeds": normal(1, 16, seed=2)}
    return pipe, call | size()


@pipeline(4, 8, 8)
def audioldm2():
    import transformers

    language = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8, bos_token_id=0, eos_token_id=0)
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=16,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )
    pipe = diffusers.AudioLDM2Pipeline(
        vae=kl(in_channels=1, out_channels=1),
        text_encoder=None,
        text_encoder_2=transformers.T5EncoderModel(
            transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=8)
        ),
        projection_model=None,
        language_model=transformers.GPT2Model(language),
        tokenizer=None,
        tokenizer_2=None,
        feature_extractor=None,
        unet=unet(diffusers.AudioLDM2UNet2DConditionModel, cross_attention_dim=([None, 16, 16], [None, 16, 16])),
        scheduler=ddim(),
        vocoder=transformers.SpeechT5HifiGan(vocoder),
    )
    call = {
        "generated_prompt_embeds": normal(1, 4, 16, seed=3),
        "negative_generated_prompt_embeds": normal(1, 4, 16, seed=4),
        "audio_length_in_s": 4.0,
    }
    return pipe, prompt() | masks("attention_mask") | call


@pipeline(4, 2, 8, 8)
def animatediff():
    net = unet(
        diffusers.UNetMotionModel,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=4,
    )
    pipe = diffusers.AnimateDiffPipeline(kl(), None, None, net, None, ddim(beta_schedule="linear"))
    return pipe, prompt() | size() | {"num_frames": 2, "guidance_scale": 3.0}


@pipeline(2, 4, 8, 8, schedulers=("Euler",))
def stable_video_diffusion():
    import transformers

    net = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=2,
        num_frames=2,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=["DownEncoderBlock2D"] * 2,
        block_out_channels=(32, 32),
    )
    sees = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS,
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=20.0,
    )
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae, transformers.CLIPVisionModelWithProjection(sees), net, scheduler, transformers.CLIPImageProcessorPil()
    )
    return pipe, size() | {"image": picture(), "num_frames": 2}


# Pixels.


def pixels():
    """Return an unconditional UNet."""
    return diffusers.UNet2DModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        norm_num_groups=4,
    )


@pipeline(schedulers=("DDPM",))
def ddpm_pixels():
    return diffusers.DDPMPipeline(pixels(), diffusers.DDPMScheduler()), {"batch_size": 1, "output_type": "np"}


@pipeline(schedulers=("DDIM", "DDIM eta"))
def ddim_pixels():
    return diffusers.DDIMPipeline(pixels(), diffusers.DDIMScheduler()), {"batch_size": 1, "output_type": "np"}


# Transformers with a noise schedule.


@pipeline(schedulers=DIFFUSION)
def dit():
    net = diffusers.DiTTransformer2DModel(
        **ATTENTION, in_channels=4, out_channels=8, sample_size=8, norm_num_groups=4, num_embeds_ada_norm=1000
    )
    scheduler = ddim(beta_schedule="linear")
    return diffusers.DiTPipeline(net, kl(), scheduler), {"class_labels": [3], "output_type": "np"}


@pipeline(4, 8, 8)
def pixart_sigma():
    net = diffusers.PixArtTransformer2DModel(
        **ATTENTION,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction")
    pipe = diffusers.PixArtSigmaPipeline(None, None, kl(), net, scheduler)
    return pipe, prompt() | masks() | size() | {"use_resolution_binning": False, "negative_prompt": None}


@pipeline(4, 2, 8, 8)
def latte():
    net = diffusers.LatteTransformer3DModel(
        **ATTENTION,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=16,
        video_length=2,
    )
    pipe = diffusers.LattePipeline(None, None, kl(), net, ddim(beta_schedule="linear"))
    return pipe, prompt() | size() | {"video_length": 2, "negative_prompt": None, "clean_caption": False}


@pipeline(2, 4, 8, 8, schedulers=("DDIM", "DDPM", "DPM++ 2M", "UniPC", "CogVideoX DDIM", "CogVideoX DPM"))
def cogvideox():
    net = diffusers.CogVideoXTransformer3DModel(
        **ATTENTION,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        **BETAS,
        snr_shift_scale=1.0,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    return diffusers.CogVideoXPipeline(None, None, vae, net, scheduler), prompt() | size(64) | {"num_frames": 5}


@pipeline(8, 16, schedulers=("EDM DPM++", "EDM Euler"))
def stable_audio():
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    net = diffusers.StableAudioDiTModel(
        **ATTENTION,
        sample_size=16,
        in_channels=8,
        num_key_value_attention_heads=2,
        out_channels=8,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
        vae = diffusers.AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 2],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=8,
            sampling_rate=16,
        )
    projection = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32)
    # The released model's scheduler, its stochastic sibling, needs torchsde.
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=80.0, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
    )
    return diffusers.StableAudioPipeline(vae, None, projection, None, net, scheduler), prompt() | {
        "guidance_scale": 3.0
    }


# Flow matching.


@pipeline(4, 8, 8, schedulers=FLOW)
def stable_diffusion_3():
    net = diffusers.SD3Transformer2DModel(
        **ATTENTION,
        sample_size=8,
        in_channels=4,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipe = diffusers.StableDiffusion3Pipeline(net, flow(), kl(shift_factor=0.1), *[None] * 6)
    return pipe, prompt() | pooled() | size()


FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}  # also of what controls it, and of Chroma


def flux_like(cls, channels=16, *, guidance=True):
    """Return a pipeline with Flux's parts, whose network sees this many channels and draws 16."""
    net = diffusers.FluxTransformer2DModel(
        in_channels=channels, out_channels=16, pooled_projection_dim=8, guidance_embeds=guidance, **FLUX
    )
    pipe = cls(flow(use_dynamic_shifting=True), kl(shift_factor=0.1), None, None, None, None, net)
    told = {key: value for key, value in (prompt() | pooled()).items() if not key.startswith("negative")}
    return pipe, told | size()


@pipeline(16, 16, schedulers=SIGMAS)
def flux():
    return flux_like(diffusers.FluxPipeline)


@pipeline(16, 16, schedulers=SIGMAS)
def flux_true_cfg():
    pipe, call = flux_like(diffusers.FluxPipeline, guidance=False)
    return pipe, call | prompt() | pooled() | {"true_cfg_scale": 3.0}


@pipeline(16, 16, schedulers=SIGMAS)
def flux_kontext():
    pipe, call = flux_like(diffusers.FluxKontextPipeline)
    return pipe, call | {"image": picture(), "_auto_resize": False, "max_area": 16 * 16}


@pipeline(16, 16, schedulers=SIGMAS)
def flux_control():
    pipe, call = flux_like(diffusers.FluxControlPipeline, 2 * 16)
    return pipe, call | {"control_image": picture()}


@pipeline(16, 16, schedulers=SIGMAS)
def flux_fill():
    pipe, call = flux_like(diffusers.FluxFillPipeline, 3 * 16)
    return pipe, call | {"image": picture(), "mask_image": hole()}


@pipeline(16, 16, schedulers=SIGMAS)
def qwen_image():
    net = diffusers.QwenImageTransformer2DModel(
        **ATTENTION, in_channels=16, out_channels=4, joint_attention_dim=16, axes_dims_rope=(2, 2, 4)
    )
    pipe = diffusers.QwenImagePipeline(
        flow(use_dynamic_shifting=True), diffusers.AutoencoderKLQwenImage(**VIDEO), None, None, net
    )
    return pipe, prompt() | masks("prompt_embeds_mask") | size(64)


@pipeline(4, 8, 8, schedulers=SIGMAS)
def lumina2():
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 8, 8),
        cap_feat_dim=16,
    )
    pipe = diffusers.Lumina2Pipeline(net, flow(6.0), kl(shift_factor=0.1), None, None)
    return pipe, prompt() | masks() | size(64) | {"guidance_scale": 2.0}


@pipeline(4, 8, 8, schedulers=SIGMAS)
def z_image():
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 16, 16],
    )
    pipe = diffusers.ZImagePipeline(flow(), kl(shift_factor=0.1), None, None, net)
    embeds = {"prompt_embeds": [normal(5, 16, seed=1)], "negative_prompt_embeds": [normal(3, 16, seed=2)]}
    return pipe, embeds | size()


@pipeline(4, 8, 8, schedulers=FLOW)
def aura_flow():
    net = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return diffusers.AuraFlowPipeline(None, None, kl(), net, flow(1.73)), prompt() | masks() | size()


@pipeline(4, 8, 8, schedulers=FLOW)
def sana():
    net = diffusers.SanaTransformer2DModel(
        **ATTENTION,
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    pipe = diffusers.SanaPipeline(None, None, vae, net, flow())
    return pipe, prompt() | masks() | size(32) | {
        "use_resolution_binning": False,
        "negative_prompt": None,
        "guidance_scale": 2.0,
    }


def ltx_parts():
    """Return the parts of LTX's pipelines."""
    net = diffusers.LTXVideoTransformer3DModel(
        **ATTENTION, in_channels=8, out_channels=8, cross_attention_dim=16, caption_channels=16
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    return flow(use_dynamic_shifting=True, shift_terminal=0.1), vae, None, None, net


@pipeline(8, 8, schedulers=SIGMAS)
def ltx():
    return diffusers.LTXPipeline(*ltx_parts()), prompt() | masks() | size(64) | {"num_frames": 9}


@pipeline(8, 8, schedulers=SIGMAS)
def ltx_image_to_video():
    call = size(64) | {"num_frames": 9, "image": picture()}
    return diffusers.LTXImageToVideoPipeline(*ltx_parts()), prompt() | masks() | call


WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}  # also of SkyReels


def wan_like(cls, *, experts=1, **config):
    """Return a pipeline with Wan's parts."""
    nets = [diffusers.WanTransformer3DModel(**WAN) for _ in range(experts)]
    parts = dict(zip(("transformer", "transformer_2"), nets, strict=False))
    pipe = cls(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLWan(**VIDEO),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **parts,
        **config,
    )
    return pipe, prompt() | size(64) | {"num_frames": 5}


@pipeline(4, 2, 8, 8, schedulers=FLOW)
def wan():
    return wan_like(diffusers.WanPipeline)


@pipeline(4, 2, 8, 8, schedulers=FLOW)
def wan_two_experts():
    pipe, call = wan_like(diffusers.WanPipeline, experts=2, boundary_ratio=0.8)
    return pipe, call | {"guidance_scale_2": 3.0}


@pipeline(4, 2, 8, 8, schedulers=FLOW)
def wan_image_to_video():
    pipe, call = wan_like(diffusers.WanImageToVideoPipeline, expand_timesteps=True)
    return pipe, call | {"image": picture()}


# Options.


def options(**changes):
    """Return a variant that changes arguments of the call."""
    return lambda pipe, call: (pipe, call | changes)


def scheduler(label):
    """Return a variant with another scheduler of the same schedule."""

    def modify(pipe, call):
        name, changed, told = SCHEDULERS[label]
        cls = getattr(diffusers, name)
        known = {"_use_default_values", *inspect.signature(cls).parameters}
        config = {key: value for key, value in pipe.scheduler.config.items() if key in known}
        pipe.scheduler = cls.from_config(config, **changed)
        return pipe, call | told

    return modify


def configured(**config):
    """Return a variant with a scheduler of the same class that is configured otherwise."""

    def modify(pipe, call):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config)
        return pipe, call

    return modify


def both(first, second):
    """Return one variant after another."""
    return lambda pipe, call: second(*first(pipe, call))


def count(value, number):
    """Return this many different conditions made of one."""
    if isinstance(value, list):
        return [one for i in range(number) for one in (shifted(item, i) for item in value)]
    if isinstance(value, torch.Tensor):
        return torch.cat([shifted(value, i) for i in range(number)])
    return value * number


def shifted(value, by):
    """Return another condition like this one; masks stay as they are."""
    if isinstance(value, torch.Tensor):
        return value.roll(by, -1) if value.is_floating_point() else value
    return value + by


def prompts(number, batched=("_embeds", "mask", "image", "class_labels", "batch_size")):
    """Return a variant with this many different prompts, pictures or classes."""

    def modify(pipe, call):
        return pipe, {key: count(v, number) if any(b in key for b in batched) else v for key, v in call.items()}

    return modify


def generators(number):
    """Return a variant with one generator a sample."""
    return lambda pipe, call: (pipe, call | {"generator": [generator(i) for i in range(number)]})


def latents(shape):
    """Return a variant that is given its noise."""
    return lambda pipe, call: (pipe, call | {"latents": normal(1, *shape, seed=7).to(dtype_of(pipe))})


def dtype_of(pipe):
    """Return the dtype of the denoisers."""
    return next(iter(denoisers(pipe).values())).dtype


def reading(pipe, step, time, tensors):
    """Look at the latents, and note the look on the pipeline."""
    pipe.seen = [*getattr(pipe, "seen", []), float(tensors["latents"].abs().mean())]
    return {}


def shrinking(pipe, step, time, tensors):
    """Change the latents after each step."""
    return {"latents": 0.9 * tensors["latents"]}


def interrupting(pipe, step, time, tensors):
    """End the loop early, as an interface's stop button does."""
    pipe._interrupt = step >= STEPS // 2
    return {}


def forgetting(pipe, step, time, tensors):
    """Change the prompt half way."""
    told = tensors["prompt_embeds"]
    other = [-one for one in told] if isinstance(told, list) else -told
    return {"prompt_embeds": other} if step == STEPS // 2 else {}


def old_shrinking(step, time, latents):
    """Change the latents in place, all that the older kind of callback can do."""
    latents.mul_(0.9)


def words_for_embeddings(pipe, call):
    """Ask for a text instead of embeddings, so that a text encoder runs before the loop."""
    call = {key: value for key, value in call.items() if "embeds" not in key}
    return pipe, call | {"prompt": ["a cab"], "negative_prompt": ["gag"]}


def free_init(pipe, call):
    """Run the whole loop twice, the second time from noise with the first one's low frequencies."""
    pipe.enable_free_init(num_iters=2)
    return pipe, call


def remembering(pipe, call):
    """Let the network keep a state between calls: its later blocks are skipped when the first changes little."""
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1.5))
    return pipe, call


class LowRank(nn.Module):
    """A linear layer with an adapter of rank two beside it."""

    def __init__(self, base, random):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=random).to(base.weight.dtype))
        self.up = nn.Parameter(0.2 / math.sqrt(base.in_features) * torch.randn(base.out_features, 2, generator=random))
        self.up.data = self.up.data.to(base.weight.dtype)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def adapted(pipe, call):
    """Put low-rank adapters beside the projections of attention, as LoRA does."""
    random = generator(11)
    for net in denoisers(pipe).values():
        for module in list(net.modules()):
            for name in ("to_q", "to_k", "to_v"):
                if isinstance(base := getattr(module, name, None), nn.Linear):
                    setattr(module, name, LowRank(base, random).requires_grad_(False))
    return pipe, call


def compiled(pipe, call):
    """Compile the networks, to the same operations."""
    torch.compiler.reset()
    for net in denoisers(pipe).values():
        net.compile(backend="eager", dynamic=True)
    return pipe, call


def offloaded(pipe, call):
    """Keep the weights elsewhere, and load them for the duration of a call, as offloading hooks do."""
    for net in denoisers(pipe).values():
        weights = {name: value.data.clone() for name, value in net.named_parameters()}
        plain = net.forward

        @functools.wraps(plain)
        def forward(*told, net=net, weights=weights, plain=plain, **named):
            for name, value in net.named_parameters():
                value.data.copy_(weights[name])
            try:
                return plain(*told, **named)
            finally:
                unload(net)

        unload(net)
        net.forward = forward
    return pipe, call


def unload(net):
    """Make the weights useless."""
    for value in net.parameters():
        value.data.fill_(math.nan)


def two_pictures(pipe, call):
    """Draw two samples of one prompt from two pictures."""
    return pipe, call | {"image": count(call["image"], 2), "num_images_per_prompt": 2}


CUTOFF = {"cutoff_step_ratio": 0.4}
OWN = {  # options that belong to single pipelines
    "stable_diffusion": [
        ("text", words_for_embeddings),
        ("compiled", compiled),
        ("zero terminal SNR", configured(rescale_betas_zero_snr=True, timestep_spacing="trailing")),
        ("clipped", both(configured(clip_sample=True, clip_sample_range=3.0), options(guidance_scale=2.0))),
        ("guidance cut off", options(callback_on_step_end=callbacks.SDCFGCutoffCallback(**CUTOFF))),
    ],
    "stable_diffusion_img2img": [("two per prompt, two pictures", two_pictures)],
    "instruct_pix2pix": [("two per prompt, two pictures", two_pictures)],
    "stable_diffusion_inpaint": [("strength", options(strength=0.6))],
    "stable_diffusion_controlnet": [
        ("guess mode", options(guess_mode=True)),
        ("control ends early", options(control_guidance_end=0.5)),
    ],
    "stable_diffusion_pag": [("adaptive PAG", options(pag_adaptive_scale=0.2)), ("no PAG", options(pag_scale=0.0))],
    "stable_diffusion_xl": [
        ("denoising end", options(denoising_end=0.8)),
        ("guidance cut off", options(callback_on_step_end=callbacks.SDXLCFGCutoffCallback(**CUTOFF))),
    ],
    "stable_diffusion_3": [
        ("skipped layers", options(skip_guidance_layers=[0])),
        ("guidance cut off", options(callback_on_step_end=callbacks.SD3CFGCutoffCallback(**CUTOFF))),
    ],
    "ddpm_pixels": [("not clipped", configured(clip_sample=False))],
    "ddim_pixels": [("not clipped", configured(clip_sample=False))],
    "flux": [("stateful cache", remembering), ("compiled", compiled)],
    "cogvideox": [("dynamic guidance", options(use_dynamic_cfg=True))],
    "lumina2": [
        ("guidance not normalised", options(cfg_normalization=False)),
        ("guidance truncated", options(cfg_trunc_ratio=0.5)),
    ],
    "z_image": [
        ("guidance normalised", options(cfg_normalization=True)),
        ("guidance truncated", options(cfg_truncation=0.5)),
    ],
    "animatediff": [("free init", free_init)],
    "wan": [("compiled", compiled)],
    "wan_image_to_video": [("three prompts, one picture", prompts(3, ("_embeds",)))],
}
DUPLICATED = "one picture for two samples is deprecated: the variant with two pictures stands for it"
UNREPEATED = "given embeddings are not repeated"
BROKEN = {  # what the installed diffusers cannot do
    ("stable_diffusion_img2img", "two per prompt"): DUPLICATED,
    ("instruct_pix2pix", "two per prompt"): DUPLICATED,
    ("stable_diffusion_3", "two per prompt"): UNREPEATED,
    ("lumina2", "two per prompt"): UNREPEATED,
    ("ltx", "two per prompt"): UNREPEATED,
    ("ltx_image_to_video", "two per prompt"): UNREPEATED,
    ("flux_fill", "flow UniPC"): "no scale_noise",
    ("z_image", "flow UniPC"): "sigmas are a list, which UniPC cannot multiply",
    ("wan_image_to_video", "three prompts"): "a batch shares one picture",
    ("wan_image_to_video", "generator list"): "a batch shares one picture",
}


@cache
def variants(name, broken=False):
    """Return `(label, modify)` of a pipeline's options: `modify(pipe, call)` takes a fresh build and returns it."""
    pipe, call = PIPELINES[name]()
    takes = inspect.signature(type(pipe).__call__).parameters
    config = pipe.scheduler.config
    is_flow = any(label.startswith("flow") for label in SUITS[name])
    found = [("plain", options())]
    found += [(label, scheduler(label)) for label in SUITS[name] if set(SCHEDULERS[label][2]) <= set(takes)]
    three = prompts(3)
    found += [
        ("three prompts", three),
        ("generator list", both(three, generators(3))),
        ("no generator", options(generator=None)),
    ]
    per_prompt = [key for key in takes if key.startswith("num_") and key.endswith("_per_prompt")]
    found += [("two per prompt", options(**{key: 2})) for key in per_prompt]
    if LATENTS[name]:
        found.append(("given latents", latents(LATENTS[name])))
    if "timesteps" in takes and "DDPM" in SUITS[name]:
        found.append(("given timesteps", both(scheduler("DDPM"), options(timesteps=[999 - 95 * i for i in range(10)]))))
    if "sigmas" in takes:
        chosen = "flow Euler" if is_flow else "Euler"
        sigmas = [1.0 - 0.095 * i for i in range(10)] if is_flow else [14.0 * 0.6**i for i in range(10)] + [0.0]
        found.append(("given sigmas", both(scheduler(chosen), options(sigmas=sigmas))))
    if any(key.startswith("negative_") and "embeds" in key for key in call) or "class_labels" in call:
        scale = "true_cfg_scale" if "true_cfg_scale" in takes else "guidance_scale"
        found.append(("no guidance", options(**{scale: 1.0})))
    if "guidance_rescale" in takes:
        found.append(("guidance rescaled", options(guidance_rescale=0.7)))
    if "callback_on_step_end" in takes:
        found += [
            ("callback reads", options(callback_on_step_end=reading)),
            ("callback changes latents", options(callback_on_step_end=shrinking)),
        ]
        if hasattr(type(pipe), "interrupt"):
            found.append(("callback interrupts", options(callback_on_step_end=interrupting)))
        if "prompt_embeds" in getattr(pipe, "_callback_tensor_inputs", ()):
            told = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
            found.append(("callback changes prompt", options(callback_on_step_end=forgetting, **told)))
    elif "callback" in takes:
        found.append(("callback changes latents", options(callback=old_shrinking)))
    found += [("low-rank adapters", adapted), ("offloaded", offloaded)]
    if call["output_type"] == "latent":
        found.append(("decoded", options(output_type="np")))
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}.get(config.get("prediction_type"))
    if other and not config.get("rescale_betas_zero_snr"):  # at zero SNR epsilon says nothing
        found.append((other, configured(prediction_type=other)))
    return [(label, modify) for label, modify in found + OWN.get(name, []) if ((name, label) in BROKEN) == broken]


def make(name, label="plain", dtype=torch.float32):
    """Return a fresh pipeline with an option, and the arguments to call it with."""
    return dict(variants(name))[label](*PIPELINES[name](dtype))


def denoisers(pipe):
    """Return the networks that the loop calls, by the name of the component."""
    names = ("unet", "transformer", "transformer_2", "prior", "prior_prior", "decoder")
    return {name: pipe.components[name] for name in names if pipe.components.get(name) is not None}


def run(pipe, call):
    """Return what the pipeline draws, as a tensor; all random states are put back afterwards."""
    generators = [one for value in call.values() for one in (value if isinstance(value, list) else [value])]
    states = [(one, one.get_state()) for one in generators if isinstance(one, torch.Generator)]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            drawn = next(iter(pipe(**call).values()))
    finally:
        for one, state in states:
            one.set_state(state)
    return torch.as_tensor(drawn)


# What the zoo is like.


def change(x, y):
    """Return the relative distance of x from y."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def main(names):
    """Run all variants of the named pipelines, or of all, and print what they are like."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"__array_(_ implementation|wrap__ must)", DeprecationWarning)
    print(f"{'pipeline':36}{'variant':30}{'calls':>5}{'build s':>9}{'run s':>7}{'std':>9}{'effect':>8}  shape")
    started, failed = time.perf_counter(), 0
    for name in names or PIPELINES:
        for label, _ in variants(name):
            try:
                row = measured(name, label)
            except Exception as error:
                failed += 1
                row = f"FAILED {type(error).__name__}: {' '.join(str(error).split())}"
            print(f"{name:36}{label:30}{row}", flush=True)
    print(f"{failed} failed, {time.perf_counter() - started:.0f} s")


def measured(name, label):
    """Return a row of the table; `effect` is the sample's change per change of the outputs, both relative."""
    first = time.perf_counter()
    pipe, call = make(name, label)
    second = time.perf_counter()
    x = run(pipe, call)
    third = time.perf_counter()
    again, calls = watched(name, label, 1.0)
    moved, _ = watched(name, label, 1.001)
    if not (torch.equal(x, again) and x.isfinite().all()):
        raise AssertionError("not finite, or not the same twice")
    effect = 1e3 * change(moved, x)
    times = f"{second - first:9.2f}{third - second:7.2f}"
    return f"{calls:5}{times}{x.std():9.3g}{effect:8.2f}  {tuple(x.shape)}"


def watched(name, label, factor):
    """Return the sample with all outputs of the networks times a factor, and the number of calls."""
    calls = 0

    def scale(tensor):
        nonlocal calls
        calls += 1
        return tensor.mul_(factor)

    return altered(*make(name, label), scale), calls


def altered(pipe, call, alter):
    """Return the sample with every output of the networks altered."""

    def hook(net, told, out):
        for tensor in out[0] if isinstance(out[0], list) else [out[0]]:
            tensor.copy_(alter(tensor))

    hooks = [net.register_forward_hook(hook) for net in denoisers(pipe).values()]
    try:
        return run(pipe, call)
    finally:
        for one in hooks:
            one.remove()


def floor(pipe, call):
    """Return how far apart samples are whose outputs differ by a unit in their last place, for two seeds."""
    x = run(pipe, call)
    return max(distance(altered(pipe, call, nudged(seed)), x) for seed in (1, 2))


def nudged(seed):
    """Return what adds noise of one unit in the last place to a tensor."""
    random = generator(seed)

    def nudge(tensor):
        wide = tensor.float()
        size = torch.finfo(tensor.dtype).eps * wide.square().mean().sqrt()
        return wide + size * torch.randn(tensor.shape, generator=random)

    return nudge


def distance(x, y):
    """Return the relative distance of the samples of x from those of y, the largest of the batch."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    return float(((x - y).norm(dim=1) / y.norm(dim=1)).max())


if __name__ != "__main__":
    import zoo_more  # noqa: F401  # they all add their pipelines to PIPELINES
else:
    import zoo

    zoo.main(sys.argv[1:])
