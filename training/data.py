"""Training samples by index, from any kind of data, and the random numbers that go with an index.

Sample i of a run is a function of the data, the options, the batch size and the seed alone: the same whatever the
number of processes, and the same after a resume.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .embedded.scenes import IMAGE_SIZE, draw_caption, scene
from .images import aspect_buckets, nearest_bucket, picture_size
from .latents import META, Encoder, Sample, Size
from .pipeline import EMBEDDED, Conditioning, Pipeline
from .sources import Lazily, Listing, Record, Skip, Source, Stream, digest, open_source

log = logging.getLogger(__name__)
PROMPTS = Path(__file__).resolve().parent / "prompts.txt"
AESTHETIC = ("aesthetic", "aesthetic_score", "AESTHETIC_SCORE", "aesthetics", "LAION_aesthetic")
WATERMARK = ("pwatermark", "watermark", "watermark_score", "p_watermark")
FEW = 50  # records below which a share of skipped ones says nothing yet


def _option(default, help: str, choices: tuple[str, ...] | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class DataOptions:
    """What is done with the pictures that --data names; the fields are flags of distill.py and prepare.py."""

    resolution: int | None = _option(None, "px of the (square) picture; none: the teacher's own")
    min_size: int = _option(0, "leave out pictures whose shorter side has fewer px")
    min_aesthetic: float | None = _option(None, "leave out pictures with a lower aesthetic score; 6 is the paper's")
    aesthetic_column: str | None = _option(None, f"the score's column; none: the first of {', '.join(AESTHETIC)}")
    max_watermark: float | None = _option(None, "leave out pictures with a higher watermark probability")
    watermark_column: str | None = _option(None, f"its column; none: the first of {', '.join(WATERMARK)}")
    crop: str = _option(
        "center", "which part of a picture; random: one place a picture, for good", ("center", "random")
    )
    flip: bool = _option(False, "show each picture mirrored half of the time")
    buckets: bool = _option(False, "batches of one aspect each, between 1:2 and 2:1, instead of square crops")
    caption_drop: float = _option(0.0, "share of samples that are shown without their caption")
    caption_column: str | None = _option(None, "of a dataset or metadata.jsonl; none: caption, text, txt, prompt")
    image_column: str | None = _option(None, "of a dataset or metadata.jsonl; none: image, jpg, png, webp or file_name")
    dataset_config: str | None = _option(None, "configuration of a Hugging Face dataset")
    dataset_split: str = _option("train", "its split")
    streaming: bool = _option(True, "read a dataset of the Hub as a stream; --no-streaming downloads it first")
    max_samples: int | None = _option(None, "take no more than this many")
    max_skipped_share: float = _option(0.25, "stop when a greater share of the data is bad")
    num_held_out: int = _option(64, "samples kept for validation, at most about a twentieth of the data")
    num_scenes: int = _option(4096, "size of the pool of scenes ('embedded', the default of the embedded teacher)")
    images_per_prompt: int = _option(1, "pictures that the teacher makes of each prompt of a list")
    prompt_steps: int = _option(10, "DPM-Solver++ steps for such a picture")
    prompt_guidance_scale: float = _option(7.5, "w for such a picture")
    cache_latents: bool = _option(True, "keep latents and text embeddings on disk, if half of its free space is enough")
    cache_dir: Path | None = _option(None, "where; none: the user's cache folder")  # noqa: RUF009
    cache_dtype: str = _option("fp16", "type they are kept in", ("fp16", "bf16", "fp32"))

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


class TrainingData:
    """Samples by index. `skipped`: bad records met so far; `filtered`: how many a filter of the options left out."""

    needs_encoders = True  # whether VAE and text encoders (for prompts, the UNet) are called by `batch`

    def __init__(self, spec: str, options: DataOptions, batch_size: int, seed: int, device: torch.device) -> None:
        self.spec, self.options, self.batch_size, self.seed, self.device = spec, options, batch_size, seed, device
        self.skipped: list[Skip] = []
        self.filtered: dict[str, int] = {}
        self.no_prompt: Sample = {}

    def batch(self, indices: range) -> tuple[Tensor, Conditioning]:
        """Latents [B, C, h, w] and the UNet's arguments of the samples with these indices, which count over the run.

        The samples of a whole batch [n*batch_size, (n+1)*batch_size) have one size. Raises ValueError with the list
        when more than `max_skipped_share` of the data turned out to be bad.
        """
        return self._collate(self._samples(indices), indices)

    def held_out(self, n: int) -> tuple[Tensor, Conditioning]:
        """The first n samples of those that are never trained on, or as many as there are; all of one size."""
        return self._collate(self._held_out(n), None)

    def describe(self) -> str:
        """One line for the log."""
        raise NotImplementedError

    def _samples(self, indices: range) -> list[Sample]:
        raise NotImplementedError

    def _held_out(self, n: int) -> list[Sample]:
        raise NotImplementedError

    def _collate(self, samples: Sequence[Sample], indices: range | None) -> tuple[Tensor, Conditioning]:
        latents, conditioning = [], []
        for row, sample in enumerate(samples):
            mirror, drop = decisions(self.seed, indices[row]) if indices is not None else (1.0, 1.0)
            views = sample["latents"]
            latents.append(views[-1 if mirror < 0.5 else 0])
            told = {key: value for key, value in sample.items() if key != "latents"}
            conditioning.append(told | self.no_prompt if drop < self.options.caption_drop else told)
        stacked = {key: torch.stack([one[key] for one in conditioning]) for key in conditioning[0]}
        return (
            torch.stack(latents).float().to(self.device),
            {key: value.float().to(self.device) for key, value in stacked.items()},
        )

    def _skip(self, skip: Skip) -> None:
        self.skipped.append(skip)
        log.warning("skipped %s: %s", skip.name, skip.reason)

    def _left_out(self) -> str:
        parts = [f"{count} {reason}" for reason, count in self.filtered.items()]
        return "".join(f", {part}" for part in [*parts, *([f"{len(self.skipped)} skipped"] if self.skipped else [])])


def open_data(spec: str | None, pipeline: Pipeline, options: DataOptions, batch_size: int, seed: int) -> TrainingData:
    """The training data that `spec` names, or, for None, what suits the teacher: see docs/data.md.

    batch_size: of all processes together. Raises FileNotFoundError for data that are not there, ValueError for data
    that are of no use (too many bad ones; a cache of another teacher), naming them.
    """
    from .samples import PreparedData, RecordData, StreamData

    options = at_resolution(options, pipeline)
    spec = spec or default_spec(pipeline)
    if (Path(spec) / META).is_file():
        return PreparedData(Path(spec), pipeline, options, batch_size, seed)
    source = source_of(spec, options, seed)
    kind = StreamData if isinstance(source, Stream) else RecordData
    return kind(source, spec, pipeline, options, batch_size, seed)


def default_spec(pipeline: Pipeline) -> str:
    """'embedded' for the embedded teacher; the shipped list of prompts for any other."""
    return "embedded" if pipeline.source in ("embedded", "embedded-teacher", str(EMBEDDED)) else str(PROMPTS)


def at_resolution(options: DataOptions, pipeline: Pipeline) -> DataOptions:
    """The options with the teacher's own resolution, unless one is given. Raises ValueError for one that it cannot."""
    resolution = options.resolution or pipeline.latent_shape[1] * pipeline.vae_scale
    if resolution % pipeline.vae_scale:
        raise ValueError(f"--resolution must be a multiple of {pipeline.vae_scale} px, got {resolution}")
    return replace(options, resolution=resolution)


