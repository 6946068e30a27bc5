"""Repositories of the Hugging Face hub and their copies in the local cache."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterable
from pathlib import Path

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


def cached(repo: str, revision: str = "main") -> Path | None:
    """The snapshot folder of a repository in the local Hugging Face cache, whole or not; None if there is none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "model_index.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def lacking(folder: Path) -> list[str]:
    """What a diffusers folder lacks of a pipeline that can be read, by file name; [] for a whole one.

    An index that is no JSON object is lacking too: it is to be downloaded again.
    """
    missing: list[str] = []

    def read(name: str) -> dict:
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            missing.append(name)
        return found if isinstance(found, dict) else {}

    parts = ["unet", "vae", "text_encoder"]
    index = read("model_index.json")
    if index.get("text_encoder_2", [None])[0]:
        parts.append("text_encoder_2")
    names = ["scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)]
    missing += [name for name in names if not (folder / name).is_file()]
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
            for shard in read(name).get("weight_map", {}).values()
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


def _stem(part: str) -> str:
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


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
