"""LoRAs merged into a model's weights: for export, for scoring, and into a teacher; and several LoRAs made one."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splam_core import (
    load_file,
    lora_adapters,
    lora_magnitudes,
    lora_to_kohya,
    not_finite,
    read_json,
    read_metadata,
    reading,
    save_file,
    shortened,
)
from splam_core.keys import unet_pairs

from .files import ModelFiles, StateDict, model_spec

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and peft's
ADAPTER_CONFIG = "adapter_config.json"
_PARTS = ("lora_down.weight", "lora_up.weight", "alpha", "diff", "diff_b", "magnitude")
_LORA_MARKS = ("lora_", ".lora.", "hada_", "lokr_", "oft_", "lycoris_")
_TEXT_ENCODERS = {"te": 0, "te1": 0, "te2": 1}  # of kohya's prefixes
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
    """A LoRA of a UNet alone as `merged` takes it; the rest as `read_whole_lora`, which takes text encoders too."""
    found = read_whole_lora(path)
    _parts(found, str(lora_file(path)))
    return found


def read_whole_lora(path: Path) -> StateDict:
    """A LoRA under kohya's names, every module with its alpha, DoRA's norms as "magnitude".

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
            for adapter in adapters.values():
                _check_adapter(adapter)
            norms = lora_magnitudes(lora)
            plain = {key: weight for key, weight in lora.items() if "lora_magnitude_vector" not in key}
            found = lora_to_kohya(plain, adapters=adapters) | {f"{key}.magnitude": norm for key, norm in norms.items()}
        except ValueError as error:
            raise ValueError(f"{file}: {shortened(str(error), 2000)}") from error
    if not found or (bad := not_finite(found)) is not None:
        fault = f"{bad} holds NaN or infinity" if found else "it is empty"
        raise ValueError(f"{file}: {fault}; expected a LoRA's weights. Fetch the file again, or take another.")
    return found


def file_and_weight(text: str) -> tuple[Path, float]:
    """FILE or FILE:weight. Raises ValueError for a weight that is not finite."""
    name, colon, weight = text.rpartition(":")
    try:
        value = float(weight) if colon else None
    except ValueError:  # C:\\style.safetensors
        value = None
    if value is None:
        return Path(text).expanduser(), 1.0
    if not name or not math.isfinite(value):
        raise ValueError(f"expected FILE or FILE:weight with a finite weight, got {text!r}")
    return Path(name).expanduser(), value


def named_with_weight(text: str) -> str:
    """The same without folders, for cards and metadata; a weight of 1 goes unsaid."""
    file, weight = file_and_weight(text)
    return file.name if weight == 1 else f"{file.name}:{weight:g}"


def with_loras(model: ModelFiles, loras: Sequence[str]) -> ModelFiles:
    """A model with LoRAs (FILE or FILE:weight) merged into its UNet and text encoders; what they change is fp32.

    Raises FileNotFoundError for a file that is not there, ValueError naming the file for what `merged` refuses.
    """
    for text in loras:
        file, weight = file_and_weight(text)
        unet, *texts = _by_part(read_whole_lora(file), model, str(file))
        model = replace(
            model,
            unet=merged(model.unet, unet, weight, str(file), torch.float32),
            texts=[
                merged(own, part, weight, f"{file}, text encoder", torch.float32)
                for own, part in zip(model.texts, texts, strict=True)
            ],
        )
    return model


def _by_part(lora: Mapping[str, Tensor], model: ModelFiles, name: str) -> list[StateDict]:
    """A LoRA's keys for the UNet and each text encoder of a model, all as `merged` takes a UNet's."""
    parts: list[StateDict] = [{} for _ in range(1 + len(model.texts))]
    for key, weight in lora.items():
        found = re.match(r"lora_(te[12]?)_(?:text_model_)?", key)
        number = 1 + _TEXT_ENCODERS[found[1]] if found else 0
        if number >= len(parts):
            raise ValueError(
                f"{name}: {key!r} is of text encoder {number}, and this model has {len(model.texts)}: the LoRA belongs "
                f"to another model"
            )
        parts[number][f"lora_unet_{key[found.end() :]}" if found else key] = weight
    return parts


