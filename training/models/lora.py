"""A LoRA merged into the weights of a UNet: for export, and for scoring it as the model that it makes of its base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from splam_core import load_file, lora_to_kohya
from splam_core.keys import unet_pairs

from .files import ModelFiles, model_spec

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


def merged(base: dict[str, Tensor], lora: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A UNet's fp32 state dict plus scale * up @ down of every module of a LoRA under peft's names."""
    result = dict(base)
    for key, down in lora.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        up = lora[f"{module}.lora_B.weight"]
        weight = result[f"{module}.weight"]
        delta = (up.flatten(1).double() @ down.flatten(1).double()).reshape(weight.shape)
        result[f"{module}.weight"] = (weight.double() + scale * delta).float()
    return result


def extract_lora(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The LoRA (peft's names, alpha = rank) nearest to tuned - base: a truncated SVD of every matrix and kernel.

    Biases and norms, which have no low rank, go in whole as .diff_b and .diff. At full rank it is exact.
    Raises ValueError for UNets of different shapes.
    """
    if tuned.keys() != base.keys():
        different = sorted(tuned.keys() ^ base.keys())
        raise ValueError(f"--base is another architecture: {len(different)} keys differ, the first {different[0]}")
    lora: dict[str, Tensor] = {}
    for key, weight in tuned.items():
        if weight.shape != base[key].shape:
            raise ValueError(f"--base is another architecture: {key} is {tuple(base[key].shape)} there")
        difference = weight.float() - base[key].float()
        if not difference.any():
            continue
        module, _, kind = key.rpartition(".")
        if kind == "bias":
            lora[f"{module}.diff_b"] = difference
        elif difference.ndim < 2:
            lora[f"{module}.diff"] = difference
        else:
            u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
            kept = min(rank, len(s))
            root = s[:kept].sqrt()
            down = (root[:, None] * v[:kept]).reshape(kept, *difference.shape[1:])
            up = (u[:, :kept] * root).reshape(len(u), kept, *[1] * (difference.ndim - 2))
            lora |= {f"{module}.lora_A.weight": down.contiguous(), f"{module}.lora_B.weight": up.contiguous()}
    return lora


def save_lora(
    lora: Mapping[str, Tensor],
    file: Path,
    model: ModelFiles,
    scale: float,
    dtype: torch.dtype,
    title: str,
    more: Mapping[str, str] | None = None,
) -> None:
    """A LoRA under kohya's names, which every host loads. scale: alpha/rank."""
    ranks = {key: w.shape[0] for key, w in lora.items() if key.endswith("lora_A.weight")}
    kohya = lora_to_kohya({key: weight.to(dtype).contiguous() for key, weight in lora.items()})
    for key, weight in kohya.items():
        if key.endswith(".alpha"):
            kohya[key] = weight * scale
    rank = max(ranks.values(), default=0)
    metadata = model_spec(model, title, "/lora") | dict(more or {})
    metadata |= {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank * scale),
        "ss_base_model_version": {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[model.family],
        "ss_v2": str(model.family == "sd2"),
    }
    save_file(kohya, file, metadata)
