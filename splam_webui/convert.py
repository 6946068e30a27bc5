"""Diffusers folders, bare UNets and LoRAs into the files that the hosts load. Knows no host: folders are arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splam_core.checkpoint import (
    UNET_PREFIX,
    diffusers_to_ldm,
    fold_gamma,
    json_object,
    load_file,
    load_files,
    lora_adapters,
    lora_to_kohya,
    not_finite,
    read_json,
    read_metadata,
    reading,
    save_file,
    weight_files,
)
from splam_core.parametrisation import MARKS, Parametrisation, parametrisation_of
from splam_core.text_encoders import text_encoders_to_ldm, text_family

StateDict = dict[str, Tensor]
Progress = Callable[[float, str], None]

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# What a cond_proj in the source was fed.
EMBEDDED: dict[str, str | float] = {"SPLAM (gamma = 1)": "splam", "LCM (guidance 8.5)": 8.5}
WEIGHTS = ("diffusion_pytorch_model", "model")  # of a UNet or VAE, of a text encoder
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}


@dataclass(frozen=True)
class Converted:
    """The file that was written, and sentences that the user should read."""

    path: Path
    notes: tuple[str, ...] = ()


@dataclass
class Source:
    """What was found: a UNet under LDM names, folded, and all else that goes into the file."""

    unet: StateDict
    others: StateDict = field(default_factory=dict)  # VAE and text encoders under LDM names; empty: from the base
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # part -> diffusers' configuration of it
    parametrisation: Parametrisation = field(default_factory=Parametrisation)


def convert(
    source: Path,
    name: str,
    checkpoints: Path,
    loras: Path,
    base: Path | None = None,
    precision: str = "fp16",
    embedded: str | float = "splam",
    overwrite: bool = False,
    progress: Progress = lambda fraction, text: None,
) -> Converted:
    """Write `name`.safetensors into the folder `checkpoints`, or `loras` if the source is a LoRA.

    source: a diffusers pipeline folder, a UNet (folder or .safetensors file; then `base`, a single file of the same
    architecture, gives VAE and text encoder), a single file, or a LoRA. precision: a key of PRECISIONS.
    embedded: see `fold_gamma`. Raises ValueError, FileNotFoundError or FileExistsError with one message for the user.
    """
    resolve_target(name, checkpoints, overwrite=True)  # a bad name is told before minutes of reading
    progress(0.0, f"Reading {source.name}")
    with reading(source):
        weights = load_file(source) if source.is_file() else None
        is_lora = any("lora_" in key or ".lora." in key or key.startswith("lycoris_") for key in weights or {})
        target = resolve_target(name, loras if is_lora else checkpoints, overwrite)
        found: Source | None = None
        notes: tuple[str, ...] = ()
        if weights is not None and is_lora:
            metadata = read_metadata(source)
            single = _with_zero_diff(_kohya(weights, metadata, source))
        else:
            found = _read_file(source, weights, embedded) if weights is not None else _read_folder(source, embedded)
            progress(0.5, "Putting the parts together")
            single = {UNET_PREFIX + key: weight for key, weight in found.unet.items()}
            said = found.parametrisation
            if not found.others:
                found.others, of_base = _from_base(base, single, source)
                said = said if said.prediction_type else of_base
            single |= found.others
            metadata = _metadata(found, said, target.stem, embedded)
            # By which hosts know an XL model of this kind, and SPLAM Loader and trainer any.
            single = {key: weight for key, weight in single.items() if key not in MARKS}
            single |= {key: torch.zeros(0) for key in said.keys}
            notes = said.contradictions
        single = {key: _cast(weight, PRECISIONS[precision]) for key, weight in single.items()}
        if broken := not_finite(single):
            raise ValueError(
                f"{source}: {broken} holds NaN or infinite values at {precision}. If it does so at fp32 too the file "
                "is damaged: fetch it again."
            )
    progress(0.7, f"Writing {target.name}")
    if any(path and path.is_file() and target.is_file() and path.samefile(target) for path in (source, base)):
        # Windows replaces no file from which tensors are mapped.
        single = {key: weight.clone() for key, weight in single.items()}
        del weights, found
    save_file(single, target, metadata)
    progress(1.0, "Done")
    return Converted(target, notes)


def resolve_target(name: str, folder: Path, overwrite: bool) -> Path:
    """folder/name.safetensors. Raises ValueError for a name that is no plain file name, FileExistsError."""
    stem = name.strip().removesuffix(".safetensors").rstrip()
    if not stem or not re.fullmatch(r"[^\x00-\x1f/\\:*?\"<>|]+", stem) or stem.strip(".") != stem:
        raise ValueError(
            f"Target name: expected a plain file name, got {name!r}. It goes into {folder}, with .safetensors added: "
            'no slashes, no leading dot, none of : * ? " < > |.'
        )
    target = folder / f"{stem}.safetensors"
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another name, or tick the box that allows to overwrite it.")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: the folder does not exist; create it first.")
    return target


def _read_folder(source: Path, embedded: str | float) -> Source:
    """Read and fold a pipeline or a UNet."""
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: no such file or folder. Give the path of a diffusers folder (the one with model_index.json) or "
            "of a UNet's .safetensors file."
        )
    if (source / "unet").is_dir():
        return _read_pipeline(source, embedded)
    unet = _fold_diffusers(load_weights(source), embedded, source)
    return Source(unet, configs={"unet": read_json(source / "config.json")})


def load_weights(folder: Path) -> StateDict:
    """The weights of one part of a pipeline: one .safetensors file or several with their index."""
    for stem in WEIGHTS:
        files = weight_files(folder, stem)
        if files:
            return load_files(files)
    found = sorted(file.name for file in folder.iterdir())[:5] if folder.is_dir() else "no folder"
    raise FileNotFoundError(
        f"{folder}: expected {WEIGHTS[0]}.safetensors or {WEIGHTS[1]}.safetensors, found {found}. "
        "Fetch the safetensors version of the model; pickles (.bin) are not opened."
    )


def _read_pipeline(folder: Path, embedded: str | float) -> Source:
    encoders = [folder / name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()]
    parts = {part.name: read_json(part / "config.json") for part in (folder / "unet", folder / "vae", *encoders)}
    configs = {**parts, "scheduler": read_json(folder / "scheduler" / "scheduler_config.json")}
    texts = [load_weights(encoder) for encoder in encoders] or [load_weights(folder / "text_encoder")]
    try:
        others = diffusers_to_ldm({}, load_weights(folder / "vae"))
        others |= text_encoders_to_ldm(texts, text_family(texts))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    weights = load_weights(folder / "unet")
    said = _parametrisation(weights, {}, configs["scheduler"], folder)
    return Source(_fold_diffusers(weights, embedded, folder / "unet"), others, configs, said)


def _read_file(file: Path, weights: StateDict, embedded: str | float) -> Source:
    metadata: dict[str, Any] = read_metadata(file)
    configs = {key.removeprefix("splam."): value for key, value in metadata.items() if key.startswith("splam.")}
    configs = {key: json_object(text, f"{file}: {key}") for key, text in configs.items() if text.startswith("{")}
    said = _parametrisation(weights, metadata, configs.get("scheduler"), file)
    if any(key.startswith(UNET_PREFIX) for key in weights):
        folded = _fold(weights, embedded, file)
        others = {key: weight for key, weight in folded.items() if not key.startswith(UNET_PREFIX)}
        unet = {key.removeprefix(UNET_PREFIX): weight for key, weight in folded.items() if key not in others}
        return Source(unet, others, configs, said)
    weights = {key: weight for key, weight in weights.items() if key not in MARKS}
    return Source(_fold_diffusers(weights, embedded, file), configs=configs, parametrisation=said)


def _parametrisation(
    keys: Iterable[str], metadata: dict[str, str], scheduler: dict[str, Any] | None, path: Path
) -> Parametrisation:
    try:
        return parametrisation_of(keys, metadata, scheduler)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _fold_diffusers(weights: StateDict, embedded: str | float, path: Path) -> StateDict:
    """A diffusers UNet under LDM names without prefix, its cond_proj folded."""
    if "conv_in.weight" not in weights or "time_embedding.linear_1.weight" not in weights:
        raise ValueError(
            f"{path}: expected a diffusers UNet (conv_in, time_embedding, down_blocks...) or a single-file checkpoint "
            f"(keys under {UNET_PREFIX}), found {sorted(weights)[:3]}. Choose another file."
        )
    folded = _fold(weights, embedded, path)
    try:
        return {key.removeprefix(UNET_PREFIX): weight for key, weight in diffusers_to_ldm(folded).items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _fold(weights: StateDict, embedded: str | float, path: Path) -> StateDict:
    try:
        # In float32, so that the sum is rounded once, to the precision of the target.
        return fold_gamma(weights, embedded, torch.float32)[0]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _from_base(base: Path | None, unet: StateDict, source: Path) -> tuple[StateDict, Parametrisation]:
    """VAE and text encoders of a single file whose UNet has the shapes of `unet`, and what it says that it predicts."""
    if base is None:
        raise ValueError(
            f"{source}: expected also a VAE and text encoder, found a UNet alone. Choose a base checkpoint, the one it "
            "was distilled from or any other of the same family, to take them from."
        )
    weights, metadata = load_file(base), read_metadata(base)
    text = metadata.get("splam.scheduler")
    scheduler = None if text is None else json_object(text, f"{base}: splam.scheduler")
    others = {key: weight for key, weight in weights.items() if not key.startswith(UNET_PREFIX)}
    theirs = {key: tuple(w.shape) for key, w in weights.items() if key not in others}
    ours = {key: tuple(w.shape) for key, w in unet.items()}
    differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if differing:
        key = differing[0]
        raise ValueError(
            f"{base.name} is of another family than {source.name}: {len(differing)} UNet weights differ in shape, such "
            f"as {key}, {theirs.get(key)} and {ours.get(key)}. Choose a base checkpoint of the same family."
        )
    return others, _parametrisation(weights, metadata, scheduler, base)


def _metadata(source: Source, said: Parametrisation, title: str, embedded: str | float) -> dict[str, str]:
    """ModelSpec metadata, and the parts' configurations, since shapes do not tell everything.

    Of an SD2.x that does not say what it predicts nothing is said: hosts know its kinds by their weights.
    """
    context = next((w.shape[1] for key, w in source.unet.items() if key.endswith("attn2.to_k.weight")), 768)
    family = "sdxl" if any(key.startswith("label_emb.") for key in source.unet) else "sd2" if context == 1024 else "sd1"
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[family],
        "modelspec.implementation": "sgm",
        "modelspec.title": title,
        "splam.method": "splam" if embedded == "splam" else "lcm",
    }
    if said.prediction_type or family != "sd2":
        metadata["modelspec.prediction_type"] = "v" if said.prediction_type == "v_prediction" else "epsilon"
    for part, config in source.configs.items():
        kept = {key: value for key, value in config.items() if key != "_name_or_path"}
        if part == "scheduler" and said.prediction_type:
            kept["prediction_type"] = said.prediction_type
        if part == "unet":
            kept["time_cond_proj_dim"] = None  # folded
        metadata[f"splam.{part}"] = json.dumps(kept)
    return metadata


def _with_zero_diff(lora: StateDict) -> StateDict:
    """Automatic1111 takes a bias delta `diff_b` only beside a weight delta `diff`, which here is zero.

    The layer that the fold changes, the first of Stable Diffusion's time embedding, is four times as wide as its input.
    """
    modules = [key.removesuffix(".diff_b") for key in lora if key.endswith(".diff_b")]
    full = dict(lora)
    for module in modules:
        if f"{module}.diff" in lora:
            continue
        if not module.endswith(("time_embedding_linear_1", "time_embed_0")):
            raise ValueError(f"LoRA: {module}.diff_b has no {module}.diff beside it, without which hosts refuse it.")
        width = len(lora[f"{module}.diff_b"])
        full[f"{module}.diff"] = torch.zeros(width, width // 4)
    return full


def _kohya(lora: StateDict, metadata: dict[str, str], source: Path) -> StateDict:
    try:
        return lora_to_kohya(lora, adapters=lora_adapters(metadata))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight
