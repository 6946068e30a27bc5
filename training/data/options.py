"""What is done with the pictures that --data names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..flags import flag
from ..models.pipeline import Pipeline
from .images import aspect_buckets
from .latents import Size

AESTHETIC = ("aesthetic", "aesthetic_score", "AESTHETIC_SCORE", "aesthetics", "LAION_aesthetic")
WATERMARK = ("pwatermark", "watermark", "watermark_score", "p_watermark")


@dataclass(frozen=True)
class DataOptions:
    """What is done with the pictures that --data names; the fields are flags of distill.py and prepare.py."""

    resolution: int | None = flag(None, "px of the (square) picture; none: the teacher's own")
    min_size: int = flag(0, "leave out pictures whose shorter side has fewer px")
    min_aesthetic: float | None = flag(None, "leave out pictures with a lower aesthetic score; 6 is the paper's")
    aesthetic_column: str | None = flag(None, f"the score's column; none: the first of {', '.join(AESTHETIC)}")
    max_watermark: float | None = flag(None, "leave out pictures with a higher watermark probability")
    watermark_column: str | None = flag(None, f"its column; none: the first of {', '.join(WATERMARK)}")
    crop: str = flag("center", "which part of a picture; random: one place a picture, for good", ("center", "random"))
    flip: bool = flag(False, "show each picture mirrored half of the time")
    buckets: bool = flag(False, "batches of one aspect each, between 1:2 and 2:1, instead of square crops")
    caption_drop: float = flag(0.0, "share of samples that are shown without their caption")
    caption_column: str | None = flag(None, "of a dataset or metadata table; none: caption, text, txt, prompt")
    image_column: str | None = flag(None, "of a dataset or metadata table; none: image, jpg, png, webp or file_name")
    dataset_config: str | None = flag(None, "configuration of a Hugging Face dataset")
    dataset_split: str = flag("train", "its split")
    streaming: bool = flag(True, "read a dataset of the Hub as a stream; --no-streaming downloads it first")
    max_samples: int | None = flag(None, "take no more than this many")
    max_skipped_share: float = flag(0.25, "stop when a greater share of the data is bad")
    num_held_out: int = flag(64, "samples kept for validation, at most about a twentieth of the data")
    num_scenes: int = flag(4096, "size of the pool of scenes ('embedded', the default of the embedded teacher)")
    images_per_prompt: int = flag(1, "pictures that the teacher makes of each prompt of a list")
    prompt_steps: int = flag(10, "DPM-Solver++ steps for such a picture")
    prompt_guidance_scale: float = flag(7.5, "w for such a picture")
    cache_latents: bool = flag(True, "keep latents and text embeddings on disk, if half of its free space is enough")
    cache_dir: Path | None = flag(None, "where; none: the user's cache folder")
    cache_dtype: str = flag("fp16", "type they are kept in", ("fp16", "bf16", "fp32"))

    def __post_init__(self) -> None:
        for name in ("resolution", "max_samples", "num_scenes", "images_per_prompt", "prompt_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        for name in ("caption_drop", "max_skipped_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be between 0 and 1, got {getattr(self, name)}")

    @property
    def sizes(self) -> list[Size]:
        """The picture sizes that there can be."""
        return aspect_buckets(self.resolution) if self.buckets else [(self.resolution, self.resolution)]


def at_resolution(options: DataOptions, pipeline: Pipeline) -> DataOptions:
    """The options with the teacher's own resolution, unless one is given. Raises ValueError for one that it cannot."""
    resolution = options.resolution or pipeline.latent_shape[1] * pipeline.vae_scale
    if resolution % pipeline.vae_scale:
        raise ValueError(f"--resolution must be a multiple of {pipeline.vae_scale} px, got {resolution}")
    return replace(options, resolution=resolution)