def source_of(spec: str, options: DataOptions, seed: int = 0) -> Source:
    """The records that `spec` names; 'embedded' is the scenes of stream `seed`, with the held-out ones at their end."""
    if spec == "embedded":
        return scenes(seed, options.num_scenes + options.num_held_out)
    return open_source(
        spec,
        options.caption_column,
        options.image_column,
        options.dataset_config,
        options.dataset_split,
        options.streaming,
        options.images_per_prompt,
    )


def scenes(seed: int, count: int) -> Listing:
    """The first scenes of a stream as records."""

    def record(index: int) -> Record:
        caption = str(draw_caption(np.random.default_rng([seed, index])))
        return Record(f"scene {index}", caption, lambda: scene(seed, index)[0], size=(IMAGE_SIZE, IMAGE_SIZE))

    return Listing(Lazily(count, record), digest("scenes", seed, count), shuffled=True)


def sift(record: Record, options: DataOptions) -> Size | Skip | str:
    """The size that a record's picture is cut to, or why it is bad, or which filter leaves it out."""
    if record.picture is None:
        return (options.resolution, options.resolution)
    limits = (
        (options.min_aesthetic, 1, options.aesthetic_column, AESTHETIC, "aesthetic score too low"),
        (options.max_watermark, -1, options.watermark_column, WATERMARK, "watermarked"),
    )
    for limit, sign, column, usual, reason in limits:
        if limit is None:
            continue
        found = next((name for name in ([column] if column else usual) if name in record.columns), None)
        try:
            value = float(record.columns[found])
        except (KeyError, TypeError, ValueError):
            wanted = column or f"any of {', '.join(usual)}"
            return Skip(record.name, f"no number in {wanted} (its columns: {', '.join(record.columns) or 'none'})")
        if not sign * value >= sign * limit:
            return reason
    try:
        size = record.size or picture_size(record.picture())
    except (ValueError, OSError) as error:
        return Skip(record.name, str(error))
    if min(size) < options.min_size:
        return f"under {options.min_size} px"
    return nearest_bucket(size, options.sizes)


