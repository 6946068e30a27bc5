"""The LoRAs that are on a MODEL and its CLIP, and a new one beside them, as one LoRA: style and speed in one file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import comfy.lora
import comfy.utils
import comfy.weight_adapter
import torch
from torch import Tensor

from ..host import Clip, Model
from .host import NAME

HOLDS = ("speed", "both")  # what the LoRA that comes out is of
Patches = list[tuple[Any, ...]]  # of a weight, in the host's form: (strength, adapter or difference, ...)


def check_style(model: Model, clip: Clip | None) -> None:
    """Raises ValueError where MODEL and CLIP have no LoRA, or one that is not among their patches."""
    patchers = [model, *([clip.patcher] if clip is not None else [])]
    if any("bypass_lora" in patcher.injections for patcher in patchers):
        raise ValueError(
            f"{NAME}: lora_holds is 'both', and a LoRA was loaded in bypass mode, which this does not read. "
            "Load it by Load LoRA, or set lora_holds to 'speed'."
        )
    if not any(patcher.patches for patcher in patchers):
        raise ValueError(
            f"{NAME}: lora_holds is 'both', and neither MODEL nor CLIP has a LoRA on it. Put Load LoRA between the "
            "checkpoint and this node, or set lora_holds to 'speed'."
        )


@torch.no_grad()
def with_style(lora: Mapping[str, Tensor], model: Model, clip: Clip | None) -> dict[str, Tensor]:
    """What changes the model's own weights as its LoRAs, and after them `lora`, do; kohya's names, fp16, on the CPU.

    lora: of `as_lora`, learned on the MODEL with its LoRAs. Ranks are put beside one another; where a layer has
    another change than LoRAs of two matrices (DoRA, LoHa, a merge), all of it goes in as one whole difference.
    """
    new: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, weight in lora.items():
        module, _, part = key.partition(".")
        new[module][part] = weight.float()
    found: dict[str, Tensor] = dict(lora)
    for kohya, part, weight, patches in (*_of_unet(model), *(_of_clip(clip) if clip is not None else ())):
        if part == "bias":
            joined = {"diff_b": comfy.lora.calculate_weight(patches, weight.clone(), kohya) - weight}
        else:
            ours = new.pop(kohya, None)
            joined = _joined(weight, patches, _matrices(ours, weight) if ours else None, kohya)
            for name in ours or ():
                del found[f"{kohya}.{name}"]
        found |= {f"{kohya}.{name}": value.to("cpu", torch.float16).contiguous() for name, value in joined.items()}
    return found


def _joined(weight: Tensor, patches: Patches, ours: tuple[Tensor, Tensor] | None, name: str) -> dict[str, Tensor]:
    """The parts of one LoRA for a weight [out, in, ...] that patches and then `ours`, (down, up), change."""
    pairs = [_pair(one, weight) for one in patches]
    plain = [pair for pair in pairs if pair is not None]
    if len(plain) == len(pairs):
        downs, ups = zip(*plain, *([ours] if ours else []), strict=True)
        down, up = torch.cat(downs), torch.cat(ups, 1)
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(len(down)))}
    changed: Tensor = comfy.lora.calculate_weight(patches, weight.clone(), name) - weight
    if ours:
        changed += (ours[1].flatten(1) @ ours[0].flatten(1)).reshape(weight.shape)
    return {"diff": changed}


def _of_unet(model: Model) -> Iterator[tuple[str, str, Tensor, Patches]]:
    """(kohya's name, "weight" or "bias", what it is without patches, its patches) of every patched weight."""
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    kohya = {f"diffusion_model.{own}": "lora_unet_" + key.rpartition(".")[0] for key, own in names.items()}
    yield from _patched(model, kohya, "diffusion_model.", "lora_unet_")


def _of_clip(clip: Clip) -> Iterator[tuple[str, str, Tensor, Patches]]:
    """The same of the text encoders: one is lora_te, several are lora_te1 and lora_te2."""
    known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    several = any(name.startswith("lora_te2_") for name in known)
    starts = ("lora_te1_", "lora_te2_") if several else ("lora_te_",)
    kohya: dict[str, str] = {}
    for name, own in known.items():
        if name.startswith(starts):
            kohya.update({own: name, f"{own.removesuffix('.weight')}.bias": name})
    yield from _patched(clip.patcher, kohya, "", "text_encoders.")


def _patched(
    patcher: Any, kohya: Mapping[str, str], own_start: str, start: str
) -> Iterator[tuple[str, str, Tensor, Patches]]:
    for key, (first, *patches) in patcher.get_key_patches().items():
        if patches and key.startswith(own_start):
            module, _, part = key.rpartition(".")
            # A layer that nobody else has a name for goes by the host's own.
            name = kohya.get(key, start + module.removeprefix(own_start)).replace(".", "_")
            weight, convert = first
            yield name, part, convert(weight.detach().to("cpu", torch.float32, copy=True), inplace=True), patches


def _pair(patch: tuple[Any, ...], weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """(down [r, in, ...], up [out, r, ...]) whose product is the patch; None for another kind than a plain LoRA's."""
    strength, adapter, strength_model, offset, function = patch
    # Not a kind of it, such as a DoRA of peft's, of which the matrices are not all.
    plain = type(adapter) is comfy.weight_adapter.LoRAAdapter and strength_model == 1.0
    if not plain or offset is not None or function is not None:
        return None
    up, down, alpha, middle, dora_scale, reshape = adapter.weights
    if middle is not None or dora_scale is not None or reshape is not None:
        return None
    parts = {"lora_up.weight": up.float().cpu(), "lora_down.weight": down.float().cpu()}
    if alpha is not None:
        parts["alpha"] = torch.tensor(float(alpha))
    down, up = _matrices(parts, weight)
    return down, strength * up


def _matrices(parts: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a LoRA for this weight, alpha/rank in the second."""
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    rank = len(down)
    up = float(parts.get("alpha", rank)) / rank * up
    return down.reshape(rank, *weight.shape[1:]), up.reshape(len(weight), rank, *[1] * (weight.ndim - 2))
