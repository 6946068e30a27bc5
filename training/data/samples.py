"""From data to samples by index: records made into samples beforehand or on the way, and prepared shards."""

from __future__ import annotations

import json
import logging
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from splam_core import read_json, reading
from splam_core.order import Order, held_out

from ..files import shipped, write_whole
from ..models.pipeline import Pipeline
from .base import (
    Share,
    TrainingData,
    cache_folder,
    cache_settings,
    check_skipped,
    encoder_of,
    is_drawn,
    sift,
)
from .latents import (
    GROUP,
    META,
    NO_PROMPT,
    Sample,
    Size,
    make,
    read_index,
    read_sample,
    write_shard,
)
from .options import DataOptions
from .sources import Listing, Skip, digest

log = logging.getLogger(__name__)
PROMPTS = shipped("assets") / "prompts.txt"  # what is trained on without --data
MEMORY = 2**30  # bytes of samples that are kept in memory
DIGITS = 15  # of a sample's SHA-256 that are kept in memory
MOST_PARTS = 10_000_000  # of a prepared set
SHARDS = "shards.json"  # of a prepared part: how many there are, written when all of them are there


class KnownData(TrainingData):
    """Data whose samples are known one by one; a subclass says how to get one."""

    def _arrange(self, buckets: dict[Size, Tensor]) -> None:
        """Take the held-out samples from the end of the largest bucket, and put the rest in order."""
        total = sum(map(len, buckets.values()))
        if not total:
            left_out = self._left_out() or ", which is empty"
            raise ValueError(f"{self.spec} holds nothing to train on{left_out}. Check the filters of the options.")
        largest = max(buckets, key=lambda size: (len(buckets[size]), size))
        scenes = self.spec == "embedded" and total > self.options.num_held_out  # made for it, beyond the pool
        most, size = self.options.num_held_out, len(buckets[largest])
        held = min(most, size - 1) if scenes else held_out(total, size, most)
        kept = len(buckets[largest]) - held
        self._held, rest = buckets[largest][kept:], buckets[largest][:kept]
        self._buckets = [*(ids for size, ids in sorted(buckets.items()) if size != largest), rest]
        self._order = Order([len(ids) for ids in self._buckets], self.batch_size, self.seed)
        self._count = total - held

    def _samples(self, indices: range) -> list[Sample]:
        return [self._good(self._buckets[bucket], position) for bucket, position in map(self._order.place, indices)]

    def _held_out(self, n: int) -> list[Sample]:
        ids = self._held if len(self._held) else self._buckets[-1]
        found = (self._get(int(one)) for one in ids[:n])
        return [sample for sample in found if sample is not None] or [self._good(ids, 0)]

    def _good(self, ids: Tensor, position: int) -> Sample:
        """The sample at a position or, in place of one that proved to be bad, the next of its bucket."""
        for further in range(len(ids)):
            sample = self._get(int(ids[(position + further) % len(ids)]))
            if sample is not None:
                return sample
        raise ValueError(f"{self.spec}: every picture of a bucket is bad; the last: {self.skipped[-1]}")

    def _get(self, number: int) -> Sample | None:
        raise NotImplementedError

    def _counted(self, shown: Callable[[object], str]) -> str:
        buckets = f" in {len(self._buckets)} aspect buckets" if len(self._buckets) > 1 else ""
        return f"{shown(self.spec)}: {self._count} samples{buckets}, {len(self._held)} held out{self._left_out()}"


