"""A whole model on disk as state dicts and configurations: diffusers folders and single files, read and written.

No network is built, so that what is only renamed stays the same to the bit.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, LCMScheduler, UNet2DConditionModel
from torch import Tensor

from splam_core import (
    diffusers_to_ldm,
    fold_gamma,
    json_object,
    ldm_to_diffusers,
    load_file,
    load_files,
    parametrisation_of,
    read_json,
    read_metadata,
    reading,
    save_file,
    weight_files,
)
from splam_core.text_encoders import PLACES, text_encoder_from_ldm, text_encoders_to_ldm

from ..files import whole_folder
from .architectures import ARCHITECTURES, latent_side
from .teachers import EMBEDDED

StateDict = dict[str, Tensor]
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")
WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model", "model"
_CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
# Where a model came from is nobody's business, and its type is that of its weights.
_LEFT_OUT = ("_name_or_path", "_use_default_values", "dtype", "torch_dtype")
_SPEC = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}
# What diffusers before 0.15 called a VAE's attention layers, and many folders on the Hub still do.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class ModelFiles:
    """Parts under diffusers' names; text encoders without "text_model.". What a source lacks is {} or []."""

    unet: StateDict
    vae: StateDict
    texts: list[StateDict]
    family: str  # "sd1", "sd2" or "sdxl"
    configs: dict[str, dict]  # part -> config.json, "scheduler" -> scheduler_config.json
    tokenizers: list[Path] = field(default_factory=list)  # folders; none: CLIP's own
    zeros_for_empty: bool = True  # what SDXL's guidance takes for no prompt

    @property
    def prediction_type(self) -> str:
        return self.configs["scheduler"].get("prediction_type", "epsilon")

    @property
    def resolution(self) -> int:
        """The side of its pictures, in pixels."""
        widths = self.configs.get("vae", ARCHITECTURES[self.family].vae).get("block_out_channels")
        if not isinstance(widths, (list, tuple)):
            raise ValueError(f"its VAE's config.json says {widths!r:.40} for block_out_channels, expected a list")
        return latent_side(self.configs["unet"], self.family, self.prediction_type) * 2 ** (len(widths) - 1)

    def cast(self, dtype: torch.dtype) -> ModelFiles:
        def one(weights: StateDict) -> StateDict:
            return {key: w.to(dtype) if w.is_floating_point() else w for key, w in weights.items()}

        return replace(self, unet=one(self.unet), vae=one(self.vae), texts=[one(text) for text in self.texts])

    def folded(self, embedded: str | float, name: str = "the model") -> ModelFiles:
        """Without cond_proj, its constant at gamma = 1 (or at an LCM's guidance) in a bias; see `fold_gamma`.

        Raises ValueError, as `fold_gamma` and for weights that do not fit together. name: of what errors speak.
        """
        with reading(name):
            try:
                unet, found = fold_gamma(self.unet, embedded)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        if not found:
            return self
        return replace(self, unet=unet, configs=self._with("unet", {"time_cond_proj_dim": None}))

    def clip_skipped(self, clip_skip: int) -> ModelFiles:
        """Without the text encoder's last clip_skip - 1 layers: what A1111 calls Clip skip, ComfyUI layer -clip_skip.

        The final norm follows the last layer that is left. Raises ValueError for SDXL and for more layers than it has.
        """
        if clip_skip == 1:
            return self
        if self.family == "sdxl":
            raise ValueError(
                f"--clip-skip {clip_skip} is for SD1.x and SD2.x: SDXL reads the layer before the last of both its "
                f"text encoders, always. Leave it away."
            )
        layers = self.configs["text_encoder"]["num_hidden_layers"]
        left = layers - clip_skip + 1
        if not 1 <= left <= layers:
            raise ValueError(f"--clip-skip must be from 1 to {layers}, the text encoder's layers, got {clip_skip}")
        text = {key: weight for key, weight in self.texts[0].items() if _layer(key) < left}
        return replace(self, texts=[text], configs=self._with("text_encoder", {"num_hidden_layers": left}))

    def few_step(self) -> ModelFiles:
        """With the scheduler that samples a few-step model as it should, on the same noise schedule."""
        scheduler = json.loads(LCMScheduler.from_config(self.configs["scheduler"]).to_json_string())
        return replace(self, configs={**self.configs, "scheduler": scheduler})

    def with_parts_of(self, other: ModelFiles) -> ModelFiles:
        """This UNet with everything else of another model."""
        return replace(other, unet=self.unet, configs={**other.configs, "unet": self.configs["unet"]})

    def without(self, *parts: str) -> ModelFiles:
        """Without "vae" or "texts"."""
        kept = {
            name: settings
            for name, settings in self.configs.items()
            if not any(name == part or (part == "texts" and name.startswith("text_encoder")) for part in parts)
        }
        return replace(
            self,
            vae={} if "vae" in parts else self.vae,
            texts=[] if "texts" in parts else self.texts,
            configs=kept,
        )

    def _with(self, part: str, settings: dict) -> dict[str, dict]:
        return {**self.configs, part: {**self.configs[part], **settings}}


