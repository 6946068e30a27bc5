"""One .safetensors file of a whole model, as ComfyUI and Automatic1111 keep it: read into a Pipeline, and written.

The weights' names are splam_core's business; here are the configurations, which our own files carry as JSON in their
metadata and other people's files leave to be known from the family.
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
from splam_core.text_encoders import PLACES, text_encoder_from_ldm, text_encoders_to_ldm

from .architectures import ARCHITECTURES
from .pipeline import EMBEDDED, Pipeline

StateDict = dict[str, Tensor]
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")


def family_of(state_dict: Mapping[str, Tensor]) -> str:
    """ "sd1", "sd2" or "sdxl", by where the text encoders lie or, without any, by the UNet's context width."""
    for family in ("sdxl", "sd2", "sd1"):
        if any(key.startswith(PLACES[family][0][0]) for key in state_dict):
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
        texts = [text_encoder_from_ldm(weights, *place) for place in PLACES[family]]
        lacking = [name for name, part in (("VAE", vae), *(("text encoder", text) for text in texts)) if not part]
        if lacking:
            raise ValueError(f"it has no {' and no '.join(lacking)}; a teacher needs all parts")
        unet, _ = fold_gamma(unet, embedded)
        scheduler = known.get("scheduler") or {**architecture.scheduler, "prediction_type": prediction_of(
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
    return diffusers_to_ldm(unet, vae) | (text_encoders_to_ldm(texts, family) if texts else {})


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


def prediction_of(
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
