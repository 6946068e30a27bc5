"""The scenes keep the promises of their captions, and the judge can tell; mostly drawn from stand-ins for pictures."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextModel, CLIPTokenizer

from training.embedded import loop, teacher, text
from training.embedded.autoencoder import (
    LATENT_NOISE,
    SCALING_FACTOR,
    fix_latents,
    likeness,
    opponent_colours,
    polish_loss,
    reconstruction_loss,
)
from training.embedded.judge import Targets, judge_loss, target_of
from training.embedded.loop import train
from training.embedded.teacher import encode_scenes
from training.embedded.text import GROUPS, WIDTH, LayoutHead, build_text_encoder, layout
from training.models.teachers import ASSETS, EMBEDDED
from training.pictures import to_tensor
from training.scenes.emoji import (
    BACKGROUNDS,
    DIRECTIONS,
    GRID,
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
    scene,
)
from training.scenes.judge import Judge, load_judge

pytestmark = pytest.mark.train


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=IMAGE_SIZE,
    )


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=2,
    )


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
    assert len(VOCABULARY) == len(set(NAMES.values())) == 186
    assert {file.stem for file in Pictures().folder.glob("*.webp")} == set(NAMES.values())
    assert len({file.read_bytes() for file in Pictures().folder.glob("*.webp")}) == 186
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
    for seed in range(6):
        things = ("a dog", VOCABULARY[100])  # of very different colours, on a background of a third
        caption = Caption(things, RELATIONS[seed % 4], "black") if seed % 2 else Caption(things[:1], None, "black")
        rng = np.random.default_rng(seed)
        placed = place(caption, rng)
        image = pictures.render(caption, placed, rng)
        for item in placed:
            assert item.side == (SINGLE if caption.relation is None else PAIR)
            assert (item.x - item.side / 2) % GRID == (item.y - item.side / 2) % GRID == 0
            ys, xs = np.nonzero(np.abs(image.astype(int) - colour_of(item.thing)).max(-1) < 60)
            assert abs(xs.mean() + 0.5 - item.x) < 1 and abs(ys.mean() + 0.5 - item.y) < 1
            assert xs.max() - xs.min() == pytest.approx(item.side * 56 / 64, abs=2.5)


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
    assert len(people) == 24 and len(never) == 4 and never < set(people)
    for word in ("light", "medium", "dark", "woman", "man", *(name.split(" with ")[0][-5:] for name in never)):
        assert any(word in name for name in things & set(people))  # every word of them is learnt from others
    assert {caption.background for caption in seen} == {None, *BACKGROUNDS}
    assert 0.7 < np.mean([len(caption.things) == 1 for caption in seen]) < 0.8


def test_a_folder_that_lacks_pictures_is_named_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks 186 of the 186 pictures, such as 1f436\.webp.*git checkout"):
        Pictures(tmp_path)


def seen_as(caption: Caption, placed) -> Judge:
    """A judge that sees in any picture what `target_of` says of this scene."""
    target = target_of(caption, placed)
    maps = torch.zeros(1, 3 + len(VOCABULARY), 8, 8)
    maps[0, 0] = torch.where(target[0] == 1, 5.0, -5.0)
    maps[0, 1:3] = target[1:3]
    for item in placed:
        maps[0, 3 + VOCABULARY.index(item.thing), int(item.y / 16), int(item.x / 16)] = 1.0
    ground = torch.zeros(1, len(BACKGROUNDS))
    ground[0, list(BACKGROUNDS).index(caption.background or "white")] = 1.0
    judge = Judge()
    judge.forward = lambda images: (maps, ground, None)
    return judge


def test_a_picture_is_right_that_shows_its_caption_and_nothing_else():
    caption = Caption(("a dog", "a cat"), "above", "red")
    judge = seen_as(caption, place(caption, np.random.default_rng(0)))
    wanted = {
        caption: True,
        Caption(("a dog", "a cat"), "above"): True,  # no background named: any will do
        Caption(("a cat", "a dog"), "below", "red"): True,
        Caption(("a cat", "a dog"), "above", "red"): False,
        Caption(("a dog", "a cat"), "to the left of", "red"): False,
        Caption(("a dog", "a panda"), "above", "red"): False,
        Caption(("a dog", "a cat"), "above", "blue"): False,
        Caption(("a dog",), None, "red"): False,
    }
    assert [judge.right(torch.zeros(1, 3, 128, 128), [one]).item() for one in wanted] == list(wanted.values())


def test_the_judge_finds_things_where_they_were_placed():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        caption = draw_caption(rng, held_out=None)
        placed = place(caption, rng)
        found, _ = seen_as(caption, placed).detect(torch.zeros(1, 3, 128, 128))[0]
        found = {item.thing: item for item in found}
        assert set(found) == set(caption.things)
        for item in placed:
            assert abs(found[item.thing].x - item.x) < 1e-3 and abs(found[item.thing].y - item.y) < 1e-3


def test_the_judge_learns_from_a_batch(pictures):
    torch.manual_seed(0)
    judge = Judge(width=8)
    images, targets = torch.utils.data.default_collate([Targets(pictures, 5, 0, 4)[index] for index in range(4)])
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = judge_loss(judge, images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_layout_says_what_stands_on_each_side_and_on_which_background():
    dog, cat = (1 + text.NAMES[0].index(name) for name in ("a dog", "a cat"))
    none = [0, 0, 0]
    assert layout(parse_caption("a dog")) == [dog, 0, 0, *none * 4, 0]
    above = layout(parse_caption("a dog above a cat on a black background"))
    assert above == layout(parse_caption("a cat below a dog on a black background"))
    assert sorted(above[::3]) == sorted([0, dog, cat, 0, 0, 2]) and above[-1] == 2
    assert above[:-1] != layout(parse_caption("a cat above a dog"))[:-1]


def test_a_person_is_read_by_trade_sex_and_skin():
    woman, man = (layout(parse_caption(f"a {one} cook with dark skin")) for one in ("woman", "man"))
    assert woman[0] == man[0] and woman[1] != man[1] and woman[2] == man[2] and 0 not in woman[:3]
    seen = {parts for name in VOCABULARY if not Caption((name,)).held_out for parts in enumerate(text.parts_of(name))}
    assert all(set(enumerate(text.parts_of(name))) <= seen for name in VOCABULARY)  # each part is learnt from others


def test_the_layout_head_counts_captions_read_without_a_fault():
    torch.manual_seed(0)
    tokens = torch.full((2, 77), 49407)
    tokens[:, :9] = 5
    target = torch.tensor([layout(parse_caption("a dog")), layout(parse_caption("a cat above a dog"))])
    head = LayoutHead()
    hidden = torch.randn(2, 77, WIDTH)
    _, right = head(hidden, tokens, target)
    assert right == 0
    with torch.no_grad():  # a head that says of either caption what a token's first number tells
        head.linear.weight.zero_()
        head.linear.bias.zero_()
        first = 0
        for index, size in enumerate(GROUPS):
            head.linear.weight[first + target[0, index], 0] += 1
            head.linear.weight[first + target[1, index], 0] -= 1
            if target[0, index] == target[1, index]:
                head.linear.bias[first + target[0, index]] = 1
            first += size
        hidden[0, :, 0], hidden[1, :, 0] = 1, -1
        _, right = head(hidden, tokens, target)
        assert right == 1
        hidden[1, 76, 0] = 1
        assert 0.9 < head(hidden, tokens, target)[1] < 1


def test_fixing_latents_gives_them_unit_scale_and_leaves_reconstructions(pictures):
    torch.manual_seed(0)
    vae = tiny_vae()
    images = torch.stack([to_tensor(pictures.scene(0, index)[0]) for index in range(4)])
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        fix_latents(vae, images)
        posterior = vae.encode(images).latent_dist
        assert torch.allclose(vae.decode(posterior.mean).sample, before, atol=1e-3)
    latents = posterior.mean * SCALING_FACTOR
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3 and (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.allclose(posterior.std * SCALING_FACTOR, torch.tensor(LATENT_NOISE))


def test_polishing_leaves_the_encoder_without_gradients(pictures):
    torch.manual_seed(0)
    vae = tiny_vae()
    images = torch.stack([to_tensor(pictures.scene(0, index)[0]) for index in range(2)])[..., :64, :64]
    polish_loss(vae, images, torch.tensor(0.0)).backward()
    assert vae.encoder.conv_in.weight.grad is None and vae.decoder.conv_out.weight.grad.abs().sum() > 0
    reconstruction_loss(vae, images, torch.tensor(0.0)).backward()
    assert vae.encoder.conv_in.weight.grad.abs().sum() > 0


def test_scenes_are_encoded_once_and_shards_of_another_encoder_refused(pictures, tmp_path):
    torch.manual_seed(0)
    vae = tiny_vae()
    latents, captions = encode_scenes(vae, pictures, 3, 1, tmp_path, size=3)
    assert latents.shape == (3, 4, 16, 16) and latents.dtype == torch.float16
    assert captions == [str(pictures.scene(3, index, objects=1 + index % 2)[1]) for index in range(3)]
    changed = (tmp_path / "3-0000.pt").stat().st_mtime_ns
    more, texts = encode_scenes(vae, pictures, 3, 2, tmp_path, size=3)
    assert (tmp_path / "3-0000.pt").stat().st_mtime_ns == changed
    assert torch.equal(more[:3], latents) and texts[:3] == captions and len(texts) == 6
    with torch.no_grad():
        vae.decoder.conv_out.weight.add_(1)  # polished
    encode_scenes(vae, pictures, 3, 1, tmp_path, size=3)
    with torch.no_grad():
        vae.encoder.conv_out.weight.add_(1)
    with pytest.raises(ValueError, match=r"was encoded by another autoencoder than RUN_DIR/vae; remove .* to encode"):
        encode_scenes(vae, pictures, 3, 1, tmp_path, size=3)


def test_the_text_encoders_command_resumes_and_forgets_tokens_that_no_caption_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["text", "--run-dir", str(tmp_path), "--steps", "1"])
    text.main()
    assert "held-out pairs" in capsys.readouterr().out
    table = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").get_input_embeddings().weight
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    seen = tokenizer([str(draw_caption(np.random.default_rng(i), held_out=None)) for i in range(50)]).input_ids
    assert all(table[token].abs().sum() > 0 for token in {token for one in seen for token in one})
    assert (table.abs().sum(1) > 0).sum() < 600  # of 49,408
    text.main()
    assert "resumed" in capsys.readouterr().out


def test_the_teachers_command_trains_resumes_and_draws(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    tiny_vae().save_pretrained(tmp_path / "vae")
    build_text_encoder(WIDTH).save_pretrained(tmp_path / "text_encoder")
    monkeypatch.setattr(teacher, "build_unet", tiny_unet)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # takes minutes
    monkeypatch.setattr(teacher, "SHARD", 4)
    monkeypatch.setattr(teacher, "SHOWN", 6)
    monkeypatch.setattr(teacher, "SHOWN_STEPS", 2)
    command = ["teacher", "--run-dir", str(tmp_path), "--shards", "2"]
    command += ["--batch-size", "4"]
    for steps in ("1", "2"):
        monkeypatch.setattr("sys.argv", [*command, "--steps", steps])
        teacher.main()
    assert "resumed" in capsys.readouterr().out
    assert torch.load(tmp_path / "teacher.pt", weights_only=True)["step"] == 2
    captions = (tmp_path / "sheet-000002.txt").read_text().splitlines()
    assert len(captions) == 6 and all(parse_caption(caption) for caption in captions)
    assert (tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    monkeypatch.setattr("sys.argv", [*command, "--sheet", str(tmp_path / "now.png")])
    teacher.main()
    assert Image.open(tmp_path / "now.png").width > 6 * IMAGE_SIZE


def test_likeness_is_nought_for_channels_that_tell_different_things():
    torch.manual_seed(0)
    one, other = torch.randn(2, 1, 64, 64), torch.randn(2, 1, 64, 64)
    assert likeness(torch.cat([one, 3 * one + 1], 1)).item() == pytest.approx(0.5, abs=1e-4)
    assert likeness(torch.cat([one, other], 1)).item() < 1e-3


def test_opponent_colours_of_scenes_are_of_about_unit_scale_and_differ(pictures):
    colours = opponent_colours(torch.stack([to_tensor(pictures.scene(0, index)[0]) for index in range(48)]))
    assert colours.shape == (48, 3, 16, 16)
    assert colours.std((0, 2, 3)).min() > 0.3 and colours.std((0, 2, 3)).max() < 3
    assert likeness(colours) < 0.3
    assert opponent_colours(torch.full((1, 3, 8, 8), 0.4)).flatten().tolist() == pytest.approx([1, 0, 0])


def test_a_slow_training_saves_between_its_reports_and_goes_on_from_there(tmp_path, monkeypatch):
    def steps_of(count, stop_after):
        torch.manual_seed(0)
        module, taken = torch.nn.Linear(2, 1), []

        def loss_at(step, batch):
            if step == stop_after:
                raise KeyboardInterrupt
            taken.append(batch)
            return module(torch.ones(1, 2)).square().sum()

        data_from = lambda first: iter(range(first, count))  # noqa: E731
        try:
            reported = list(train(module, loss_at, data_from, tmp_path / "run.pt", count, 1e-2))
        except KeyboardInterrupt:
            reported = None
        return taken, reported

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    assert steps_of(6, stop_after=4) == ([0, 1, 2, 3], None)
    assert steps_of(6, stop_after=None) == ([4, 5], [6])


def test_the_judge_is_right_on_fresh_composites_and_only_on_right_ones():
    judge = load_judge(ASSETS / "judge.safetensors")
    scenes = [scene(987, index, held_out=None) for index in range(500)]
    images = torch.stack([to_tensor(image) for image, _, _ in scenes]).split(100)
    captions = [caption for _, caption, _ in scenes]
    right = [judge.right(part, captions[i * 100 : i * 100 + 100]) for i, part in enumerate(images)]
    assert torch.cat(right).double().mean() > 0.99
    wrong = [judge.right(part, captions[::-1][i * 100 : i * 100 + 100]) for i, part in enumerate(images)]
    assert torch.cat(wrong).double().mean() < 0.02