def read_model(place: Path) -> ModelFiles:
    """A diffusers pipeline folder, a run's folder, a UNet folder or a single file.

    Raises FileNotFoundError or ValueError, naming the file and what it lacks.
    """
    with reading(place):
        return _read_single_file(place) if place.is_file() else _read_folder(place)


def _read_folder(folder: Path) -> ModelFiles:
    if (folder / "pipeline" / "unet").is_dir():  # what training/distill.py leaves
        folder = folder / "pipeline"
    alone = not (folder / "unet").is_dir() and bool(weight_files(folder, WEIGHTS))
    unet_folder = folder if alone else folder / "unet"
    if not (unet_folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model: expected a diffusers pipeline folder (with unet/config.json), a folder in "
            f"which training/distill.py finished, or a UNet folder (with config.json and {WEIGHTS}.safetensors), found "
            f"{sorted(path.name for path in folder.iterdir()) if folder.is_dir() else 'nothing'}"
        )
    configs, texts, tokenizers = {"unet": _config(unet_folder)}, [], []
    unet, vae = _weights(unet_folder, WEIGHTS), {}
    family = "sdxl" if configs["unet"].get("addition_embed_type") == "text_time" else "sd1"
    family = "sd2" if family == "sd1" and configs["unet"].get("cross_attention_dim") == 1024 else family
    if not alone and (folder / "vae").is_dir():
        vae, configs["vae"] = _renamed_attention(_weights(folder / "vae", WEIGHTS)), _config(folder / "vae")
    for name in () if alone else ("text_encoder", "text_encoder_2"):
        if (folder / name).is_dir():
            texts.append(_bare(_weights(folder / name, TEXT_WEIGHTS)))
            configs[name] = _config(folder / name)
            tokenizers.append(folder / name.replace("text_encoder", "tokenizer"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file() and (vae or texts):
        raise FileNotFoundError(
            f"{folder}: expected scheduler/scheduler_config.json, which says what the UNet predicts and on which "
            f"schedule, found none: fetch it"
        )
    configs["scheduler"] = _scheduler(folder, unet, {}, _json(scheduler), family)
    zeros = bool(_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True))
    return ModelFiles(unet, vae, texts, family, configs, tokenizers, zeros)


def _read_single_file(file: Path) -> ModelFiles:
    weights, metadata = load_file(file), read_metadata(file)
    said = {part: f"splam.{part}" for part in PARTS if f"splam.{part}" in metadata}
    known = {part: json_object(metadata[key], f"{file}: {key}") for part, key in said.items()}
    family = metadata.get("splam.family") or family_of(weights)
    if family not in ARCHITECTURES:
        raise ValueError(f"{file}: its metadata splam.family is {family!r:.40}; expected {', '.join(ARCHITECTURES)}")
    try:
        rest = {k: w for k, w in weights.items() if not k.startswith(("cond_stage_model.", "conditioner."))}
        unet, vae, _ = ldm_to_diffusers(rest)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    architecture = ARCHITECTURES[family]
    scheduler = _scheduler(file, weights, metadata, known.get("scheduler", {}), family)
    inputs = {**_inputs(unet), "sample_size": latent_side({}, family, scheduler["prediction_type"])}
    configs = {
        "unet": known.get("unet") or _full(UNet2DConditionModel, architecture.unet | inputs),
        "scheduler": scheduler,
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
    for settings in configs.values():
        for name in _LEFT_OUT:
            settings.pop(name, None)
    return ModelFiles(unet, vae, texts, family, configs)


def write_folder(model: ModelFiles, folder: Path) -> None:
    """A diffusers pipeline folder, which appears under its name only when it is whole.

    Text encoders' names begin with "text_model.", as transformers 4 needs them and transformers 5 reads them too.
    """
    parts = [("unet", model.unet, WEIGHTS)] + ([("vae", model.vae, WEIGHTS)] if model.vae else [])
    for name, weights in zip(("text_encoder", "text_encoder_2"), model.texts, strict=False):
        # The projection stands outside the text model.
        named = {key if key == "text_projection.weight" else f"text_model.{key}": w for key, w in weights.items()}
        parts.append((name, named, TEXT_WEIGHTS))
    index: dict = {"_class_name": "StableDiffusionXLPipeline" if model.family == "sdxl" else "StableDiffusionPipeline"}
    with whole_folder(folder) as partial:
        for name, weights, stem in parts:
            (partial / name).mkdir(parents=True)
            save_file(weights, partial / name / f"{stem}.safetensors")
            _write_json(partial / name / "config.json", model.configs[name])
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
            index["force_zeros_for_empty_prompt"] = model.zeros_for_empty
        else:
            nothing = {"safety_checker": [None, None], "feature_extractor": [None, None]}
            index |= {**nothing, "requires_safety_checker": False}
        _write_json(partial / "model_index.json", index)


def write_single_file(model: ModelFiles, file: Path, title: str, more: Mapping[str, str] | None = None) -> None:
    """One LDM-style .safetensors file with ModelSpec metadata.

    The configurations of the parts ride along as JSON, since shapes do not tell the number of attention heads.
    """
    state_dict = to_single_file(model.unet, model.vae or None, model.texts, model.family)
    marks = parametrisation_of((), None, model.configs["scheduler"]).keys
    state_dict |= {key: torch.zeros(0) for key in marks}  # how hosts, and SPLAM Loader, are told
    metadata = model_spec(model, title) | dict(more or {})
    metadata |= {f"splam.{part}": json.dumps(settings) for part, settings in model.configs.items()}
    save_file(state_dict, file, metadata)


def model_spec(model: ModelFiles, title: str, kind: str = "") -> dict[str, str]:
    """ModelSpec 1.0.0 metadata; kind: "" for a checkpoint, "/lora" for a LoRA."""
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
        "modelspec.resolution": f"{model.resolution}x{model.resolution}",
        "splam.family": model.family,
    }


def tokenizer_of(model: ModelFiles, number: int) -> tuple[Path, dict[str, str]]:
    """(folder, settings that it lacks) of a text encoder's tokenizer: the source's, or CLIP's own.

    OpenCLIP's text encoders pad with "!".
    """
    if number < len(model.tokenizers) and model.tokenizers[number].is_dir():
        return model.tokenizers[number], {}
    return EMBEDDED / "tokenizer", {"pad_token": "!"} if PLACES[model.family][number][1] else {}


def _write_tokenizer(model: ModelFiles, number: int, folder: Path) -> None:
    source, settings = tokenizer_of(model, number)
    shutil.copytree(source, folder)
    if settings:
        _write_json(folder / "tokenizer_config.json", _json(folder / "tokenizer_config.json") | settings)
    if not (folder / "vocab.json").is_file():  # transformers 4 reads no other than these two
        tokens = _json(folder / "tokenizer.json")["model"]
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokens["merges"]]
        (folder / "vocab.json").write_text(json.dumps(tokens["vocab"], ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")


def _weights(folder: Path, stem: str) -> StateDict:
    """A part's weights: whole, in shards, or fp16."""
    files = weight_files(folder, stem)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no safetensors weights: expected {stem}.safetensors or {stem}.fp16.safetensors, found "
            f"{sorted(file.name for file in folder.glob('*')) or 'nothing'}. Pickles (.bin) are not read: fetch the "
            f"model's safetensors files."
        )
    return load_files(files)


def _scheduler(
    place: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str], config: dict, family: str
) -> dict:
    """scheduler_config.json with what the whole model says that it predicts, and on which schedule."""
    try:
        said = parametrisation_of(weights, metadata, config)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    for contradiction in said.contradictions:
        warnings.warn(f"{place}: {contradiction}", stacklevel=2)
    zero = said.schedule is not None and said.schedule.has_zero_terminal_snr
    # The last timestep is then all noise: one that "leading" leaves out.
    known = config or ARCHITECTURES[family].scheduler | ({"timestep_spacing": "trailing"} if zero else {})
    return {
        **known,
        "prediction_type": said.prediction_type or _usual_prediction(weights, family),
        "rescale_betas_zero_snr": zero,
    }


