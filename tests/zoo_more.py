"""More of the zoo: the other tasks of Stable Diffusion and XL, unions of ControlNets, several stages."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.controlnets import controlnet_cosmos
from torch import nn

import zoo
from zoo import FLOW, ddim, flow, hole, kl, latent_diffusion, normal, picture, pipeline, pooled, prompt, size
from zoo_controlled import HINTS, PLAIN, SD3, XL, control, xl
from zoo_staged import CASCADE, Unchecked, cascade, cosmos_net, frame, motion_net, projected_text

XL_PLAIN = ("Euler", "DDIM")
STRENGTH = {"strength": 0.95}


def painted():
    """Return what is painted into, and where."""
    return {"image": picture(), "mask_image": hole()}


# Stable Diffusion XL under a ControlNet of several kinds of pictures.


def union():
    """Return a ControlNet for several kinds of pictures at a time."""
    kinds = {"num_control_type": 2, "num_trans_channel": 16, "num_trans_head": 2, "num_trans_layer": 1}
    return control(diffusers.ControlNetUnionModel, **XL | kinds | {"num_proj_channel": 16})


def xl_union(cls, **parts):
    """Return a pipeline of XL under such a ControlNet."""
    return xl(cls, controlnet=union(), add_watermarker=False, **parts)


@pipeline(4, 8, 8, schedulers=XL_PLAIN)
def stable_diffusion_xl_controlnet_union():
    call = {"control_image": [picture(), 1 - picture()], "control_mode": [0, 1]}
    return xl_union(diffusers.StableDiffusionXLControlNetUnionPipeline), prompt() | pooled() | size() | call


@pipeline(schedulers=XL_PLAIN)
def stable_diffusion_xl_controlnet_union_img2img():
    call = {"image": picture(), "control_image": [1 - picture()], "control_mode": [1]}
    return xl_union(diffusers.StableDiffusionXLControlNetUnionImg2ImgPipeline), prompt() | pooled() | call | STRENGTH


@pipeline(4, 8, 8, schedulers=XL_PLAIN)
def stable_diffusion_xl_controlnet_union_inpaint():
    call = {"control_image": [1 - picture()], "control_mode": [1]}
    pipe = xl_union(diffusers.StableDiffusionXLControlNetUnionInpaintPipeline)
    return pipe, prompt() | pooled() | size() | painted() | call | STRENGTH


# The other tasks of XL.


@pipeline(schedulers=("Euler",))
def stable_diffusion_xl_controlnet_img2img():
    guide = control(**XL)
    pipe = xl(diffusers.StableDiffusionXLControlNetImg2ImgPipeline, controlnet=guide, add_watermarker=False)
    return pipe, prompt() | pooled() | {"image": picture(), "control_image": 1 - picture()} | STRENGTH


@pipeline(4, 8, 8, schedulers=("Euler",))
def stable_diffusion_xl_controlnet_inpaint():
    guide = control(**XL)
    pipe = xl(diffusers.StableDiffusionXLControlNetInpaintPipeline, controlnet=guide, add_watermarker=False)
    return pipe, prompt() | pooled() | size() | painted() | {"control_image": 1 - picture()} | STRENGTH


@pipeline(4, 8, 8, schedulers=("Euler",))
def stable_diffusion_xl_controlnet_xs():
    net = zoo.unet(**XL, layers_per_block=2)
    adapter = diffusers.ControlNetXSAdapter.from_unet(net, size_ratio=0.5, conditioning_embedding_out_channels=HINTS)
    scheduler = diffusers.EulerDiscreteScheduler(**zoo.BETAS, steps_offset=1, timestep_spacing="leading")
    parts = (kl(), None, None, None, None, net, adapter, scheduler)
    pipe = diffusers.StableDiffusionXLControlNetXSPipeline(*parts, add_watermarker=False)
    return pipe, prompt() | pooled() | size() | {"image": picture()}


@pipeline(4, 8, 8, schedulers=("Euler",))
def stable_diffusion_xl_adapter():
    adapter = diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    return xl(diffusers.StableDiffusionXLAdapterPipeline, adapter=adapter), prompt() | pooled() | size() | {
        "image": picture()
    }


@pipeline(4, 8, 8, schedulers=XL_PLAIN)
def stable_diffusion_xl_pag():
    pipe = xl(diffusers.StableDiffusionXLPAGPipeline, add_watermarker=False)
    return pipe, prompt() | pooled() | size()


@pipeline(4, 8, 8, schedulers=("Euler",))
def stable_diffusion_xl_instruct_pix2pix():
    pipe = xl(diffusers.StableDiffusionXLInstructPix2PixPipeline, add_watermarker=False)
    pipe.register_modules(unet=zoo.unet(**XL, in_channels=8))
    return pipe, prompt() | pooled() | size() | {"image": picture()}


# The other tasks of Stable Diffusion.


@pipeline(schedulers=PLAIN)
def stable_diffusion_pag_img2img():
    return latent_diffusion(diffusers.StableDiffusionPAGImg2ImgPipeline), prompt() | {"image": picture()} | STRENGTH


@pipeline(4, 8, 8, schedulers=PLAIN)
def stable_diffusion_controlnet_pag():
    pipe = latent_diffusion(diffusers.StableDiffusionControlNetPAGPipeline, controlnet=control())
    return pipe, prompt() | size() | {"image": picture()}


@pipeline(4, 8, 8, schedulers=("DDIM",))
def stable_diffusion_upscale():
    words = zoo.words()
    net = zoo.unet(in_channels=7, num_class_embeds=1000)
    parts = (
        kl(scaling_factor=0.08333),
        words["text_encoder"],
        words["tokenizer"],
        net,
        diffusers.DDPMScheduler(),
        ddim(),
    )
    return diffusers.StableDiffusionUpscalePipeline(*parts), prompt() | {"image": picture()[..., :8, :8]}


@pipeline(4, 8, 8, schedulers=PLAIN)
def stable_diffusion_self_attention_guidance():
    return latent_diffusion(diffusers.StableDiffusionSAGPipeline, image_encoder=None), prompt() | size()


@pipeline(4, 8, 8, schedulers=PLAIN)
def stable_diffusion_panorama():
    return latent_diffusion(diffusers.StableDiffusionPanoramaPipeline), prompt() | {"height": 64, "width": 128}


@pipeline(4, 8, 8, schedulers=PLAIN)
def stable_diffusion_ldm3d():
    pipe = latent_diffusion(diffusers.StableDiffusionLDM3DPipeline, image_encoder=None)
    return pipe, prompt() | size() | {"output_type": "np"}


@pipeline(schedulers=("LCM",))
def latent_consistency_img2img():
    scheduler = diffusers.LCMScheduler(**zoo.BETAS, prediction_type="v_prediction")
    net = zoo.unet(time_cond_proj_dim=8)
    pipe = latent_diffusion(diffusers.LatentConsistencyModelImg2ImgPipeline, unet=net, scheduler=scheduler)
    return pipe, {"prompt_embeds": prompt()["prompt_embeds"], "image": picture()} | STRENGTH


# Transformers.


def sd3(cls, **config):
    """Return a pipeline with Stable Diffusion 3's parts."""
    codec = kl(shift_factor=0.1, latent_channels=config.get("in_channels", 4))
    return cls(diffusers.SD3Transformer2DModel(**SD3 | config), flow(), codec, *[None] * 6)


