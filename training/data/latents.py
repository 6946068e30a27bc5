"""Samples, that is latents with their text embeddings: made from records, and kept in shards.

A shard is a webdataset tar of safetensors files, with an index beside it. It appears under its name only when it is
whole, so that whatever was interrupted, what is there can be used and the rest is made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from splam_core import not_finite, read_json, reading
from splam_core.solver import draw_latents

from ..files import write_whole
from ..models.pipeline import DTYPES, Pipeline
from ..models.sampling import teacher_function
from .images import crop, load_picture
from .sources import Record, Skip

GROUP = 8  # pictures encoded at once, always the same ones together, so that a sample never depends on who made it
META = "meta.json"
NO_PROMPT = "no-prompt.safetensors"
Sample = dict[str, Tensor]  # "latents" [V, C, h, w] (V = 2: the second mirrored), and what Pipeline.encode gives of one
Size = tuple[int, int]  # height, width in px


@dataclass(frozen=True)
class Encoder:
    """Makes samples of records with the pipeline's VAE and text encoders, or with the whole teacher."""

    pipeline: Pipeline
    crop: str = "center"
    flip: bool = False
    dtype: str = "fp16"
    prompt_steps: int = 10
    prompt_guidance_scale: float = 7.5

    def __call__(self, records: Sequence[Record], sizes: Sequence[Size]) -> list[Sample | Skip]:
        """A sample or a Skip of each record; sizes: that of each record's picture after the crop."""
        results: list[Sample | Skip] = []
        for start in range(0, len(records), GROUP):
            results += self._group(records[start : start + GROUP], sizes[start : start + GROUP])
        return results

    def no_prompt(self) -> Sample:
        """What a dropped caption is replaced by, the same that guidance takes for no prompt."""
        found = self.pipeline.unconditional()
        return {key: value[0].to(DTYPES[self.dtype]).cpu() for key, value in found.items() if key != "time_ids"}

    def cut(self, records: Sequence[Record]) -> int:
        """How many of the records' captions are longer than the text encoder reads."""
        return self.pipeline.too_long([record.caption for record in records])

    def bytes_per_sample(self, size: Size) -> int:
        """By arithmetic: latents at this size, mirrored ones too, and the text embeddings."""
        scale = self.pipeline.vae_scale
        latents = self.pipeline.latent_shape[0] * (size[0] // scale) * (size[1] // scale) * (1 + self.flip)
        values = latents + sum(value.numel() for value in self.no_prompt().values())
        return values * torch.finfo(DTYPES[self.dtype]).bits // 8

    def _group(self, records: Sequence[Record], sizes: Sequence[Size]) -> list[Sample | Skip]:
        with ThreadPoolExecutor(min(GROUP, os.cpu_count() or 1)) as pool:
            pictures = list(pool.map(self._picture, records, sizes))
        results: list[Sample | Skip] = list(pictures)
        for size in dict.fromkeys(sizes):
            chosen = [i for i, one in enumerate(pictures) if sizes[i] == size and not isinstance(one, Skip)]
            if not chosen:
                continue
            conditioning = self.pipeline.encode([records[i].caption for i in chosen], size)
            drawn = [i for i in chosen if records[i].picture is None]
            if drawn:
                made = teacher_latents(
                    self.pipeline,
                    [records[i].caption for i in drawn],
                    [records[i].number for i in drawn],
                    size,
                    self.prompt_steps,
                    self.prompt_guidance_scale,
                )
                latents = dict(zip(drawn, made[:, None], strict=True))
            else:
                # Mirrored pictures are encoded anew: a VAE is not quite symmetric.
                images = torch.stack([pictures[i] for i in chosen])
                views = [images, images.flip(-1)] if self.flip else [images]
                encoded = torch.stack([self.pipeline.latents(view) for view in views], dim=1)
                latents = dict(zip(chosen, encoded, strict=True))
            for row, i in enumerate(chosen):
                sample = {"latents": latents[i], **{key: value[row] for key, value in conditioning.items()}}
                results[i] = self._kept(sample, records[i].name)
        return results

    def _picture(self, record: Record, size: Size) -> Tensor | Skip | None:
        if record.picture is None:
            return None
        try:
            return crop(load_picture(record.picture()), size, self.crop, record.name)
        except (ValueError, OSError) as error:
            return Skip(record.name, str(error))

    def _kept(self, sample: Sample, name: str) -> Sample | Skip:
        """On the CPU in the cache's dtype; sizes in px stay exact."""
        kept = {
            key: value.to(torch.float32 if key == "time_ids" else DTYPES[self.dtype]).cpu().contiguous()
            for key, value in sample.items()
        }
        bad = [key for key, value in kept.items() if not value.isfinite().all()]
        if bad:
            return Skip(name, f"{' and '.join(bad)} not finite in {self.dtype}")
        first = kept["latents"].view(-1)[0]
        if (kept["latents"] == first).all():
            return Skip(name, f"its latents are {first:g} everywhere, which no picture's are: the VAE failed")
        return kept


@dataclass(frozen=True)
class Made:
    """What became of some records: the good ones as (number, record, sample), the bad ones, and captions cut."""

    good: list[tuple[int, Record, Sample]]
    bad: list[Skip]
    cut: int


def make(encoder: Encoder, chosen: Sequence[tuple[int, Record, Size]]) -> Made:
    """Samples of (number, record, size): all that is encoded and kept goes through here."""
    records = [record for _, record, _ in chosen]
    samples = encoder(records, [size for _, _, size in chosen])
    good = [(n, record, one) for (n, record, _), one in zip(chosen, samples, strict=True) if not isinstance(one, Skip)]
    return Made(good, [one for one in samples if isinstance(one, Skip)], encoder.cut([record for _, record, _ in good]))


@torch.no_grad()
def teacher_latents(
    pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], size: Size, steps: int, guidance_scale: float
) -> Tensor:
    """Latents [B, C, h, w] of the teacher's own pictures: `steps` of DPM-Solver++(2M) (Lu et al., 2022), w as anywhere.

    Picture i depends on its prompt and seeds[i]; in the batch's company, on rounding too.
    """
    shape = (pipeline.latent_shape[0], size[0] // pipeline.vae_scale, size[1] // pipeline.vae_scale)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    conditioning, negative = pipeline.encode(list(prompts), size), pipeline.unconditional(size)
    teacher = teacher_function(pipeline, conditioning, negative, guidance_scale)
    return draw_latents(teacher, torch.stack(noise).to(pipeline.device), pipeline.schedule, steps)


def write_shard(
    folder: Path,
    shard: str,
    made: Made,
    skipped: Sequence[Skip] = (),
    filtered: Mapping[str, int] | None = None,
) -> None:
    """SHARD.tar with the samples, and SHARD.json: what is where, what was left out for what, how many were cut.

    skipped, filtered: of the shard's records, those that were not even tried.
    """
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number, record, sample in made.good:
            key = f"{shard}-{number:05d}"
            said = json.dumps({"name": record.name, "caption": record.caption}).encode()
            for field, data in (("safetensors", save(sample)), ("json", said)):
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    content.seek(0)
    with tarfile.open(fileobj=content) as archive:
        places = [[member.offset_data, member.size] for member in archive if member.name.endswith(".safetensors")]
    rows = [
        {
            "number": number,
            "name": record.name,
            "at": at,
            "sha256": hashlib.sha256(content.getbuffer()[at[0] : sum(at)]).hexdigest(),
            "shape": list(sample["latents"].shape),
        }
        for (number, record, sample), at in zip(made.good, places, strict=True)
    ]
    bad = [[one.name, one.reason] for one in (*skipped, *made.bad)]
    index = {"samples": rows, "skipped": bad, "filtered": dict(filtered or {}), "cut": made.cut}
    write_whole(folder / f"{shard}.tar", content.getvalue())
    write_whole(folder / f"{shard}.json", json.dumps(index).encode())


def read_index(folder: Path, shard: str) -> dict | None:
    """A shard's index; None for a shard that is not whole yet. Raises ValueError naming one that is damaged."""
    index = folder / f"{shard}.json"
    if not index.is_file() or not (folder / f"{shard}.tar").is_file():
        return None
    found = read_json(index)
    with reading(index, "it is no index of a shard", f"Delete it and {shard}.tar, and run the same command again"):
        numbers = [number for row in found["samples"] for number in (row["number"], *row["at"], *row["shape"])]
        words = [word for one in found["skipped"] for word in (one[0], one[1])] + list(found["filtered"])
        counts = [*numbers, *found["filtered"].values(), found.get("cut", 0)]
        if not all(isinstance(one, int) and 0 <= one < 2**63 for one in counts) or not all(
            isinstance(one, str) for one in words
        ):
            raise TypeError("numbers and names of other types")
        if any(len(row["at"]) != 2 or len(row["shape"]) != 4 for row in found["samples"]):
            raise TypeError("places that are no (offset, size), or shapes that are no [views, channels, height, width]")
        return found


def read_sample(folder: Path, shard: str, at: Sequence[int], sha256: str | None = None) -> Sample:
    """The sample at (offset, size) in a shard. Raises ValueError naming the file if it is damaged.

    sha256: what its index says of it, or the first digits of that; sets of before have none.
    """
    file = folder / f"{shard}.tar"
    try:
        with open(file, "rb") as opened:
            opened.seek(at[0])
            content = opened.read(at[1])
        if sha256 and not hashlib.sha256(content).hexdigest().startswith(sha256):
            raise ValueError("its SHA-256 is not that of its index")
        sample = load(content)
        if bad := not_finite(sample):
            raise ValueError(f"{bad} holds NaN or infinite values")
        return sample
    except Exception as error:  # safetensors raises a class of its own
        raise ValueError(f"{file} is damaged at byte {at[0]} ({error}): delete it, and prepare it again") from error
