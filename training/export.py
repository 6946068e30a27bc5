"""The finished student on disk: a diffusers pipeline folder, and one single-file checkpoint without any gamma key."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from splam_core.checkpoint import diffusers_to_ldm, load_file, save_file

from .config import Config
from .pipeline import Pipeline


def save_diffusers(pipeline: Pipeline, unet: UNet2DConditionModel, folder: Path, dtype: torch.dtype) -> None:
    """`unet` and the other parts of `pipeline` as a pipeline folder, which appears when it is whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    StableDiffusionPipeline(
        vae=copy.deepcopy(pipeline.vae),
        text_encoder=copy.deepcopy(pipeline.text_encoder),
        tokenizer=pipeline.tokenizer,
        unet=copy.deepcopy(unet),
        # The schedule is the teacher's; `StableDiffusionPipeline` then samples the student as it should.
        scheduler=LCMScheduler.from_config(pipeline.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=dtype).save_pretrained(partial)
    drop_paths(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def drop_paths(folder: Path) -> None:
    """Take out of the configurations where on this machine their models were loaded from."""
    for file in folder.rglob("config.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_single_file(folder: Path, file: Path, config: Config) -> None:
    """A pipeline folder as one LDM-style .safetensors file with ModelSpec metadata.

    The configurations of the parts ride along as JSON, since shapes do not tell the number of attention heads.
    """
    state_dict = diffusers_to_ldm(
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"),
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"),
        load_file(folder / "text_encoder" / "model.safetensors"),
    )
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "sgm",
        "modelspec.title": config.name,
        "modelspec.prediction_type": {"v_prediction": "v"}.get(scheduler["prediction_type"], "epsilon"),
        "splam.method": config.method,
        "splam.skip": str(config.skip),
        "splam.solver_skip": str(config.solver_skip),
        "splam.guidance_scale": str(config.guidance_scale),
        "splam.teacher": config.teacher,
    }
    for part, name in (
        ("unet", "config"),
        ("vae", "config"),
        ("text_encoder", "config"),
        ("scheduler", "scheduler_config"),
    ):
        settings = json.loads((folder / part / f"{name}.json").read_text(encoding="utf-8"))
        metadata[f"splam.{part}"] = json.dumps(settings)
    save_file(state_dict, file, metadata)
