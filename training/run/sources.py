"""What a run begins with: its teacher, its data, and the student that --student names."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from splam_core import read_json

from ..data import TrainingData
from ..data.base import Share
from ..data.paths import PathData
from ..data.phase import make_data
from ..models.files import read_model
from ..models.load import load_pipeline
from ..models.lora import file_and_weight, is_lora, lora_file, merged, read_lora
from ..models.pipeline import DTYPES, Pipeline
from ..models.teachers import resolve
from .checkpoints import checkpoints, file_digest
from .config import Config
from .networks import base_dtype


def load_teacher(config: Config, device: torch.device | str) -> Pipeline:
    """With its LoRAs. The frozen UNet of --lora comes in its final type: a small device never holds it in fp32."""
    dtype = base_dtype(config) if config.lora and str(device) != "cpu" else None
    return load_pipeline(
        config.teacher,
        device,
        revision=config.revision,
        download=config.download_teacher,
        unet_dtype=dtype,
        loras=config.teacher_lora,
        clip_skip=config.clip_skip,
    )


def run_data(config: Config, pipeline: Pipeline, accelerator: Accelerator) -> TrainingData:
    """What --data or --paths names, encoded where it is to be; the pipeline's encoders leave the device.

    Raises ValueError where that is not to be had.
    """
    whole = config.train_batch_size * accelerator.num_processes
    if config.paths is not None:
        data = PathData(config.paths, pipeline, config.data_options, whole, config.seed + 1)
        pipeline.encoders_to("cpu")
        return data
    return make_data(
        config.data,
        pipeline,
        config.data_options,
        whole,
        config.seed + 1,
        _samples(config, whole),
        config.validation_samples,
        Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone),
        DTYPES[config.teacher_dtype],
    )


def next_batch(samples: int, whole: int) -> int:
    """The first sample, from this one on, with which a batch of all processes begins: such a batch is of one size."""
    return -(-samples // whole) * whole


def _samples(config: Config, whole: int) -> int:
    """How many samples the run will have seen at its end. A resumed one may have begun with other batches.

    A checkpoint that is damaged says nothing here, and is dealt with where it is taken up.
    """
    each, wanted = whole * config.gradient_accumulation_steps, config.resume_from_checkpoint
    ends = [each * config.total_steps]
    for folder in checkpoints(config.output_dir) if wanted == "latest" else [Path(wanted)] if wanted else []:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            facts = read_json(folder / "state.json")
            ends.append(next_batch(facts["samples"], whole) + each * (config.total_steps - facts["step"]))
    return max(ends)


def teacher_loras_digest(config: Config) -> str | None:
    """SHA-256 (16 digits of it) over the files and weights of --teacher-lora, wherever they lie; None without."""
    found = [file_and_weight(text) for text in config.teacher_lora]
    parts = sorted(f"{file_digest(lora_file(place) or place)} {weight!r}" for place, weight in found)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if parts else None


def load_student(config: Config, pipeline: Pipeline) -> dict[str, Tensor] | None:
    """What --student names, as the networks take it: a plain UNet's weights or, for a LoRA run, a LoRA's.

    Before there are networks. Raises what `resolve` raises, and ValueError for a student of another kind or model.
    """
    if config.student is None:
        return None
    place = resolve(config.student, download=False)
    if is_lora(place):
        lora = read_lora(place)
        return lora if config.lora else merged(pipeline.unet.float().state_dict(), lora, name=str(place))
    if config.lora:
        raise ValueError(
            f"--student {config.student} is a whole model, and a --lora goes on from a LoRA: leave --lora away, or "
            f"make one of it with training/export.py --to lora --base {config.teacher}."
        )
    found = read_model(place)
    model = found.folded("splam", str(place))
    if len(model.unet) < len(found.unet):
        warnings.warn(
            f"--student {config.student}: its cond_proj is read as SPLAM's, at gamma = 1. If it is an LCM's, which "
            f"embeds its guidance there, fold that first: training/export.py --embedded-guidance 8.5",
            stacklevel=2,
        )
    own = pipeline.unet.state_dict()
    different = [key for key in own.keys() | model.unet.keys() if _shape(own, key) != _shape(model.unet, key)]
    if different:
        raise ValueError(
            f"--student {config.student} is another architecture than --teacher {config.teacher}: {len(different)} "
            f"weights differ, the first {min(different)}. Give the student's own teacher."
        )
    if model.vae and model.prediction_type != pipeline.prediction_type:
        raise ValueError(
            f"--student {config.student} predicts {model.prediction_type}, --teacher {config.teacher} "
            f"{pipeline.prediction_type}: give the student's own teacher."
        )
    return model.unet


def _shape(weights: dict[str, Tensor], key: str) -> torch.Size | None:
    return weights[key].shape if key in weights else None
