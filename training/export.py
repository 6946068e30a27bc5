"""Turn a model into another form of itself.

    python training/export.py SOURCE --to diffusers|single-file|lora --output PATH

SOURCE: a checkpoint folder of training/distill.py, its output folder, a diffusers folder, a UNet folder (with --base),
a single .safetensors file, a LoRA (with --base), a preset or a Hub id. Weights that embed gamma or an LCM's guidance
are folded: the result is plain Stable Diffusion. What is only renamed stays the same to the bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "training"

import torch
from torch import Tensor

from splam_core import load_file, read_json, read_metadata, reading

from .files import WRITE_ERRORS, why_not_written
from .models.files import ModelFiles, read_model, write_folder, write_single_file
from .models.lora import extract_lora, is_lora, joined, merged, named_with_weight, read_lora, save_lora, with_loras
from .models.pipeline import DTYPES
from .models.teachers import resolve, without_folders
from .run.checkpoints import verify

FORMS = ("diffusers", "single-file", "lora")


def read_source(
    source: str, base: str | None, embedded: str | float, role: str, revision: str | None = None
) -> tuple[ModelFiles, dict[str, Tensor] | None, float]:
    """(model with nothing left to fold, its LoRA under peft's names if it is one, that LoRA's alpha/rank).

    Raises ValueError or FileNotFoundError naming what is missing.
    """
    place = Path(source).expanduser()
    if (place / "state.json").is_file():
        with reading(place):
            return _read_checkpoint(place, base, role)
    place = resolve(source, revision)
    if is_lora(place):
        if base is None:
            raise ValueError(f"{place} is a LoRA: name the model that it changes with --base")
        model = read_model(resolve(base)).folded(embedded, base).few_step()
        return replace(model, unet=merged(_float(model.unet), read_lora(place), name=str(place))), None, 1.0
    model = read_model(place)
    had_projection = any("cond_proj" in key for key in model.unet)
    model = model.folded(embedded, str(place))
    if base is not None and not (model.vae and model.texts):
        model = model.with_parts_of(read_model(resolve(base)))
    return (model.few_step() if had_projection else model), None, 1.0


def _read_checkpoint(folder: Path, base: str | None, role: str) -> tuple[ModelFiles, dict[str, Tensor] | None, float]:
    """A checkpoint-N or `best` folder: the role's weights on the teacher that state.json names."""
    verify(folder)
    config = read_json(folder / "state.json")["config"]
    # `best` has one role's, under the student's name.
    file = folder / f"{role if (folder / 'target.safetensors').is_file() else 'student'}.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder}: expected {file.name}, found {sorted(f.name for f in folder.iterdir())}")
    weights = {key: weight for key, weight in load_file(file).items() if "cond_proj" not in key}  # zero at gamma = 1
    plain = read_model(resolve(base) if base else resolve(config["teacher"], config.get("revision"))).few_step()
    loras = config.get("teacher_lora", [])
    model = with_loras(plain, loras)
    if not config["lora"]:
        return replace(model, unet=weights), None, 1.0
    scale = (config["lora_alpha"] or config["lora_rank"]) / config["lora_rank"]
    model = replace(model, unet=merged(_float(model.unet), weights, scale, str(file)))
    if config.get("lora_holds") == "both":
        return model, joined(weights, scale, loras, plain), 1.0
    return model, weights, scale


def _float(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: weight.float() if weight.is_floating_point() else weight for key, weight in weights.items()}


