"""More of the zoo: pipelines of several stages, pixels of learned variance, videos."""

from __future__ import annotations

import diffusers
import torch
from torch import nn

import zoo
from zoo import BETAS, VIDEO, ddim, flow, kl, masks, normal, picture, pipeline, pooled, prompt, size
from zoo_controlled import PLAIN, control


class Unchecked(nn.Module):
    """In the place of a check of what is asked for and drawn."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, text):
        return True

    def check_video_safety(self, video):
        return video


# DeepFloyd IF: the network also gives the variance of every pixel.


def deep_floyd(cls, **config):
    """Return a pipeline of IF, whose outputs have a learned variance behind them."""
    net = zoo.unet(
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=16,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    changed = {
        "beta_schedule": "squaredcos_cap_v2",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "variance_type": "learned_range",
    }
    scheduler = diffusers.DDPMScheduler(**changed | config)
    return cls(None, None, net, scheduler, None, None, None, requires_safety_checker=False)


@pipeline(schedulers=("DPM++ 2M",))
def deep_floyd_if():
    return deep_floyd(diffusers.IFPipeline), prompt() | size(8) | {"output_type": "np"}


@pipeline(schedulers=("DPM++ 2M",))
def deep_floyd_if_img2img():
    call = {"image": picture()[..., :8, :8], "strength": 0.95, "output_type": "np"}
    return deep_floyd(diffusers.IFImg2ImgPipeline), prompt() | call


@pipeline(schedulers=("DPM++ 2M",))
def deep_floyd_if_inpaint():
    call = {"image": picture()[..., :8, :8], "mask_image": zoo.hole()[..., :8, :8], "strength": 0.95}
    return deep_floyd(diffusers.IFInpaintingPipeline), prompt() | call | {"output_type": "np"}


# Kandinsky and Stable Cascade: what one network draws conditions another.


def movq():
    """Return Kandinsky's decoder."""
    return zoo.PIPELINES["kandinsky"]()[0].movq


def kandinsky_3_net():
    """Return the network of Kandinsky 3."""
    return diffusers.Kandinsky3UNet(
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(16, 32),
        cross_attention_dim=4,
        encoder_hid_dim=16,
    )


@pipeline(4, 8, 8, schedulers=PLAIN)
def kandinsky_3():
    scheduler = ddim(beta_schedule="squaredcos_cap_v2")
    pipe = diffusers.Kandinsky3Pipeline(None, None, kandinsky_3_net(), scheduler, movq())
    masked = {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]]), "negative_attention_mask": torch.ones(1, 5).long()}
    return pipe, prompt() | masked | size(16)


@pipeline(schedulers=PLAIN)
def kandinsky_3_img2img():
    scheduler = ddim(beta_schedule="squaredcos_cap_v2")
    pipe = diffusers.Kandinsky3Img2ImgPipeline(None, None, kandinsky_3_net(), scheduler, movq())
    masked = {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]]), "negative_attention_mask": torch.ones(1, 5).long()}
    return pipe, prompt() | masked | {"image": picture(), "strength": 0.95}


def projected_text():
    """Return a tokenizer and CLIP's text encoder with its projection."""
    import transformers

    words = zoo.words()
    config = transformers.CLIPTextConfig(**words["text_encoder"].config.to_dict() | {"projection_dim": 16})
    return words["tokenizer"], transformers.CLIPTextModelWithProjection(config)


def sees():
    """Return CLIP's picture encoder and what prepares pictures for it."""
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    return transformers.CLIPVisionModelWithProjection(config), transformers.CLIPImageProcessorPil(
        crop_size=16, size={"shortest_edge": 16}
    )


@pipeline(schedulers=("DDPM",))
def kandinsky_combined():
    tokenizer, text = projected_text()
    vision, processor = sees()
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16, num_embeddings=8
    )
    steps = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=10.0
    )
    decoder = zoo.PIPELINES["kandinsky"]()[0]
    pipe = diffusers.KandinskyV22CombinedPipeline(
        decoder.unet, decoder.scheduler, decoder.movq, prior, vision, text, tokenizer, steps, processor
    )
    return pipe, size() | {"prompt": "a cab", "prior_num_inference_steps": 9}


