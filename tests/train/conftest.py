"""Tiny pipelines of random weights in Stable Diffusion's classes, as diffusers folders, one for each family."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.embedded.teacher import build_scheduler
from training.models.teachers import EMBEDDED


def text_config(**options):
    return CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        projection_dim=32,
        vocab_size=49408,
        **{"num_hidden_layers": 1, **options},
    )


def write_tiny(folder, xl=False):
    """Widths of 32, two levels in the UNet; 128 px pictures, 16x16 latents."""
    torch.manual_seed(0)
    unet = {
        "sample_size": 16,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        # Not 32: a group norm of one channel a group would take the timestep out again.
        "norm_num_groups": 8,
    }
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=128,
    )
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    if xl:
        # Attention over the 32 + 32 channels of two text encoders; 6 sizes of 8 and a pooled embedding of 32.
        unet |= {
            "cross_attention_dim": 64,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        }
        whole = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text_config(num_hidden_layers=2)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(num_hidden_layers=3, hidden_act="gelu")),
            tokenizer=tokenizer,
            tokenizer_2=CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", pad_token="!"),
            unet=UNet2DConditionModel(**unet),
            scheduler=build_scheduler(),
            add_watermarker=False,
        )
    else:
        unet = UNet2DConditionModel(**unet)
        whole = StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Latents and whatever else is cached stay out of the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """SD1.x: the folder."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory):
    """SDXL: the folder."""
    return write_tiny(tmp_path_factory.mktemp("tiny-xl") / "pipeline", xl=True)


@pytest.fixture(scope="session")
def tiny_v(tmp_path_factory, tiny_pipeline):
    """The same weights as tiny_pipeline, said to predict v."""
    folder = tmp_path_factory.mktemp("tiny-v") / "pipeline"
    shutil.copytree(tiny_pipeline, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    return folder


@pytest.fixture(scope="session")
def small():
    """Distil a teacher for a few steps, in this process: small(teacher, output_dir, steps, *more arguments)."""
    from training.distill import distill
    from training.run.config import parse

    def run(teacher, output_dir, steps, *more):
        distill(parse([str(one) for one in (*small_arguments(teacher, output_dir, steps), *more)]))

    return run


def small_arguments(teacher, output_dir, steps):
    return (
        "--teacher", teacher, "--output-dir", output_dir, "--max-train-steps", steps, "--train-batch-size", 2,
        "--data", "embedded", "--num-scenes", 32, "--num-held-out", 8, "--no-cache-latents", "--sample-every", 0,
        "--validation-samples", 0, "--lr-warmup-steps", 1, "--report-to", "none",
    )  # fmt: skip


@pytest.fixture
def own_precision():
    """A test that may choose its mixed precision: accelerate keeps the first one of a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def command_line():
    """The arguments of such a run, for a process of its own."""
    return lambda *of, more=(): [str(one) for one in (*small_arguments(*of), *more)]
