"""The conversion tab: small random models on disk, converted, and read back by diffusers' own single-file code."""

import atexit
import copy
import functools
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from splam_core import parametrisation_of, read_metadata

from .conftest import started

pytestmark = pytest.mark.webui

CLIP = {"num_hidden_layers": 2, "vocab_size": 60, "max_position_embeddings": 8}
WIDTHS = {"sd1": (64,), "sd2": (1024,), "sdxl": (64, 64)}  # of the text encoders; 2.x is told by its width
PREFIX = "model.diffusion_model."
SD_SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture
def web(tmp_path, monkeypatch):
    """The tab as a page would build it, and a function that presses its button. The hosts do not differ here."""
    with started("forge", tmp_path, monkeypatch) as host:
        yield with_button(host)


def test_every_host_shows_the_tab(host):
    assert callable(with_button(host).press)


def with_button(host):
    import gradio

    gradio.clicks.clear()
    gradio.reports.clear()
    (_, title, element), *rest = host.script_callbacks.ui_tabs[0]()
    assert (title, element, rest) == ("SPLAM", "splam", [])
    (button,) = gradio.clicks

    def press(source, name="made", base=None, precision="fp32", embedded=None, overwrite=False):
        names = ("source", "base", "precision", "embedded", "name", "overwrite")
        values = dict(zip(names, [component.value for component in button.inputs], strict=True))
        values |= {"source": str(source), "name": name, "precision": precision, "overwrite": overwrite}
        values |= {"base": base} if base else {}
        values |= {"embedded": embedded} if embedded else {}
        return button.function(*(values[key] for key in names))

    host.press, host.reports, host.folder = press, gradio.reports, host.models / "Stable-diffusion"
    host.choices = button.inputs[1]
    return host


def make_unet(context, cond_proj=True, xl=False):
    torch.manual_seed(1)
    extra = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 6 * 8,
    }
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=context,
        attention_head_dim=8,
        time_cond_proj_dim=256 if cond_proj else None,
        **(extra if xl else {}),
    ).eval()


def make_pipeline(folder, family="sd1", prediction_type="epsilon"):
    """A diffusers pipeline folder; returns (unet, vae, text encoders)."""
    template, *parts = pipeline_template(family)
    shutil.copytree(template, folder)
    settings = {"_class_name": "LCMScheduler", "prediction_type": prediction_type, "_name_or_path": "/home/me"}
    settings |= SD_SCHEDULER
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    return parts


@functools.cache
def pipeline_template(family):
    folder = Path(tempfile.mkdtemp(prefix="splam-"))
    unet = make_unet(1024 if family == "sd2" else 64, xl=family == "sdxl")
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    encoders = []
    for number, width in enumerate(WIDTHS[family]):
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=64, num_attention_heads=4, projection_dim=64, **CLIP
        )
        encoders.append((CLIPTextModelWithProjection if number else CLIPTextModel)(config).eval())
        encoders[-1].save_pretrained(folder / ("text_encoder_2" if number else "text_encoder"))
    (folder / "model_index.json").write_text("{}")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, unet, vae, encoders


def embedding_of(guidance):
    """What diffusers' LCM pipeline feeds to cond_proj at a guidance scale; the authors' gamma = 1 is guidance 1."""
    function = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    return function(None, torch.tensor([guidance - 1.0]), embedding_dim=256)


def read_unet(file, config):
    """The UNet of a single file, by diffusers' code: no trace of a projection may be left in it."""
    weights = safetensors.torch.load_file(file)
    converted = single_file_utils.convert_ldm_unet_checkpoint(weights, {**config, "time_cond_proj_dim": None})
    unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": None}).eval()
    unet.load_state_dict(converted)
    return unet


