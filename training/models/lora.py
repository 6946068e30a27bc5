"""A LoRA merged into the weights of a UNet: for export, and for scoring it as the model that it makes of its base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splam_core import (
    load_file,
    lora_adapters,
    lora_magnitudes,
    lora_to_kohya,
    read_json,
    read_metadata,
    reading,
    save_file,
)
from splam_core.keys import unet_pairs

from .files import ModelFiles, StateDict, model_spec

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and peft's
ADAPTER_CONFIG = "adapter_config.json"
_PARTS = ("lora_down.weight", "lora_up.weight", "alpha", "diff", "diff_b", "magnitude")
_LORA_MARKS = ("lora_", ".lora.", "hada_", "lokr_", "oft_", "lycoris_")
_KEEPING_STARTS = ("gaussian", "eva")  # of peft's init_lora_weights: those that leave the weights below as they are


def lora_file(path: Path) -> Path | None:
    """The weights of a folder that diffusers or peft left, or the file itself; None if there is none."""
    choices = [path / name for name in LORA_FILES] if path.is_dir() else [path]
    return next((file for file in choices if file.is_file()), None)


def is_lora(place: Path) -> bool:
    """By a folder's files, or by a file's keys; LyCORIS' kinds too, which are then refused by name."""
    file = lora_file(place)
    if place.is_dir():  # a pipeline may have a LoRA beside it
        return file is not None and not (place / "unet").is_dir()
    return any(mark in key or key.endswith((".diff", ".diff_b")) for key in load_file(file) for mark in _LORA_MARKS)


def read_lora(path: Path) -> StateDict:
    """A LoRA of a UNet as `merged` takes it: kohya's names, every module with its alpha, DoRA's norms as "magnitude".

    path: a .safetensors file with kohya's, peft's or diffusers' names, or a folder that diffusers or peft left. Alphas
    are those of the file, else of adapter_config.json beside it, else of its metadata (alpha_pattern and rsLoRA too),
    else the ranks. Raises FileNotFoundError without a file, ValueError naming it for what cannot be added exactly.
    """
    file = lora_file(path)
    if file is None:
        raise FileNotFoundError(
            f"{path} holds no LoRA; expected a .safetensors file, or a folder with {' or '.join(LORA_FILES)}"
        )
    lora, config = load_file(file), file.parent / ADAPTER_CONFIG
    with reading(file):
        adapters = lora_adapters(read_metadata(file))
        if config.is_file() and file.name == LORA_FILES[1]:
            adapters = {"unet": read_json(config)}
        try:
            _check_adapter(adapters.get("unet", {}))
            norms = lora_magnitudes(lora)
            plain = {key: weight for key, weight in lora.items() if "lora_magnitude_vector" not in key}
            found = lora_to_kohya(plain, adapters=adapters) | {f"{key}.magnitude": norm for key, norm in norms.items()}
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    _parts(found, str(file))
    return found


def _check_adapter(config: Mapping[str, Any]) -> None:
    """Refuse what peft's configuration says and its weights do not show."""
    kind, start = config.get("peft_type") or "LORA", config.get("init_lora_weights", True)
    if kind != "LORA":
        raise ValueError(f"its adapter is peft's {kind}, expected LORA: merge it with peft")
    if not isinstance(start, bool) and start not in _KEEPING_STARTS:
        raise ValueError(
            f"its init_lora_weights is {start!r}, by which peft changed the weights below it first; expected true, "
            f"false, {' or '.join(_KEEPING_STARTS)}: merge it with peft"
        )
    for name in ("layer_replication", "fan_in_fan_out"):
        if config.get(name):
            raise ValueError(f"its {name} is set, which no adapter of a Stable Diffusion UNet has: merge it with peft")


@torch.no_grad()
def merged(unet: Mapping[str, Tensor], lora: Mapping[str, Tensor], scale: float = 1.0, name: str = "LoRA") -> StateDict:
    """A UNet's state dict plus scale * (alpha/rank * up @ down + diff), and its biases plus scale * diff_b.

    Summed in float64 and rounded once to each weight's own type. unet: under diffusers' names. lora: of `read_lora`, or
    under kohya's or peft's names; without an alpha it is the rank. With magnitudes (Liu et al., DoRA) the changed
    weight's rows get these norms, and scale goes from the old weight to that. name: of what errors speak.
    Raises ValueError for a LoRA of another model, of a text encoder (which would be lost), or of another kind.
    """
    result, modules = dict(unet), _modules_by_kohya_name(unet)
    for kohya, found in _parts(lora_to_kohya(lora), name).items():
        if kohya not in modules:
            raise ValueError(f"{name}: this UNet has no module {kohya!r}: the LoRA belongs to another model")
        module = modules[kohya]
        try:
            if "diff_b" in found:
                bias = unet[f"{module}.bias"]
                result[f"{module}.bias"] = (bias.double() + scale * _at(found["diff_b"], bias)).to(bias.dtype)
            if found.keys() & {"lora_up.weight", "lora_down.weight", "diff"}:
                weight = unet[f"{module}.weight"]
                change = _change(weight.double(), found)
                result[f"{module}.weight"] = (weight.double() + scale * change).to(weight.dtype)
        except (LookupError, RuntimeError, ValueError) as error:
            shapes = {part: tuple(weight.shape) for part, weight in found.items()}
            own = {key: tuple(unet[f"{module}.{key}"].shape) for key in ("weight", "bias") if f"{module}.{key}" in unet}
            raise ValueError(
                f"{name}: {kohya} of this UNet is {own}, the LoRA's are {shapes}; it belongs to another model, or is "
                f"incomplete"
            ) from error
    return result


