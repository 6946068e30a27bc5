"""SPLAM LoRA Loader: LoRAs under peft's, diffusers' or kohya's names, each key used or named."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import comfy.weight_adapter
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..splam_core.checkpoint import (
    StateDict,
    is_safetensors,
    load_file,
    lora_adapters,
    lora_magnitudes,
    lora_to_kohya,
    not_finite,
    read_metadata,
    reading,
)
from ..splam_core.families import family_told
from ..splam_core.keys import lora_key
from .announce import warn
from .catalogue import as_listed, host_names, is_pickle, read_json
from .families import ATTACHMENT as FAMILY
from .host import Clip, Model
from .options import search_aliases
from .sockets import connected

FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
CROSS_ATTENTION = re.compile(r"attn2[._]to_[kv]$")
# Endings of what LoRA, LoHa, LoKr and OFT are made of, in the names that the host reads; marks of these and others.
ROLES = (
    *(".lora_up.weight", ".lora_down.weight", ".lora_mid.weight", ".lora_B.weight", ".lora_A.weight"),
    *(".hada_w1_a", ".hada_w1_b", ".hada_t1", ".oft_blocks"),
    *(".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"),
)
MARKS = (".lora_", ".lora.", ".hada_", ".lokr_", ".oft_", ".a1.weight", ".diff", ".w_norm", ".b_norm", ".set_weight")


class SPLAMLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        return io.Schema(
            node_id="SPLAMLoraLoader",
            display_name="SPLAM LoRA Loader",
            category="loaders/SPLAM",
            description=(
                "Puts a LoRA on a model: slam-lora-sdxl, LCM LoRAs, and those that this repository trains, whichever "
                "program named their keys. Every key is used, or named in one warning."
            ),
            **search_aliases("LCM LoRA", "DMD2", "Hyper-SD", "Lightning LoRA", "few steps"),
            inputs=[
                io.Model.Input("model", tooltip="The model of the family that the LoRA was trained on."),
                io.Combo.Input("lora_name", options=list_loras(), tooltip="A .safetensors file in models/loras."),
                io.Float.Input("strength_model", **strength, tooltip="Of the UNet's part. 1 is as it was trained."),
                io.Float.Input("strength_clip", **strength, tooltip="Of the text encoder's part, if there is one."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Needed only where the LoRA was trained on the text encoder too; few-step LoRAs are not.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA."),
                io.Clip.Output(tooltip="The text encoder with the LoRA; none if none came in."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        try:
            with host_names():
                return lora_name is None or bool(locate_lora(lora_name))
        except ValueError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: Any) -> list[int]:
        if lora_name is None:  # by a link, of which the host does not tell the value: what it hangs on tells
            return []
        with host_names():
            path = locate_lora(lora_name)
            return [file.stat().st_mtime_ns for file in (path, _settings_beside(path)) if file is not None]

    @classmethod
    @connected
    def execute(
        cls, model: Model, lora_name: str, strength_model: float, strength_clip: float, clip: Clip | None = None
    ) -> io.NodeOutput:
        with host_names():
            path = locate_lora(lora_name)
            with reading(path):
                model, clip, unused = apply_lora(model, clip, path, strength_model, strength_clip)
        if unused:
            shown = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
            of_text = clip is None and any(key.startswith("lora_te") for key in unused)
            reason = " (no CLIP is connected, so the text encoder's part goes unused)" if of_text else ""
            warn(f"SPLAM LoRA Loader: {lora_name}: {len(unused)} keys have no place in this model{reason}: {shown}")
        return io.NodeOutput(model, clip)


def list_loras() -> list[str]:
    return [name for name in folder_paths.get_filename_list("loras") if is_safetensors(name)]


def locate_lora(name: str) -> Path:
    """Raises ValueError, saying where LoRAs go, for a name that the host does not list."""
    if not isinstance(name, str):
        raise ValueError(f"SPLAM LoRA Loader: expected the name of a LoRA, found {name!r:.40}. Choose one of the list.")
    if is_pickle(name):
        raise ValueError(
            f"SPLAM LoRA Loader: {name!r} is a pickle, which can run code when opened; expected a .safetensors file."
        )
    listed = list_loras()
    name = as_listed(name, listed)
    path = folder_paths.get_full_path("loras", name) if name in listed else None
    if path is None:
        raise ValueError(
            f"SPLAM LoRA Loader: there is no LoRA {name!r}. Found: {', '.join(listed[:20]) or 'none'}. Put "
            "*.safetensors files into models/loras, and refresh the page."
        )
    return Path(path)


def apply_lora(
    model: Model, clip: Clip | None, path: Path, strength_model: float, strength_clip: float
) -> tuple[Model, Clip | None, list[str]]:
    """(MODEL, CLIP, keys of the file without a place in them). clip may be None.

    Raises ValueError for a file that is no LoRA, and for one of another family of models; KeyError and the like where
    parts of it are missing or misshapen.
    """
    weights = load_file(path)
    known = {key: weight for key, weight in weights.items() if _is_lora_key(key)}
    if not any(mark in key for key in known for mark in MARKS):
        found = f"keys like {', '.join(sorted(weights)[:3]) or 'none'}"
        raise ValueError(
            f"{path}: expected a LoRA (keys ending in lora_A.weight or lora_down.weight, or those of LoHa, LoKr, GLoRA "
            f"and OFT in kohya's names), found {found}."
        )
    if broken := not_finite(known):
        raise ValueError(f"{path}: {broken} holds NaN or infinite values. The file is damaged, or its training failed.")
    try:
        magnitudes = lora_magnitudes(known)
        lora = lora_to_kohya({k: w for k, w in known.items() if not _is_magnitude(k)}, adapters=_adapters(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    modules = {key: _module(key, key_map) for key in (*lora, *(f"{module}.magnitude" for module in magnitudes))}
    _check_family(path, lora, modules, key_map, model, clip)
    # One warning says what goes unused, in place of the host's line for each.
    patches = comfy.lora.load_lora({k: w for k, w in lora.items() if modules[k]}, key_map, log_missing=False)
    for module, magnitude in magnitudes.items():
        target = key_map.get(module)
        if isinstance(patches.get(target), comfy.weight_adapter.LoRAAdapter):
            plain = patches[target]
            patches[target] = PeftDora(plain.loaded_keys, (*plain.weights, magnitude))
    patched = model.clone()
    if strength_model != 0 and (told := family_told(path.name, read_metadata(path))) is not None:
        patched.set_attachments(FAMILY, told)
    placed = set(patched.add_patches(patches, strength_model))
    if clip is not None:
        clip = clip.clone()
        placed |= set(clip.add_patches(patches, strength_clip))
    if not placed:
        raise ValueError(f"{path}: none of its {len(lora)} keys has a place in this model. {_families(lora, model)}")
    used = {module for module, target in key_map.items() if target in placed or _bias(target) in placed}
    unused = [key for key in weights if key not in known]
    unused += [key for key, module in modules.items() if module not in used]
    return patched, clip, unused


class PeftDora(comfy.weight_adapter.LoRAAdapter):
    """A LoRA after which each row of the weight is scaled to its magnitude, as peft's DoRA does.

    The host's own `dora_scale` divides by the norms of the weight before the change, or by those of its columns.
    The magnitude is the last of its weights: a host that streams them to the device makes the adapter of them anew.
    """

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: tuple[int, int, int] | None,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Tensor | None = None,
    ) -> Tensor:
        def here(tensor: Tensor) -> Tensor:
            moved: Tensor = comfy.model_management.cast_to_device(tensor, weight.device, intermediate_dtype)
            return moved

        up, down, alpha = (*map(here, self.weights[:2]), self.weights[2])
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        before = weight.to(intermediate_dtype)
        after = before + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        rows = (-1, *[1] * (weight.ndim - 1))
        after *= (here(self.weights[-1]) / after.flatten(1).norm(dim=1)).reshape(rows)
        weight += function((strength * (after - before)).to(weight.dtype))
        return weight


def _is_lora_key(key: str) -> bool:
    return key.startswith(("lora_", "lycoris_", "diffusion_model.")) or lora_key(key) is not None


def _is_magnitude(key: str) -> bool:
    found = lora_key(key)
    return found is not None and found.role == "magnitude"


def _module(key: str, key_map: dict[str, Any]) -> str:
    """The module of the host's map that a key belongs to, or ""."""
    while key and key not in key_map:
        key = key.rpartition(".")[0]
    return key