def assert_folded(file, original, guidance=1.0):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 259])
    context = torch.randn(2, 5, original.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(2, 64), "time_ids": torch.ones(2, 6)}
    keywords = {"added_cond_kwargs": added} if original.config.addition_embed_type else {}
    with torch.no_grad():
        expected = original(x, t, context, timestep_cond=embedding_of(guidance).expand(2, -1), **keywords).sample
        found = read_unet(file, original.config)(x, t, context, **keywords).sample
    assert (found - expected).abs().max() < 1e-5 * expected.std()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_pipeline_folder(web, tmp_path, family):
    unet, vae, encoders = make_pipeline(tmp_path / "model", family)
    message = web.press(tmp_path / "model")
    assert message.startswith(f"Wrote models/Stable-diffusion{os.sep}made.safetensors")
    file = web.folder / "made.safetensors"
    assert_folded(file, unet)
    weights = safetensors.torch.load_file(file)
    back = single_file_utils.convert_ldm_vae_checkpoint(dict(weights), vae.config)
    assert all(torch.equal(back[key], weight) for key, weight in vae.state_dict().items())
    for number, encoder in enumerate(encoders):
        own = {key.removeprefix("text_model."): weight for key, weight in encoder.state_dict().items()}
        if family == "sd2" or number == 1:
            prefix = "conditioner.embedders.1.model." if number else "cond_stage_model.model."
            back = single_file_utils.convert_open_clip_checkpoint(encoder, dict(weights), prefix=prefix)
        else:
            prefix = "conditioner.embedders.0.transformer." if family == "sdxl" else "cond_stage_model.transformer."
            back = single_file_utils.convert_ldm_clip_checkpoint(dict(weights), remove_prefix=prefix)
        back = {key.removeprefix("text_model."): weight for key, weight in back.items()}
        compared = [key for key in own if not key.endswith("position_ids")]
        assert all(torch.equal(back[key], own[key]) for key in compared), number


def test_metadata_and_progress(web, tmp_path):
    make_pipeline(tmp_path / "model", "sd1", "v_prediction")
    web.press(tmp_path / "model", "my model.safetensors", precision="fp16")
    file = web.folder / "my model.safetensors"
    metadata = read_metadata(file)
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.title"] == "my model"
    assert json.loads(metadata["splam.unet"])["time_cond_proj_dim"] is None
    assert "/home/me" not in str(metadata)
    dtypes = {weight.dtype for weight in safetensors.torch.load_file(file).values()}
    assert dtypes == {torch.float16}
    fractions = [fraction for fraction, _ in web.reports]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert all(text for _, text in web.reports)


def converted(web, tmp_path, family="sdxl"):
    """The weights and metadata of a single file that the tab made, to be changed and converted again."""
    make_pipeline(tmp_path / "model", family)
    web.press(tmp_path / "model", "first")
    return safetensors.torch.load_file(web.folder / "first.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    "keys, metadata, prediction, notes",
    [
        ([], {}, "epsilon", 0),
        (["v_pred"], {}, "v", 0),
        (["v_pred", "ztsnr"], {}, "v", 0),
        ([], {"modelspec.predict_key": "v"}, "v", 0),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, "v", 1),
        (["v_pred", "ztsnr"], {"splam.scheduler": json.dumps(SD_SCHEDULER)}, "v", 1),
    ],
)
def test_what_a_file_says_that_it_predicts_stays(web, tmp_path, keys, metadata, prediction, notes, family):
    weights = converted(web, tmp_path, family)
    safetensors.torch.save_file(weights | {key: torch.zeros(0) for key in keys}, tmp_path / "v.safetensors", metadata)
    message = web.press(tmp_path / "v.safetensors")
    assert message.startswith("Wrote") and message.count("the first is believed") == notes
    file = web.folder / "made.safetensors"
    made, said = safetensors.torch.load_file(file), read_metadata(file)
    assert {"v_pred", "ztsnr"} & made.keys() == set(keys) or (prediction == "v" and "v_pred" in made and not keys)
    assert said["modelspec.prediction_type"] == prediction
    again = parametrisation_of(made, said, json.loads(said["splam.scheduler"]) if "splam.scheduler" in said else None)
    assert again.contradictions == () and (again.prediction_type == "v_prediction") == (prediction == "v")


def test_an_sd2_that_does_not_say_is_left_to_the_hosts(web, tmp_path):
    safetensors.torch.save_file(converted(web, tmp_path, "sd2"), tmp_path / "mute.safetensors")
    web.press(tmp_path / "mute.safetensors")
    assert "modelspec.prediction_type" not in read_metadata(web.folder / "made.safetensors")


def test_a_folder_of_zero_terminal_snr_becomes_the_keys(web, tmp_path):
    make_pipeline(tmp_path / "model", "sdxl", "v_prediction")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    web.press(tmp_path / "model")
    assert {"v_pred", "ztsnr"} < safetensors.torch.load_file(web.folder / "made.safetensors").keys()


def test_a_unet_that_does_not_say_predicts_what_its_base_does(web, tmp_path):
    make_pipeline(tmp_path / "base", "sdxl", "v_prediction")
    web.press(tmp_path / "base", "base")
    web.press(tmp_path / "base" / "unet", base="base.safetensors")
    assert read_metadata(web.folder / "made.safetensors")["modelspec.prediction_type"] == "v"
    assert "v_pred" in safetensors.torch.load_file(web.folder / "made.safetensors")


