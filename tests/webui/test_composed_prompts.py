"""Prompts with AND and weights at guidance 1 in every host: u + sum of w (c - u), in float64, whatever the settings."""

import pytest
import torch

from .reference import assert_same, composed, embedding, noised

pytestmark = pytest.mark.webui
A, B, C, NEGATIVE = (embedding(seed) for seed in (1, 2, 3, 9))
PARTS = [(A, 1.0), (B, 0.5)]
IMAGE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 0.7


def assert_composed(found, p, pictures, steps, negative=NEGATIVE):
    first, *fresh = p.rng.drawn
    assert_same(found.double(), composed(first, pictures, negative, steps, fresh), 1e-5)


@pytest.mark.parametrize(
    ("parts", "steps"),
    [
        (PARTS, 1),
        (PARTS, 4),
        ([(A, 1.0), (B, 1.0)], 1),
        ([(A, 1.0), (B, -1.0)], 2),
        ([(A, 0.7), (B, 1.2), (C, -0.4)], 2),
        ([(A, 0.5)], 1),
    ],
)
def test_sum(host, parts, steps):
    p = host.request(prompts=[parts], steps=steps)
    found, info = host.run(p)
    assert_composed(found, p, [parts], steps)
    assert sum(host.shared.sd_model.calls) == (len(parts) + 1) * steps
    assert "CFG scale: 1" in info
    assert "SPLAM guidance: 1" in info
    assert "Skip Early CFG" not in info


@pytest.mark.parametrize("parts", [[(A, 1.0)], [(A, 0.3), (B, 0.7)], [(A, 1.5), (B, 0.2), (C, -0.7)]])
def test_the_negative_is_not_evaluated_where_it_cancels(host, parts):
    """The weights' sum is 1, as of every plain prompt."""
    p = host.request(prompts=[parts], steps=2)
    found, _ = host.run(p)
    assert_composed(found, p, [parts], 2)
    assert sum(host.shared.sd_model.calls) == len(parts) * 2
    if host.name == "forge":
        assert not p.encoded


def test_batch_is_its_pictures_made_one_by_one(host):
    p = host.request(prompts=[PARTS] * 2, seeds=[7, 8], steps=2)
    both, _ = host.run(p)
    assert_composed(both, p, [PARTS] * 2, 2)
    for i in range(2):
        alone, _ = host.run(host.request(prompts=[PARTS], seeds=[7 + i], steps=2))
        assert_same(both[i : i + 1], alone, 1e-5)


def test_pictures_of_different_weights(host):
    """Forge and reForge give all pictures of a batch the last one's weights, with every sampler: this is said."""
    pictures = [PARTS, [(C, 1.0)]]
    p = host.request(prompts=pictures, seeds=[7, 8], steps=2)
    found, _ = host.run(p)
    if host.name == "a1111":
        assert_composed(found, p, pictures, 2)
        assert not p.comments
    else:
        assert len(p.comments) == 1
        assert "batch size to 1" in next(iter(p.comments))


@pytest.mark.parametrize("tokens", [2, 10, 15])
def test_negative_prompt_of_another_length(host, tokens):
    negative = embedding(9, tokens)
    p = host.request(prompts=[PARTS], negative=negative, steps=2)
    found, _ = host.run(p)
    assert_composed(found, p, [PARTS], 2, negative)


def test_edited_prompt(host):
    """[a:b:1] AND c :0.5"""
    p = host.request(prompts=[[({1: A, 100: B}, 1.0), (C, 0.5)]], steps=4)
    found, _ = host.run(p)
    first, *fresh = p.rng.drawn
    editions = [[[(A, 1.0), (C, 0.5)]]] * 2 + [[[(B, 1.0), (C, 0.5)]]] * 2
    assert_same(found.double(), composed(first, editions, NEGATIVE, 4, fresh, edited=True), 1e-5)


def test_image_to_image(host):
    p = host.request(prompts=[PARTS], init_latent=IMAGE, denoising_strength=0.6, steps=3)
    found, _ = host.run(p)
    first, *fresh = p.rng.drawn
    z = noised(IMAGE, first, 3, 0.6)
    assert_same(found.double(), composed(z, [PARTS], NEGATIVE, 3, fresh, 0.6), 1e-5)


@pytest.mark.parametrize("script", [True, False])
def test_hires_fix(host, script):
    """Both passes; without the script the hosts have encoded the negative prompt."""
    p = host.request(prompts=[PARTS], enable_hr=True, steps=2, denoising_strength=0.5)
    if not script:
        p.scripts = None
    found, _ = host.run(p)
    one, two = (generator.drawn for generator in p.passes)
    small = composed(one[0], [PARTS], NEGATIVE, 2, one[1:])
    z = noised(torch.nn.functional.interpolate(small, scale_factor=2), two[0], 2, 0.5)
    assert_same(found.double(), composed(z, [PARTS], NEGATIVE, 2, two[1:], 0.5), 1e-5)
    assert sum(host.shared.sd_model.calls) == 3 * 4
    assert p.cfg_scale == (1 if script else 7)


def test_guidance_kept_at_1_is_the_same(host):
    p = host.request(prompts=[PARTS], cfg_scale=1.0, script_args=[False], steps=2)
    found, info = host.run(p)
    assert_composed(found, p, [PARTS], 2)
    assert "SPLAM guidance: as set" in info


@pytest.mark.parametrize(("setting", "value"), [("skip_early_cond", 0.4), ("s_min_uncond", 20.0)])
@pytest.mark.parametrize("parts", [PARTS, [(A, 1.0)]])
def test_settings_that_leave_the_negative_out_do_not_reach_it(host, parts, setting, value):
    host.shared.opts.data[setting] = value
    p = host.request(prompts=[parts], steps=4)
    found, _ = host.run(p)
    assert_composed(found, p, [parts], 4)
    assert host.shared.opts.data == {setting: value}
    assert getattr(p, setting, value) == value


def test_all_is_put_back_after_an_error(host):
    def failing(x, t, context):
        raise RuntimeError("out of memory")

    host.use(network=failing)
    p = host.request(prompts=[PARTS], s_min_uncond=0.5)
    with pytest.raises(RuntimeError, match="out of memory"):
        host.run(p)
    assert host.shared.opts.data == {}
    assert (p.cfg_scale, p.s_min_uncond) == (1, 0.5)
    if host.name != "a1111":
        assert host.shared.sd_model.forge_objects.unet.model_options == {}


def test_modifiers_of_other_extensions_stay(host):
    if host.name == "a1111":
        pytest.skip("has no conditioning modifiers")
    seen = []

    def other(*arguments):
        seen.append(len(arguments[4]))
        return arguments

    options = host.shared.sd_model.forge_objects.unet.model_options
    options["conditioning_modifiers"] = [other]
    host.run(host.request(prompts=[PARTS], steps=2))
    assert seen == [2, 2]
    assert options == {"conditioning_modifiers": [other]}