@torch.no_grad()
def joined(adapter: Mapping[str, Tensor], scale: float, loras: Sequence[str], model: ModelFiles) -> StateDict:
    """One LoRA (kohya's names, fp32) that changes a model as LoRAs (FILE or FILE:weight) and an adapter on them do.

    adapter: of the UNet, under peft's names, alpha/rank = scale. model: without the LoRAs. Exact: ranks are put beside
    one another, biases added. Where a LoRA has more than two matrices for a layer (DoRA, a whole difference), all of
    that layer goes in as one whole difference. Raises as `with_loras`.
    """
    own = {key: w * scale if key.endswith(".alpha") else w for key, w in lora_to_kohya(adapter).items()}
    sources = [(own, 1.0, "the adapter")]
    for text in reversed(loras):
        file, weight = file_and_weight(text)
        sources.insert(0, (read_whole_lora(file), weight, str(file)))
    result: StateDict = {}
    for number, weights in enumerate([model.unet, *model.texts]):
        names, changes = _modules_by_kohya_name(weights), defaultdict(list)
        for lora, weight, name in sources:
            for kohya, parts in _parts(_by_part(lora, model, name)[number], name).items():
                if kohya not in names:
                    raise ValueError(f"{name}: this model has no module {kohya!r}: the LoRA belongs to another model")
                changes[names[kohya]].append((parts, weight))
        start = "lora_unet_"
        if number:
            start = f"lora_te{number}_" if len(model.texts) > 1 else "lora_te_"
        for module, found in changes.items():
            bare = number == 0 or module == "text_projection"
            kohya = start + ("" if bare else "text_model_") + module.replace(".", "_")
            result |= {f"{kohya}.{part}": w.float() for part, w in _together(found, weights, module).items()}
    return result


def _together(changes: Sequence[tuple[dict[str, Tensor], float]], weights: StateDict, module: str) -> StateDict:
    """The parts of one LoRA for a module that several, (parts, weight) in their order, change."""
    result: StateDict = {}
    biases = [weight * parts["diff_b"].double() for parts, weight in changes if "diff_b" in parts]
    if biases:
        result["diff_b"] = torch.stack(biases).sum(0)
    changes = [(parts, weight) for parts, weight in changes if parts.keys() - {"diff_b", "alpha"}]
    if not changes:
        return result
    base = weights[f"{module}.weight"]
    if all(parts.keys() - {"alpha", "diff_b"} == {"lora_down.weight", "lora_up.weight"} for parts, _ in changes):
        downs, ups = [], []
        for parts, weight in changes:
            down, up = parts["lora_down.weight"].double(), parts["lora_up.weight"].double()
            rank = len(down)
            downs.append(down.reshape(rank, *base.shape[1:]))
            factor = weight * float(parts.get("alpha", rank)) / rank
            ups.append(factor * up.reshape(len(base), rank, *[1] * (base.ndim - 2)))
        result |= {"lora_down.weight": torch.cat(downs), "lora_up.weight": torch.cat(ups, 1)}
        result["alpha"] = torch.tensor(float(len(result["lora_down.weight"])))
        return result
    changed = base.double()
    for parts, weight in changes:
        changed = changed + weight * _change(changed, parts)
    return result | {"diff": changed - base.double()}


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
def merged(
    unet: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    scale: float = 1.0,
    name: str = "LoRA",
    dtype: torch.dtype | None = None,
) -> StateDict:
    """A UNet's state dict plus scale * (alpha/rank * up @ down + diff), and its biases plus scale * diff_b.

    Summed in float64 and rounded once to dtype, without it to each weight's own type. unet: under diffusers' names.
    lora: of `read_lora`, or under kohya's or peft's names; without an alpha it is the rank. With magnitudes (Liu et
    al., DoRA) the changed weight's rows get these norms, and scale goes from the old weight to that. name: of what
    errors speak.
    Raises ValueError for a LoRA of another model, of a text encoder (which would be lost), or of another kind.
    """
    result, modules = dict(unet), _modules_by_kohya_name(unet)
    for kohya, found in _parts(lora_to_kohya(lora), name).items():
        if kohya not in modules:
            raise ValueError(f"{name}: this model has no module {kohya!r}: the LoRA belongs to another model")
        module = modules[kohya]
        try:
            if "diff_b" in found:
                bias = unet[f"{module}.bias"]
                result[f"{module}.bias"] = (bias.double() + scale * _at(found["diff_b"], bias)).to(dtype or bias.dtype)
            if found.keys() & {"lora_up.weight", "lora_down.weight", "diff"}:
                weight = unet[f"{module}.weight"]
                change = _change(weight.double(), found)
                result[f"{module}.weight"] = (weight.double() + scale * change).to(dtype or weight.dtype)
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
            raise ValueError(f"{name}: this model has no module {kohya!r}: the LoRA belongs to another model")
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
    """A LoRA under kohya's names, which every host loads. scale: alpha/rank, times what the LoRA says of its own."""
    kohya = lora_to_kohya({k: w if k.endswith(".alpha") else w.to(dtype).contiguous() for k, w in lora.items()})
    for key, weight in kohya.items():
        if key.endswith(".alpha"):
            kohya[key] = weight * scale
    rank = max((len(weight) for key, weight in kohya.items() if key.endswith("lora_down.weight")), default=0)
    metadata = model_spec(model, title, "/lora") | dict(more or {})
    metadata |= {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank * scale),
        "ss_base_model_version": {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[model.family],
        "ss_v2": str(model.family == "sd2"),
    }
    save_file(kohya, file, metadata)