def check_skipped(skipped: Sequence[Skip], seen: int, options: DataOptions, spec: str) -> None:
    """Raises ValueError with the list if more than `max_skipped_share` of the records seen were bad."""
    if len(skipped) <= options.max_skipped_share * seen:
        return
    shown = [f"  {one.name}: {one.reason}" for one in skipped[:FEW]]
    more = [f"  and {len(skipped) - FEW} more"] if len(skipped) > FEW else []
    raise ValueError(
        "\n".join(
            [
                f"{spec}: {len(skipped)} of {seen} records are bad, more than --max-skipped-share "
                f"{options.max_skipped_share:g} allows:",
                *shown,
                *more,
                "Mend or remove them, or raise the share.",
            ]
        )
    )


def encoder_of(pipeline: Pipeline, options: DataOptions) -> Encoder:
    return Encoder(
        pipeline,
        options.crop,
        options.flip,
        options.cache_dtype,
        options.prompt_steps,
        options.prompt_guidance_scale,
    )


def cache_settings(pipeline: Pipeline, options: DataOptions, source: Source) -> dict:
    """All that cached samples depend on; its digest is the cache's key."""
    drawn = isinstance(source, Listing) and isinstance(source[0], Record) and source[0].picture is None
    settings = {
        "fingerprint": pipeline.fingerprint(),
        "source": source.identity,
        **{name: getattr(options, name) for name in ("resolution", "crop", "flip", "buckets", "cache_dtype")},
        **{name: getattr(options, name) for name in ("min_size", "min_aesthetic", "max_watermark", "max_samples")},
    }
    if drawn:
        settings |= {name: getattr(options, name) for name in ("prompt_steps", "prompt_guidance_scale")}
        settings["teacher"] = unet_hash(pipeline.unet)
    return settings


def unet_hash(unet: torch.nn.Module) -> str:
    """A quick hash of a network: names, shapes and the first values of each tensor, in bf16."""
    return digest(
        [
            (name, list(weight.shape), weight.flatten()[:16].to(torch.bfloat16).float().tolist())
            for name, weight in sorted(unet.state_dict().items())
        ]
    )


def cache_folder() -> Path:
    """The user's cache folder for latents; SPLAM_CACHE moves it."""
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    home = os.environ.get("SPLAM_CACHE") or (Path(base) if base else Path.home() / ".cache") / "comfyui-splam"
    return Path(home) / "latents"


def grouped(items: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` neighbours; the last may be shorter."""
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


def draws(seed: int, indices: range, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Noise [B, *shape], and two uniforms [B] in [0, 1) for timestep and gamma.

    Sample i's numbers are a function of (seed, i) alone: the same whatever the batch size, the number of processes or
    the step at which a run was resumed.
    """
    noise, uniforms = [], []
    for index in indices:
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index) % 2**63)
        noise.append(torch.randn(shape, generator=generator))
        uniforms.append(torch.rand(2, generator=generator))
    u_t, u_gamma = torch.stack(uniforms).unbind(1)
    return torch.stack(noise), u_t, u_gamma


def decisions(seed: int, index: int) -> tuple[float, float]:
    """Two uniforms in [0, 1) that decide whether sample `index` is mirrored and whether its caption is dropped."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + 2**62 + index) % 2**63)
    return tuple(torch.rand(2, generator=generator).tolist())
