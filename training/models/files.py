"""A whole model on disk as state dicts and configurations: diffusers folders and single files, read and written.

No network is built, so that what is only renamed stays the same to the bit.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from splam_core import fold_gamma, ldm_to_diffusers, load_file, read_metadata, save_file
from splam_core.checkpoint import diffusers_to_ldm
from splam_core.text_encoders import PLACES, text_encoder_from_ldm, text_encoders_to_ldm

from .architectures import ARCHITECTURES
from .pipeline import Pipeline
from .teachers import EMBEDDED

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
StateDict = dict[str, Tensor]
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")

TEXT_WEIGHTS = ("model.safetensors", "model.fp16.safetensors")
_CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
_PRIVATE = ("_name_or_path", "_use_default_values")  # where a model came from is nobody's business
_SPEC = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}


@dataclass(frozen=True)
class ModelFiles:
    """Parts under diffusers' names; text encoders without "text_model.". What a source lacks is {} or []."""

    unet: StateDict
    vae: StateDict
    texts: list[StateDict]
    family: str  # "sd1", "sd2" or "sdxl"
    configs: dict[str, dict]  # part -> config.json, "scheduler" -> scheduler_config.json
    text_prefixes: list[str] = field(default_factory=list)  # what the text encoders' keys began with
    tokenizers: list[Path] = field(default_factory=list)  # folders

    @property
    def prediction_type(self) -> str:
        return self.configs["scheduler"].get("prediction_type", "epsilon")

    def cast(self, dtype: torch.dtype) -> ModelFiles:
        def one(weights: StateDict) -> StateDict:
            return {key: w.to(dtype) if w.is_floating_point() else w for key, w in weights.items()}

        return replace(self, unet=one(self.unet), vae=one(self.vae), texts=[one(text) for text in self.texts])

    def folded(self, embedded: str | float) -> ModelFiles:
        """Without cond_proj, its constant at gamma = 1 (or at an LCM's guidance) in a bias; see `fold_gamma`."""
        unet, found = fold_gamma(self.unet, embedded)
        if not found:
            return self
        config = {**self.configs["unet"], "time_cond_proj_dim": None}
        return replace(self, unet=unet, configs={**self.configs, "unet": config})


def read_model(place: Path) -> ModelFiles:
    """A diffusers pipeline folder, a run's folder, a UNet folder or a single file. Raises ValueError naming it."""
    if place.is_file():
        return _read_single_file(place)
    if (place / "pipeline" / "unet").is_dir():
        place = place / "pipeline"
    alone = any((place / name).is_file() for name in WEIGHTS) and not (place / "unet").is_dir()
    unet_folder = place if alone else place / "unet"
    unet, config = _weights(unet_folder, WEIGHTS), _json(unet_folder / "config.json")
    if not unet or not config:
        raise ValueError(
            f"{place}: expected a diffusers folder with unet/config.json and {WEIGHTS[0]}, found "
            f"{sorted(path.name for path in place.iterdir()) if place.is_dir() else 'nothing'}"
        )
    configs, texts, prefixes, tokenizers = {"unet": config}, [], [], []
    for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        weights = {} if alone else _weights(place / name, TEXT_WEIGHTS)
        if weights:
            prefixes.append("text_model." if any(key.startswith("text_model.") for key in weights) else "")
            texts.append({key.removeprefix("text_model."): weight for key, weight in weights.items()})
            configs[name] = _json(place / name / "config.json")
            tokenizers.append(place / tokenizer)
    vae = {} if alone else _weights(place / "vae", WEIGHTS)
    if vae:
        configs["vae"] = _json(place / "vae" / "config.json")
    family = "sdxl" if config.get("addition_embed_type") == "text_time" else "sd1"
    family = "sd2" if family == "sd1" and config.get("cross_attention_dim") == 1024 else family
    configs["scheduler"] = _json(place / "scheduler" / "scheduler_config.json") or ARCHITECTURES[family].scheduler
    return ModelFiles(unet, vae, texts, family, configs, prefixes, tokenizers)


def family_of_file(file: Path) -> str:
    """ "sd1", "sd2" or "sdxl" of a single file."""
    return read_metadata(file).get("splam.family") or family_of(load_file(file))


