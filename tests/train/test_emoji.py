"""Emoji scenes keep the promises of their captions, drawn from stand-ins for the pictures, which are not carried."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from training.scenes.emoji import (
    BACKGROUNDS,
    DIRECTIONS,
    IMAGE_SIZE,
    NAMES,
    PAIR,
    RELATIONS,
    SINGLE,
    VOCABULARY,
    Caption,
    Pictures,
    draw_caption,
    parse_caption,
    place,
    related,
)

pytestmark = pytest.mark.train


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A disc for each thing, of a colour of its own, on nothing."""
    folder = tmp_path_factory.mktemp("emoji")
    for number, code in enumerate(NAMES.values()):
        picture = Image.new("RGBA", (64, 64))
        colour = (number, 255 - number, 37 * number % 256, 255)
        ImageDraw.Draw(picture).ellipse((4, 4, 59, 59), fill=colour)
        picture.save(folder / f"{code}.webp", lossless=True)
    return Pictures(folder)


def colour_of(thing: str) -> np.ndarray:
    number = VOCABULARY.index(thing)
    return np.array([number, 255 - number, 37 * number % 256])


def test_a_scene_is_a_function_of_seed_and_index(pictures):
    first, again, other = pictures.scene(1, 2), pictures.scene(1, 2), pictures.scene(1, 3)
    assert np.array_equal(first[0], again[0]) and first[1:] == again[1:]
    assert not np.array_equal(first[0], other[0])
    assert first[0].shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and first[0].dtype == np.uint8


def test_captions_survive_a_round_trip_through_text():
    rng = np.random.default_rng(0)
    for _ in range(300):
        caption = draw_caption(rng, held_out=None)
        assert parse_caption(str(caption)) == caption
        assert parse_caption(f"  {str(caption).upper()} ") == caption


def test_a_longer_name_is_not_taken_for_a_shorter_one_with_an_ending():
    assert parse_caption("a face with a mask on a red background").things == ("a face with a mask",)
    assert parse_caption("a dog above a cat").background is None


@pytest.mark.parametrize("text", ["", "a dog on a dog", "a dog above", "two dogs", "a dog on a brown background"])
def test_other_text_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"is not a caption of the emoji scenes; expected e\.g\."):
        parse_caption(text)


def test_every_name_is_told_apart_by_words_and_has_a_picture_of_its_own():
    assert len(VOCABULARY) == len(set(NAMES.values())) == 240
    assert all(parse_caption(name).things == (name,) for name in VOCABULARY)


@pytest.mark.parametrize("relation", RELATIONS)
def test_two_things_stand_apart_and_in_their_relation(relation):
    rng = np.random.default_rng(RELATIONS.index(relation))
    for _ in range(100):
        first, second = place(Caption(("a dog", "a cat"), relation), rng)
        assert related(first, second, relation)
        assert not any(related(first, second, other) for other in DIRECTIONS if other != relation)
        toward_x, toward_y = DIRECTIONS[relation]
        apart = (first.x - second.x) * toward_x + (first.y - second.y) * toward_y
        assert apart >= (first.side + second.side) / 2  # their squares do not meet
        for item in (first, second):
            assert item.side / 2 <= min(item.x, item.y) and max(item.x, item.y) <= IMAGE_SIZE - item.side / 2


def test_a_thing_is_painted_where_it_was_placed_and_as_large(pictures):
    for seed in range(5):
        caption = Caption(("a dog", "a cat"), "above") if seed % 2 else Caption(("a dog",))
        rng = np.random.default_rng(seed)
        for item in place(caption, rng):
            low, high = SINGLE if caption.relation is None else PAIR
            assert low <= item.side <= high
            painted = pictures.paint(item)
            ys, xs = np.nonzero(painted[..., 3] > 0.5)
            assert abs(xs.mean() + 0.5 - item.x) < 1 and abs(ys.mean() + 0.5 - item.y) < 1
            assert xs.max() - xs.min() == pytest.approx(item.side * 56 / 64, abs=2.5)
            inside = painted[int(item.y), int(item.x)] * 255
            assert np.abs(inside - [*colour_of(item.thing), 255]).max() < 2


def test_a_named_background_is_seen_about_the_things(pictures):
    shades = {}
    for name in BACKGROUNDS:
        caption = Caption(("a dog",), background=name)
        rng = np.random.default_rng(7)
        image = pictures.render(caption, place(caption, rng), rng)
        shades[name] = image[[0, 0, -1, -1], [0, -1, 0, -1]].mean(0)
    for name, shade in shades.items():
        others = [np.abs(shade - other).max() for label, other in shades.items() if label != name]
        assert min(others) > 25, name  # a judge has to be able to tell them apart
    assert shades["white"].min() > 215 and shades["black"].max() < 50


def test_combinations_are_held_out_of_training_and_nothing_but_combinations():
    rng = np.random.default_rng(0)
    seen = [draw_caption(rng) for _ in range(6000)]
    assert not any(caption.held_out for caption in seen)
    assert all(draw_caption(rng, held_out=True).held_out for _ in range(50))
    things = {thing for caption in seen for thing in caption.things}
    never = set(VOCABULARY) - things
    people = [name for name in VOCABULARY if " skin" in name]
    assert len(people) == 48 and len(never) == 8 and never < set(people)
    for word in ("light", "medium", "dark", "woman", "man", *(name.split(" with ")[0][-5:] for name in never)):
        assert any(word in name for name in things & set(people))  # every word of them is learnt from others
    assert {caption.background for caption in seen} == {None, *BACKGROUNDS}
    assert 0.7 < np.mean([len(caption.things) == 1 for caption in seen]) < 0.8


def test_a_folder_that_lacks_pictures_is_named_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks 240 of the 240 pictures, such as 1f436\.webp.*npm pack"):
        Pictures(tmp_path)