def _usual_prediction(weights: Mapping[str, Tensor], family: str) -> str:
    """Of a file that does not say. SD2.1's two files differ in nothing but their training: one predicts v at 768 px.

    Known by diffusers and the hosts from the last layer norm's bias of the last block's self-attention.
    """
    probe = weights.get("model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias")
    # The v model's values spread wide (ComfyUI draws the same line, at 0.09).
    return "v_prediction" if family == "sd2" and probe is not None and probe.float().std() > 0.09 else "epsilon"


def _bare(text_encoder: StateDict) -> StateDict:
    """Without "text_model." in front, which transformers 4 has and transformers 5 has not, and without buffers."""
    named = {key.removeprefix("text_model."): weight for key, weight in text_encoder.items()}
    return {key: weight for key, weight in named.items() if not key.endswith("position_ids")}


def _renamed_attention(vae: StateDict) -> StateDict:
    def renamed(key: str) -> str:
        return re.sub(
            r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", key
        )

    return {renamed(key): weight for key, weight in vae.items()}


def _inputs(unet: StateDict) -> dict[str, int]:
    """What the weights themselves tell of the configuration."""
    return {"in_channels": unet["conv_in.weight"].shape[1]} if "conv_in.weight" in unet else {}


def _full(kind: type, settings: dict) -> dict:
    """config.json of a model: the settings and the class's own defaults."""
    with torch.device("meta"):
        return json.loads(kind.from_config(settings).to_json_string())


def _layer(key: str) -> int:
    found = re.match(r"encoder\.layers\.(\d{1,6})\.", key)
    return int(found[1]) if found else -1


def _config(folder: Path) -> dict:
    return {key: value for key, value in _json(folder / "config.json").items() if key not in _LEFT_OUT}


def _json(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}


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
