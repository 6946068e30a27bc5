"""The procedural scenes that the embedded pipeline is trained on: one or two shaded objects on a varied background.

A scene is drawn in two halves. The *caption* names shape, colour, size and relation; everything else
(position, rotation, exact radius, hue jitter, light, shadow, background) is continuous nuisance, so that the pictures
of one caption are a distribution and not a list. All of it is a function of (seed, index): the same pair gives the same
picture.
"""

from __future__ import annotations

import colorsys
import re
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 128
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
COLOURS = {  # hue, saturation, value
    "red": (0.99, 0.85, 0.88),
    "orange": (0.075, 0.90, 0.96),
    "yellow": (0.15, 0.85, 0.95),
    "green": (0.36, 0.72, 0.66),
    "cyan": (0.50, 0.72, 0.86),
    "blue": (0.62, 0.80, 0.86),
    "purple": (0.765, 0.66, 0.72),
    "pink": (0.93, 0.42, 0.97),
}
SIZES = {"small": (14.0, 18.0), "large": (25.0, 30.0)}  # radius, px
DIRECTIONS = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}  # y points down
RELATIONS = tuple(DIRECTIONS)
MARGIN = 2.0  # px between an object and the border, and half of that between two objects


@dataclass(frozen=True)
class Thing:
    """What the caption says of one object."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        article = "an" if self.size[0] in "aeiou" else "a"
        return f"{article} {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Caption:
    """One thing, or two with the relation of the first to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None

    def __str__(self) -> str:
        return f" {self.relation} ".join(map(str, self.things))

    @property
    def held_out(self) -> bool:
        """Whether a (shape, colour) pair of it is kept out of training: one colour of eight for each shape."""
        return any(
            list(COLOURS).index(thing.colour) == (3 * SHAPES.index(thing.shape) + 1) % 8 for thing in self.things
        )


_THING = rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING})?")


def parse_caption(text: str) -> Caption:
    """The inverse of ``str(caption)``. Raises ValueError for text that is not a caption of this grammar."""
    match = _CAPTION.fullmatch(" ".join(text.lower().split()))
    if match is None:
        raise ValueError(
            f"{text!r} is not a caption of the embedded scenes; expected e.g. 'a large red star' or 'a large red star "
            f"above a small blue ring', with sizes {', '.join(SIZES)}, colours {', '.join(COLOURS)}, shapes "
            f"{', '.join(SHAPES)} and relations {', '.join(RELATIONS)}"
        )
    first, relation, second = match.groups()[:3], match.group(4), match.groups()[4:]
    return Caption((Thing(*first),) if relation is None else (Thing(*first), Thing(*second)), relation)


def draw_caption(rng: np.random.Generator, objects: int | None = None, held_out: bool | None = False) -> Caption:
    """A random caption of `objects` things (None: one in 35 % of draws); `held_out` None takes any, else only such."""
    while True:
        count = objects or (1 if rng.random() < 0.35 else 2)
        things = tuple(
            Thing(str(rng.choice(list(SIZES))), str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))
            for _ in range(count)
        )
        if count == 2 and things[0].colour == things[1].colour and things[0].shape == things[1].shape:
            continue
        caption = Caption(things, str(rng.choice(RELATIONS)) if count == 2 else None)
        if held_out is None or caption.held_out == held_out:
            return caption


@dataclass(frozen=True)
class Placed:
    """A thing with its geometry: centre and radius in pixels, rotation in radians."""

    thing: Thing
    x: float
    y: float
    radius: float
    angle: float


def place(caption: Caption, rng: np.random.Generator) -> tuple[Placed, ...]:
    """Positions that fulfil the caption: inside the picture; of two, either side of its middle along their relation."""
    middle = IMAGE_SIZE / 2
    while True:
        placed = []
        for number, thing in enumerate(caption.things):
            radius = rng.uniform(*SIZES[thing.size])
            reach = middle - radius - MARGIN
            if caption.relation is None:
                x, y = middle + rng.uniform(-reach, reach, 2)
            else:
                # Where a caption puts things must show in the average of its pictures, or a model learns it very late.
                along, across = rng.uniform(22, reach), rng.uniform(-16, 16)
                dx, dy = DIRECTIONS[caption.relation]
                side = along if number == 0 else -along
                x, y = middle + side * dx + across * dy, middle + side * dy + across * dx
            placed.append(Placed(thing, x, y, radius, rng.uniform(-0.4, 0.4)))
        if caption.relation is None or related(placed[0], placed[1], caption.relation, dominance=2.0):
            return tuple(placed)


def related(a: Placed, b: Placed, relation: str, dominance: float = 1.0) -> bool:
    """Whether a stands in `relation` to b, clear of it, the offset along its axis `dominance` times that across."""
    dx, dy = a.x - b.x, a.y - b.y
    toward_x, toward_y = DIRECTIONS[relation]
    along, across = dx * toward_x + dy * toward_y, dx * toward_y + dy * toward_x
    return along > dominance * abs(across) and (dominance == 1.0 or np.hypot(dx, dy) > a.radius + b.radius + MARGIN)


