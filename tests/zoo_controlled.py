"""More of the zoo: pictures that begin or are guided by others, by ControlNets, adapters, masks and depth."""

from __future__ import annotations

import diffusers
from diffusers import HunyuanDiT2DControlNetModel

import zoo
from zoo import (
    ATTENTION,
    BLOCKS,
    FLOW,
    SIGMAS,
    UNSCALED,
    flow,
    hole,
    kl,
    latent_diffusion,
    normal,
    picture,
    pipeline,
    pooled,
    prompt,
    size,
    unet,
)

HINTS = (8, 8)  # channels of the pictures that guide
PLAIN = ("DDIM", "DDPM", "DPM++ 2M")  # schedulers of pipelines whose like has them all


def control(cls=diffusers.ControlNetModel, **config):
    """Return a ControlNet of the U-Net's shape."""
    return cls(**BLOCKS | {"conditioning_embedding_out_channels": HINTS} | config)


@pipeline(schedulers=PLAIN)
def stable_diffusion_controlnet_img2img():
    pipe = latent_diffusion(diffusers.StableDiffusionControlNetImg2ImgPipeline, controlnet=control())
    return pipe, prompt() | {"image": picture(), "control_image": picture(), "strength": 0.95}


@pipeline(4, 8, 8, schedulers=PLAIN)
def stable_diffusion_controlnet_inpaint():
    pipe = latent_diffusion(diffusers.StableDiffusionControlNetInpaintPipeline, controlnet=control())
    return pipe, prompt() | size() | {"image": picture(), "mask_image": hole(), "control_image": picture()}


@pipeline(4, 8, 8, schedulers=PLAIN)
def stable_diffusion_two_controlnets():
    pipe = latent_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=[control(), control()])
    return pipe, prompt() | size() | {"image": [picture(), 1 - picture()], "controlnet_conditioning_scale": [0.5, 0.7]}


@pipeline(4, 8, 8, schedulers=PLAIN)
def stable_diffusion_controlnet_xs():
    net = unet(layers_per_block=2, use_linear_projection=True)
    adapter = diffusers.ControlNetXSAdapter.from_unet(net, size_ratio=0.5, conditioning_embedding_out_channels=HINTS)
    pipe = latent_diffusion(diffusers.StableDiffusionControlNetXSPipeline, unet=net, controlnet=adapter)
    return pipe, prompt() | size() | {"image": picture()}


@pipeline(4, 8, 8, schedulers=PLAIN)
def stable_diffusion_adapter():
    adapter = diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    pipe = latent_diffusion(diffusers.StableDiffusionAdapterPipeline, adapter=adapter)
    return pipe, prompt() | size() | {"image": picture()}


XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
    "use_linear_projection": True,
}


def xl(cls, **parts):
    """Return a pipeline with Stable Diffusion XL's parts."""
    net = unet(**XL)
    scheduler = diffusers.EulerDiscreteScheduler(**zoo.BETAS, steps_offset=1, timestep_spacing="leading")
    encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return cls(vae=kl(), unet=net, scheduler=scheduler, **encoders, **parts)


@pipeline(4, 8, 8, schedulers=("Euler", "DDIM"))
def stable_diffusion_xl_controlnet():
    pipe = xl(diffusers.StableDiffusionXLControlNetPipeline, controlnet=control(**XL), add_watermarker=False)
    return pipe, prompt() | pooled() | size() | {"image": picture()}


@pipeline(schedulers=("Euler", "DDIM"))
def stable_diffusion_xl_img2img():
    pipe = xl(diffusers.StableDiffusionXLImg2ImgPipeline, add_watermarker=False)
    return pipe, prompt() | pooled() | {"image": picture(), "strength": 0.95}


@pipeline(4, 8, 8, schedulers=("Euler", "DDIM"))
def stable_diffusion_xl_inpaint():
    pipe = xl(diffusers.StableDiffusionXLInpaintPipeline, add_watermarker=False)
    return pipe, prompt() | pooled() | size() | {"image": picture(), "mask_image": hole(), "strength": 0.95}


@pipeline(4, 8, 8, schedulers=UNSCALED)
def kandinsky_controlnet():
    pipe, call = zoo.PIPELINES["kandinsky"]()
    config = {name: value for name, value in pipe.unet.config.items() if name != "_use_default_values"}
    config |= {"in_channels": 8, "addition_embed_type": "image_hint"}
    net = diffusers.UNet2DConditionModel.from_config(config)
    call = {name: call[name] for name in ("image_embeds", "negative_image_embeds", "height", "width")}
    return diffusers.KandinskyV22ControlnetPipeline(net, pipe.scheduler, pipe.movq), call | {
        "hint": normal(1, 3, 64, 64, seed=5),
        "output_type": "np",
    }


@pipeline(schedulers=UNSCALED)
def kandinsky_img2img():
    pipe, call = zoo.PIPELINES["kandinsky"]()
    call = {name: call[name] for name in ("image_embeds", "negative_image_embeds", "height", "width")}
    pipe = diffusers.KandinskyV22Img2ImgPipeline(pipe.unet, pipe.scheduler, pipe.movq)
    return pipe, call | {"image": picture(), "strength": 0.95}


SD3 = ATTENTION | {
    "sample_size": 8,
    "in_channels": 4,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "out_channels": 4,
    "pos_embed_max_size": 8,
}


