"""Make latents and text embeddings of a data set once, for training that needs neither VAE nor text encoder.

    python training/prepare.py --teacher dreamshaper-v7 --data photos/ --output-dir photos-512
    python training/distill.py --teacher dreamshaper-v7 --data photos-512

With --paths N, paths of the teacher from N of its samples as well, for training that does not ask the teacher either:

    python training/prepare.py --teacher dreamshaper-v7 --data photos-512 --paths 20000 --output-dir photos-paths
    python training/distill.py --teacher dreamshaper-v7 --paths photos-paths

OUTPUT_DIR gets webdataset tars of safetensors files, with an index beside each. Run the same command again to go on
after an interruption: whole shards are kept. Several processes share the work: `accelerate launch` (or RANK and
WORLD_SIZE), or on machines that do not know of each other --shard 0/4, 1/4, ...
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "training"

import torch
from safetensors.torch import save
from tqdm import tqdm

from splam_core import Recipe

from .data import DataOptions, at_resolution, default_spec, open_data, source_of
from .data.base import FEW, cache_settings, check_skipped, encoder_of, is_drawn, sift
from .data.latents import GROUP, META, NO_PROMPT, Encoder, Size, make, read_index, write_shard
from .data.paths import PathPreparation, PathSettings
from .data.samples import SHARDS, claim, shards_of
from .data.sources import Listing, Record, Skip
from .data.streams import StreamData
from .files import write_whole
from .flags import add_flags, with_home
from .models.load import load_pipeline
from .models.pipeline import DTYPES, Pipeline
from .models.teachers import TEACHERS, resolve


class Preparation:
    """One process's share of a set: every `world`-th part of it, from the `rank`-th on."""

    def __init__(
        self,
        spec: str,
        pipeline: Pipeline,
        options: DataOptions,
        folder: Path,
        shard_size: int = 256,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.spec, self.options, self.folder, self.shard_size = spec, options, folder, shard_size
        self.source = source_of(spec, options)
        self.encoder: Encoder = encoder_of(pipeline, options)
        self.numbers: Sequence[int] = ()  # of a listing's records, those that are taken
        if isinstance(self.source, Listing):
            self.numbers = range(len(self.source))
            if options.max_samples and options.max_samples < len(self.numbers):
                self.numbers = _chosen(self.source, options.max_samples)
            self.parts = math.ceil(len(self.numbers) / shard_size)
        else:
            self.parts = self.source.parts
        self.mine = range(rank, self.parts, world)
        self.made, self.kept, self.seen = 0, 0, 0  # samples made now, samples kept in all, records
        self.cut = 0  # captions of kept samples that were longer than the text encoder reads
        self.skipped: list[Skip] = []
        self.filtered: dict[str, int] = {}
        self.lost: list[ConnectionError] = []  # of parts that could not be read to their end
        self._claim(cache_settings(pipeline, options, self.source))

    def _claim(self, settings: dict) -> None:
        """Write what the folder is of, or see that it is that already. Raises ValueError for another set's folder."""
        meta = {"spec": self.spec, "parts": self.parts, "shard_size": self.shard_size, **settings}
        if isinstance(self.numbers, list):
            meta["chosen"] = "at random"  # in sets that were begun before it was said: the first
        if claim(self.folder, meta):
            write_whole(self.folder / NO_PROMPT, save(self.encoder.no_prompt()))
            write_whole(self.folder / META, json.dumps(meta, indent=2).encode())

    def run(self) -> Iterator[str]:
        """Make what is missing; yields the name of each shard. Raises ValueError for too many bad records."""
        for part in self.mine:
            done = self.folder / f"{part:06d}.{SHARDS}"
            if done.is_file():
                for _, index in shards_of(self.folder, range(part, part + 1)):
                    self._count(index)
                continue
            for left in self.folder.glob(f"{part:06d}*.partial"):  # a part has one maker, which was killed
                left.unlink(missing_ok=True)
            count = 0
            try:
                for records in grouped(self._records(part), self.shard_size):
                    shard = f"{part:06d}-{count:05d}"
                    count += 1
                    if read_index(self.folder, shard) is None:
                        self._make(shard, records)
                    self._count(read_index(self.folder, shard))
                    yield shard
            except ConnectionError as error:  # what is whole of it stays, and the next run goes on with it
                if not self.seen:  # of a server that is not there, no part can be had
                    raise
                logging.warning("%s", error)
                self.lost.append(error)
                continue
            write_whole(done, json.dumps(count).encode())
        check_skipped(self.skipped, self.seen, self.options, self.spec)

    def _records(self, part: int) -> Iterator[Record | Skip]:
        if isinstance(self.source, Listing):
            first = part * self.shard_size
            yield from (self.source[i] for i in self.numbers[first : first + self.shard_size])
            return
        most = self.options.max_samples
        if most:  # evenly of all parts
            most = most // self.parts + (part < most % self.parts)
            if not most:
                return
        for number, record in enumerate(self.source.read(part), 1):
            yield record
            if number == most:
                return

    def _make(self, shard: str, records: list[Record | Skip]) -> None:
        skipped, filtered, chosen = [], {}, []
        for number, record in enumerate(records):
            verdict: Size | Skip | str = record if isinstance(record, Skip) else sift(record, self.options)
            if isinstance(verdict, Skip):
                skipped.append(verdict)
            elif isinstance(verdict, str):
                filtered[verdict] = filtered.get(verdict, 0) + 1
            else:
                chosen.append((number, record, verdict))
        made = make(self.encoder, chosen)
        for skip in (*skipped, *made.bad):
            logging.warning("skipped %s: %s", skip.name, skip.reason)
        write_shard(self.folder, shard, made, skipped, filtered)
        self.made += len(made.good)

    def _count(self, index: dict) -> None:
        self.skipped += [Skip(*one) for one in index["skipped"]]
        self.kept += len(index["samples"])
        self.cut += index.get("cut", 0)
        for reason, count in index["filtered"].items():
            self.filtered[reason] = self.filtered.get(reason, 0) + count
        self.seen += len(index["samples"]) + len(index["skipped"]) + sum(index["filtered"].values())
        if self.seen >= FEW:
            check_skipped(self.skipped, self.seen, self.options, self.spec)

    def missing(self) -> int:
        """Parts, of all processes, that are not finished."""
        return sum(not (self.folder / f"{part:06d}.{SHARDS}").is_file() for part in range(self.parts))


def _chosen(source: Listing, count: int) -> Sequence[int]:
    """The numbers of the records that --max-samples takes of a listing: those that training without this takes."""
    if source.shuffled:
        return range(count)
    return sorted(torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count].tolist())


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, DataOptions]:
    """The command line; `--some-flag` and `--some_flag` are one, and the data's flags are distill.py's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, **options) -> None:
        parser.add_argument(*sorted({f"--{name}", f"--{name.replace('-', '_')}"}), **options)

    add("teacher", required=True, help="as distill.py's: whose VAE and text encoder (for prompts, whose pictures)")
    add(
        "data",
        type=with_home,
        help="a folder, tars, a dataset, a list of prompts: docs/data.md; none: what suits the teacher",
    )
    add("output-dir", type=Path, required=True, help="the prepared set; give it to distill.py as --data")
    add("shard", help="i/n: do the i-th of n equal shares, counted from 0 (default: RANK and WORLD_SIZE, or all)")
    add("shard-size", type=int, default=256, help="records of a shard (default: 256)")
    add("device", help="default: the GPU number LOCAL_RANK, or the CPU")
    add("dtype", choices=sorted(DTYPES), default="fp32", help="type that VAE and text encoder run in (default: fp32)")
    add("teacher-dtype", choices=sorted(DTYPES), help="type of the UNet, for prompts (default: bf16 on a GPU)")
    add("teacher-lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="merged into it, as distill.py's")
    add("clip-skip", type=int, default=1, help="as distill.py's (default: 1)")
    add("revision", help="branch, tag or commit of a teacher on the Hub")
    add("download-teacher", action="store_true", help="fetch the teacher if it is not on this machine")
    group = parser.add_argument_group("data")
    add_flags(group, DataOptions)
    add_flags(parser.add_argument_group("kept paths"), PathSettings)
    given = parser.parse_args(arguments)
    try:
        if given.shard_size < 1:
            raise ValueError(f"--shard-size must be 1 or more, got {given.shard_size}")
        given.rank, given.world = share(given.shard)
        given.kept = PathSettings(**_of(given, PathSettings))
        return given, DataOptions(**_of(given, DataOptions))
    except ValueError as error:
        parser.error(str(error))


def _of(given: argparse.Namespace, kind: type) -> dict[str, Any]:
    """What is given of a dataclass's fields."""
    return {entry.name: vars(given)[entry.name] for entry in fields(kind) if entry.name in vars(given)}