@pipeline(16, 8, 8, schedulers=("flow Euler",))
def stable_diffusion_3_inpaint():
    pipe = sd3(diffusers.StableDiffusion3InpaintPipeline, in_channels=16, out_channels=16)
    return pipe, prompt() | pooled() | size() | painted() | STRENGTH


@pipeline(4, 8, 8, schedulers=FLOW[:2])
def stable_diffusion_3_pag():
    return sd3(diffusers.StableDiffusion3PAGPipeline), prompt() | pooled() | size()


@pipeline(schedulers=("flow Euler",))
def flux_controlnet_img2img():
    pipe, call = flux_guided(diffusers.FluxControlNetImg2ImgPipeline)
    return pipe, call | {"image": picture(), "control_image": 1 - picture()} | STRENGTH


@pipeline(16, 16, schedulers=("flow Euler",))
def flux_controlnet_inpaint():
    pipe, call = flux_guided(diffusers.FluxControlNetInpaintPipeline)
    return pipe, call | painted() | {"control_image": 1 - picture()} | STRENGTH


def flux_guided(cls):
    """Return a pipeline of Flux with its ControlNet."""
    pipe, call = zoo.PIPELINES["flux_controlnet"]()
    names = ("num_inference_steps", "generator", "output_type", "control_image")
    call = {name: value for name, value in call.items() if name not in names}
    parts = (pipe.scheduler, pipe.vae, None, None, None, None, pipe.transformer, pipe.controlnet)
    return cls(*parts), call


