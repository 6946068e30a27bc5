"""What training/evaluate.py is asked to draw and to score, and what can be said of it before that."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from splam_core import few_step_timesteps

from ..models.teachers import resolve
from .embedded_scores import drawn_captions, read_scene_captions
from .perceptual import clip_weights, inception_weights
from .protocols import PROTOCOLS, protocol_captions

SCENE_SOURCES = ("renders", "reconstructions")

SCORES = ("inception", "clip")


@dataclass(frozen=True)
class Request:
    """What to draw and to score; the command's flags."""

    model: str  # a name of NAMED, a folder, a file, or "renders" and "reconstructions", which bound what can be reached
    protocol: str = "embedded"
    sampler: str = "splam"
    steps: int = 4
    guidance_scale: float = 1.0  # w; 1 is none
    num_images: int | None = None  # None: the protocol's
    seed: int = 0  # of captions and noise
    prompts: Path | None = None
    output_dir: Path | None = None  # keeps the pictures, and lets a run go on
    batch_size: int = 64
    image_size: int | None = None  # px; None: the protocol's
    device: str = "cpu"
    dtype: str = "fp32"
    lora: Path | None = None
    lora_scale: float = 1.0
    gamma_embedding: str = "splam"  # what a cond_proj in the checkpoint was trained to be told; see fold_gamma
    shard: tuple[int, int] | None = None  # (i, n): draw every n-th batch from the i-th on, and do not score
    scores: tuple[str, ...] = SCORES  # of the protocols that are not embedded
    reference: Path | None = None  # folder, or .npz
    save_reference: Path | None = None
    inception_weights: Path | None = None
    clip_model: str = "ViT-g-14"
    clip_pretrained: str = "laion2b_s12b_b42k"
    clip_weights: Path | None = None
    curves: int = 0  # pictures for endpoint error and delta; 0: neither
    teacher: str = "embedded-teacher"  # whose paths the endpoint error follows
    teacher_guidance_scale: float = 3.0
    label: str | None = None  # the method's name in tables


def check(request: Request) -> None:
    """What can be said of a request before anything is drawn, or loaded."""
    if request.num_images is not None and request.num_images < 2 and not (request.num_images == 0 and request.curves):
        raise ValueError(f"--num-images must be 2 or more (0 with --curves), got {request.num_images}")
    if request.batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, got {request.batch_size}")
    if request.sampler in ("splam", "lcm"):
        few_step_timesteps(request.steps)
    if request.model in SCENE_SOURCES:
        if request.protocol != "embedded" or request.curves:
            raise ValueError(f"--model {request.model} is of --protocol embedded, without --curves")
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
