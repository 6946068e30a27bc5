"""One .safetensors file of a whole model, as ComfyUI and Automatic1111 keep it: read into a Pipeline, and written.

UNet and VAE are splam_core's business; here are the text encoders of the three families, and the configurations, which
our own files carry as JSON in their metadata and other people's files leave to be known from the family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from splam_core import NoiseSchedule, diffusers_to_ldm, fold_gamma, ldm_to_diffusers, load_file, read_metadata

from .architectures import ARCHITECTURES
from .pipeline import EMBEDDED, Pipeline

StateDict = dict[str, Tensor]
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")
# Where each family keeps its text encoders: (prefix, whether OpenCLIP's names follow it).
TEXT_PLACES = {
    "sd1": [("cond_stage_model.transformer.text_model.", False)],
    "sd2": [("cond_stage_model.model.", True)],
    "sdxl": [("conditioner.embedders.0.transformer.text_model.", False), ("conditioner.embedders.1.model.", True)],
}
_OPEN_CLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def family_of(state_dict: Mapping[str, Tensor]) -> str:
    """ "sd1", "sd2" or "sdxl", by where the text encoders lie or, without any, by the UNet's context width."""
    for family in ("sdxl", "sd2", "sd1"):
        if any(key.startswith(TEXT_PLACES[family][0][0]) for key in state_dict):
            return family
    if any(".label_emb." in key for key in state_dict):
        return "sdxl"
    widths = {weight.shape[1] for key, weight in state_dict.items() if key.endswith("attn2.to_k.weight")}
    return "sd2" if 1024 in widths else "sd1"


def load_single_file(
    file: Path, dtype: torch.dtype = torch.float32, embedded: str | float = "splam", prediction_type: str | None = None
) -> Pipeline:
    """A Pipeline of a single file of SD1.x, SD2.x or SDXL; a cond_proj in it is folded (`fold_gamma`'s `embedded`).

    Metadata "splam.<part>" gives the configurations; without them the published ones of the family are taken.
    prediction_type: of a file that does not say (ModelSpec metadata, or a "v_pred" key). A VAE or text encoder that
    the file lacks is an error. Raises ValueError naming the file.
    """
    weights, metadata = load_file(file), read_metadata(file)
    family = family_of(weights)
    known = {part: json.loads(metadata[f"splam.{part}"]) for part in PARTS if f"splam.{part}" in metadata}
    if "unet" in known and known["unet"].get("addition_embed_type") == "text_time":
        family = "sdxl"
    architecture = ARCHITECTURES[family]
    try:
        unet, vae, _ = ldm_to_diffusers(
            {k: v for k, v in weights.items() if not k.startswith(("cond_", "conditioner"))}
        )
        texts = [read_text_encoder(weights, *place) for place in TEXT_PLACES[family]]
        lacking = [name for name, part in (("VAE", vae), *(("text encoder", text) for text in texts)) if not part]
        if lacking:
            raise ValueError(f"it has no {' and no '.join(lacking)}; a teacher needs all parts")
        unet, _ = fold_gamma(unet, embedded)
        scheduler = known.get("scheduler") or {**architecture.scheduler, "prediction_type": _prediction(
            prediction_type, metadata, weights, family, unet
        )}  # fmt: skip
        if "unet" in known:
            known["unet"]["time_cond_proj_dim"] = None
        parts = [
            _build(UNet2DConditionModel.from_config(known.get("unet") or architecture.unet), unet, dtype),
            _build(AutoencoderKL.from_config(known.get("vae") or architecture.vae), vae, dtype),
            _build(CLIPTextModel(_clip(known.get("text_encoder"), architecture.clip())), texts[0], dtype),
        ]
        second = None
        if family == "sdxl":
            config = _clip(known.get("text_encoder_2"), architecture.clip(second=True))
            second = _build(CLIPTextModelWithProjection(config), texts[1], dtype)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: expected a Stable Diffusion 1.x, 2.x or XL checkpoint: {error}") from error
    pad = {"pad_token": "!"}  # OpenCLIP's
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", **(pad if family == "sd2" else {}))
    return Pipeline(
        *parts,
        tokenizer,
        NoiseSchedule.from_config(scheduler),
        scheduler,
        second,
        CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", **pad) if second is not None else None,
        second is not None,
        str(file),
    )