@pipeline(schedulers=("flow Euler",))
def chroma_img2img():
    pipe, call = zoo.PIPELINES["chroma"]()
    names = ("num_inference_steps", "generator", "output_type")
    call = {name: value for name, value in call.items() if name not in names}
    pipe = diffusers.ChromaImg2ImgPipeline(pipe.scheduler, pipe.vae, None, None, pipe.transformer)
    return pipe, call | {"image": picture()} | STRENGTH


# Several stages, videos, and no text at all.


def decoder():
    """Return the decoder of Stable Cascade, a denoiser of its own, and what draws the picture from it."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    return cascade(prior=False), PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=4, latent_channels=4)


@pipeline(schedulers=())
def stable_cascade_decoder():
    (net, vqgan), (tokenizer, text) = decoder(), projected_text()
    pipe = diffusers.StableCascadeDecoderPipeline(
        net, tokenizer, text, diffusers.DDPMWuerstchenScheduler(), vqgan, latent_dim_scale=4.0
    )
    call = CASCADE | {"image_embeddings": normal(1, 4, 4, 4, seed=7), "guidance_scale": 2.0}
    return pipe, call


@pipeline(4, 2, 8, 8, schedulers=("DDIM",))
def animatediff_video_to_video():
    pipe = diffusers.AnimateDiffVideoToVideoPipeline(kl(), None, None, motion_net(), None, ddim(beta_schedule="linear"))
    return pipe, prompt() | {"video": [frame(5), frame(6)], "guidance_scale": 3.0, "strength": 0.95} | size()


def pixels(**config):
    """Return a U-Net of pixels without text."""
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    defaults = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 4}
    return diffusers.UNet2DModel(**defaults | blocks | {"attention_head_dim": 8} | config)


@pipeline(schedulers=())
def ddim_of_pixels():
    return diffusers.DDIMPipeline(pixels(), diffusers.DDIMScheduler()), {"batch_size": 2, "output_type": "np"}


@pipeline(schedulers=())
def score_sde_ve():
    pipe = diffusers.ScoreSdeVePipeline(pixels(), diffusers.ScoreSdeVeScheduler(sigma_max=1.0))
    return pipe, {"batch_size": 2, "output_type": "np"}


@pipeline(schedulers=())
def latent_diffusion_without_text():
    net = pixels(in_channels=4, out_channels=4)
    return diffusers.LDMPipeline(kl(), net, diffusers.DDIMScheduler(clip_sample=False)), {"output_type": "np"}


@pipeline(schedulers=())
def consistency_model():
    net = pixels(sample_size=8)
    pipe = diffusers.ConsistencyModelPipeline(net, diffusers.CMStochasticIterativeScheduler())
    return pipe, {"batch_size": 2, "output_type": "pt"}


@pipeline(schedulers=())
def stable_cascade_combined():
    (net, vqgan), (tokenizer, text), (_, prior_text) = decoder(), projected_text(), projected_text()
    steps = diffusers.DDPMWuerstchenScheduler
    parts = (tokenizer, text, net, steps(), vqgan, cascade(prior=True), prior_text, tokenizer, steps())
    guidance = {"prior_guidance_scale": 4.0, "decoder_guidance_scale": 2.0}
    call = CASCADE | guidance | size(170) | {"prior_num_inference_steps": 9}
    return diffusers.StableCascadeCombinedPipeline(*parts), call


def with_picture(name, cls, *names):
    """Return a pipeline of the zoo as one of another class that begins with a picture; its parts by their names."""
    pipe, call = zoo.PIPELINES[name]()
    call = {key: value for key, value in call.items() if key not in ("num_inference_steps", "generator", "output_type")}
    return cls(**{part: getattr(pipe, part, None) for part in names}), call


@pipeline(schedulers=("flow Euler",))
def z_image_img2img():
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    pipe, call = with_picture("z_image", diffusers.ZImageImg2ImgPipeline, *parts)
    return pipe, call | {"image": picture()} | STRENGTH


def large():
    """Return a picture for codecs that divide each side by eight."""
    return normal(1, 3, 64, 64, seed=5).sigmoid()


@pipeline(schedulers=("flow Euler",))
def qwen_image_img2img():
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    pipe, call = with_picture("qwen_image", diffusers.QwenImageImg2ImgPipeline, *parts)
    return pipe, call | {"image": large()} | STRENGTH


@pipeline(16, 16, schedulers=("flow Euler",))
def qwen_image_inpaint():
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    pipe, call = with_picture("qwen_image", diffusers.QwenImageInpaintPipeline, *parts)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 24:] = 1
    return pipe, call | {"image": large(), "mask_image": mask} | STRENGTH


@pipeline(4, 8, 8, schedulers=PLAIN)
def kandinsky_inpaint():
    config = dict(zoo.PIPELINES["kandinsky"]()[0].unet.config) | {"in_channels": 9}
    pipe, call = with_picture("kandinsky", diffusers.KandinskyV22InpaintPipeline, "scheduler", "unet", "movq")
    names = {name: value for name, value in config.items() if name != "_use_default_values"}
    pipe.register_modules(unet=diffusers.UNet2DConditionModel.from_config(names))
    return pipe, call | painted()


@pipeline(4, 8, 8, schedulers=())
def sana_sprint():
    pipe, call = zoo.PIPELINES["sana"]()
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")} | {"guidance_embeds": True}
    net = diffusers.SanaTransformer2DModel.from_config(config)
    pipe = diffusers.SanaSprintPipeline(None, None, pipe.vae, net, diffusers.SCMScheduler())
    kept = ("prompt_embeds", "prompt_attention_mask", "height", "width", "use_resolution_binning")
    return pipe, {name: call[name] for name in kept} | {"intermediate_timesteps": None}


@pipeline(4, 2, 8, 8, schedulers=("DDIM",))
def text_to_video_from_video():
    parts = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    pipe, call = with_picture("text_to_video", diffusers.VideoToVideoSDPipeline, *parts)
    call = {name: value for name, value in call.items() if name not in ("num_frames", "height", "width")}
    return pipe, call | {"video": [frame(5), frame(6)]} | STRENGTH


class Transforms:
    """In the place of torchvision's, of which Cosmos takes one function: the nearest neighbours of a mask."""

    class InterpolationMode:
        NEAREST = "nearest"

    class functional:  # torchvision's name
        @staticmethod
        def resize(values, size, interpolation):
            return nn.functional.interpolate(values, size, mode=interpolation)


@pipeline(4, 2, 8, 8, schedulers=("flow UniPC",))
def cosmos_transfer():
    controlnet_cosmos.transforms = getattr(controlnet_cosmos, "transforms", Transforms)
    net = cosmos_net(in_channels=5, controlnet_block_every_n=1)
    guide = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2,
        in_channels=6,
        latent_channels=6,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        img_context_dim_out=32,
        crossattn_proj_in_channels=16,
        encoder_hidden_states_channels=16,
    )
    steps = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    codec = diffusers.AutoencoderKLWan(**zoo.VIDEO)
    pipe = diffusers.Cosmos2_5_TransferPipeline(None, None, net, codec, steps, guide, Unchecked())
    controls = [frame(seed).resize((64, 64)) for seed in range(5)]
    call = {"controls": controls, "num_frames": 5, "num_frames_per_chunk": 5, "guidance_scale": 3.0}
    return pipe, prompt() | size(64) | call