def _bias(target: Any) -> str:
    return target.removesuffix(".weight") + ".bias" if isinstance(target, str) else ""


def _adapters(path: Path) -> dict[str, dict[str, Any]]:
    """peft's settings of the LoRA: in the file (diffusers), or beside it (peft)."""
    adapters = lora_adapters(read_metadata(path))
    if (beside := _settings_beside(path)) is not None:
        adapters.setdefault("unet", {}).update(read_json(beside))
    return adapters


def _settings_beside(path: Path) -> Path | None:
    beside = path.with_name("adapter_config.json")
    return beside if path.name == "adapter_model.safetensors" and beside.is_file() else None


def _check_family(
    path: Path,
    lora: StateDict,
    modules: dict[str, str],
    key_map: dict[str, Any],
    model: Model,
    clip: Clip | None,
) -> None:
    """Raises ValueError where the LoRA's matrices do not fit the model's, or most of them have no place in it."""
    try:
        shapes = _shapes(lora)
    except ValueError as error:
        raise ValueError(f"{path}: {error} The file is damaged: fetch it again.") from error
    for module, found in shapes.items():
        target = key_map.get(module)
        if not isinstance(target, str):
            continue
        owner = model.model if clip is None or target.startswith("diffusion_model.") else clip.cond_stage_model
        wanted = comfy.utils.get_attr(owner, target).shape
        if found[0] != wanted[0] or found[1] not in (None, wanted[1:].numel()):
            raise ValueError(
                f"{path}: this LoRA does not fit the model. {_families(lora, model)} At {module} it is for a weight of "
                f"{found[0]} x {found[1] or 'any'}, expected {wanted[0]} x {wanted[1:].numel()}. Choose a LoRA of the "
                "model's own family."
            )
    unet = [key for key in lora if any(mark in key for mark in MARKS) and not key.startswith("lora_te")]
    missing = [key for key in unet if not modules[key]]
    if len(missing) > len(unet) / 2:
        raise ValueError(
            f"{path}: {len(missing)} of its {len(unet)} UNet keys, such as {missing[0]}, have no place in this model. "
            f"{_families(lora, model)} Choose a LoRA of the model's own family."
        )