def cascade(prior):
    """Return the network of a stage of Stable Cascade."""
    condition = {"clip_text_in_channels": 16, "clip_image_in_channels": 16} if prior else {"effnet_in_channels": 4}
    return diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_pooled_in_channels=16,
        clip_seq=4,
        switch_level=(False,),
        patch_size=1,
        **condition,
    )


CASCADE = {
    "prompt_embeds": normal(1, 5, 16, seed=1),
    "prompt_embeds_pooled": normal(1, 1, 16, seed=2),
    "negative_prompt_embeds": normal(1, 5, 16, seed=3),
    "negative_prompt_embeds_pooled": normal(1, 1, 16, seed=4),
}


@pipeline(schedulers=())
def stable_cascade_prior():
    steps = diffusers.DDPMWuerstchenScheduler()
    tokenizer, text = projected_text()
    pipe = diffusers.StableCascadePriorPipeline(tokenizer, text, cascade(prior=True), steps)
    return pipe, CASCADE | size(340) | {"guidance_scale": 4.0, "output_type": "pt"}


# Videos.


def motion_net():
    """Return the network of AnimateDiff."""
    return zoo.PIPELINES["animatediff"]()[0].unet


@pipeline(4, 2, 8, 8, schedulers=("DDIM", "DDPM"))
def animatediff_controlnet():
    pipe = diffusers.AnimateDiffControlNetPipeline(
        kl(), None, None, motion_net(), None, control(), ddim(beta_schedule="linear")
    )
    call = {"num_frames": 2, "guidance_scale": 3.0, "conditioning_frames": [frame(5), frame(6)]}
    return pipe, prompt() | size() | call


def frame(seed):
    """Return a picture of Pillow."""
    from PIL import Image

    values = (255 * normal(16, 16, 3, seed=seed).sigmoid()).byte().numpy()
    return Image.fromarray(values)


@pipeline(4, 2, 8, 8, schedulers=("DDIM", "DDPM"))
def animatediff_sparse_controlnet():
    guide = control(
        diffusers.SparseControlNetModel,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        conditioning_channels=3,
        motion_num_attention_heads=2,
        motion_max_seq_length=4,
        use_simplified_condition_embedding=False,
    )
    pipe = diffusers.AnimateDiffSparseControlNetPipeline(
        kl(), None, None, motion_net(), None, guide, ddim(beta_schedule="linear")
    )
    call = {"num_frames": 2, "guidance_scale": 3.0, "conditioning_frames": [frame(5)], "controlnet_frame_indices": [0]}
    return pipe, prompt() | size() | call


@pipeline(2, 4, 8, 8, schedulers=("DDIM", "CogVideoX DDIM"))
def cogvideox_image_to_video():
    net = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )
    vae = zoo.PIPELINES["cogvideox"]()[0].vae
    scheduler = diffusers.CogVideoXDDIMScheduler(
        **BETAS,
        snr_shift_scale=1.0,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    call = prompt() | size(64) | {"num_frames": 5, "image": normal(1, 3, 64, 64, seed=5).sigmoid()}
    return diffusers.CogVideoXImageToVideoPipeline(None, None, vae, net, scheduler), call


@pipeline(4, 2, 8, 8, schedulers=("flow Euler", "flow UniPC"))
def skyreels():
    return skyreels_like(diffusers.SkyReelsV2Pipeline)


def skyreels_like(cls):
    """Return a pipeline with the parts of SkyReels V2."""
    net = diffusers.SkyReelsV2Transformer3DModel(**zoo.WAN)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = cls(None, None, net, diffusers.AutoencoderKLWan(**VIDEO), scheduler)
    return pipe, {"prompt": None} | prompt() | size(64) | {"num_frames": 5}


@pipeline(4, 2, 8, 8, schedulers=("flow UniPC",))
def skyreels_diffusion_forcing():
    return skyreels_like(diffusers.SkyReelsV2DiffusionForcingPipeline)


@pipeline(schedulers=("flow UniPC",))
def skyreels_diffusion_forcing_video_to_video():
    pipe, call = skyreels_like(diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline)
    clip = [frame(seed).resize((64, 64)) for seed in range(5)]
    return pipe, call | {"video": clip, "num_frames": 9, "overlap_history": 1, "base_num_frames": 9}


def cosmos_net(**config):
    """Return the network of Cosmos."""
    return diffusers.CosmosTransformer3DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "rope_scale": (2.0, 1.0, 1.0),
            "concat_padding_mask": False,  # which takes torchvision
        }
        | config
    )