class RecordData(KnownData):
    """Records in any order, made into samples in fixed groups when first asked for, and kept."""

    def __init__(
        self, source: Listing, spec: str, pipeline: Pipeline, options: DataOptions, batch_size: int, seed: int
    ) -> None:
        super().__init__(spec, options, batch_size, seed, pipeline.device)
        self.source, self.encoder = source, encoder_of(pipeline, options)
        self._met: dict[int, tuple[frozenset[int], int]] = {}  # of a group: the good ones, how many captions were cut
        if options.caption_drop:
            self.no_prompt = self.encoder.no_prompt()
        order = torch.arange(len(source))
        if not source.shuffled:  # once and for all: the cache, and what is held out, do not depend on the seed
            order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
        self._kept: list[tuple[int, Size]] = []
        self._sift(order[: options.max_samples].tolist())
        sizes = {size: [] for size in options.sizes}
        for number, (_, size) in enumerate(self._kept):
            sizes[size].append(number)
        self._arrange({size: torch.tensor(ids) for size, ids in sizes.items() if ids})
        self.drawn, self._closed, self._writes = is_drawn(source), False, True
        self._memory: OrderedDict[int, dict[int, Sample]] = OrderedDict()
        self._pinned: dict[int, dict[int, Sample]] = {}  # groups that are nowhere else and cannot be made again
        self._bytes = self.encoder.bytes_per_sample((options.resolution,) * 2)
        self.folder = self._choose_folder(pipeline)

    def _sift(self, numbers: Sequence[int]) -> None:
        with ThreadPoolExecutor(8) as pool:
            verdicts = pool.map(self._verdict, numbers)
            progress = tqdm(
                verdicts, f"reading {self.spec}", len(numbers), disable=None if len(numbers) > 2000 else True
            )
            for number, verdict in zip(numbers, progress, strict=True):
                if isinstance(verdict, Skip):
                    self._skip(verdict)
                elif isinstance(verdict, str):
                    self.filtered[verdict] = self.filtered.get(verdict, 0) + 1
                else:
                    self._kept.append((number, verdict))
        self._seen = len(numbers)
        check_skipped(self.skipped, self._seen, self.options, self.spec)

    def _verdict(self, number: int) -> Size | Skip | str:
        record = self.source[number]
        return record if isinstance(record, Skip) else sift(record, self.options)

    def _choose_folder(self, pipeline: Pipeline) -> Path | None:
        """Where samples are kept on disk: nowhere if memory holds them cheaply, or half of the free disk does not."""
        needed = len(self._kept) * self._bytes
        if not self.options.cache_latents or (self.spec == "embedded" and needed <= MEMORY):
            return None
        base = Path(self.options.cache_dir or cache_folder())
        settings = cache_settings(pipeline, self.options, self.source)
        folder = base / digest(settings)
        if not folder.is_dir():
            base.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(base).free
            if needed > free / 2:
                log.warning(
                    "%s needs %.1f GB as latents, more than half of the %.1f GB that are free in %s: not cached. "
                    "--cache-dir names another place.", self.spec, needed / 1e9, free / 1e9, base,
                )  # fmt: skip
                return None
            folder.mkdir(exist_ok=True)
            write_whole(folder / "settings.json", json.dumps({"spec": self.spec, **settings}, indent=2).encode())
        return folder

    @property
    def cut(self) -> int:
        return sum(cut for _, cut in self._met.values())

    @property
    def needs_encoders(self) -> bool:
        return not self._closed

    def make(self, samples: int, held_out: int, share: Share) -> None:
        """See TrainingData. Pictures of files that neither disk nor memory can keep are left for when they are needed.

        Raises ValueError for pictures of the teacher's that memory cannot keep.
        """
        places = self._places(samples, share)
        held = (self._held if len(self._held) else self._buckets[-1])[:held_out].tolist()
        groups = sorted({int(self._buckets[b][p]) // GROUP for b, p in places} | {number // GROUP for number in held})
        keeps = self.folder is not None or self._fits(len(groups))
        if keeps:
            # What lies on disk is made by shares; in memory each process makes its own.
            for group in self._progress(groups[share.rank :: share.world] if self.folder else groups):
                self._meet(group)
        share.wait()
        if not keeps:
            return
        for group in groups:  # what another process left on a disk of its own is made here, too
            self._meet(group)
        for bucket, position in places:
            self._stand_in(self._buckets[bucket], position)
        if held and not any(number % GROUP in self._meet(number // GROUP) for number in held):
            self._stand_in(self._held if len(self._held) else self._buckets[-1], 0)
        self._closed = self.drawn or self._writes

    def _places(self, samples: int, share: Share) -> list[tuple[int, int]]:
        """(bucket, position) of all that a run's first samples are; of this process's alone, if nothing is on disk."""
        each, found = max(1, self.batch_size // share.world), dict[tuple[int, int], None]()
        for index in range(samples):
            if self.folder or index // each % share.world == share.rank:
                found[self._order.place(index)] = None
                if len(found) == self._count:
                    break
        return list(found)

    def _fits(self, groups: int) -> bool:
        """Whether that many can be kept in memory. Raises ValueError if they must be and cannot."""
        needed = groups * GROUP * self._bytes
        if self.drawn and needed > max(MEMORY, psutil.virtual_memory().available / 2):
            raise ValueError(
                f"{self.spec}: the teacher's pictures take {needed / 1e9:.1f} GB as latents, more than memory can "
                f"keep. Name a --cache-dir with room for them, or take fewer with --max-samples."
            )
        return self.drawn or needed <= MEMORY

    def _progress(self, groups: Sequence[int]) -> Iterator[int]:
        what = "drawing" if self.drawn else "encoding"
        return iter(tqdm(groups, f"{what} {self.spec}", disable=None if len(groups) > 8 else True))

    def _stand_in(self, ids: Tensor, position: int) -> None:
        """Make what `_good` takes in place of a bad sample."""
        for further in range(len(ids)):
            group, at = divmod(int(ids[(position + further) % len(ids)]), GROUP)
            if at in self._meet(group):
                return

    def _meet(self, group: int) -> frozenset[int]:
        """The positions of a group's good samples, which are made and kept if they are not yet."""
        if group not in self._met:
            index = read_index(self.folder, f"{group:08d}") if self.folder else None
            if index is not None:
                self._note(group, index)
            else:
                self._remember(group, self._make(group))
        return self._met[group][0]

    def _note(self, group: int, index: dict) -> None:
        self._met[group] = frozenset(row["number"] for row in index["samples"]), index.get("cut", 0)
        self._skip_again([Skip(*one) for one in index["skipped"]])

    def _get(self, number: int) -> Sample | None:
        group, position = divmod(number, GROUP)
        if group in self._pinned:
            return self._pinned[group].get(position)
        if group not in self._memory:
            self._remember(group, self._group(group))
        if group in self._memory:
            self._memory.move_to_end(group)
        return (self._memory.get(group) or self._pinned.get(group, {})).get(position)

    def _remember(self, group: int, samples: dict[int, Sample]) -> None:
        if self.drawn and (self.folder is None or read_index(self.folder, f"{group:08d}") is None):
            self._pinned[group] = samples
            return
        self._memory[group] = samples
        if len(self._memory) * GROUP * self._bytes > MEMORY:
            self._memory.popitem(last=False)

    def _group(self, group: int) -> dict[int, Sample]:
        """Position and sample of one group's good records: from disk, or made now."""
        shard = f"{group:08d}"
        index = read_index(self.folder, shard) if self.folder else None
        if index is None:
            return self._make(group)
        self._note(group, index)
        return {
            row["number"]: read_sample(self.folder, shard, row["at"], row.get("sha256")) for row in index["samples"]
        }

    def _make(self, group: int) -> dict[int, Sample]:
        if self.drawn and self._closed:
            raise ValueError(
                f"{self.spec}: {self.source[self._kept[group * GROUP][0]].name} was not drawn before training, or its "
                f"file in {self.folder} is gone. Start again with --resume-from-checkpoint latest."
            )
        chosen = self._kept[group * GROUP : (group + 1) * GROUP]
        made = make(self.encoder, [(at, self.source[number], size) for at, (number, size) in enumerate(chosen)])
        if self.folder and self._writes:
            try:
                write_shard(self.folder, f"{group:08d}", made)
            except OSError as error:
                log.warning("latents are no longer cached: %s: %s", self.folder, error)
                self._writes = False
        self._met[group] = frozenset(at for at, _, _ in made.good), made.cut
        self._skip_again(made.bad)
        return {at: sample for at, _, sample in made.good}

    def _skip_again(self, bad: list[Skip]) -> None:
        for one in bad:
            if one not in self.skipped:
                self._skip(one)
                check_skipped(self.skipped, self._seen, self.options, self.spec)

    def describe(self, shown: Callable[[object], str] = str) -> str:
        size = f"{len(self._kept) * self._bytes / 1e9:.2g} GB"
        where = f"kept in {shown(self.folder)}" if self.folder else "kept in memory, up to 1 GB of them"
        made = "made before training" if self._closed else "made when first needed"
        said = f"{self._counted(shown)}; {made}, {size} of latents and text embeddings {where}"
        if self.spec == str(PROMPTS):
            said += (
                ". These are pictures that the teacher makes of the shipped prompts; the paper trains on real ones: "
                "name yours with --data"
            )
        return said


class PreparedData(KnownData):
    """What training/prepare.py left: nothing is encoded any more."""

    needs_encoders = False

    def __init__(self, folder: Path, pipeline: Pipeline, options: DataOptions, batch_size: int, seed: int) -> None:
        super().__init__(str(folder), options, batch_size, seed, pipeline.device)
        with damaged(folder):
            self._read(folder, pipeline, options)

    def _read(self, folder: Path, pipeline: Pipeline, options: DataOptions) -> None:
        self.folder, self.meta = folder, read_meta(folder)
        if "path_steps" in self.meta:
            raise ValueError(f"{folder} holds paths of a teacher. Give it as --paths, without --data.")
        fingerprint = pipeline.fingerprint()
        if self.meta["fingerprint"] != fingerprint:
            raise ValueError(
                f"{folder} was prepared with another VAE or text encoder ({self.meta['fingerprint']}) than this "
                f"teacher's ({fingerprint}). Prepare it again with this --teacher, in another folder."
            )
        missing = [part for part in range(self.meta["parts"]) if not (folder / f"{part:06d}.{SHARDS}").is_file()]
        if missing:
            raise ValueError(
                f"{folder} is not finished: {len(missing)} of {self.meta['parts']} parts are missing. Run the "
                f"prepare.py command that made it once more; it goes on where it stopped."
            )
        if options.caption_drop:
            self.no_prompt = load_file(folder / NO_PROMPT)
        self.shards: list[str] = []
        rows, sizes = [], []
        for shard, index in shards_of(folder, range(self.meta["parts"])):
            rows += [
                (len(self.shards), *row["at"], int(row["sha256"][:DIGITS], 16) if "sha256" in row else -1)
                for row in index["samples"]
            ]
            sizes += [tuple(side * pipeline.vae_scale for side in row["shape"][-2:]) for row in index["samples"]]
            self.shards.append(shard)
            self.cut += index.get("cut", 0)
            self.skipped += [Skip(*one) for one in index["skipped"]]
            for reason, count in index["filtered"].items():
                self.filtered[reason] = self.filtered.get(reason, 0) + count
        self._rows = torch.tensor(rows, dtype=torch.int64)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: options.max_samples].tolist()
        buckets: dict[Size, list[int]] = {}
        for number in order:
            buckets.setdefault(sizes[number], []).append(number)
        self._arrange({size: torch.tensor(ids) for size, ids in buckets.items()})

    def _get(self, number: int) -> Sample:
        shard, start, size, digits = self._rows[number].tolist()
        return read_sample(
            self.folder, self.shards[shard], (start, size), None if digits < 0 else f"{digits:0{DIGITS}x}"
        )

    def describe(self, shown: Callable[[object], str] = str) -> str:
        return f"{self._counted(shown)}; prepared at {self.meta['resolution']} px, from {shown(self.meta['spec'])}"


def damaged(folder: Path) -> AbstractContextManager[None]:
    """What goes wrong inside because of a prepared set's small files is a ValueError that names its folder."""
    return reading(folder, "its files do not fit together", "Delete it, and prepare it again")


def read_meta(folder: Path) -> dict:
    meta = read_json(folder / META)
    if not isinstance(meta.get("parts"), int) or not 0 <= meta["parts"] <= MOST_PARTS:
        raise ValueError(f"{folder / META}: expected a number of parts, found {meta.get('parts')!r:.40}")
    return meta


def claim(folder: Path, meta: dict) -> bool:
    """Whether a set that is to be prepared is new; one that was begun must be of the same `meta`, but for its spec's
    spelling. Makes the folder, and writes nothing into it. Raises ValueError for another set's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / META).is_file():
        return True
    found = read_meta(folder)
    wrong = [f"{key} {found.get(key)} (now {value})" for key, value in meta.items() if found.get(key) != value]
    wrong = [one for one in wrong if not one.startswith("spec ")]  # a path may be written in several ways
    if wrong:
        raise ValueError(
            f"{folder} was begun with other settings or data: {', '.join(wrong)}. Take another --output-dir, "
            f"or the settings it was begun with."
        )
    return False


def shards_of(folder: Path, parts: range) -> Iterator[tuple[str, dict]]:
    """The shards of the finished parts, with their indices. Raises ValueError for one that is gone."""
    for part in parts:
        done = folder / f"{part:06d}.{SHARDS}"
        for number in range(_count(done) if done.is_file() else 0):
            shard = f"{part:06d}-{number:05d}"
            index = read_index(folder, shard)
            if index is None:
                raise ValueError(f"{folder / shard}.tar or .json is gone: delete {done.name} and prepare it again")
            yield shard, index


def _count(done: Path) -> int:
    """How many shards a finished part has."""
    text = done.read_bytes()
    if not text.isdigit() or len(text) > 9:
        raise ValueError(f"{done}: expected a number of shards, found {text[:40]!r}. Delete it and prepare it again")
    return int(text)