def share(shard: str | None) -> tuple[int, int]:
    """(i, n) of --shard, or of the launcher's environment."""
    if not shard:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first, _, of = shard.partition("/")
    if not (first.isdigit() and of.isdigit() and int(first) < int(of)):
        raise ValueError(f"--shard must be i/n with i from 0 to n-1, got {shard}")
    return int(first), int(of)


def prepare(given: argparse.Namespace, options: DataOptions) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device(given.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"))
    place = resolve(given.teacher, given.revision, given.download_teacher)
    unet = given.teacher_dtype or ("bf16" if device.type == "cuda" else None)
    unet_dtype = DTYPES[unet] if unet else None
    pipeline = load_pipeline(place, "cpu", unet_dtype=unet_dtype, loras=given.teacher_lora, clip_skip=given.clip_skip)
    pipeline.source = given.teacher
    spec = given.data or default_spec(pipeline)
    options = at_resolution(options, pipeline)
    pipeline.encoders_to(device, DTYPES[given.dtype])
    if given.kept.paths:
        pipeline.unet.to(device)
        _keep_paths(given, spec, pipeline, options)
        return
    work = Preparation(spec, pipeline, options, given.output_dir, given.shard_size, given.rank, given.world)
    if is_drawn(work.source):
        pipeline.unet.to(device)
    quiet = None if given.rank == 0 else True
    for _ in tqdm(work.run(), "shards", disable=quiet):
        pass
    filtered = "".join(f", {count} {reason}" for reason, count in work.filtered.items())
    filtered += f", {work.cut} with captions cut at 77 tokens" if work.cut else ""
    print(f"{work.kept} samples ({work.made} made now), {len(work.skipped)} skipped{filtered} -> {given.output_dir}")
    for skip in work.skipped:
        print(f"  skipped {skip.name}: {skip.reason}")
    if work.lost:
        raise ConnectionError(
            f"{len(work.lost)} of {work.parts} parts could not be read to their end; the first: {work.lost[0]}. Run "
            f"the same command again: it goes on with them"
        )
    if left := work.missing():
        print(f"{left} of {work.parts} parts are left to the other processes")
    else:
        total = sum(len(index["samples"]) for _, index in shards_of(given.output_dir, range(work.parts)))
        print(f"finished: {total} samples. Train on them with --data {given.output_dir}")


def _keep_paths(given: argparse.Namespace, spec: str, pipeline: Pipeline, options: DataOptions) -> None:
    preset, settings = TEACHERS.get(given.teacher), given.kept
    if settings.guidance_scale is None:
        settings = replace(settings, guidance_scale=preset.guidance_scale if preset else Recipe.guidance_scale)
    data = open_data(spec, pipeline, options, GROUP, settings.path_seed + 1)
    if isinstance(data, StreamData):
        raise ValueError(
            f"--paths takes samples by number, and {spec} is a stream: prepare that first, without --paths"
        )
    work = PathPreparation(data, pipeline, settings, given.output_dir, given.shard_size, given.rank, given.world)
    for _ in tqdm(work.run(), "shards", len(work.mine), disable=None if given.rank == 0 else True):
        pass
    print(
        f"{work.kept} paths ({work.made} solved now), {len(work.skipped)} skipped, {settings.unet_forwards} UNet "
        f"evaluations in all -> {given.output_dir}"
    )
    if left := work.missing():
        print(f"{left} of {work.parts} parts are left to the other processes")
    else:
        print(f"finished. Train on them with --paths {given.output_dir}")


def grouped(items: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` neighbours; the last may be shorter."""
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


def main() -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sys.stdout.reconfigure(errors="backslashreplace")  # the names of files need not be UTF-8
    given, options = parse()
    try:
        prepare(given, options)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}. What is finished is kept: make room, and run the same command again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted. What is finished is kept: run the same command again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