def cosmos_codec():
    """Return the autoencoder of the first Cosmos."""
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        latents_mean=None,
        latents_std=None,
    )


def edm():
    """Return the scheduler of the first Cosmos."""
    return diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )


@pipeline(4, 2, 8, 8, schedulers=("EDM Euler",))
def cosmos_text_to_world():
    pipe = diffusers.CosmosTextToWorldPipeline(None, None, cosmos_net(), cosmos_codec(), edm(), Unchecked())
    return pipe, prompt() | size(32) | {"num_frames": 5, "guidance_scale": 3.0}


@pipeline(4, 2, 8, 8, schedulers=("EDM Euler",))
def cosmos_video_to_world():
    pipe = diffusers.CosmosVideoToWorldPipeline(
        None, None, cosmos_net(in_channels=5), cosmos_codec(), edm(), Unchecked()
    )
    call = {"num_frames": 5, "guidance_scale": 3.0, "image": frame(5).resize((32, 32))}
    return pipe, prompt() | size(32) | call


@pipeline(4, 1, 8, 8, schedulers=("flow Euler",))
def cosmos_2_text_to_image():
    pipe = diffusers.Cosmos2TextToImagePipeline(
        None, None, cosmos_net(), diffusers.AutoencoderKLWan(**VIDEO), flow(use_karras_sigmas=True), Unchecked()
    )
    return pipe, prompt() | size(64) | {"guidance_scale": 3.0}


@pipeline(4, 2, 8, 8, schedulers=("flow Euler",))
def cosmos_2_video_to_world():
    codec = diffusers.AutoencoderKLWan(**VIDEO)
    pipe = diffusers.Cosmos2VideoToWorldPipeline(
        None, None, cosmos_net(in_channels=5), codec, flow(use_karras_sigmas=True), Unchecked()
    )
    call = {"num_frames": 5, "guidance_scale": 3.0, "image": frame(5).resize((64, 64))}
    return pipe, prompt() | size(64) | call


@pipeline(4, 2, 8, 8, schedulers=("flow Euler",))
def hunyuan_video():
    net = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    pipe = diffusers.HunyuanVideoPipeline(None, None, net, vae, flow(7.0), None, None)
    embeds = {name: value for name, value in (prompt() | pooled() | masks()).items() if not name.startswith("neg")}
    return pipe, embeds | size(64) | {"num_frames": 5}


@pipeline(schedulers=("flow Euler", "flow UniPC"))
def wan_video_to_video():
    pipe, call = zoo.wan_like(diffusers.WanVideoToVideoPipeline)
    clip = [frame(seed).resize((64, 64)) for seed in range(5)]
    call = {name: value for name, value in call.items() if name != "num_frames"}
    return pipe, call | {"video": clip, "strength": 0.95}


@pipeline(4, 2, 8, 8, schedulers=("DDIM", "DPM++ 2M"))
def text_to_video():
    net = diffusers.UNet3DConditionModel(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=zoo.WIDTHS,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    pipe = diffusers.TextToVideoSDPipeline(kl(), None, None, net, ddim())
    return pipe, prompt() | size() | {"num_frames": 2, "guidance_scale": 3.0}
