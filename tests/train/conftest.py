"""A tiny pipeline of random weights in Stable Diffusion's classes, as a diffusers folder."""

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.embedded.teacher import build_scheduler
from training.pipeline import EMBEDDED


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """The folder. Widths of 32, two levels in the UNet; 128 px pictures, 16x16 latents."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=128,
    )
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=32,
        vocab_size=49408,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        tokenizer=CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer"),
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
