"""Scenes of emoji: one large picture of a set, or two in a relation, on a background that the caption may name.

The set is of Microsoft's Fluent Emoji 3D (MIT), pictures of 256x256 px with transparency in assets/emoji, named by code
points (`1f34e.webp`); `emoji.txt` beside this module gives their names in words. The caption names what must be seen;
exact place and shades are nuisance; and all of it is a function of (seed, index).
Things face one way and stand on a grid of GRID pixels, two latents. Moved by less than a latent, each would look
different to an autoencoder of that factor; moved by one, to the UNet's own halvings: and all of them would have to be
learnt.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import shipped

FOLDER = shipped("assets") / "emoji"
IMAGE_SIZE = 128
GRID = 16
SINGLE, PAIR = 104, 56  # side of the square that an emoji fills, px: alone, and of two
NAMES = dict(  # name in words -> code points
    line.split(" ", 1)[::-1] for line in (Path(__file__).with_suffix(".txt")).read_text(encoding="utf-8").splitlines()
)
VOCABULARY = tuple(NAMES)
DIRECTIONS = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}  # y points down
RELATIONS = tuple(DIRECTIONS)
BACKGROUNDS = {  # hue, saturation, value
    "white": (0.60, 0.02, 0.97),
    "black": (0.65, 0.10, 0.11),
    "red": (0.99, 0.72, 0.78),
    "yellow": (0.145, 0.58, 0.97),
    "green": (0.38, 0.50, 0.68),
    "blue": (0.59, 0.58, 0.84),
    "purple": (0.75, 0.48, 0.66),
    "pink": (0.93, 0.28, 0.97),
}


@dataclass(frozen=True)
class Caption:
    """One thing, or two with the relation of the first to the second; and the background's colour, or None."""

    things: tuple[str, ...]
    relation: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        ending = f" on a {self.background} background" if self.background else ""
        return f" {self.relation} ".join(self.things) + ending

    @property
    def held_out(self) -> bool:
        """Whether it is of a combination that is kept out of training.

        One of six kinds of each trade's people (a tone of skin of a woman or a man), one of eight backgrounds of each
        thing, and one of twenty ordered pairs.
        """
        indices = [VOCABULARY.index(thing) for thing in self.things]
        people = any(index % 6 == (index // 6) % 6 and " skin" in VOCABULARY[index] for index in indices)
        pair = len(indices) == 2 and (3 * indices[0] + 7 * indices[1]) % 20 == 0
        ground = self.background is not None and any(
            index % len(BACKGROUNDS) == list(BACKGROUNDS).index(self.background) for index in indices
        )
        return people or pair or ground


_THING = "(" + "|".join(sorted(map(re.escape, VOCABULARY), key=len, reverse=True)) + ")"
_CAPTION = re.compile(
    rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING})?(?: on a ({'|'.join(BACKGROUNDS)}) background)?", re.IGNORECASE
)
_CANONICAL = {name.lower(): name for name in VOCABULARY}


def parse_caption(text: str) -> Caption:
    """The inverse of ``str(caption)``. Raises ValueError for text that is not a caption of this grammar."""
    match = _CAPTION.fullmatch(" ".join(text.split()))
    if match is None:
        raise ValueError(
            f"{text!r} is not a caption of the emoji scenes; expected e.g. 'a red rose', 'a panda on a blue "
            "background' or 'a cat to the left of a cookie on a white background', with relations "
            f"{', '.join(RELATIONS)}, backgrounds {', '.join(BACKGROUNDS)} and the things of training/scenes/emoji.txt"
        )
    first, relation, second, background = match.groups()
    things = tuple(_CANONICAL[thing.lower()] for thing in (first, second) if thing)
    return Caption(things, relation and relation.lower(), background and background.lower())


def draw_caption(
    rng: np.random.Generator,
    objects: int | None = None,
    held_out: bool | None = False,
    things: Sequence[str] = VOCABULARY,
) -> Caption:
    """A random caption of `objects` of `things` (None: one in 75 % of draws), two different ones where there are two.

    Half of the captions name their background. `held_out` None takes any caption, else only such.
    """
    while True:
        count = objects or (1 if rng.random() < 0.75 else 2)
        chosen = tuple(things[index] for index in rng.choice(len(things), count, replace=False))
        relation = str(rng.choice(RELATIONS)) if count == 2 else None
        background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.5 else None
        caption = Caption(chosen, relation, background)
        if held_out is None or caption.held_out == held_out:
            return caption


@dataclass(frozen=True)
class Placed:
    """A thing with its geometry: centre and side in pixels."""

    thing: str
    x: float
    y: float
    side: int


