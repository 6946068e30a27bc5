"""What training/evaluate.py is asked to draw and to score, and what can be said of it before that."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from splam_core import few_step_timesteps

from ..flags import flag
from ..models.pipeline import DTYPES
from ..models.sampling import SAMPLERS
from ..models.teachers import NAMED, resolve
from .embedded_scores import drawn_captions, read_scene_captions
from .perceptual import clip_weights, inception_weights
from .protocols import PROTOCOLS, protocol_captions
from .variety import SEEDS

SCENE_SOURCES = ("renders", "reconstructions")

SCORES = ("inception", "clip")


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N-1, got {text!r}")
    return int(index), int(count)


@dataclass(frozen=True)
class Request:
    """What to draw and to score; the fields are the command's flags, in the groups of GROUPS."""

    model: str = flag(
        help=f"{', '.join(NAMED)}, a diffusers or UNet folder, a single file, a Hub id in the cache, or 'renders' or "
        f"'reconstructions' (the embedded protocol's ceilings)"
    )
    protocol: str = flag("embedded", "presets of the numbers of pictures, sizes and scores", tuple(PROTOCOLS))
    sampler: str = flag("splam", "dpm-solver++, unipc and lcm are diffusers' schedulers", SAMPLERS)
    steps: int = flag(4, "of the sampler")
    guidance_scale: float = flag(1.0, "w; 1 is none, anything else costs two evaluations a step")
    num_images: int | None = flag(None, "the protocol's when left out; another number is a trial")
    seed: int = flag(0, "of captions and noise")
    prompts: Path | None = flag(None, "captions, one a line, or COCO's annotations (.json)", also=("--captions",))
    output_dir: Path | None = flag(None, "keep the pictures here; a run that was stopped goes on")
    batch_size: int = flag(64, "pictures at a time; latencies are of this batch")
    image_size: int | None = flag(None, "px; the protocol's when left out")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where it is drawn and scored")
    dtype: str = flag("fp32", "of the weights", tuple(DTYPES))
    lora: Path | None = flag(None, "merged into the model: a .safetensors file, or a folder")
    lora_scale: float = flag(1.0, "its strength")
    clip_skip: int = flag(1, "as distill.py's")
    gamma_embedding: str = flag(
        "splam", "what a cond_proj of the checkpoint is told: splam, zero, or LCM's guidance_scale"
    )
    shard: tuple[int, int] | None = flag(
        None, "I/N: draw the I-th (from 0) of N shares and do not score", parse=_shard, metavar="I/N"
    )
    scores: tuple[str, ...] = flag(SCORES, "of the full-size protocols", SCORES)
    reference: Path | None = flag(None, "folder of real pictures, or an .npz file with mu and sigma")
    save_reference: Path | None = flag(None, "write the reference's statistics and features to this .npz file")
    inception_weights: Path | None = flag(None, "torch-fidelity's; found in the cache when left out")
    clip_model: str = flag("ViT-g-14", "open_clip's name, or local-dir:FOLDER")
    clip_pretrained: str = flag("laion2b_s12b_b42k", "open_clip's tag of the weights")
    clip_weights: Path | None = flag(None, "their file; found in the cache when left out")
    curves: int = flag(
        0,
        "endpoint error and delta(t, 20) on N pictures (128); --num-images 0 leaves the other scores out",
        metavar="N",
        const=128,
    )
    variety: int = flag(
        0,
        f"how far pictures of N seeds ({SEEDS}) of one prompt lie apart, beside the teacher's, over eight prompts; "
        f"--num-images 0 leaves the other scores out",
        metavar="N",
        const=SEEDS,
    )
    teacher: str = flag(
        "embedded-teacher", "whose guided paths the endpoint error follows, and whose spread stands beside the model's"
    )
    teacher_guidance_scale: float = flag(3.0, "its w")
    label: str | None = flag(None, "the method's name in tables")


GROUPS = {
    "the model and how it is sampled": (
        "model", "lora", "lora_scale", "clip_skip", "gamma_embedding", "sampler", "steps", "guidance_scale", "dtype",
        "label",
    ),
    "what is drawn": (
        "protocol", "num_images", "image_size", "prompts", "seed", "batch_size", "output_dir", "shard", "device",
    ),
    "scores": (
        "scores", "reference", "save_reference", "inception_weights", "clip_model", "clip_pretrained", "clip_weights",
        "curves", "variety", "teacher", "teacher_guidance_scale",
    ),
}  # fmt: skip


def check(request: Request) -> None:
    """What can be said of a request before anything is drawn, or loaded."""
    measured = request.curves or request.variety
    if request.num_images is not None and request.num_images < 2 and not (request.num_images == 0 and measured):
        raise ValueError(f"--num-images must be 2 or more (0 with --curves or --variety), got {request.num_images}")
    if request.variety < 0 or request.variety == 1:
        raise ValueError(f"--variety must be 2 seeds or more, got {request.variety}")
    if request.batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, got {request.batch_size}")
    if request.sampler in ("splam", "lcm"):
        few_step_timesteps(request.steps)
    if request.model in SCENE_SOURCES:
        if request.protocol != "embedded" or measured:
            raise ValueError(
                f"--model {request.model} is of --protocol embedded, without --curves and without --variety"
            )
    else:
        resolve(request.model)
    if request.protocol == "embedded" or request.num_images == 0:
        return
    fetch = PROTOCOLS[request.protocol].fetch
    judged = () if request.shard else request.scores
    if request.prompts is None or ("inception" in judged and request.reference is None):
        raise FileNotFoundError(f"--protocol {request.protocol} needs --captions and --reference. {fetch}")
    if request.output_dir is None:
        raise ValueError(f"--protocol {request.protocol} needs --output-dir, where its pictures are kept")
    if "inception" in judged:
        inception_weights(request.inception_weights)
        if not request.reference.exists():
            raise FileNotFoundError(f"--reference {request.reference} is not there. {fetch}")
    if "clip" in judged and not request.clip_model.startswith("local-dir:") and not request.clip_weights:
        clip_weights(request.clip_model, request.clip_pretrained)


def protocol_captions_of(request: Request) -> list:
    """A caption for each picture: text, or of the embedded protocol Caption."""
    if request.protocol != "embedded":
        return protocol_captions(request.protocol, request.prompts, request.num_images)
    count = request.num_images or PROTOCOLS["embedded"].images
    if request.prompts is None:
        return drawn_captions(request.seed, count)
    captions = read_scene_captions(request.prompts)
    return [captions[index % len(captions)] for index in range(count)]


def share_of(request: Request) -> tuple[int, int]:
    """(index, number) of this process's share."""
    return request.shard or (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def device_of(request: Request) -> str:
    """With several processes on a machine of several GPUs, each has its own."""
    return (
        f"cuda:{os.environ['LOCAL_RANK']}"
        if request.device == "cuda" and "LOCAL_RANK" in os.environ
        else request.device
    )


def size_of(request: Request) -> tuple[int, int] | None:
    """Height and width in px; None is the model's own."""
    side = request.image_size or PROTOCOLS[request.protocol].image_size
    return (side, side) if side else None
