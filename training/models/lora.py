"""A LoRA merged into the weights of a UNet: for export, and for scoring it as the model that it makes of its base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from splam_core import load_file, lora_to_kohya
from splam_core.keys import unet_pairs

LORA_FILE = "pytorch_lora_weights.safetensors"
_PARTS = ("lora_down.weight", "lora_up.weight", "alpha", "diff", "diff_b")


@torch.no_grad()
def merge_lora(unet: Mapping[str, Tensor], path: Path, scale: float = 1.0) -> None:
    """Add scale * (alpha/rank * up @ down + diff) to a UNet's weights and scale * diff_b to its biases, in place.

    unet: a state dict under diffusers' names. path: a .safetensors file with kohya's, peft's or diffusers' names, or a
    folder with pytorch_lora_weights.safetensors. Raises FileNotFoundError without it, ValueError naming the file for
    a LoRA of another model, of a text encoder (which would be lost), or of a kind that is not low-rank.
    """
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no LoRA; expected a .safetensors file or a folder with {LORA_FILE}")
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, weight in lora_to_kohya(load_file(file)).items():
        module, _, part = key.partition(".")
        if not module.startswith("lora_unet_") or part not in _PARTS:
            raise ValueError(
                f"{file}: expected lora_unet_<module>.<{', '.join(_PARTS)}>, found {key!r}; only low-rank changes "
                f"of a UNet can be merged"
            )
        parts[module.removeprefix("lora_unet_")][part] = weight
    modules = _modules_by_kohya_name(unet)
    for name, found in parts.items():
        if name not in modules:
            raise ValueError(f"{file}: this UNet has no module {name!r}: the LoRA belongs to another model")
        module = modules[name]
        try:
            for target, change in _changes(found).items():
                weight = unet[f"{module}.{target}"]
                weight.copy_(weight.double() + scale * change.reshape(weight.shape).to(weight.device))
        except (KeyError, RuntimeError) as error:
            shapes = {part: tuple(weight.shape) for part, weight in found.items()}
            own = {key: tuple(unet[f"{module}.{key}"].shape) for key in ("weight", "bias") if f"{module}.{key}" in unet}
            raise ValueError(
                f"{file}: {name} of this UNet is {own}, the LoRA's are {shapes}; it belongs to another model, or is "
                f"incomplete"
            ) from error


def _changes(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a module's parts of a LoRA add to its weight and its bias."""
    changes = {}
    if "diff_b" in found:
        changes["bias"] = found["diff_b"].double()
    if "diff" in found:
        changes["weight"] = found["diff"].double()
    if found.keys() & {"lora_up.weight", "lora_down.weight"}:
        up, down = found["lora_up.weight"].double(), found["lora_down.weight"].double()
        # Convolutions too: the up part of a convolution's LoRA is 1x1.
        low_rank = up.flatten(1) @ down.flatten(1) * (float(found.get("alpha", len(down))) / len(down))
        changes["weight"] = low_rank + (changes["weight"].flatten(1) if "weight" in changes else 0)
    return changes


def _modules_by_kohya_name(unet: Mapping[str, Tensor]) -> dict[str, str]:
    """Every module under its diffusers name and under its LDM name (SDXL's LoRAs), dots written as underscores."""
    modules = dict.fromkeys(key.rpartition(".")[0] for key in unet)
    names = {module.replace(".", "_"): module for module in modules}
    for diffusers, ldm in unet_pairs(unet):
        for module in modules:
            if module == diffusers or module.startswith(f"{diffusers}."):
                names.setdefault((ldm + module.removeprefix(diffusers)).replace(".", "_"), module)
    return names