def as_adapter(
    lora: Mapping[str, Tensor], adapter: Mapping[str, Tensor], unet: Mapping[str, Tensor], scale: float, name: str
) -> StateDict:
    """The weights of an adapter (peft's names, alpha/rank = scale) that changes a UNet as a LoRA of `read_lora` does.

    Where the adapter's rank is higher, what it has too much stays as it is in A and is zero in B. Raises ValueError for
    a LoRA of another model, of a higher rank, with layers that the adapter has not, or with more than matrices.
    """
    result, names = dict(adapter), _modules_by_kohya_name(unet)
    for kohya, found in _parts(lora, name).items():
        module = names.get(kohya)
        if module is None:
            raise ValueError(f"{name}: this UNet has no module {kohya!r}: the LoRA belongs to another model")
        if found.keys() | {"alpha"} != {"lora_up.weight", "lora_down.weight", "alpha"}:
            raise ValueError(
                f"{name}: {kohya} has {', '.join(sorted(found))}, expected two matrices: train without --lora"
            )
        if f"{module}.lora_A.weight" not in adapter:
            raise ValueError(f"{name}: it changes {module}, which --lora-target-modules does not name: add it")
        down, up = found["lora_down.weight"].float(), found["lora_up.weight"].float()
        a, b = (adapter[f"{module}.lora_{one}.weight"].clone() for one in "AB")
        rank = len(down)
        if rank > len(a):
            raise ValueError(f"{name}: {module} is of rank {rank}: expected {len(a)} or less. Take --lora-rank {rank}")
        if down.numel() != a[:rank].numel() or up.numel() != b[:, :rank].numel():
            raise ValueError(f"{name}: {module} has other shapes than this UNet's: the LoRA belongs to another model")
        a[:rank] = down.reshape(a[:rank].shape)
        b.zero_()
        b[:, :rank] = (up * (float(found.get("alpha", rank)) / rank / scale)).reshape(b[:, :rank].shape)
        result |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return result


def _parts(lora: Mapping[str, Tensor], name: str) -> dict[str, dict[str, Tensor]]:
    """{module: {part: tensor}} of a LoRA under kohya's names, the modules without "lora_unet_"."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, weight in lora.items():
        module, _, part = key.partition(".")
        if part == "dora_scale":
            raise ValueError(
                f"{name}: it is a DoRA of kohya's or LyCORIS' ({key!r}), whose readers do not agree on the norms that "
                f"belong to it; expected peft's, or a LoRA"
            )
        if not module.startswith("lora_unet_") or part not in _PARTS:
            raise ValueError(
                f"{name}: expected lora_unet_<module>.<{', '.join(_PARTS)}>, found {key!r}; only low-rank changes of a "
                f"UNet can be merged"
            )
        parts[module.removeprefix("lora_unet_")][part] = weight
    return parts


def _change(weight: Tensor, found: Mapping[str, Tensor]) -> Tensor:
    """What a module's parts of a LoRA add to its weight; all in float64."""
    change = _at(found["diff"], weight) if "diff" in found else torch.zeros_like(weight)
    if found.keys() & {"lora_up.weight", "lora_down.weight"}:
        up, down = found["lora_up.weight"].double(), found["lora_down.weight"].double()
        # Convolutions too: the up part of a convolution's LoRA is 1x1.
        change = change + _at(
            up.flatten(1) @ down.flatten(1) * (float(found.get("alpha", len(down))) / len(down)), weight
        )
    if "magnitude" in found:
        rows = (weight + change).flatten(1)
        factors = found["magnitude"].to(rows).reshape(-1, 1) / rows.norm(dim=1, keepdim=True)
        change = (factors * rows).reshape(weight.shape) - weight
    return change


def _at(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, torch.float64).reshape(like.shape)


def _modules_by_kohya_name(unet: Mapping[str, Tensor]) -> dict[str, str]:
    """Every module under its diffusers name and under its LDM name (SDXL's LoRAs), dots written as underscores."""
    modules = dict.fromkeys(key.rpartition(".")[0] for key in unet)
    names = {module.replace(".", "_"): module for module in modules}
    for diffusers, ldm in unet_pairs(unet):
        for module in modules:
            if module == diffusers or module.startswith(f"{diffusers}."):
                names.setdefault((ldm + module.removeprefix(diffusers)).replace(".", "_"), module)
    return names


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
