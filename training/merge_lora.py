"""A LoRA merged into a pipeline's UNet, for scoring it as the model that it makes of its base."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from splam_core import load_file, lora_to_kohya
from splam_core.keys import unet_pairs

from .pipeline import Pipeline

LORA_FILE = "pytorch_lora_weights.safetensors"
_PARTS = ("lora_down.weight", "lora_up.weight", "alpha", "diff_b")


def merge_lora(pipeline: Pipeline, path: Path, scale: float = 1.0) -> None:
    """Add scale * alpha/rank * up @ down to the UNet's weights, and scale * diff_b to its biases, in place.

    path: a .safetensors file with kohya's or peft's names, or a folder with pytorch_lora_weights.safetensors.
    Raises FileNotFoundError without it, ValueError naming the file for a LoRA of another model, of a text encoder, or
    of a kind that is not low-rank.
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
    modules = _modules_by_kohya_name(pipeline.unet)
    for name, found in parts.items():
        if name not in modules:
            raise ValueError(f"{file}: this UNet has no module {name!r}: the LoRA belongs to another model")
        try:
            _add(modules[name], found, scale)
        except (KeyError, RuntimeError) as error:
            shapes = {part: tuple(weight.shape) for part, weight in found.items()}
            raise ValueError(
                f"{file}: {name} of this UNet is {tuple(modules[name].weight.shape)}, the LoRA's are {shapes}; it "
                f"belongs to another model, or is incomplete"
            ) from error


@torch.no_grad()
def _add(module: torch.nn.Module, found: dict[str, Tensor], scale: float) -> None:
    if "diff_b" in found:
        bias = module.bias
        bias.copy_(bias.double() + scale * found["diff_b"].double().reshape(bias.shape).to(bias.device))
    if found.keys() <= {"diff_b"}:
        return
    up, down = found["lora_up.weight"].double(), found["lora_down.weight"].double()
    rank = down.shape[0]
    strength = scale * float(found.get("alpha", torch.tensor(rank))) / rank
    # Convolutions too: the up part of a convolution's LoRA is 1x1.
    change = (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
    module.weight.copy_(module.weight.double() + strength * change.to(module.weight.device))


def _modules_by_kohya_name(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every layer under its diffusers name and under its LDM name (SDXL's LoRAs), dots written as underscores."""
    layers = {name: module for name, module in unet.named_modules() if hasattr(module, "weight")}
    names = {name.replace(".", "_"): module for name, module in layers.items()}
    for diffusers, ldm in unet_pairs(unet.state_dict()):
        for name, module in layers.items():
            if name == diffusers or name.startswith(f"{diffusers}."):
                names.setdefault((ldm + name.removeprefix(diffusers)).replace(".", "_"), module)
    return names