def _read_single_file(file: Path) -> ModelFiles:
    weights, metadata = load_file(file), read_metadata(file)
    known = {part: json.loads(metadata[f"splam.{part}"]) for part in PARTS if f"splam.{part}" in metadata}
    family = metadata.get("splam.family") or family_of(weights)
    try:
        rest = {k: w for k, w in weights.items() if not k.startswith(("cond_stage_model.", "conditioner."))}
        unet, vae, _ = ldm_to_diffusers(rest)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    architecture = ARCHITECTURES[family]
    configs = {
        "unet": known.get("unet") or _full(UNet2DConditionModel, architecture.unet),
        "scheduler": known.get("scheduler")
        or {**architecture.scheduler, "prediction_type": prediction_of(None, metadata, weights, family, unet)},
    }
    if vae:
        configs["vae"] = known.get("vae") or _full(AutoencoderKL, architecture.vae)
    texts = []
    for number, place in enumerate(PLACES[family]):
        name = "text_encoder_2" if number else "text_encoder"
        text = text_encoder_from_ldm(weights, *place)
        if text:
            configs[name] = known.get(name) or architecture.clip(second=bool(number)).to_dict()
            layers = configs[name]["num_hidden_layers"]
            texts.append({key: w for key, w in text.items() if _layer(key) < layers and key != "logit_scale"})
    prefixes = json.loads(metadata.get("splam.text_prefixes", "[]")) or ["text_model."] * len(texts)
    return ModelFiles(unet, vae, texts, family, configs, prefixes)


def write_folder(model: ModelFiles, folder: Path) -> None:
    """A diffusers pipeline folder, which appears under its name only when it is whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    parts = [("unet", model.unet, WEIGHTS[0])] + ([("vae", model.vae, WEIGHTS[0])] if model.vae else [])
    for name, weights, prefix in zip(
        ("text_encoder", "text_encoder_2"), model.texts, model.text_prefixes, strict=False
    ):
        # The projection stands outside the text model; where one has a prefix, the rest has it.
        named = {key if key == "text_projection.weight" else prefix + key: w for key, w in weights.items()}
        parts.append((name, named, TEXT_WEIGHTS[0]))
    index: dict = {"_class_name": "StableDiffusionXLPipeline" if model.family == "sdxl" else "StableDiffusionPipeline"}
    for name, weights, file in parts:
        (partial / name).mkdir(parents=True)
        save_file(weights, partial / name / file)
        settings = {key: value for key, value in model.configs[name].items() if key not in _PRIVATE}
        _write_json(partial / name / "config.json", settings)
        index[name] = _CLASSES[name]
    for number in range(len(model.texts)):
        name = "tokenizer_2" if number else "tokenizer"
        _write_tokenizer(model, number, partial / name)
        index[name] = _CLASSES[name]
    (partial / "scheduler").mkdir()
    scheduler = model.configs["scheduler"]
    _write_json(partial / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler.get("_class_name", "DDIMScheduler")]
    if model.family == "sdxl":
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    _write_json(partial / "model_index.json", index)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_single_file(model: ModelFiles, file: Path, title: str, more: Mapping[str, str] | None = None) -> None:
    """One LDM-style .safetensors file with ModelSpec metadata.

    The configurations of the parts ride along as JSON, since shapes do not tell the number of attention heads.
    """
    state_dict = to_single_file(model.unet, model.vae or None, model.texts, model.family)
    if model.family == "sdxl" and model.prediction_type == "v_prediction":
        state_dict["v_pred"] = torch.zeros(0)  # how hosts are told
    metadata = model_spec(model, title) | dict(more or {})
    metadata["splam.text_prefixes"] = json.dumps(model.text_prefixes)
    metadata |= {f"splam.{part}": json.dumps(settings) for part, settings in model.configs.items()}
    save_file(state_dict, file, metadata)


def model_spec(model: ModelFiles, title: str, kind: str = "") -> dict[str, str]:
    """ModelSpec 1.0.0 metadata; kind: "" for a checkpoint, "/lora" for a LoRA."""
    side = model.configs["unet"].get("sample_size") or 64
    architecture = _SPEC[model.family]
    v = model.prediction_type == "v_prediction"
    if model.family == "sd2":
        architecture += "-768-v" if v else "-512"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + kind,
        "modelspec.implementation": "diffusers" if kind else "sgm",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.resolution": f"{8 * side}x{8 * side}",
        "splam.family": model.family,
    }


def _write_tokenizer(model: ModelFiles, number: int, folder: Path) -> None:
    """The source's tokenizer, or CLIP's own; OpenCLIP's text encoders pad with "!"."""
    source = model.tokenizers[number] if number < len(model.tokenizers) else None
    if source is not None and source.is_dir():
        shutil.copytree(source, folder)
        return
    shutil.copytree(EMBEDDED / "tokenizer", folder)
    if PLACES[model.family][number][1]:
        settings = _json(folder / "tokenizer_config.json")
        _write_json(folder / "tokenizer_config.json", settings | {"pad_token": "!"})


