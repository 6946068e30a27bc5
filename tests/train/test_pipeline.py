"""A pipeline's VAE: few pictures at once, in a type that holds its values, whatever autocast says."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from training.models.files import read_model
from training.models.load import build_pipeline, load_pipeline

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    return load_pipeline(tiny_pipeline)


@pytest.mark.parametrize(
    ("size", "at_once"), [((1024, 1024), 1), ((512, 512), 1), ((768, 320), 1), ((256, 256), 4), ((64, 64), 16)]
)
def test_the_vae_takes_few_large_pictures_at_once(pipeline, monkeypatch, size, at_once):
    taken = []

    def encode(images):
        taken.append(len(images))
        latents = torch.zeros(len(images), 4, *(side // 8 for side in images.shape[2:]))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=latents))

    def decode(latents):
        taken.append(len(latents))
        return SimpleNamespace(sample=torch.zeros(len(latents), 3, 1, 1))

    monkeypatch.setattr(pipeline.vae, "encode", encode)
    monkeypatch.setattr(pipeline.vae, "decode", decode)
    latents = pipeline.latents(torch.zeros(1, 3, 1, 1).expand(18, 3, *size))
    assert latents.shape == (18, 4, size[0] // 8, size[1] // 8) and sum(taken) == 18 and max(taken) == at_once
    taken.clear()
    assert len(pipeline.decode(latents)) == 18 == sum(taken) and max(taken) == at_once


def test_autocast_changes_nothing_of_vae_and_text_encoder(pipeline):
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = pipeline.latents(images), pipeline.decode(pipeline.latents(images)), *pipeline.encode(["a"]).values()
    with torch.autocast("cpu", torch.bfloat16):
        cast = pipeline.latents(images), pipeline.decode(pipeline.latents(images)), *pipeline.encode(["a"]).values()
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


def test_a_vae_that_overflows_in_fp16_runs_in_fp32(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline)
    assert pipeline.vae.config.force_upcast
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight *= 3e5  # the group norms after it take the scale out again
        pipeline.vae.decoder.conv_in.weight *= 3e5
    before = pipeline.fingerprint()
    pipeline.encoders_to("cpu", torch.float16)
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipeline.vae.encoder.conv_in.weight.nan_to_num_(posinf=6e4, neginf=-6e4)
    pipeline.vae.decoder.conv_in.weight.nan_to_num_(posinf=6e4, neginf=-6e4)
    assert pipeline.latents(images).isfinite().all()
    assert pipeline.decode(torch.full((1, 4, 16, 16), 9.0)).isfinite().all()
    assert pipeline.fingerprint() == before


def test_prompts_that_are_too_long_are_counted(pipeline):
    assert pipeline.too_long(["a fox", "fox " * 75, "fox " * 76, "word " * 300, ""]) == 2
    assert pipeline.too_long([]) == 0


def with_settings(folder, part, **settings):
    model = read_model(folder)
    return replace(model, configs={**model.configs, part: {**model.configs[part], **settings}})


@pytest.mark.parametrize(("said", "side"), [(None, 64), ([24, 24], 24), (16, 16)])
def test_a_config_may_leave_the_latents_size_open_or_say_it_twice(tiny_pipeline, said, side):
    model = with_settings(tiny_pipeline, "unet", sample_size=said)
    assert model.resolution == 8 * side and build_pipeline(model).latent_shape == (4, side, side)


def test_latents_that_are_not_square_are_refused(tiny_pipeline):
    model = with_settings(tiny_pipeline, "unet", sample_size=[16, 24])
    with pytest.raises(ValueError, match=r"\[16, 24\] for sample_size; expected a number"):
        build_pipeline(model).latent_shape  # noqa: B018


def test_a_vae_with_a_mean_of_its_latents_is_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="latents_mean, as EDM"):
        build_pipeline(with_settings(tiny_pipeline, "vae", latents_mean=[0.1] * 4))


def test_a_pipeline_knows_what_it_was_asked_for_as():
    """By it the embedded teacher's own scenes are its data."""
    assert load_pipeline("embedded").source == "embedded"


@torch.no_grad()
def test_clip_skip_leaves_the_last_layers_away():
    """As diffusers' StableDiffusionPipeline reads it, whose clip_skip counts from 0."""
    whole, skipped = load_pipeline("embedded"), load_pipeline("embedded", clip_skip=2)
    tokens = whole._tokens(whole.tokenizer, whole.text_encoder, ["a fox"])
    before_last = whole.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    text = getattr(whole.text_encoder, "text_model", whole.text_encoder)
    expected = text.final_layer_norm(before_last)
    assert torch.equal(skipped.encode(["a fox"])["encoder_hidden_states"], expected)
    assert skipped.fingerprint() != whole.fingerprint()  # what is prepared for one is not for the other


@pytest.mark.parametrize("skip", [0, 9])
def test_no_more_layers_are_skipped_than_there_are(tiny_pipeline, skip):
    with pytest.raises(ValueError, match=f"--clip-skip must be from 1 to 1, .*got {skip}"):
        load_pipeline(tiny_pipeline, clip_skip=skip)


def test_clip_skip_is_not_for_sdxl(tiny_xl):
    with pytest.raises(ValueError, match="SDXL reads the layer before the last"):
        load_pipeline(tiny_xl, clip_skip=2)
