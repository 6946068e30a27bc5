"""The phase in which data are made: the teacher at hand as it was loaded, and none of the networks of training yet.

A LoRA's student is the teacher's own UNet with an adapter: once there is one, the teacher no longer draws by itself.
"""

from __future__ import annotations

import torch

from ..models.pipeline import Pipeline
from . import open_data
from .base import Share, TrainingData
from .options import DataOptions


def make_data(
    spec: str | None,
    pipeline: Pipeline,
    options: DataOptions,
    batch_size: int,
    seed: int,
    samples: int,
    held_out: int,
    share: Share,
    dtype: torch.dtype = torch.float32,
) -> TrainingData:
    """The data that `spec` names (`open_data`), with the first `samples` of the run and `held_out` ones made.

    dtype: what the UNet draws in, by autocast; on a CPU, where that saves nothing, as it is. Each process makes its
    share. VAE and text encoders leave the device if nothing is left for them to do. Raises
    what `open_data` and `TrainingData.make` raise.
    """
    data = open_data(spec, pipeline, options, batch_size, seed)
    kind = pipeline.device.type
    with torch.autocast(kind, dtype, enabled=kind != "cpu" and dtype != torch.float32):
        data.make(samples, held_out, share)
    if not data.needs_encoders and kind != "cpu":
        pipeline.encoders_to("cpu")
    return data