def _box(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float) -> np.ndarray:
    dx, dy = np.abs(x) - half_x, np.abs(y) - half_y
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of a unit-radius `shape`, negative inside; y points down. Good near the outline."""
    if shape == "circle":
        return np.hypot(x, y) - 0.90
    if shape == "square":
        return _box(x, y, 0.78, 0.78)
    if shape == "triangle":
        y = y - 0.18
        return np.maximum(y - 0.56, 0.866 * np.abs(x) - 0.5 * y - 0.56)
    if shape == "star":
        angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        radius = np.hypot(x, y)
        px, py = radius * np.cos(angle), radius * np.sin(angle)
        ex, ey = 0.45 * np.cos(np.pi / 5) - 1.04, 0.45 * np.sin(np.pi / 5)  # from the outer tip to the inner corner
        return ((px - 1.04) * ey - py * ex) / np.hypot(ex, ey)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.68) - 0.24
    if shape == "cross":
        return np.minimum(_box(x, y, 0.94, 0.30), _box(x, y, 0.30, 0.94))
    if shape == "heart":
        y = y - 0.14
        turned = _box((x + y) * np.sqrt(0.5), (x - y) * np.sqrt(0.5), 0.54, 0.54)
        lobe = np.hypot(np.abs(x) - 0.54 * np.sqrt(0.5), y + 0.54 * np.sqrt(0.5)) - 0.54
        return np.minimum(turned, lobe)
    if shape == "moon":
        x = x + 0.12
        return np.maximum(np.hypot(x, y) - 0.96, 0.80 - np.hypot(x - 0.52, y))
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def _background(rng: np.random.Generator) -> np.ndarray:
    """A muted two-colour gradient with a soft wave over it."""
    ys, xs = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) / (IMAGE_SIZE - 1) - 0.5
    value = rng.uniform(0.18, 0.72)
    ends = [
        np.array(
            colorsys.hsv_to_rgb(
                rng.random(), rng.uniform(0, 0.22), np.clip(value + rng.uniform(-0.18, 0.18), 0.1, 0.85)
            )
        )
        for _ in range(2)
    ]
    angle, wave_angle = rng.uniform(0, 2 * np.pi, 2)
    mix = 0.5 + (xs * np.cos(angle) + ys * np.sin(angle)) / 1.2
    mix += rng.uniform(0, 0.14) * np.sin(
        rng.uniform(4, 14) * (xs * np.cos(wave_angle) + ys * np.sin(wave_angle)) + rng.uniform(0, 6.28)
    )
    mix = np.clip(mix, 0, 1)[..., None]
    return (1 - mix) * ends[0] + mix * ends[1]


def render(placed: tuple[Placed, ...], rng: np.random.Generator) -> np.ndarray:
    """The picture, uint8 [128, 128, 3]; light, colours and background come from `rng`."""
    image = _background(rng)
    light = rng.uniform(0, 2 * np.pi)
    lx, ly = np.cos(light), np.sin(light)
    shadow_strength, shading = rng.uniform(0.25, 0.5), rng.uniform(0.12, 0.25)
    ys, xs = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    for item in placed:
        cos, sin = np.cos(item.angle) / item.radius, np.sin(item.angle) / item.radius

        def outline(shift_x: float = 0.0, shift_y: float = 0.0, item=item, cos=cos, sin=sin) -> np.ndarray:
            dx, dy = xs - item.x - shift_x, ys - item.y - shift_y
            return signed_distance(item.thing.shape, dx * cos + dy * sin, dy * cos - dx * sin) * item.radius

        distance = outline()
        shadow = np.clip(0.5 - outline(-0.16 * item.radius * lx, -0.16 * item.radius * ly) / 8, 0, 1)
        image = image * (1 - shadow_strength * shadow[..., None])

        hue, saturation, value = COLOURS[item.thing.colour]
        colour = np.array(
            colorsys.hsv_to_rgb(
                (hue + rng.uniform(-0.012, 0.012)) % 1,
                np.clip(saturation + rng.uniform(-0.06, 0.06), 0, 1),
                np.clip(value + rng.uniform(-0.06, 0.06), 0, 1),
            )
        )
        towards = ((xs - item.x) * lx + (ys - item.y) * ly) / item.radius
        shade = 1 - shading * 0.4 + shading * towards
        shade *= 1 - 0.25 * np.clip(1 + distance / 4, 0, 1)  # a bevel of 4 px
        spot = np.hypot(xs - item.x - 0.45 * lx * item.radius, ys - item.y - 0.45 * ly * item.radius) / (
            0.28 * item.radius
        )
        body = np.clip(colour * shade[..., None] + 0.28 * np.exp(-(spot**2))[..., None], 0, 1)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        image = image * (1 - coverage) + body * coverage
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def scene(seed: int, index: int, **caption_options) -> tuple[np.ndarray, Caption, tuple[Placed, ...]]:
    """Picture, caption and geometry number `index` of the stream `seed`; options as for `draw_caption`."""
    rng = np.random.default_rng([seed, index])
    caption = draw_caption(rng, **caption_options)
    placed = place(caption, rng)
    return render(placed, rng), caption, placed
