"""The scenes keep the promises of their captions, and the judge can tell."""

import numpy as np
import pytest
import torch

from training.embedded.text import SIDES, layout
from training.models.teachers import ASSETS
from training.pictures import to_tensor
from training.scenes.judge import load_judge, shows
from training.scenes.shapes import (
    COLOURS,
    DIRECTIONS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Caption,
    Thing,
    draw_caption,
    parse_caption,
    place,
    scene,
    signed_distance,
)

pytestmark = pytest.mark.train


def test_a_scene_is_a_function_of_seed_and_index():
    first, again, other = scene(1, 2), scene(1, 2), scene(1, 3)
    assert np.array_equal(first[0], again[0]) and first[1:] == again[1:]
    assert not np.array_equal(first[0], other[0])


def test_captions_survive_a_round_trip_through_text():
    rng = np.random.default_rng(0)
    for _ in range(300):
        caption = draw_caption(rng, held_out=None)
        assert parse_caption(str(caption)) == caption


@pytest.mark.parametrize(
    "text", ["", "a dog", "a large red star above", "a large mauve star", "a large red star near a small blue ring"]
)
def test_other_text_is_no_caption(text):
    with pytest.raises(ValueError, match="not a caption of the embedded scenes"):
        parse_caption(text)


def test_training_never_shows_a_held_out_pair():
    pairs = {(shape, colour) for shape in SHAPES for colour in COLOURS}
    held_out = {(s, c) for s, c in pairs if Caption((Thing("small", c, s),)).held_out}
    assert len(held_out) == len(SHAPES)
    seen = {
        (thing.shape, thing.colour)
        for index in range(1500)
        for thing in draw_caption(np.random.default_rng(index)).things
    }
    assert seen == pairs - held_out


def test_things_lie_inside_apart_and_in_their_relation():
    for index in range(300):
        rng = np.random.default_rng(index)
        caption = draw_caption(rng)
        placed = place(caption, rng)
        for item in placed:
            assert item.radius < item.x < IMAGE_SIZE - item.radius and item.radius < item.y < IMAGE_SIZE - item.radius
            assert SIZES[item.thing.size][0] <= item.radius <= SIZES[item.thing.size][1]
        if caption.relation:
            a, b = placed
            dx, dy = DIRECTIONS[caption.relation]
            along, across = (a.x - b.x) * dx + (a.y - b.y) * dy, (a.x - b.x) * dy + (a.y - b.y) * dx
            assert along > 2 * abs(across) and np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_fill_their_unit_circle(shape):
    y, x = np.mgrid[-1.4:1.4:281j, -1.4:1.4:281j]
    inside = signed_distance(shape, x, y) < 0
    assert not inside[np.hypot(x, y) > 1.25].any()
    assert 0.25 < inside.mean() * 2.8**2 < np.pi


def test_the_layout_says_what_stands_on_which_side():
    red_star, blue_ring = [2, 1, 4], [1, 6, 5]  # 1 + index of size, colour, shape
    sides = dict(zip(SIDES, layout(parse_caption("a large red star above a small blue ring")), strict=True))
    assert sides == {None: [0] * 3, "above": red_star, "below": blue_ring} | dict.fromkeys(SIDES[3:], [0] * 3)
    turned = layout(parse_caption("a small blue ring below a large red star"))
    assert turned == list(sides.values())
    assert layout(parse_caption("a large red star"))[0] == red_star


def test_shows_wants_exactly_the_caption():
    caption = parse_caption("a large red star above a small blue ring")
    rng = np.random.default_rng(0)
    star, ring = place(caption, rng)
    assert shows([star, ring], caption) and shows([ring, star], caption)
    assert not shows([star], caption)
    assert not shows([star, ring], parse_caption("a large red star below a small blue ring"))
    assert not shows([star, ring], parse_caption("a small blue star above a large red ring"))
    assert not shows([star, ring], parse_caption("a large red star"))


def test_the_judge_is_right_on_held_out_renders():
    judge = load_judge(ASSETS / "judge.safetensors")
    scenes = [scene(987, index, held_out=None) for index in range(500)]
    images = torch.stack([to_tensor(image) for image, _, _ in scenes])
    captions = [caption for _, caption, _ in scenes]
    right = torch.cat(
        [judge.right(part, captions[i * 100 : i * 100 + 100]) for i, part in enumerate(images.split(100))]
    )
    assert right.double().mean() > 0.99
    wrong = torch.cat(
        [judge.right(part, captions[::-1][i * 100 : i * 100 + 100]) for i, part in enumerate(images.split(100))]
    )
    assert wrong.double().mean() < 0.02