def to_single_file(
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor] | None,
    texts: list[Mapping[str, Tensor]],
    family: str,
) -> StateDict:
    """LDM state dict of diffusers parts; vae None and texts [] leave them out."""
    single = diffusers_to_ldm(unet, vae)
    for weights, (prefix, open_clip) in zip(texts, TEXT_PLACES[family], strict=False):
        plain = {key.removeprefix("text_model."): w for key, w in weights.items() if not key.endswith("position_ids")}
        single |= {prefix + key: weight for key, weight in (_to_open_clip(plain) if open_clip else plain).items()}
    return single


def read_text_encoder(weights: Mapping[str, Tensor], prefix: str, open_clip: bool) -> StateDict:
    """A text encoder of a single file under transformers' names without "text_model."; empty if there is none."""
    found = {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
    if not open_clip:
        return {key: weight for key, weight in found.items() if not key.endswith("position_ids")}
    plain: StateDict = {}
    for key, weight in found.items():
        if key in _OPEN_CLIP:
            plain[_OPEN_CLIP[key]] = weight
        elif key == "text_projection":
            plain["text_projection.weight"] = weight.T.contiguous()
        elif key.startswith("transformer.resblocks."):
            number, _, rest = key.removeprefix("transformer.resblocks.").partition(".")
            layer = f"encoder.layers.{number}"
            module, _, kind = rest.rpartition(".")
            if rest.startswith("attn.in_proj_"):
                for name, part in zip("qkv", weight.chunk(3), strict=True):
                    plain[f"{layer}.self_attn.{name}_proj.{rest.removeprefix('attn.in_proj_')}"] = part.clone()
            else:
                plain[f"{layer}.{_OPEN_CLIP_LAYER[module]}.{kind}"] = weight
    return plain


def _to_open_clip(plain: Mapping[str, Tensor]) -> StateDict:
    """transformers' names without "text_model." to OpenCLIP's: q, k and v in one matrix, the projection transposed."""
    names = {new: old for old, new in _OPEN_CLIP.items()}
    layers = {new: old for old, new in _OPEN_CLIP_LAYER.items()}
    result: StateDict = {}
    for key, weight in plain.items():
        if key in names:
            result[names[key]] = weight
        elif key == "text_projection.weight":
            result["text_projection"] = weight.T.contiguous()
        elif key.startswith("encoder.layers."):
            number, _, rest = key.removeprefix("encoder.layers.").partition(".")
            module, _, kind = rest.rpartition(".")
            place = f"transformer.resblocks.{number}"
            if module in layers:
                result[f"{place}.{layers[module]}.{kind}"] = weight
            elif module == "self_attn.q_proj":
                three = [plain[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
                result[f"{place}.attn.in_proj_{kind}"] = torch.cat(three)
        else:
            raise ValueError(f"text encoder: the key {key!r} has no counterpart in OpenCLIP")
    return result


def load_text_weights(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights named without "text_model." into whatever transformers calls them; a layer too many is left out."""
    own = {key.removeprefix("text_model."): key for key in model.state_dict() if not key.endswith("position_ids")}
    missing = sorted(own.keys() - weights.keys())
    if missing:
        raise ValueError(f"the text encoder lacks {len(missing)} weights, the first {missing[0]!r}")
    model.load_state_dict({own[key]: weight for key, weight in weights.items() if key in own}, strict=False)


def _build(model: torch.nn.Module, weights: StateDict, dtype: torch.dtype) -> torch.nn.Module:
    model = model.to(dtype)
    if isinstance(model, (CLIPTextModel, CLIPTextModelWithProjection)):
        load_text_weights(model, weights)
    else:
        model.load_state_dict(weights)
    return model


def _clip(known: dict | None, default: CLIPTextConfig) -> CLIPTextConfig:
    return CLIPTextConfig.from_dict(known) if known else default


def _prediction(
    asked: str | None, metadata: Mapping[str, str], weights: Mapping[str, Tensor], family: str, unet: StateDict
) -> str:
    """What the network predicts. SD2.1's two files differ in nothing but their training: one predicts v at 768 px.

    Known by diffusers and the hosts from the last layer norm's bias of the last block's self-attention.
    """
    said = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key")
    if asked or said:
        return {"v": "v_prediction", "epsilon": "epsilon"}.get(asked or said, asked or said)
    if "v_pred" in weights:
        return "v_prediction"
    probe = weights.get("model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias")
    # The v model's values spread wide (ComfyUI draws the same line, at 0.09).
    return "v_prediction" if family == "sd2" and probe is not None and probe.float().std() > 0.09 else "epsilon"
