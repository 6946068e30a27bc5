"""A folder of generated pictures that can be stopped and gone on with, by one process or by several."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import whole_file

SETTINGS = "settings.json"

# Indices of a batch -> its pictures, uint8 [B, 3, H, W].
Source = Callable[[range], Tensor]


class PictureFolder:
    """000000.png, 000001.png, ..., each written whole or not at all, and settings.json, which says what they are of.

    Raises ValueError if the folder holds pictures of other settings, or pictures without any.
    """

    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / SETTINGS
        settings = json.loads(json.dumps(settings))  # as it will be read back
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            other = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
            if other:
                differences = "; ".join(f"{key} {found.get(key)!r} there, {settings.get(key)!r} here" for key in other)
                raise ValueError(
                    f"{file} says that the pictures of this folder were made with other settings ({differences}). "
                    f"Name another --output-dir, or empty this one."
                )
        elif any(folder.glob("*.png")):
            raise ValueError(
                f"{folder} holds pictures and no {SETTINGS} that says how they were made: name another --output-dir"
            )
        else:
            with whole_file(file) as place:
                place.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those whose picture is not there, or is not a whole PNG file."""
        return [index for index in indices if not is_whole_png(self.path(index))]

    def fill(self, source: Source, batches: Sequence[range], report: Callable[[int], None] | None = None) -> None:
        """Make what is missing. report(n) is called after each batch with its size.

        A batch with a missing picture is drawn whole, so that all of it is what an undisturbed run gives.
        """
        for batch in batches:
            missing = self.missing(batch)
            if missing:
                pictures = source(batch)
                for index in missing:
                    self.save(index, pictures[index - batch.start])
            if report:
                report(len(batch))

    def save(self, index: int, picture: Tensor) -> None:
        with whole_file(self.path(index)) as place:
            Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(place, format="PNG")

    def wait(self, count: int, patience: float = 1800.0, poll: float = 2.0) -> None:
        """Until other processes have written pictures 0 .. count-1.

        Raises TimeoutError, saying what to do, when no new picture has come for `patience` seconds.
        """
        left, since = self.missing(range(count)), time.monotonic()
        while left:
            time.sleep(poll)
            still = self.missing(left)
            if len(still) < len(left):
                since = time.monotonic()
            elif time.monotonic() - since > patience:
                raise TimeoutError(
                    f"{self.folder}: {len(left)} of {count} pictures are missing, {self.path(left[0]).name} first, and "
                    f"none came in {patience:.0f} s. Start the other processes again; what is there is kept."
                )
            left = still

    def read(self, count: int) -> Tensor:
        """Pictures 0 .. count-1, uint8 [count, 3, H, W]."""
        return torch.stack([read_picture(self.path(index)) for index in range(count)])


def read_picture(file: Path) -> Tensor:
    """uint8 [3, H, W]."""
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def is_whole_png(file: Path) -> bool:
    """Whether the file is there and all its checksums are right."""
    try:
        with Image.open(file) as image:
            image.verify()
        return True
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for broken files
        return False


def batches_of(count: int, batch_size: int, shard: int = 0, shards: int = 1) -> list[range]:
    """Indices 0 .. count-1 in fixed batches; of these the ones of a shard, every shards-th."""
    starts = range(0, count, batch_size)
    return [range(start, min(start + batch_size, count)) for start in starts[shard::shards]]
