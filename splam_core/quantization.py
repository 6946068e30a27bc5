"""Weights kept as 8-bit floats with a factor beside them, in either of ComfyUI's namings, back to what they stand for.

`<layer>.scale_weight` with a marker `scaled_fp8`, or `<layer>.weight_scale` with a `<layer>.comfy_quant` or metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

METADATA = "_quantization_metadata"
FACTORS = ("scale_weight", "weight_scale")
# What else lies beside such weights: factors of the layers' inputs, for 8-bit arithmetic, and the formats' names.
_COMPANIONS = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
_FORMATS = ("float8_e4m3fn", "float8_e5m2")


def dequantized(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The state dict with every factor multiplied in, and without what lay beside the weights for it.

    Such weights come out in the type of the others, float16 at least. A state dict without factors comes back as it
    is, 8-bit floats too. Raises ValueError for other quantisations (NVFP4, MXFP8, int8) and ill-fitting factors.
    """
    foreign = sorted(_formats(state_dict, metadata or {}) - set(_FORMATS))
    if foreign:
        raise ValueError(
            f"its weights are quantised as {foreign[0]}; expected fp8, or no quantisation. Take the model's fp16 or "
            "fp8 version."
        )
    found = {key: factor_of(state_dict, key) for key in state_dict if key.endswith("weight")}
    factors = {key: factor for key, factor in found.items() if factor is not None}
    kept = {key: weight for key, weight in state_dict.items() if _last(key) not in (*FACTORS, *_COMPANIONS)}
    others = {w.dtype for key, w in kept.items() if key not in factors and w.is_floating_point()}
    wide = torch.float32 if torch.float32 in others else torch.bfloat16 if torch.bfloat16 in others else torch.float16
    return {key: (weight.float() * factors[key]).to(wide) if key in factors else weight for key, weight in kept.items()}


def factor_of(state_dict: Mapping[str, Tensor], key: str) -> Tensor | None:
    """What the weight of this key is to be multiplied by, shaped so that it can be; None if nothing.

    One number, or one an output channel; raises ValueError for another shape.
    """
    layer, weight = key.removesuffix("weight"), state_dict[key]
    found = next((f"{layer}{name}" for name in FACTORS if f"{layer}{name}" in state_dict), None)
    if found is None:
        return None
    factor = state_dict[found].float()
    if factor.numel() == 1:
        return factor.reshape(())
    if weight.ndim and factor.numel() == weight.shape[0]:
        return factor.reshape(-1, *[1] * (weight.ndim - 1))
    raise ValueError(
        f"{found!r} has the shape {tuple(factor.shape)} beside a weight of {tuple(weight.shape)}; expected one number, "
        "or one an output channel. Take the model's fp16 version."
    )


def _formats(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> set[str]:
    """The formats that a file names for its layers."""
    said = [weight.flatten()[:4096] for key, weight in state_dict.items() if _last(key) == "comfy_quant"]
    try:
        layers = [json.loads(bytes(text.to(torch.uint8).tolist())) for text in said]
        if METADATA in metadata:
            layers += json.loads(metadata[METADATA])["layers"].values()
        return {str(layer["format"]) for layer in layers}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"its description of how weights are quantised does not parse ({error!r}). Fetch the file again."
        ) from error


def companions(key: str) -> list[str]:
    """The keys that may lie beside a weight's."""
    layer = key.removesuffix("weight")
    return [layer + name for name in (*FACTORS, *_COMPANIONS)]


def _last(key: str) -> str:
    return key.rpartition(".")[2]
