"""Kept paths: the teacher's paths from the samples of any data, solved once and kept in shards, and read again.

Path i of a set is a function of the teacher, the data, the settings and i alone, whoever solved it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splam_core import SOLVERS, add_noise, draws, read_json, solve_paths
from splam_core.order import Order
from splam_core.paths import draw_starts
from splam_core.recipe import on_device

from ..files import write_whole
from ..flags import flag
from ..models.pipeline import DTYPES, Conditioning, Pipeline
from ..models.sampling import teacher_function
from .base import TrainingData
from .latents import GROUP, META, Made, Sample, read_index, read_sample, write_shard
from .options import DataOptions
from .samples import SHARDS, KnownData, claim, damaged, read_meta, shards_of
from .sources import Record, Skip


@dataclass(frozen=True, kw_only=True)
class PathSettings:
    """How paths are solved: flags of prepare.py. Raises ValueError, in their words, for settings that make no sense."""

    paths: int = flag(0, "solve so many paths of the teacher, for distill.py --paths; 0: prepare samples")
    path_steps: int = flag(8, "of the solver, evenly spaced in t from the path's beginning to 0")
    path_solver: str = flag("dpm-solver++", "the teacher's", SOLVERS)
    path_top_share: float = flag(0.5, "share of paths that begin at the last timestep, where sampling begins")
    timestep_power: float = flag(0.5, "the others begin in proportion to t to this power")
    guidance_scale: float | None = flag(None, "w of eq. 18; none: the teacher's, as distill.py's")
    path_seed: int = flag(0, "of noise and beginnings, and of which sample comes when")

    def __post_init__(self) -> None:
        if self.paths < 0 or self.path_steps < 1:
            found = f"got {self.paths} and {self.path_steps}"
            raise ValueError(f"--paths must be 0 or more and --path-steps 1 or more, {found}")
        if not 0 <= self.path_top_share <= 1:
            raise ValueError(f"--path-top-share must be between 0 and 1, got {self.path_top_share}")
        if self.timestep_power < 0:
            raise ValueError(f"--timestep-power must be 0 or more, got {self.timestep_power}")

    @property
    def unet_forwards(self) -> int:
        """Of all paths but the held-out ones; a guided step counts 2."""
        return self.paths * self.path_steps * (1 if self.guidance_scale == 1 else 2)


class PathPreparation:
    """One process's share of a set of paths: every `world`-th shard of it, from the `rank`-th on."""

    def __init__(
        self,
        data: TrainingData,
        pipeline: Pipeline,
        settings: PathSettings,
        folder: Path,
        shard_size: int = 256,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """data: opened with batches of GROUP. shard_size is rounded up to whole ones. settings: with a w."""
        self.data, self.pipeline, self.settings, self.folder = data, pipeline, settings, folder
        self.shard_size = math.ceil(shard_size / GROUP) * GROUP
        self.parts = math.ceil(settings.paths / self.shard_size) + 1  # the last is of held-out samples
        self.mine = range(rank, self.parts, world)
        self.made, self.kept = 0, 0
        self.skipped: list[Skip] = []
        self.negative = pipeline.unconditional()
        self._claim()

    def _claim(self) -> None:
        """Write what the folder is of, or see that it is that already. Raises ValueError for another set's folder."""
        meta = {
            **vars(self.settings),
            "parts": self.parts,
            "shard_size": self.shard_size,
            "spec": self.data.spec,
            "data_seed": self.data.seed,
            "fingerprint": self.pipeline.fingerprint(),
            "teacher": self.pipeline.unet_fingerprint(),
            **{
                name: getattr(self.data.options, name) for name in ("resolution", "flip", "caption_drop", "cache_dtype")
            },
            "num_held_out": self.data.options.num_held_out,
        }
        if claim(self.folder, meta):
            write_whole(self.folder / META, json.dumps(meta, indent=2).encode())

    def run(self) -> Iterator[str]:
        """Solve what is missing; yields the name of each shard."""
        for part in self.mine:
            done, shard = self.folder / f"{part:06d}.{SHARDS}", f"{part:06d}-00000"
            if read_index(self.folder, shard) is None:
                for left in self.folder.glob(f"{part:06d}*.partial"):  # a part has one maker, which was killed
                    left.unlink(missing_ok=True)
                write_shard(self.folder, shard, self._made(part))
            index = read_index(self.folder, shard)
            self.kept += len(index["samples"]) if part < self.parts - 1 else 0
            self.skipped += [Skip(*one) for one in index["skipped"]]
            if not done.is_file():
                write_whole(done, json.dumps(1).encode())
            yield shard

    def missing(self) -> int:
        """Shards, of all processes, that are not finished."""
        return sum(not (self.folder / f"{part:06d}.{SHARDS}").is_file() for part in range(self.parts))

    def _made(self, part: int) -> Made:
        first = part * self.shard_size
        last = min(first + self.shard_size, self.settings.paths)
        good: list[tuple[int, Record, Sample]] = []
        bad: list[Skip] = []
        for index, sample in self._held_out() if part == self.parts - 1 else self._paths(range(first, last)):
            name = f"path {index}"
            broken = next((key for key, value in sample.items() if not value.isfinite().all()), None)
            if broken:
                bad.append(Skip(name, f"{broken} not finite in {self.data.options.cache_dtype}"))
            else:
                good.append((index, Record(name, "", lambda: None), sample))
        if not good:
            raise ValueError(f"no path is finite; the first: {bad[0]}. It comes of the teacher or of the data.")
        self.made += len(good) if part < self.parts - 1 else 0
        return Made(good, bad, 0)

    def _paths(self, indices: range) -> Iterator[tuple[int, Sample]]:
        for start in range(
            indices.start, indices.stop, GROUP
        ):  # whole ones: what is cut off of the last is thrown away
            found = self._solved(*self.data.batch(range(start, start + GROUP)), range(start, start + GROUP))
            yield from ((index, sample) for index, sample in found if index in indices)

    def _held_out(self) -> Iterator[tuple[int, Sample]]:
        latents, conditioning = self.data.held_out(self.data.options.num_held_out)
        first = self.parts * self.shard_size  # other noise than any path's of the first part
        for rows in torch.arange(len(latents)).split(GROUP):
            told = {key: value[rows] for key, value in conditioning.items()}
            yield from self._solved(latents[rows], told, range(first + int(rows[0]), first + int(rows[-1]) + 1))

    @torch.no_grad()
    def _solved(self, latents: Tensor, conditioning: Conditioning, indices: range) -> Iterator[tuple[int, Sample]]:
        """The paths from samples with the noise and the start of these indices, each with its text embeddings."""
        settings, schedule = self.settings, self.pipeline.schedule
        teacher = teacher_function(self.pipeline, conditioning, self.negative, settings.guidance_scale)
        drawn = draws(settings.path_seed, indices, latents.shape[1:])
        noise, u, _ = (on_device(part, latents.device) for part in drawn)
        t = draw_starts(u, schedule.num_train_timesteps, settings.path_top_share, settings.timestep_power)
        x_t = add_noise(latents, noise, t, schedule)
        points, timesteps = solve_paths(teacher, x_t, t, settings.path_steps, schedule, settings.path_solver)
        dtype = DTYPES[self.data.options.cache_dtype]
        for row, index in enumerate(indices):
            told = {
                key: value[row].to(value.dtype if key == "time_ids" else dtype) for key, value in conditioning.items()
            }
            sample = {"latents": points[row].to(dtype), **told, "timesteps": timesteps[row]}
            yield index, {key: value.cpu().contiguous() for key, value in sample.items()}


class PathData(KnownData):
    """A set of kept paths: what `batch` gives for latents are the points of paths [B, n+1, C, h, w], and beside the
    UNet's arguments there is "timesteps" [B, n+1]. Captions dropped and pictures mirrored are so for good."""

    needs_encoders = False

    def __init__(self, folder: Path, pipeline: Pipeline, options: DataOptions, batch_size: int, seed: int) -> None:
        super().__init__(str(folder), options, batch_size, seed, pipeline.device)
        self.folder = folder
        self.meta, self.whole = read_path_meta(folder), True
        self._last = pipeline.schedule.num_train_timesteps
        with damaged(folder):
            self._read(pipeline)

    def _read(self, pipeline: Pipeline) -> None:
        folder, meta = self.folder, self.meta
        for what, wanted in (("fingerprint", pipeline.fingerprint()), ("teacher", pipeline.unet_fingerprint())):
            if meta[what] != wanted:
                part = "UNet" if what == "teacher" else "VAE or text encoder"
                raise ValueError(
                    f"{folder} holds paths of another teacher: its {part} is {meta[what]}, this one's {wanted}. Solve "
                    f"them with this --teacher, in another folder."
                )
        missing = [part for part in range(meta["parts"]) if not (folder / f"{part:06d}.{SHARDS}").is_file()]
        if missing:
            raise ValueError(
                f"{folder} is not finished: {len(missing)} of {meta['parts']} parts are missing. Run the prepare.py "
                f"command that made it once more; it goes on where it stopped."
            )
        self.shards: list[str] = []
        self._rows: list[tuple[int, list[int], str]] = []
        held: list[int] = []
        buckets: dict[tuple[int, ...], list[int]] = {}
        for part in range(meta["parts"]):
            for shard, index in shards_of(folder, range(part, part + 1)):
                for row in index["samples"]:
                    place = held if part == meta["parts"] - 1 else buckets.setdefault(tuple(row["shape"]), [])
                    place.append(len(self._rows))
                    self._rows.append((len(self.shards), row["at"], row["sha256"]))
                self.shards.append(shard)
                self.skipped += [Skip(*one) for one in index["skipped"]]
        if not buckets:
            raise ValueError(f"{folder} holds no paths to train on: its files do not fit together. Solve them again.")
        self._held = torch.tensor(held)
        self._buckets = [torch.tensor(ids) for _, ids in sorted(buckets.items())]
        self._order = Order([len(ids) for ids in self._buckets], self.batch_size, self.seed)
        self._count = sum(map(len, self._buckets))

    def _get(self, number: int) -> Sample:
        shard, at, sha256 = self._rows[number]
        sample = read_sample(self.folder, self.shards[shard], at, sha256)
        points, timesteps = sample.get("latents"), sample.get("timesteps")
        count = self.meta["path_steps"] + 1
        if (
            points is None
            or timesteps is None
            or (points.ndim, len(points), timesteps.shape, timesteps.dtype) != (4, count, (count,), torch.int64)
            or not 0 <= timesteps.min() <= timesteps.max() < self._last
        ):
            raise ValueError(
                f"{self.folder / self.shards[shard]}.tar holds no paths of {count} points with timesteps below "
                f"{self._last}: delete it, and solve it again."
            )
        return sample

    def batch(self, indices: range) -> tuple[Tensor, Conditioning]:
        """See the class, and after `latents_alone` the ends of these paths [B, C, h, w] and their text embeddings."""
        found = super().batch(indices)
        return found if self.whole else _ends(*found)

    def latents_alone(self) -> None:
        self.whole = False

    def held_out(self, n: int) -> tuple[Tensor, Conditioning]:
        """The ends of the first n held-out paths, and their text embeddings."""
        return _ends(*super().held_out(n))

    def _collate(self, samples: list[Sample], indices: range | None) -> tuple[Tensor, Conditioning]:
        stacked = {key: torch.stack([one[key] for one in samples]).to(self.device) for key in samples[0]}
        points, timesteps = stacked.pop("latents"), stacked.pop("timesteps")
        return points.float(), {**{key: value.float() for key, value in stacked.items()}, "timesteps": timesteps}

    def describe(self, shown: Callable[[object], str] = str) -> str:
        meta = self.meta
        return (
            f"{self._counted(shown)}; paths of {meta['path_steps']} steps of {meta['path_solver']}, w "
            f"{meta['guidance_scale']:g}, from {shown(meta['spec'])}"
        )


def _ends(points: Tensor, conditioning: Conditioning) -> tuple[Tensor, Conditioning]:
    return points[:, -1], {key: value for key, value in conditioning.items() if key != "timesteps"}


def read_path_meta(folder: Path) -> dict[str, Any]:
    """What a set of paths was made with. Raises FileNotFoundError or ValueError for a folder that is none."""
    if not (folder / META).is_file():
        raise FileNotFoundError(f"--paths {folder}: expected a folder that prepare.py --paths filled, found no {META}.")
    meta = read_json(folder / META)
    if "path_steps" not in meta:
        raise ValueError(f"--paths {folder}: it holds prepared samples, no paths. Give it as --data.")
    number = {"guidance_scale": (int, float), "path_steps": int}
    wrong = [key for key, kind in number.items() if not isinstance(meta.get(key), kind)]
    texts = [key for key in ("fingerprint", "teacher", "path_solver", "spec") if not isinstance(meta.get(key), str)]
    if wrong or texts:
        raise ValueError(f"{folder / META} lacks {', '.join(wrong + texts)}: solve the paths again, in another folder.")
    return read_meta(folder)