def export(options: argparse.Namespace) -> Path:
    """What the command does. Raises ValueError or FileNotFoundError for what cannot be done."""
    embedded = "splam" if options.embedded_guidance is None else options.embedded_guidance
    if options.embedded_guidance == 1:
        embedded = "splam"
    model, lora, scale = read_source(options.source, options.base, embedded, options.role, options.revision)
    dtype, output = options.dtype and DTYPES[options.dtype], Path(options.output).expanduser()
    if options.to == "lora":
        if lora is None:
            if options.base is None:
                raise ValueError("--to lora needs --base, the model that the LoRA is to change")
            lora, scale = extract_lora(model.unet, read_model(resolve(options.base)).unet, options.rank), 1.0
        _require_safetensors(output)
        save_lora(lora, output, model, scale, dtype or torch.float16, output.stem, _kept_metadata(options.source))
        return output
    if dtype:
        model = model.cast(dtype)
    left_out = (("vae", options.without_vae), ("texts", options.without_text_encoder))
    model = model.without(*(part for part, out in left_out if out))
    if options.to == "diffusers":
        if not model.vae or not model.texts:
            raise ValueError(
                "a diffusers pipeline needs a VAE and text encoders: give --base for what SOURCE lacks, and leave "
                "--without-vae and --without-text-encoder out"
            )
        if output.is_file():
            raise ValueError(f"--output {output} is a file: expected a folder, or nothing yet")
        if output.exists() and not (output / "model_index.json").is_file() and any(output.iterdir()):
            raise ValueError(f"{output} exists and is no diffusers folder: name another --output")
        output.parent.mkdir(parents=True, exist_ok=True)
    else:
        _require_safetensors(output)
    try:
        if options.to == "diffusers":
            write_folder(model, output)
        else:
            write_single_file(model, output, output.stem, _kept_metadata(options.source))
    except ValueError as error:  # names that single files have no place for, and the like
        raise ValueError(f"{options.source}: {error}") from error
    return output


def _kept_metadata(source: str) -> dict[str, str]:
    """What the source says of its making."""
    place = Path(source).expanduser()
    kept = (
        "splam.method",
        "splam.skip",
        "splam.solver",
        "splam.solver_skip",
        "splam.guidance_scale",
        "splam.teacher",
        "splam.teacher_hash",
        "splam.teacher_lora",
        "splam.lora_holds",
        "splam.clip_skip",
    )
    if (place / "state.json").is_file():
        config = json.loads((place / "state.json").read_text(encoding="utf-8"))["config"]
        loras = config.get("teacher_lora") or []
        config["teacher"] = without_folders(config["teacher"])
        config["teacher_lora"] = ", ".join(map(named_with_weight, loras))
        if not (loras and config.get("lora")):
            config.pop("lora_holds", None)
        if config.get("clip_skip") == 1:
            config.pop("clip_skip")
        return {key: str(config[key[6:]]) for key in kept if config.get(key[6:])}
    if place.suffix == ".safetensors" and place.is_file():
        return {key: value for key, value in read_metadata(place).items() if key in kept}
    return {}


def _require_safetensors(output: Path) -> None:
    if output.suffix != ".safetensors":
        raise ValueError(f"--output {output}: expected the name of a .safetensors file")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: expected the name of a .safetensors file")
    output.parent.mkdir(parents=True, exist_ok=True)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("source", metavar="SOURCE")
    result.add_argument("--to", required=True, choices=FORMS)
    result.add_argument("--output", required=True, help="a folder for diffusers, else a .safetensors file")
    result.add_argument("--base", help="the model that a LoRA changes, or that lends what a UNet alone lacks")
    result.add_argument("--dtype", choices=sorted(DTYPES), help="cast to it (default: as the source; a LoRA fp16)")
    result.add_argument("--rank", type=int, default=64, help="of an extracted LoRA (default: 64)")
    result.add_argument(
        "--embedded-guidance", type=float,
        help="the guidance scale to fold into an LCM checkpoint, 8.5 in its own pipeline; 1 (default) is SPLAM's",
    )  # fmt: skip
    result.add_argument("--role", choices=("target", "release", "student"), default="target", help="of a checkpoint")
    result.add_argument("--without-vae", action="store_true", help="leave it out of a single file")
    result.add_argument("--without-text-encoder", action="store_true", help="leave it out of a single file")
    result.add_argument("--revision", help="branch, tag or commit of a Hub id")
    names = [(action, name) for action in result._actions for name in action.option_strings if "-" in name[2:]]
    for action, name in names:
        result._option_string_actions["--" + name[2:].replace("-", "_")] = action
    return result


def main() -> int:
    options = parser().parse_args()
    try:
        print(export(options))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except WRITE_ERRORS as error:
        output = Path(options.output).expanduser()
        print(f"error: {output}: {why_not_written(error, output)}. Nothing of it is left.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