def _shapes(lora: StateDict) -> dict[str, tuple[int, int | None]]:
    """{module: rows and columns of the weight that its matrices make}, where they tell it; None: any columns.

    A convolution's columns are all that makes one output channel. Raises ValueError where matrices do not multiply.
    """
    parts: dict[str, StateDict] = {}
    for key, weight in lora.items():
        for role in ROLES:
            if key.endswith(role):
                if weight.ndim < 2:
                    raise ValueError(f"LoRA: {key} has the shape {tuple(weight.shape)}; expected a matrix.")
                parts.setdefault(key.removesuffix(role), {})[role.removeprefix(".")] = weight
    shapes = {module: _made_of(part) for module, part in parts.items()}
    return {module: shape for module, shape in shapes.items() if shape is not None}


def _made_of(part: StateDict) -> tuple[int, int | None] | None:
    def product(left: str, right: str) -> tuple[int, int] | None:
        if left not in part or right not in part:
            return None
        if left != right and part[left].shape[1:].numel() != part[right].shape[0]:
            shapes = " and ".join(str(tuple(part[name].shape)) for name in (left, right))
            raise ValueError(f"LoRA: {left} and {right} of one layer have the shapes {shapes}, which do not multiply.")
        return part[left].shape[0], part[right].shape[1:].numel()

    def kronecker(name: str) -> tuple[int, int] | None:
        return product(name, name) or product(f"{name}_a", f"{name}_b")

    if part.keys() & {"lora_mid.weight", "hada_t1", "lokr_t2"}:  # with a third matrix their shapes say less
        return None
    if "oft_blocks" in part:
        blocks = part["oft_blocks"].shape
        return (blocks[0] * blocks[1], None) if len(blocks) == 3 else None
    first, second = kronecker("lokr_w1"), kronecker("lokr_w2")
    if first and second:
        return first[0] * second[0], first[1] * second[1]
    return (
        product("lora_up.weight", "lora_down.weight")
        or product("lora_B.weight", "lora_A.weight")
        or product("hada_w1_a", "hada_w1_b")
    )


def _families(lora: StateDict, model: Model) -> str:
    """One sentence: which family the LoRA is for and which the model is of, as far as can be told."""
    width = next((shape[1] for module, shape in _shapes(lora).items() if CROSS_ATTENTION.search(module)), None)
    own = model.model.model_config.unet_config.get("context_dim")
    expected, found = (
        FAMILIES.get(size, f"a model with prompts {size} wide") if size else "a model of an unknown family"
        for size in (own, width)
    )
    return f"Expected one for {expected}, found one for {found}."
