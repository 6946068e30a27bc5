"""fp8 weights with a factor beside them, in both of ComfyUI's namings: read as what they stand for, everywhere."""

import json

import pytest
import torch
from safetensors.torch import save_file

from splam_core import fold_gamma, load_file, load_files, read_metadata
from splam_core.quantization import dequantized

pytestmark = pytest.mark.core
E4M3 = torch.float8_e4m3fn


def scaled(weight: torch.Tensor, naming: str, layer: str = "layer", channels: bool = False) -> tuple[dict, dict]:
    """(keys of a scaled fp8 layer and its file, metadata)."""
    factor = weight.abs().amax(dim=1) / 400 if channels else weight.abs().max() / 400
    codes = (weight / (factor[:, None] if channels else factor)).to(E4M3)
    if naming == "scale_weight":
        keys = {f"{layer}.weight": codes, f"{layer}.scale_weight": factor, f"{layer}.scale_input": torch.ones(())}
        return keys | {"scaled_fp8": torch.zeros(2, dtype=E4M3)}, {}
    keys = {f"{layer}.weight": codes, f"{layer}.weight_scale": factor, f"{layer}.input_scale": torch.ones(())}
    description = {"format": "float8_e4m3fn"}
    if naming == "comfy_quant":
        return keys | {
            f"{layer}.comfy_quant": torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)
        }, {}
    return keys, {"_quantization_metadata": json.dumps({"layers": {layer: description}})}


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("naming", ["scale_weight", "comfy_quant", "metadata"])
def test_codes_come_back_as_weights(naming, channels, tmp_path):
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * 0.03
    keys, metadata = scaled(weight, naming, channels=channels)
    save_file(keys | {"layer.bias": torch.zeros(8)}, tmp_path / "model.safetensors", metadata)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == {"layer.weight", "layer.bias"} and found["layer.weight"].dtype == torch.float32
    assert (found["layer.weight"] - weight).abs().max() < 0.07 * weight.abs().max()
    assert "_quantization_metadata" not in read_metadata(tmp_path / "model.safetensors")


def test_a_factor_may_lie_in_another_shard(tmp_path):
    keys, _ = scaled(torch.randn(8, 4), "scale_weight")
    factor = {"layer.scale_weight": keys.pop("layer.scale_weight")}
    for name, part in {"a": keys, "b": factor}.items():
        save_file(part, tmp_path / f"{name}.safetensors")
    found = load_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert found["layer.weight"].dtype == torch.float16
    assert torch.equal(found["layer.weight"], (keys["layer.weight"].float() * factor["layer.scale_weight"]).half())


def test_plain_fp8_stays_as_it_is():
    codes = torch.randn(4, 4).to(E4M3)
    assert dequantized({"layer.weight": codes, "scaled_fp8": torch.zeros(0, dtype=E4M3)})["layer.weight"] is codes


@pytest.mark.parametrize("naming", ["scale_weight", "comfy_quant"])
def test_the_fold_knows_both_namings(naming):
    torch.manual_seed(0)
    state = {"time_embedding.linear_1.bias": torch.zeros(8)}
    for layer, shape in (("time_embedding.linear_1", (8, 4)), ("time_embedding.cond_proj", (4, 256))):
        state |= scaled(torch.randn(shape), naming, layer)[0]
    expected = fold_gamma(dequantized(state))[0]["time_embedding.linear_1.bias"]
    found = fold_gamma(state)[0]
    assert torch.allclose(found["time_embedding.linear_1.bias"], expected, atol=1e-6)
    assert not any("cond_proj" in key for key in found)


def description(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"layer.comfy_quant": description(b'{"format": "nvfp4"}')}, "quantised as nvfp4; expected fp8"),
        ({"layer.comfy_quant": description(b"[1]")}, "does not parse"),
        ({"layer.comfy_quant": description(b"{" * 9000)}, "does not parse"),
        (
            {"layer.weight_scale": torch.ones(3)},
            r"'layer.weight_scale' has the shape \(3,\) beside a weight of \(8, 4\)",
        ),
    ],
)
def test_other_quantisations_are_refused_by_name(extra, words, tmp_path):
    save_file({"layer.weight": torch.zeros(8, 4), **extra}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{words}"):
        load_file(tmp_path / "model.safetensors")
