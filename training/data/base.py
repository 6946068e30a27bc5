"""What all kinds of training data have in common: batches, the filters of the options, what is bad, the cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from splam_core import decisions, reading

from ..models.pipeline import Conditioning, Pipeline
from .images import nearest_bucket, picture_size
from .latents import Encoder, Sample, Size
from .options import AESTHETIC, WATERMARK, DataOptions
from .sources import Listing, Record, Skip, Source

log = logging.getLogger(__name__)
FEW = 50  # records below which a share of skipped ones says nothing yet


@dataclass(frozen=True)
class Share:
    """This process's part of what all processes of a run make together; `wait` returns when all have called it."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None


class TrainingData:
    """Samples by index. `skipped`: bad records met so far; `filtered`: how many a filter of the options left out."""

    needs_encoders = True  # whether VAE and text encoders are called by `batch`
    cut = 0  # captions, of the samples met so far, that are longer than the text encoder reads

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

    def make(self, samples: int, held_out: int, share: Share) -> None:
        """Make, and keep, what the first `samples` of a run and the first held-out ones are, where that can be done.

        The teacher's UNet is asked here and never later. Called once, by every process of the run.
        """
        share.wait()

    def latents_alone(self) -> None:
        """From now on `batch` gives latents, where it gave the points of paths."""

    def describe(self, shown: Callable[[object], str] = str) -> str:
        """One line for the log. shown: how a file or folder is written in it."""
        raise NotImplementedError

    def _samples(self, indices: range) -> list[Sample]:
        raise NotImplementedError

    def _held_out(self, n: int) -> list[Sample]:
        raise NotImplementedError

    def _collate(self, samples: Sequence[Sample], indices: range | None) -> tuple[Tensor, Conditioning]:
        if not samples:
            raise ValueError(
                f"{self.spec}: expected one sample or more, found none{self._left_out()}. It holds too few records "
                f"for what was asked: loosen the filters of the options, or add some."
            )
        latents, conditioning = [], []
        for row, sample in enumerate(samples):
            mirror, drop = decisions(self.seed, indices[row]) if indices is not None else (1.0, 1.0)
            views = sample["latents"]
            latents.append(views[-1 if mirror < 0.5 else 0])
            told = {key: value for key, value in sample.items() if key != "latents"}
            conditioning.append(told | self.no_prompt if drop < self.options.caption_drop else told)
        with reading(self.spec, "its samples do not fit together", "Delete what was prepared, and prepare it again"):
            stacked = {key: torch.stack([one[key] for one in conditioning]) for key in conditioning[0]}
            together = torch.stack(latents)
        return (
            together.float().to(self.device),
            {key: value.float().to(self.device) for key, value in stacked.items()},
        )

    def _skip(self, skip: Skip) -> None:
        self.skipped.append(skip)
        log.warning("skipped %s: %s", skip.name, skip.reason)

    def _left_out(self) -> str:
        parts = [f"{count} {reason}" for reason, count in self.filtered.items()]
        parts += [f"{len(self.skipped)} skipped"] if self.skipped else []
        parts += [f"{self.cut} with captions cut at 77 tokens"] if self.cut else []
        return "".join(f", {part}" for part in parts)


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
    settings = {
        "version": 2,  # in the first, a LoRA's pictures of prompts were drawn by the student
        "fingerprint": pipeline.fingerprint(),
        "source": source.identity,
        **{name: getattr(options, name) for name in ("resolution", "crop", "flip", "buckets", "cache_dtype")},
        **{name: getattr(options, name) for name in ("min_size", "min_aesthetic", "max_watermark", "max_samples")},
    }
    named = {name: getattr(options, name) for name in ("aesthetic_column", "watermark_column")}
    settings |= {name: column for name, column in named.items() if column is not None}
    if is_drawn(source):
        settings |= {name: getattr(options, name) for name in ("prompt_steps", "prompt_guidance_scale")}
        settings["teacher"] = pipeline.unet_fingerprint()
    return settings


def is_drawn(source: Source) -> bool:
    """Whether its pictures are the teacher's own, of prompts."""
    return isinstance(source, Listing) and isinstance(source[0], Record) and source[0].picture is None


def cache_folder() -> Path:
    """The user's cache folder for latents; SPLAM_CACHE moves it."""
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    home = os.environ.get("SPLAM_CACHE") or (Path(base) if base else Path.home() / ".cache") / "comfyui-splam"
    return Path(home) / "latents"