@pipeline(4, 8, 8, schedulers=FLOW)
def stable_diffusion_3_controlnet():
    net, guide = diffusers.SD3Transformer2DModel(**SD3), diffusers.SD3ControlNetModel(**SD3)
    pipe = diffusers.StableDiffusion3ControlNetPipeline(net, flow(), kl(shift_factor=0.1), *[None] * 6, guide)
    return pipe, prompt() | pooled() | size() | {"control_image": picture()}


@pipeline(schedulers=("flow Euler", "flow Heun"))
def stable_diffusion_3_img2img():
    net = diffusers.SD3Transformer2DModel(**SD3)
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(net, flow(), kl(shift_factor=0.1), *[None] * 6)
    return pipe, prompt() | pooled() | size() | {"image": picture(), "strength": 0.95}


HUNYUAN = {
    "sample_size": 8,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "in_channels": 4,
    "cross_attention_dim": 16,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 8,
    "hidden_size": 16,
    "text_len": 5,
    "text_len_t5": 5,
}


def hunyuan_dit_like(cls, **parts):
    """Return a pipeline with HunyuanDiT's parts."""
    net = diffusers.HunyuanDiT2DModel(**HUNYUAN, num_layers=4)
    encoders = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "feature_extractor"))
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    pipe = cls(
        vae=kl(),
        transformer=net,
        scheduler=scheduler,
        safety_checker=None,
        requires_safety_checker=False,
        **encoders,
        **parts,
    )
    call = prompt() | zoo.masks() | {f"{name}_2": value for name, value in (prompt() | zoo.masks()).items()}
    return pipe, call | size() | {"use_resolution_binning": False}


@pipeline(4, 8, 8, schedulers=PLAIN)
def hunyuan_dit():
    return hunyuan_dit_like(diffusers.HunyuanDiTPipeline)


@pipeline(4, 8, 8, schedulers=PLAIN)
def hunyuan_dit_controlnet():
    guide = HunyuanDiT2DControlNetModel(**HUNYUAN, transformer_num_layers=4)
    pipe, call = hunyuan_dit_like(diffusers.HunyuanDiTControlNetPipeline, controlnet=guide)
    return pipe, call | {"control_image": picture()}


@pipeline(4, 8, 8, schedulers=("flow Euler", "flow DPM++ 2M"))
def sana_controlnet():
    pipe, call = zoo.PIPELINES["sana"]()
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")} | {"num_layers": 1}
    guide = diffusers.SanaControlNetModel.from_config(config)
    pipe = diffusers.SanaControlNetPipeline(None, None, pipe.vae, pipe.transformer, guide, pipe.scheduler)
    names = ("num_inference_steps", "generator", "output_type")
    call = {name: value for name, value in call.items() if name not in names}
    return pipe, call | {"control_image": normal(1, 3, 32, 32, seed=5).sigmoid()}


@pipeline(16, 16, schedulers=SIGMAS)
def flux_controlnet():
    pipe, call = zoo.flux_like(diffusers.FluxPipeline)
    guide = diffusers.FluxControlNetModel(
        in_channels=16, pooled_projection_dim=8, guidance_embeds=True, **zoo.FLUX | {"axes_dims_rope": [2, 2, 4]}
    )
    pipe = diffusers.FluxControlNetPipeline(pipe.scheduler, pipe.vae, None, None, None, None, pipe.transformer, guide)
    return pipe, call | {"control_image": picture()}


@pipeline(schedulers=("flow Euler", "flow Euler Karras"))
def flux_img2img():
    pipe, call = zoo.flux_like(diffusers.FluxImg2ImgPipeline)
    return pipe, call | {"image": picture(), "strength": 0.95}


@pipeline(16, 16, schedulers=("flow Euler",))
def flux_inpaint():
    pipe, call = zoo.flux_like(diffusers.FluxInpaintPipeline)
    return pipe, call | {"image": picture(), "mask_image": hole(), "strength": 0.95}


@pipeline(16, 16, schedulers=("flow Euler",))
def qwen_image_controlnet():
    config = ATTENTION | {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)}
    net, guide = diffusers.QwenImageTransformer2DModel(**config), diffusers.QwenImageControlNetModel(**config)
    vae = diffusers.AutoencoderKLQwenImage(**zoo.VIDEO)
    pipe = diffusers.QwenImageControlNetPipeline(flow(use_dynamic_shifting=True), vae, None, None, net, guide)
    call = {"control_image": normal(1, 3, 64, 64, seed=5).sigmoid()}
    return pipe, prompt() | zoo.masks("prompt_embeds_mask") | size(64) | call


@pipeline(16, 16, schedulers=("flow Euler",))
def chroma():
    net = diffusers.ChromaTransformer2DModel(
        **zoo.FLUX,
        in_channels=16,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = diffusers.ChromaPipeline(flow(), kl(shift_factor=0.1), None, None, net)
    masks = {name: mask.bool() for name, mask in zoo.masks().items()}
    return pipe, prompt() | masks | size() | {"guidance_scale": 3.0}


@pipeline(4, 8, 8, schedulers=("flow Euler",))
def cogview4():
    net = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    call = prompt() | size() | {"guidance_scale": 3.0}
    return diffusers.CogView4Pipeline(None, None, kl(), net, flow(use_dynamic_shifting=True)), call


@pipeline(4, 8, 8, schedulers=PLAIN)
def pixart_alpha():
    net = diffusers.PixArtTransformer2DModel(
        **ATTENTION,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(**zoo.BETAS, prediction_type="v_prediction")
    pipe = diffusers.PixArtAlphaPipeline(None, None, kl(), net, scheduler)
    return pipe, prompt() | zoo.masks() | size() | {"use_resolution_binning": False, "negative_prompt": None}
