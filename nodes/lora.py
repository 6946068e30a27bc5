"""SPLAM LoRA Loader: LoRAs under peft's, diffusers' or kohya's names, each key used or named."""

import json
import re
from pathlib import Path

import comfy.lora
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..splam_core.checkpoint import load_file, lora_adapters, lora_to_kohya, read_metadata
from ..splam_core.keys import lora_key
from .announce import warn
from .catalogue import PICKLES

FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
CROSS_ATTENTION = re.compile(r"attn2[._]to_[kv]\.(lora_down|lora_A)\.weight$")


class SPLAMLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        return io.Schema(
            node_id="SPLAMLoraLoader",
            display_name="SPLAM LoRA Loader",
            category="loaders/SPLAM",
            description=(
                "Puts a LoRA on a model: slam-lora-sdxl, LCM LoRAs, and those that this repository trains, whichever "
                "program named their keys. Every key is used, or named in one warning."
            ),
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
    def validate_inputs(cls, lora_name):
        try:
            return lora_name is None or bool(locate_lora(lora_name))
        except ValueError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, lora_name, **_):
        return locate_lora(lora_name).stat().st_mtime_ns

    @classmethod
    def execute(cls, model, lora_name, strength_model, strength_clip, clip=None) -> io.NodeOutput:
        model, clip, unused = apply_lora(model, clip, locate_lora(lora_name), strength_model, strength_clip)
        if unused:
            shown = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
            reason = "" if clip is not None else " (no CLIP is connected, so the text encoder's part goes unused)"
            warn(f"SPLAM LoRA Loader: {lora_name}: {len(unused)} keys have no place in this model{reason}: {shown}")
        return io.NodeOutput(model, clip)


def list_loras() -> list[str]:
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]


def locate_lora(name: str) -> Path:
    """Raises ValueError, naming the folder to look in, for a name that the host does not list."""
    if name.endswith(PICKLES):
        raise ValueError(
            f"SPLAM LoRA Loader: {name!r} is a pickle, which can run code when opened; expected a .safetensors file."
        )
    path = folder_paths.get_full_path("loras", name) if name in list_loras() else None
    if path is None:
        raise ValueError(
            f"SPLAM LoRA Loader: there is no LoRA {name!r}. Found: {', '.join(list_loras()[:20]) or 'none'}. Put "
            f"*.safetensors files into {' or '.join(folder_paths.get_folder_paths('loras'))}, and refresh the page."
        )
    return Path(path)


def apply_lora(model, clip, path: Path, strength_model: float, strength_clip: float):
    """(MODEL, CLIP, keys of the file without a place in them). clip may be None.

    Raises ValueError for a file that is no LoRA, and for one of another family of models.
    """
    weights = load_file(path)
    known = {key: weight for key, weight in weights.items() if _is_lora_key(key)}
    if not any(".lora_" in key or key.endswith((".diff", ".diff_b")) or ".lora." in key for key in known):
        found = f"keys like {', '.join(sorted(weights)[:3]) or 'none'}"
        raise ValueError(f"{path}: expected a LoRA (keys ending in lora_A.weight or lora_down.weight), found {found}.")
    lora = lora_to_kohya(known, adapters=_adapters(path))
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    modules = {key: _module(key, key_map) for key in lora}
    _check_family(path, lora, modules, key_map, model, clip)
    # One warning says what goes unused, in place of the host's line for each.
    patches = comfy.lora.load_lora({k: w for k, w in lora.items() if modules[k]}, key_map, log_missing=False)
    patched = model.clone()
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


def _is_lora_key(key: str) -> bool:
    return key.startswith(("lora_", "lycoris_", "diffusion_model.")) or lora_key(key) is not None


def _module(key: str, key_map: dict) -> str:
    """The module of the host's map that a key belongs to, or ""."""
    while key and key not in key_map:
        key = key.rpartition(".")[0]
    return key


def _bias(target) -> str:
    return target.removesuffix(".weight") + ".bias" if isinstance(target, str) else ""


def _adapters(path: Path) -> dict:
    """peft's settings of the LoRA: in the file (diffusers), or beside it (peft)."""
    adapters = lora_adapters(read_metadata(path))
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():
        adapters.setdefault("unet", {}).update(json.loads(beside.read_text(encoding="utf-8")))
    return adapters


def _check_family(path: Path, lora: dict, modules: dict, key_map: dict, model, clip) -> None:
    """Raises ValueError where the LoRA's matrices do not fit the model's, or most of them have no place in it."""
    for key, weight in lora.items():
        up = key.replace(".lora_down.", ".lora_up.").replace(".lora_A.", ".lora_B.")
        target = key_map[modules[key]] if modules[key] else None
        # With a third matrix between the two (LoCon's lora_mid) their shapes say less; the host checks it.
        if up == key or up not in lora or not isinstance(target, str) or key.replace("down", "mid") in lora:
            continue
        owner = model.model if target.startswith("diffusion_model.") else clip.cond_stage_model
        wanted = comfy.utils.get_attr(owner, target).shape
        found = (lora[up].shape[0], *weight.shape[1:])
        if (found[0], weight[0].numel()) != (wanted[0], wanted[1:].numel()):
            raise ValueError(
                f"{path}: this LoRA does not fit the model. {_families(lora, model)} At {modules[key]} it is for a "
                f"weight of {list(found)}, expected {list(wanted)}. Choose a LoRA of the model's own family."
            )
    unet = [key for key in lora if ".lora_" in key and not key.startswith("lora_te")]
    missing = [key for key in unet if not modules[key]]
    if len(missing) > len(unet) / 2:
        raise ValueError(
            f"{path}: {len(missing)} of its {len(unet)} UNet keys, such as {missing[0]}, have no place in this model. "
            f"{_families(lora, model)} Choose a LoRA of the model's own family."
        )


def _families(lora: dict, model) -> str:
    """One sentence: which family the LoRA is for and which the model is of, as far as can be told."""
    width = next((weight.shape[1] for key, weight in lora.items() if CROSS_ATTENTION.search(key)), None)
    own = model.model.model_config.unet_config.get("context_dim")
    expected, found = (
        FAMILIES.get(size, f"a model with prompts {size} wide" if size else "a model of an unknown family")
        for size in (own, width)
    )
    return f"Expected one for {expected}, found one for {found}."
