"""A Pipeline from a diffusers folder or a single file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from splam_core import NoiseSchedule, fold_gamma, ldm_to_diffusers
from splam_core.checkpoint import read_metadata
from splam_core.text_encoders import PLACES, text_encoder_from_ldm

from .architectures import ARCHITECTURES
from .files import PARTS, WEIGHTS, StateDict, family_of, prediction_of
from .pipeline import Pipeline
from .teachers import EMBEDDED, resolve


def load_single_file(
    file: Path, dtype: torch.dtype = torch.float32, embedded: str | float = "splam", prediction_type: str | None = None
) -> Pipeline:
    """A Pipeline of a single file of SD1.x, SD2.x or SDXL; a cond_proj in it is folded (`fold_gamma`'s `embedded`).

    Metadata "splam.<part>" gives the configurations; without them the published ones of the family are taken.
    prediction_type: of a file that does not say (ModelSpec metadata, or a "v_pred" key). A VAE or text encoder that
    the file lacks is an error. Raises ValueError naming the file.
    """
    weights, metadata = load_file(file), read_metadata(file)
    family = family_of(weights)
    known = {part: json.loads(metadata[f"splam.{part}"]) for part in PARTS if f"splam.{part}" in metadata}
    if "unet" in known and known["unet"].get("addition_embed_type") == "text_time":
        family = "sdxl"
    architecture = ARCHITECTURES[family]
    try:
        unet, vae, _ = ldm_to_diffusers(
            {k: v for k, v in weights.items() if not k.startswith(("cond_", "conditioner"))}
        )
        texts = [text_encoder_from_ldm(weights, *place) for place in PLACES[family]]
        lacking = [name for name, part in (("VAE", vae), *(("text encoder", text) for text in texts)) if not part]
        if lacking:
            raise ValueError(f"it has no {' and no '.join(lacking)}; a teacher needs all parts")
        unet, _ = fold_gamma(unet, embedded)
        scheduler = known.get("scheduler") or {**architecture.scheduler, "prediction_type": prediction_of(
            prediction_type, metadata, weights, family, unet
        )}  # fmt: skip
        if "unet" in known:
            known["unet"]["time_cond_proj_dim"] = None
        parts = [
            _build(UNet2DConditionModel.from_config(known.get("unet") or architecture.unet), unet, dtype),
            _build(AutoencoderKL.from_config(known.get("vae") or architecture.vae), vae, dtype),
            _build(CLIPTextModel(_clip(known.get("text_encoder"), architecture.clip())), texts[0], dtype),
        ]
        second = None
        if family == "sdxl":
            config = _clip(known.get("text_encoder_2"), architecture.clip(second=True))
            second = _build(CLIPTextModelWithProjection(config), texts[1], dtype)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: expected a Stable Diffusion 1.x, 2.x or XL checkpoint: {error}") from error
    pad = {"pad_token": "!"}  # OpenCLIP's
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", **(pad if family == "sd2" else {}))
    return Pipeline(
        *parts,
        tokenizer,
        NoiseSchedule.from_config(scheduler),
        scheduler,
        second,
        CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", **pad) if second is not None else None,
        second is not None,
        str(file),
    )


def load_text_weights(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights named without "text_model." into whatever transformers calls them; a layer too many is left out."""
    own = {key.removeprefix("text_model."): key for key in model.state_dict() if not key.endswith("position_ids")}
    missing = sorted(own.keys() - weights.keys())
    if missing:
        raise ValueError(f"the text encoder lacks {len(missing)} weights, the first {missing[0]!r}")
    model.load_state_dict({own[key]: weight for key, weight in weights.items() if key in own}, strict=False)


def _build(model: torch.nn.Module, weights: StateDict, dtype: torch.dtype) -> torch.nn.Module:
    model = model.to(dtype)
    if isinstance(model, (CLIPTextModel, CLIPTextModelWithProjection)):
        load_text_weights(model, weights)
    else:
        model.load_state_dict(weights)
    return model


def _clip(known: dict | None, default: CLIPTextConfig) -> CLIPTextConfig:
    return CLIPTextConfig.from_dict(known) if known else default


def load_pipeline(
    model: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    download: bool = False,
    unet_dtype: torch.dtype | None = None,
) -> Pipeline:
    """A diffusers pipeline folder, a finished run's folder, a UNet folder, a single file, a teacher's name or a Hub id.

    What a UNet folder lacks is taken from the embedded pipeline. Nothing is downloaded unless asked; safetensors only.
    Raises FileNotFoundError if there is no such model, ValueError for one of another kind.
    """
    place = resolve(str(model), revision, download)
    pipeline = load_single_file(place, dtype) if place.is_file() else _load_folder(place, dtype)
    pipeline.source = str(model)
    if unet_dtype is not None:  # before it goes to the device
        pipeline.unet.to(unet_dtype)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        part = getattr(pipeline, name)
        if part is not None:
            setattr(pipeline, name, part.to(device).eval().requires_grad_(False))
    pipeline.schedule = pipeline.schedule.to(device)
    return pipeline


def _load_folder(folder: Path, dtype: torch.dtype) -> Pipeline:
    if (folder / "pipeline" / "unet").is_dir():  # what training/distill.py leaves
        folder = folder / "pipeline"
    unet = folder if any((folder / name).is_file() for name in WEIGHTS) else folder / "unet"
    if not (unet / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model: expected a diffusers pipeline folder (with unet/config.json), a folder in "
            f"which training/distill.py finished, or a UNet folder (with config.json and {WEIGHTS[0]})"
        )
    rest = folder if (folder / "vae").is_dir() else EMBEDDED
    index = _json(rest / "model_index.json")
    scheduler = _json(rest / "scheduler" / "scheduler_config.json")
    two = (rest / "text_encoder_2").is_dir()
    return Pipeline(
        _load(UNet2DConditionModel, unet, dtype),
        _load(AutoencoderKL, rest / "vae", dtype),
        _load(CLIPTextModel, rest / "text_encoder", dtype),
        CLIPTokenizer.from_pretrained(rest / "tokenizer"),
        NoiseSchedule.from_config(scheduler),
        scheduler,
        _load(CLIPTextModelWithProjection, rest / "text_encoder_2", dtype) if two else None,
        CLIPTokenizer.from_pretrained(rest / "tokenizer_2") if two else None,
        bool(two and index.get("force_zeros_for_empty_prompt", True)),
    )


def _load(kind: type, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """One part; of a folder that holds fp16 weights alone, those."""
    plain, half = (
        ("model.safetensors", "model.fp16.safetensors") if kind.__module__.startswith("transformers") else WEIGHTS
    )
    shards = [f"{plain}.index.json", plain]
    variant = "fp16" if (folder / half).is_file() and not any((folder / name).is_file() for name in shards) else None
    if variant is None and not any((folder / name).is_file() for name in shards):
        raise FileNotFoundError(
            f"{folder} holds no safetensors weights: expected {plain} or {half}, found "
            f"{sorted(file.name for file in folder.glob('*')) or 'nothing'}. Pickles (.bin) are not read: fetch the "
            f"model's safetensors files."
        )
    return kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, variant=variant)


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