def place(caption: Caption, rng: np.random.Generator) -> tuple[Placed, ...]:
    """Positions that fulfil the caption: one near the middle; two either side of it along their relation."""
    if caption.relation is None:
        left, top = GRID * rng.integers(0, 2, 2)
        return (Placed(caption.things[0], left + SINGLE / 2, top + SINGLE / 2, SINGLE),)
    dx, dy = DIRECTIONS[caption.relation]
    placed = []
    for thing, sign in zip(caption.things, (1, -1), strict=True):
        along = (IMAGE_SIZE // 2) * (sign * (dx + dy) > 0)  # the right or the lower half, or the other
        across = GRID * rng.integers(2, 4)
        left, top = (along, across) if dx else (across, along)
        placed.append(Placed(thing, left + PAIR / 2, top + PAIR / 2, PAIR))
    return tuple(placed)


def related(a: Placed, b: Placed, relation: str) -> bool:
    """Whether a stands in `relation` to b: its offset along the relation's axis exceeds that across."""
    toward_x, toward_y = DIRECTIONS[relation]
    dx, dy = a.x - b.x, a.y - b.y
    return dx * toward_x + dy * toward_y > abs(dx * toward_y + dy * toward_x)


def _background(name: str | None, rng: np.random.Generator) -> np.ndarray:
    """A gradient between two near shades of a colour, float [IMAGE_SIZE, IMAGE_SIZE, 3] in [0, 1]."""
    if name is None:
        hue, saturation, value = rng.random(), rng.uniform(0.0, 0.6), rng.uniform(0.35, 0.97)
    else:
        hue, saturation, value = BACKGROUNDS[name]
        hue, saturation = hue + rng.uniform(-0.012, 0.012), saturation * rng.uniform(0.88, 1.12)
    ends = [
        np.array(colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), np.clip(value + shift, 0, 1)), np.float32)
        for shift in rng.uniform(-0.05, 0.05, 2)
    ]
    ys, xs = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) / (IMAGE_SIZE - 1) - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    mix = np.clip(0.5 + (xs * np.cos(angle) + ys * np.sin(angle)) / 1.2, 0, 1)[..., None].astype(np.float32)
    return (1 - mix) * ends[0] + mix * ends[1]


class Pictures:
    """The pictures of `folder`, made ready for both sizes in scenes.

    Raises FileNotFoundError where the folder lacks one of the vocabulary.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        lacking = [f"{code}.webp" for code in NAMES.values() if not (self.folder / f"{code}.webp").is_file()]
        if lacking:
            raise FileNotFoundError(
                f"{self.folder} lacks {len(lacking)} of the {len(NAMES)} pictures, such as {', '.join(lacking[:3])}; "
                "expected the repository's assets/emoji: fetch it again (git checkout assets/emoji)"
            )

    @cached_property
    def levels(self) -> dict[tuple[str, int], np.ndarray]:
        """Each thing at the sides SINGLE and PAIR: float [side, side, 4] in [0, 1], colours premultiplied by alpha."""
        found = {}
        for name, code in NAMES.items():
            with Image.open(self.folder / f"{code}.webp") as picture:
                whole = picture.convert("RGBA")
            for side in (SINGLE, PAIR):
                scaled = whole.resize((side, side), Image.Resampling.LANCZOS).convert("RGBa")
                found[name, side] = np.asarray(scaled, np.float32) / 255
        return found

    def render(self, caption: Caption, placed: tuple[Placed, ...], rng: np.random.Generator) -> np.ndarray:
        """The picture, uint8 [128, 128, 3]; the background's shades come from `rng`."""
        image = _background(caption.background, rng)
        for item in placed:
            painted = self.levels[item.thing, item.side]
            left, top = int(item.x - item.side / 2), int(item.y - item.side / 2)
            place = np.s_[top : top + item.side, left : left + item.side]
            image[place] = image[place] * (1 - painted[..., 3:]) + painted[..., :3]
        return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)

    def scene(self, seed: int, index: int, **caption_options) -> tuple[np.ndarray, Caption, tuple[Placed, ...]]:
        """Picture, caption and geometry number `index` of the stream `seed`; options as for `draw_caption`."""
        rng = np.random.default_rng([seed, index])
        caption = draw_caption(rng, **caption_options)
        placed = place(caption, rng)
        return self.render(caption, placed, rng), caption, placed


@cache
def pictures() -> Pictures:
    """Those that are shipped, read once a process."""
    return Pictures()


def scene(seed: int, index: int, **caption_options) -> tuple[np.ndarray, Caption, tuple[Placed, ...]]:
    """`Pictures.scene` of those that are shipped."""
    return pictures().scene(seed, index, **caption_options)