def test_numbers_that_are_none_are_refused_by_name(web, tmp_path):
    weights = converted(web, tmp_path, "sd1")
    weights[f"{PREFIX}out.2.weight"][0, 0, 0, 0] = 1e6  # too large for fp16
    safetensors.torch.save_file(weights, tmp_path / "large.safetensors")
    message = web.press(tmp_path / "large.safetensors", precision="fp16")
    assert message.startswith("Not converted. ") and f"{PREFIX}out.2.weight holds NaN or infinite" in message
    assert not (web.folder / "made.safetensors").exists()
    assert web.press(tmp_path / "large.safetensors", precision="fp32").startswith("Wrote")


def test_an_edm_model_is_refused(web, tmp_path):
    weights = converted(web, tmp_path) | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}
    safetensors.torch.save_file(weights, tmp_path / "edm.safetensors")
    message = web.press(tmp_path / "edm.safetensors")
    assert message.startswith("Not converted. ") and "continuous noise levels (EDM" in message


def scaled_fp8(weights, factor_name):
    """The matrices of a UNet as fp8 codes, each with a factor beside it; the others as they are."""
    scaled = {}
    for key, weight in weights.items():
        if not key.startswith(PREFIX) or weight.ndim != 2:
            scaled[key] = weight
            continue
        factor = weight.abs().max() / 400
        scaled[key] = (weight / factor).to(torch.float8_e4m3fn)
        scaled[key.removesuffix("weight") + factor_name] = factor
    return scaled | {f"{PREFIX}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}


@pytest.mark.parametrize("factor_name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("where", ["source", "base"])
def test_scaled_fp8_is_multiplied_out(web, tmp_path, factor_name, where):
    weights = converted(web, tmp_path, "sd1")
    scaled = scaled_fp8(weights, factor_name)
    assert any(weight.dtype == torch.float8_e4m3fn for weight in scaled.values())
    if where == "base":
        safetensors.torch.save_file(scaled, web.folder / "base.safetensors")
        web.shared.refresh_checkpoints()
        message = web.press(tmp_path / "model" / "unet", base="base.safetensors")
    else:
        safetensors.torch.save_file(scaled, tmp_path / "scaled.safetensors")
        message = web.press(tmp_path / "scaled.safetensors")
    assert message.startswith("Wrote"), message
    made = safetensors.torch.load_file(web.folder / "made.safetensors")
    assert made.keys() == weights.keys()
    for key, weight in weights.items():
        assert (made[key] - weight).abs().max() <= 0.07 * weight.abs().max(), key


def test_the_result_is_in_the_hosts_list_and_a_base_to_choose(web, tmp_path):
    make_pipeline(tmp_path / "model")
    web.press(tmp_path / "model")
    assert "made.safetensors" in web.sd_models.checkpoints_list
    assert "made.safetensors" in web.choices.refreshed_args()["choices"]


@pytest.mark.parametrize("as_file", [False, True])
def test_unet_alone_takes_the_rest_from_a_base(web, tmp_path, as_file):
    make_pipeline(tmp_path / "base")
    web.press(tmp_path / "base", "base")
    other = make_unet(64)
    torch.nn.init.normal_(other.time_embedding.cond_proj.weight)
    other.save_pretrained(tmp_path / "unet")
    source = tmp_path / "unet" / "diffusion_pytorch_model.safetensors" if as_file else tmp_path / "unet"
    assert "Choose a base checkpoint" in web.press(source)
    assert web.press(source, base="base.safetensors").startswith("Wrote")
    assert_folded(web.folder / "made.safetensors", other)
    made, base = (safetensors.torch.load_file(web.folder / f"{name}.safetensors") for name in ("made", "base"))
    assert all(torch.equal(made[key], base[key]) for key in base if not key.startswith(PREFIX))
    assert made.keys() == base.keys()


def test_a_base_of_another_family_is_refused(web, tmp_path):
    make_pipeline(tmp_path / "base", "sd2")
    web.press(tmp_path / "base", "base")
    make_unet(64).save_pretrained(tmp_path / "unet")
    message = web.press(tmp_path / "unet", base="base.safetensors")
    assert "of another family" in message
    assert "base.safetensors" in message
    assert not (web.folder / "made.safetensors").exists()


def test_an_lcm_is_folded_at_its_guidance(web, tmp_path):
    unet, _, _ = make_pipeline(tmp_path / "model")
    web.press(tmp_path / "model", embedded="LCM (guidance 8.5)")
    assert_folded(web.folder / "made.safetensors", unet, guidance=8.5)


def test_half_precision_is_rounded_once(web, tmp_path):
    """The fold of an fp16 source is added in float32."""
    unet, _, _ = make_pipeline(tmp_path / "model")
    half = copy.deepcopy(unet).half()
    half.save_pretrained(tmp_path / "model" / "unet")
    web.press(tmp_path / "model", precision="fp32")
    assert_folded(web.folder / "made.safetensors", half.float())


def test_a_single_file_is_folded_and_cast(web, tmp_path):
    unet, _, _ = make_pipeline(tmp_path / "model")
    web.press(tmp_path / "model", "plain")
    weights = safetensors.torch.load_file(web.folder / "plain.safetensors")
    assert not any("cond_proj" in key for key in weights)
    weights[f"{PREFIX}time_embed.cond_proj.weight"] = torch.zeros(32, 256)
    safetensors.torch.save_file(weights, tmp_path / "file.safetensors")
    web.press(tmp_path / "file.safetensors")
    assert_folded(web.folder / "made.safetensors", unet)


def test_weights_in_several_files(web, tmp_path):
    unet, _, _ = make_pipeline(tmp_path / "model")
    for file in (tmp_path / "model" / "unet").glob("*.safetensors"):
        file.unlink()
    unet.save_pretrained(tmp_path / "model" / "unet", max_shard_size="200KB")
    assert len(list((tmp_path / "model" / "unet").glob("*.safetensors"))) > 1
    web.press(tmp_path / "model")
    assert_folded(web.folder / "made.safetensors", unet)


def test_the_fp16_variants_shards(web, tmp_path):
    """The index is diffusion_pytorch_model.safetensors.index.fp16.json."""
    unet, _, _ = make_pipeline(tmp_path / "model")
    for file in (tmp_path / "model" / "unet").glob("*.safetensors"):
        file.unlink()
    half = copy.deepcopy(unet).half()
    half.save_pretrained(tmp_path / "model" / "unet", max_shard_size="200KB", variant="fp16")
    assert len(list((tmp_path / "model" / "unet").glob("*.safetensors"))) > 1
    web.press(tmp_path / "model")
    assert_folded(web.folder / "made.safetensors", half.float())


@pytest.mark.parametrize("name", ["file.sft", "file.SAFETENSORS"])
def test_a_source_under_the_other_names_of_safetensors(web, tmp_path, name):
    safetensors.torch.save_file(converted(web, tmp_path, "sd1"), tmp_path / name)
    assert web.press(tmp_path / name).startswith("Wrote")


def test_lycoris_passes_and_a_dora_of_pefts_is_refused(web, tmp_path):
    loha = {"lycoris_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(4, 2)}
    safetensors.torch.save_file(loha, tmp_path / "loha.safetensors")
    assert web.press(tmp_path / "loha.safetensors").startswith("Wrote")
    assert safetensors.torch.load_file(web.models / "Lora" / "made.safetensors").keys() == loha.keys()
    dora = {"unet.mid_block.attentions.0.proj_in.lora_magnitude_vector": torch.ones(4)}
    safetensors.torch.save_file(dora, tmp_path / "dora.safetensors")
    assert "a DoRA of peft's" in web.press(tmp_path / "dora.safetensors", "other")


def test_lora_gets_the_names_and_the_zero_diff_that_hosts_need(web, tmp_path):
    """Automatic1111 refuses a bias delta without a weight delta beside it."""
    unet = make_unet(64)
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    down, up, bias = torch.randn(4, 32), torch.randn(32, 4), torch.randn(128)
    lora = {
        f"unet.{module}.lora_A.weight": down,
        f"unet.{module}.lora_B.weight": up,
        "unet.time_embedding.linear_1.diff_b": bias,
    }
    safetensors.torch.save_file(lora, tmp_path / "lora.safetensors")
    message = web.press(tmp_path / "lora.safetensors")
    assert message.startswith(f"Wrote models/Lora{os.sep}made.safetensors")
    file = web.models / "Lora" / "made.safetensors"
    made = safetensors.torch.load_file(file)
    name = "lora_unet_" + module.replace(".", "_")
    assert torch.equal(made[f"{name}.lora_down.weight"], down)
    assert torch.equal(made[f"{name}.lora_up.weight"], up)
    assert made[f"{name}.alpha"] == 4
    time = "lora_unet_time_embedding_linear_1"
    assert torch.equal(made[f"{time}.diff_b"], bias)
    assert torch.equal(made[f"{time}.diff"], torch.zeros_like(unet.time_embedding.linear_1.weight))


@pytest.mark.parametrize(
    "name", ["", " ", "../out", "a/b", "a\\b", "/etc/x", "..", ".hidden", "C:x", "a\nb", "a\0b", "nul?", "x."]
)
def test_target_names_stay_inside_the_folder(web, tmp_path, name):
    make_pipeline(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    assert "expected a plain file name" in web.press(tmp_path / "model", name)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_overwritten_without_asking(web, tmp_path):
    make_pipeline(tmp_path / "model")
    file = web.folder / "made.safetensors"
    file.write_bytes(b"mine")
    message = web.press(tmp_path / "model")
    assert f"models/Stable-diffusion{os.sep}made.safetensors exists" in message and str(web.models) not in message
    assert file.read_bytes() == b"mine"
    assert web.press(tmp_path / "model", overwrite=True).startswith("Wrote")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_is_converted_in_its_own_place(web, tmp_path, monkeypatch):
    """Also on Windows, which replaces no file from which the process maps tensors."""
    replace = os.replace

    def windows(source, target):
        if str(target) in Path("/proc/self/maps").read_text():
            raise PermissionError(f"{target} is mapped")
        replace(source, target)

    module = "unet.mid_block.attentions.0.proj_in"
    lora = {f"{module}.lora_A.weight": torch.randn(4, 64), f"{module}.lora_B.weight": torch.randn(64, 4)}
    loras, checkpoints = web.models / "Lora", web.folder
    safetensors.torch.save_file(lora, loras / "own.safetensors")
    safetensors.torch.save_file(converted(web, tmp_path, "sd1"), checkpoints / "own.safetensors")
    monkeypatch.setattr(os, "replace", windows)
    for folder in (loras, checkpoints):
        assert web.press(folder / "own.safetensors", "own", overwrite=True).startswith("Wrote")
    kept = safetensors.torch.load_file(loras / "own.safetensors")
    assert torch.equal(kept["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"], lora[f"{module}.lora_B.weight"])


def spoil_truncate(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return file


def spoil_pickle(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    return file.parent


def spoil_json(folder):
    file = folder / "unet" / "config.json"
    file.write_text("<html>")
    return file


def spoil_part(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    return folder / "vae"


def spoil_keys(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file(weights | {"transformer.h.0": torch.zeros(1)}, file)
    return folder / "unet"


def spoil_index(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    file.unlink()
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../../secret.safetensors"}}))
    return index


@pytest.mark.parametrize("spoil", [spoil_truncate, spoil_pickle, spoil_json, spoil_part, spoil_keys, spoil_index])
def test_a_bad_folder_gets_one_message_that_names_the_file(web, tmp_path, spoil):
    make_pipeline(tmp_path / "model")
    culprit = spoil(tmp_path / "model")
    message = web.press(tmp_path / "model")
    assert message.startswith("Not converted. ")
    assert str(culprit) in message
    assert not list(web.folder.iterdir())


@pytest.mark.parametrize("source", ["", "/nowhere/at/all", "weights.ckpt", "other.safetensors"])
def test_a_bad_source_gets_one_message(web, tmp_path, source):
    (tmp_path / "weights.ckpt").write_bytes(b"\x80\x02")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    message = web.press(tmp_path / source if source.count("/") < 2 and source else source)
    assert message.startswith("Not converted. ")
    assert source in message


def test_a_page_that_others_reach_reads_only_the_models_folder(web, tmp_path):
    web.shared.cmd_opts.disable_extension_access = True
    make_pipeline(tmp_path / "model")
    assert "is outside" in web.press(tmp_path / "model")
    for typed in ("~/x", "x", "../x", "file://x"):  # as it was typed: not where the server's user is at home
        message = web.press(typed)
        assert "is outside" in message and typed in message
        assert not {str(Path.home()), os.getcwd()} & set(re.findall(r"/[\w./-]+", message.replace(typed, "")))
        assert str(Path.home()) not in message and str(web.models) not in message
    (web.models / "sneaky").symlink_to(tmp_path / "model")
    assert "is outside" in web.press(web.models / "sneaky")
    make_pipeline(web.models / "diffusers" / "model")
    assert web.press(web.models / "diffusers" / "model").startswith("Wrote")
