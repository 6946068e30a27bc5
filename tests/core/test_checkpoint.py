"""Key maps against diffusers' own converter and true Stable Diffusion names; files that are not what they claim."""

import json
import os
import re

import pytest
import torch

from splam_core import (
    diffusers_to_ldm,
    fold_gamma,
    ldm_to_diffusers,
    load_file,
    load_files,
    lora_adapters,
    lora_magnitudes,
    lora_to_kohya,
    not_finite,
    read_metadata,
    save_file,
    weight_files,
)
from splam_core.text_encoders import PLACES, text_encoder_from_ldm

pytestmark = pytest.mark.core
diffusers = pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

SHAPES = pytest.mark.parametrize(
    "widths, layers_per_block", [((32, 64), 1), ((64, 128, 192), 2), ((32, 32, 64, 64), 2), ((32, 64), 3)]
)


def make_vae(widths=(32, 64), layers_per_block=1):
    torch.manual_seed(0)
    levels = len(widths)
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=32,
    )


def make_clip(width=32, layers=2):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(num_attention_heads=2, **sizes))


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert found[key].shape == weight.shape, key
        assert weight.device.type == "meta" or torch.equal(found[key], weight), key


@SHAPES
def test_diffusers_own_converter_undoes_ours(make_unet, widths, layers_per_block):
    unet, vae = make_unet(widths, layers_per_block), make_vae(widths, layers_per_block)
    single = diffusers_to_ldm(unet.state_dict(), vae.state_dict())
    assert_same_weights(single_file.convert_ldm_unet_checkpoint(single, dict(unet.config)), unet.state_dict())
    assert_same_weights(single_file.convert_ldm_vae_checkpoint(single, dict(vae.config)), vae.state_dict())


@SHAPES
def test_there_and_back_is_bit_exact_both_ways(make_unet, widths, layers_per_block):
    unet, vae = make_unet(widths, layers_per_block).state_dict(), make_vae(widths, layers_per_block).state_dict()
    clip = {"text_model." + key.removeprefix("text_model."): w for key, w in make_clip().state_dict().items()}
    single = diffusers_to_ldm(unet, vae, clip)
    parts = ldm_to_diffusers(single)
    for found, expected in zip(parts, (unet, vae, clip), strict=True):
        assert_same_weights(found, expected)
    assert_same_weights(diffusers_to_ldm(*parts), single)


def test_attention_at_the_lowest_level_and_absent_at_the_highest_maps(make_unet):
    """As in SDXL: where a level has attention is read off the keys too."""
    unet = make_unet(
        (32, 64, 64),
        2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 3),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32,
    )
    single = diffusers_to_ldm(unet.state_dict())
    assert_same_weights(single_file.convert_ldm_unet_checkpoint(single, dict(unet.config)), unet.state_dict())
    assert_same_weights(ldm_to_diffusers(single)[0], unet.state_dict())