def _weights(folder: Path, names: tuple[str, str]) -> StateDict:
    """A part's weights: whole, in shards, or fp16; {} if there are none."""
    index = folder / f"{names[0]}.index.json"
    if (folder / names[0]).is_file():
        return _without_buffers(load_file(folder / names[0]))
    if index.is_file():
        shards = sorted(set(_json(index)["weight_map"].values()))
        return _without_buffers({k: w for shard in shards for k, w in load_file(folder / shard).items()})
    return _without_buffers(load_file(folder / names[1])) if (folder / names[1]).is_file() else {}


def _without_buffers(weights: StateDict) -> StateDict:
    return {key: weight for key, weight in weights.items() if not key.endswith("position_ids")}


def _full(kind: type, settings: dict) -> dict:
    """config.json of a model: the settings and the class's own defaults."""
    with torch.device("meta"):
        return json.loads(kind.from_config(settings).to_json_string())


def _layer(key: str) -> int:
    parts = key.split(".")
    return int(parts[2]) if parts[:2] == ["encoder", "layers"] else -1


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def family_of(state_dict: Mapping[str, Tensor]) -> str:
    """ "sd1", "sd2" or "sdxl", by where the text encoders lie or, without any, by the UNet's context width."""
    for family in ("sdxl", "sd2", "sd1"):
        if any(key.startswith(PLACES[family][0][0]) for key in state_dict):
            return family
    if any(".label_emb." in key for key in state_dict):
        return "sdxl"
    widths = {weight.shape[1] for key, weight in state_dict.items() if key.endswith("attn2.to_k.weight")}
    return "sd2" if 1024 in widths else "sd1"


def to_single_file(
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor] | None,
    texts: list[Mapping[str, Tensor]],
    family: str,
) -> StateDict:
    """LDM state dict of diffusers parts; vae None and texts [] leave them out."""
    return diffusers_to_ldm(unet, vae) | (text_encoders_to_ldm(texts, family) if texts else {})


def prediction_of(
    asked: str | None, metadata: Mapping[str, str], weights: Mapping[str, Tensor], family: str, unet: StateDict
) -> str:
    """What the network predicts. SD2.1's two files differ in nothing but their training: one predicts v at 768 px.

    Known by diffusers and the hosts from the last layer norm's bias of the last block's self-attention.
    """
    said = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key")
    if asked or said:
        return {"v": "v_prediction", "epsilon": "epsilon"}.get(asked or said, asked or said)
    if "v_pred" in weights:
        return "v_prediction"
    probe = weights.get("model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias")
    # The v model's values spread wide (ComfyUI draws the same line, at 0.09).
    return "v_prediction" if family == "sd2" and probe is not None and probe.float().std() > 0.09 else "epsilon"


def save_diffusers(pipeline: Pipeline, unet: UNet2DConditionModel, folder: Path, dtype: torch.dtype) -> None:
    """`unet` and the other parts of `pipeline` as a pipeline folder, which appears when it is whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    parts = {
        "vae": copy.deepcopy(pipeline.vae),
        "text_encoder": copy.deepcopy(pipeline.text_encoder),
        "tokenizer": pipeline.tokenizer,
        "unet": copy.deepcopy(unet),
        # The schedule is the teacher's; the stock pipelines then sample the student as they should.
        "scheduler": LCMScheduler.from_config(pipeline.scheduler_config),
    }
    if pipeline.text_encoder_2 is not None:
        second = {"text_encoder_2": copy.deepcopy(pipeline.text_encoder_2), "tokenizer_2": pipeline.tokenizer_2}
        whole = StableDiffusionXLPipeline(
            **parts, **second, force_zeros_for_empty_prompt=pipeline.zeros_for_empty, add_watermarker=False
        )
    else:
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        whole = StableDiffusionPipeline(**parts, **nothing)
    whole.to(dtype=dtype).save_pretrained(partial)
    drop_paths(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def drop_paths(folder: Path) -> None:
    """Take out of the configurations where on this machine their models were loaded from."""
    for file in folder.rglob("config.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