def test_stable_diffusion_1_5_names_and_shapes():
    """The full-size model, on the meta device."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = make_vae((128, 256, 512, 512), 2)
        clip = make_clip(768, 12)
    single = diffusers_to_ldm(unet.state_dict(), vae.state_dict(), clip.state_dict())
    count = {prefix: sum(key.startswith(prefix) for key in single) for prefix in PREFIXES}
    assert count == PREFIXES
    assert len(single) == sum(PREFIXES.values())
    for key, shape in KNOWN.items():
        assert list(single[key].shape) == shape, key
    inner = [key.split(".") for key in single if key.startswith("model.diffusion_model.")]
    assert {int(k[3]) for k in inner if k[2] == "input_blocks"} == set(range(12))
    assert {int(k[3]) for k in inner if k[2] == "output_blocks"} == set(range(12))
    assert_same_weights(single_file.convert_ldm_unet_checkpoint(single, dict(unet.config)), unet.state_dict())
    assert_same_weights(single_file.convert_ldm_vae_checkpoint(single, dict(vae.config)), vae.state_dict())
    assert_same_weights(ldm_to_diffusers(single)[0], unet.state_dict())


# The published v1-5-pruned-emaonly has 686 UNet weights, 248 of the VAE and 196 of CLIP besides position_ids.
PREFIXES = {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.transformer.text_model.": 196}
KNOWN = {
    "model.diffusion_model.time_embed.0.weight": [1280, 320],
    "model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3],
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
    "model.diffusion_model.input_blocks.3.0.op.weight": [320, 320, 3, 3],
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": [640, 320, 1, 1],
    "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.middle_block.1.proj_in.weight": [1280, 1280, 1, 1],
    "model.diffusion_model.middle_block.2.emb_layers.1.weight": [1280, 1280],
    "model.diffusion_model.output_blocks.2.1.conv.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.output_blocks.5.2.conv.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.output_blocks.8.2.conv.bias": [640],
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": [2560, 320],
    "model.diffusion_model.out.2.weight": [4, 320, 3, 3],
    "first_stage_model.encoder.down.0.downsample.conv.weight": [128, 128, 3, 3],
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": [256, 128, 1, 1],
    "first_stage_model.encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
    "first_stage_model.decoder.mid.attn_1.proj_out.bias": [512],
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1],
    "first_stage_model.decoder.up.3.upsample.conv.weight": [512, 512, 3, 3],
    "first_stage_model.decoder.norm_out.weight": [128],
    "first_stage_model.quant_conv.weight": [8, 8, 1, 1],
    "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": [1536, 768],
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": [768],
}


def test_gamma_weights_survive_the_conversion(make_unet):
    unet = make_unet(time_cond_proj_dim=256).state_dict()
    single = diffusers_to_ldm(unet)
    assert "model.diffusion_model.time_embed.cond_proj.weight" in single
    assert_same_weights(ldm_to_diffusers(single)[0], unet)
    folded_before, folded_after = diffusers_to_ldm(fold_gamma(unet)[0]), fold_gamma(single)[0]
    assert_same_weights(folded_after, folded_before)


def test_vae_attention_under_its_old_diffusers_names(make_unet):
    """Many hub folders were saved with query, key, value, proj_attn."""
    vae = make_vae().state_dict()
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, weight in vae.items():
        for new_name, old_name in old_names.items():
            key = key.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        old[key] = weight
    assert old.keys() != vae.keys()
    unet = make_unet().state_dict()
    assert_same_weights(diffusers_to_ldm(unet, old), diffusers_to_ldm(unet, vae))


def test_text_encoders_of_either_transformers_generation(make_unet):
    unet, clip = make_unet().state_dict(), make_clip().state_dict()
    bare = {key.removeprefix("text_model."): weight for key, weight in clip.items()}
    prefixed = {"text_model." + key: weight for key, weight in bare.items()}
    assert_same_weights(diffusers_to_ldm(unet, None, bare), diffusers_to_ldm(unet, None, prefixed))
    single = diffusers_to_ldm(unet, None, bare)
    assert_same_weights(ldm_to_diffusers(single)[2], prefixed)
    assert_same_weights(ldm_to_diffusers(single, text_prefix="")[2], bare)


def test_clip_under_its_old_names_without_text_model(make_unet):
    clip = {key.removeprefix("text_model."): weight for key, weight in make_clip().state_dict().items()}
    old = {"cond_stage_model.transformer." + key: weight for key, weight in clip.items()}
    found = text_encoder_from_ldm(diffusers_to_ldm(make_unet().state_dict()) | old, *PLACES["sd1"][0])
    assert_same_weights(found, {key: weight for key, weight in clip.items() if not key.endswith("position_ids")})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_numbers_that_are_none_are_found(dtype):
    good = {"empty": torch.zeros(0, dtype=dtype), "good": torch.randn(3, 4).to(dtype), "count": torch.tensor(3)}
    assert not_finite(good) is None
    # Sums beyond the largest number, of numbers only.
    assert not_finite({"large": torch.full((3, 4), torch.finfo(dtype).max).to(dtype)}) is None
    if dtype.itemsize > 1:
        assert not_finite(good | {"bad": torch.tensor([torch.inf, -torch.inf, 1], dtype=dtype)}) == "bad"
    for value in (torch.nan,) if dtype.itemsize == 1 else (torch.nan, torch.inf, -torch.inf):
        bad = torch.randn(3, 4)
        bad[1, 2] = value
        assert not_finite(good | {"bad": bad.to(dtype)}) == "bad"


def test_what_published_files_carry_besides_is_left_out(make_unet):
    unet = make_unet().state_dict()
    single = diffusers_to_ldm(unet, None, make_clip().state_dict())
    extra = {
        "model_ema.decay": torch.ones(1),
        "betas": torch.ones(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    for found, expected in zip(ldm_to_diffusers({**single, **extra}), ldm_to_diffusers(single), strict=True):
        assert_same_weights(found, expected)


@pytest.mark.parametrize("prefix", ["unet.", "base_model.model.", ""])
def test_lora_keys_equal_diffusers_kohya_writer(prefix):
    utils = pytest.importorskip("diffusers.utils.state_dict_utils")
    modules = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "mid_block.resnets.1.time_emb_proj",
        "up_blocks.1.upsamplers.0.conv",
    ]
    weights = {f"{m}.lora_A.weight": torch.randn(4, 8) for m in modules}
    weights |= {f"{m}.lora_B.weight": torch.randn(8, 4) for m in modules}
    expected = utils.convert_state_dict_to_kohya({"unet." + key: weight for key, weight in weights.items()})
    found = lora_to_kohya({prefix + key: weight for key, weight in weights.items()})
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key].to(found[key])) for key in expected)
    assert {w.item() for key, w in lora_to_kohya(weights, 16).items() if key.endswith(".alpha")} == {16.0}


def test_a_dora_of_pefts_keeps_its_magnitudes_or_is_refused():
    lora = {
        "unet.mid_block.resnets.0.conv1.lora_magnitude_vector": torch.ones(1, 8, 1, 1),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_magnitude_vector.weight": torch.ones(8),
    }
    modules = ["lora_unet_mid_block_resnets_0_conv1", "lora_te_text_model_encoder_layers_0_mlp_fc1"]
    assert {module: tuple(w.shape) for module, w in lora_magnitudes(lora).items()} == dict.fromkeys(modules, (8,))
    with pytest.raises(ValueError, match=r"a DoRA of peft's .'unet.mid_block.resnets.0.conv1.lora_magnitude_vector'"):
        lora_to_kohya(lora)


def test_a_folded_bias_travels_in_a_lora():
    delta = torch.randn(8)
    assert lora_to_kohya({"time_embedding.linear_1.diff_b": delta}) == {
        "lora_unet_time_embedding_linear_1.diff_b": delta
    }
    with pytest.raises(ValueError, match=r"'unet\.conv_in\.weight'"):
        lora_to_kohya({"unet.conv_in.weight": delta})


def test_conversions_say_what_they_do_not_know(make_unet):
    unet = make_unet().state_dict()
    with pytest.raises(ValueError, match=r"UNet: the key 'controlnet_cond\.weight'"):
        diffusers_to_ldm({**unet, "controlnet_cond.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="A diffusers folder needs no conversion"):
        ldm_to_diffusers(unet)
    with pytest.raises(ValueError, match="OpenCLIP"):
        ldm_to_diffusers({**diffusers_to_ldm(unet), "cond_stage_model.model.ln_final.weight": torch.ones(1)})


def test_files_come_back_as_they_went(tmp_path):
    path = tmp_path / "model.safetensors"
    state = {"a": torch.randn(3, 4).half(), "b": torch.randn(4, 3).T, "c": torch.tensor(7)}
    save_file(state, path, {"splam.method": "splam"})
    assert_same_weights(load_file(path), state)
    assert load_file(path)["a"].dtype == torch.float16
    assert read_metadata(path) == {"format": "pt", "splam.method": "splam"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    shared = torch.ones(2)
    with pytest.raises(RuntimeError):
        save_file({"a": shared, "b": shared}, path)
    assert load_file(path).keys() == {"a"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_missing_truncated_and_pickled_files_are_told_apart(tmp_path):
    path = tmp_path / "model.safetensors"
    for read in (load_file, read_metadata):
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
            read(path)
        with pytest.raises(ValueError, match=r"model\.ckpt: expected a \.safetensors file, found a pickle"):
            read(tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match=r"the extension '\.gguf'"):
            read(tmp_path / "model.gguf")
    save_file({"a": torch.ones(100)}, path)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:4], b"version https://git-lfs.github.com/spec/v1\noid sha256:0"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"model\.safetensors.*found {len(broken)} bytes.*fetch it again"):
            load_file(path)


@pytest.mark.parametrize("name", ["model.sft", "model.SAFETENSORS", "model.SafeTensors"])
def test_safetensors_under_its_other_names(name, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", {"b": "c"})
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    assert load_file(tmp_path / name)["a"].sum() == 2
    assert read_metadata(tmp_path / name)["b"] == "c"


@pytest.mark.parametrize(
    "index, shards",
    [
        ("model.safetensors.index.json", "model-0000{}-of-00002.safetensors"),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
        ("model.fp16.safetensors.index.json", "model-0000{}-of-00002.fp16.safetensors"),
    ],
)
def test_shards_under_every_name_of_their_index(index, shards, tmp_path):
    names = [shards.format(number) for number in (1, 2)]
    for key, name in zip("ab", names, strict=True):
        save_file({key: torch.ones(2)}, tmp_path / name)
    (tmp_path / index).write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    assert load_files(weight_files(tmp_path, "model")).keys() == {"a", "b"}
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(index)}: names {re.escape(names[1])}, not found"):
        weight_files(tmp_path, "model")
    (tmp_path / index).write_text("[]")
    with pytest.raises(ValueError, match="expected JSON of one object, found a list"):
        weight_files(tmp_path, "model")
    assert weight_files(tmp_path, "diffusion_pytorch_model") == []


def test_saving_where_it_cannot_be_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="create it first"):
        save_file({}, tmp_path / "missing" / "model.safetensors")
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_file({}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="'steps' must be a string, got 4"):
        save_file({}, tmp_path / "model.safetensors", {"steps": 4})


TEXT = "lora_te_text_model_encoder_layers_0_"
ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.mark.parametrize(
    "key, kohya",
    [
        ("unet.mid_block.resnets.0.conv1.lora_A.weight", "lora_unet_mid_block_resnets_0_conv1.lora_down.weight"),
        ("base_model.model.conv_in.lora_B.default.weight", "lora_unet_conv_in.lora_up.weight"),
        ("unet.base_model.model.conv_in.lora_B.weight", "lora_unet_conv_in.lora_up.weight"),
        ("unet.a.attn1.processor.to_out_lora.down.weight", "lora_unet_a_attn1_to_out_0.lora_down.weight"),
        ("unet.a.attn2.processor.to_k_lora.up.weight", "lora_unet_a_attn2_to_k.lora_up.weight"),
        ("unet.a.attn1.to_out.0.lora.down.weight", "lora_unet_a_attn1_to_out_0.lora_down.weight"),
        ("text_model.encoder.layers.0.mlp.fc1.lora_A.weight", f"{TEXT}mlp_fc1.lora_down.weight"),
        ("text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight", f"{TEXT}mlp_fc1.lora_down.weight"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
            f"{TEXT}self_attn_out_proj.lora_up.weight",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
            f"{TEXT}self_attn_q_proj.lora_up.weight",
        ),
        ("lora_unet_conv_in.lora_mid.weight", "lora_unet_conv_in.lora_mid.weight"),
        ("lora_te1_encoder_layers_0_mlp_fc1.alpha", "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"),
    ],
)
def test_lora_names_that_files_bear(key, kohya):
    weight = torch.ones(2, 2)
    found = {name: value for name, value in lora_to_kohya({key: weight}).items() if value is weight}
    assert list(found) == [kohya]


def test_two_text_encoders_are_numbered():
    weights = {f"{part}.text_model.encoder.layers.0.mlp.fc1.lora_B.weight": torch.ones(2, 2) for part in ENCODERS}
    assert {key.partition("_text_model")[0] for key in lora_to_kohya(weights)} == {"lora_te1", "lora_te2"}


def test_alpha_of_a_lora_is_what_peft_would_scale_by(tmp_path):
    """The file's own, then the argument, then peft's configuration (pattern, adapter, rslora), then the rank."""
    peft = pytest.importorskip("peft")
    module, rank = "mid_block.resnets.0.conv1", 4
    keys = {"lora_A.weight": torch.ones(rank, 8), "lora_B.weight": torch.ones(8, rank)}

    def scale(config: dict | None, alpha=None) -> float:
        weights = {f"unet.{module}.{key}": weight for key, weight in keys.items()}
        metadata = {}
        if config is not None:
            text = json.dumps({f"unet.{key}": value for key, value in config.items()})
            save_file(weights, tmp_path / "lora.safetensors", {"lora_adapter_metadata": text})
            metadata = read_metadata(tmp_path / "lora.safetensors")
        kohya = lora_to_kohya(weights, alpha, lora_adapters(metadata))
        return kohya["lora_unet_mid_block_resnets_0_conv1.alpha"].item() / rank

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mid_block = torch.nn.Module()
            self.mid_block.resnets = torch.nn.ModuleList([torch.nn.Module()])
            self.mid_block.resnets[0].conv1 = torch.nn.Linear(8, 8)

    for config in (
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 6, "alpha_pattern": {"conv1": 3}},
        {"lora_alpha": 6, "alpha_pattern": {"resnets.1.conv1": 3}},
    ):
        wrapped = peft.get_peft_model(Model(), peft.LoraConfig(r=rank, target_modules=["conv1"], **config))
        expected = wrapped.base_model.model.mid_block.resnets[0].conv1.scaling["default"]
        assert scale(config) == pytest.approx(expected)
    assert scale(None) == 1
    assert scale({"lora_alpha": 6}, alpha=2) == 0.5
    weights = {f"unet.{module}.{key}": w for key, w in {**keys, "alpha": torch.tensor(3.0)}.items()}
    for order in (weights, dict(reversed(weights.items()))):
        assert lora_to_kohya(order, 2)["lora_unet_mid_block_resnets_0_conv1.alpha"] == 3


def test_metadata_that_is_no_json_is_no_adapter():
    assert lora_adapters({"lora_adapter_metadata": "{"}) == {}


def test_the_fold_reads_scaled_fp8_weights(make_unet):
    """ComfyUI's scaled fp8 files keep weight/scale; the fold is that of the true weights."""
    unet = make_unet(time_cond_proj_dim=256).state_dict()
    scaled = dict(unet)
    for layer in ("time_embedding.linear_1", "time_embedding.cond_proj"):
        scaled[f"{layer}.weight"] = unet[f"{layer}.weight"] / 4
        scaled[f"{layer}.scale_weight"] = torch.tensor(4.0)
    found, expected = (fold_gamma(state)[0]["time_embedding.linear_1.bias"] for state in (scaled, unet))
    assert torch.equal(found, expected)
    assert not any("cond_proj" in key for key in fold_gamma(scaled)[0])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "any").touch()
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
