"""Which models SPLAM Loader offers, and where each lies. A name from a graph means only what is listed here."""

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ..splam_core import checkpoint
from ..splam_core.checkpoint import PICKLES, is_safetensors, with_names

EMBEDDED = Path(__file__).parents[1] / "assets" / "embedded"
PUBLISHER = "alimama-creative"
RELEASES = ("slam-sd1.5", "slam-dreamshaper7")  # folder names of the authors' published pipelines
KINDS = ("checkpoints", "diffusion_models", "diffusers", "loras")  # the host's folders that are read


@dataclass(frozen=True)
class Location:
    """One model on disk: a diffusers pipeline folder, a diffusers UNet folder, or a file."""

    path: Path
    unet: Path | None = None  # a UNet folder that takes the place of the pipeline's own
    is_few_step: bool = False  # known by where it lies

    @property
    def is_pipeline(self) -> bool:
        return (self.path / "model_index.json").is_file()

    @property
    def unet_folder(self) -> Path:
        return self.unet or self.path / "unet"


def find_models() -> dict[str, Location]:
    """Name -> location: the embedded pipeline, the published releases, then the host's `diffusers`,
    `diffusion_models` and `checkpoints` folders."""
    found: dict[str, Location] = {}
    if (EMBEDDED / "student" / "config.json").is_file():
        found["embedded-student"] = Location(EMBEDDED, EMBEDDED / "student", True)
    if (EMBEDDED / "unet" / "config.json").is_file():
        found["embedded-teacher"] = Location(EMBEDDED)
    releases: dict[str, Location] = {}
    folders: dict[str, Location] = {}
    for base in map(Path, folder_paths.get_folder_paths("diffusers")):
        for path in _diffusers_models(base):
            name = path.relative_to(base).as_posix()
            release = _release(name)
            if release and release not in releases:
                releases[release] = Location(path, is_few_step=True)
            else:
                folders.setdefault(f"diffusers/{name}", Location(path))
    found |= releases | folders
    for kind, prefix in (("diffusion_models", "diffusion_models/"), ("checkpoints", "")):
        for name in folder_paths.get_filename_list(kind):
            path = folder_paths.get_full_path(kind, name)
            if path and is_safetensors(name):
                name = Path(name).as_posix()
                found.setdefault(prefix + name, Location(Path(path), is_few_step=bool(_release(name))))
    return found


def locate(name: str) -> Location:
    """Raises ValueError, saying where models go, when there is no such model.

    A published release may also be called by its place, diffusers/slam-sd1.5.
    """
    if not isinstance(name, str):
        raise ValueError(f"SPLAM Loader: expected the name of a model, found {name!r:.40}. Choose one of the list.")
    found = find_models()
    name = as_listed(name, found)
    if name in found:
        return found[name]
    release = _release(name.removeprefix("diffusers/")) if name.startswith("diffusers/") and ".." not in name else ""
    if release in found:
        return found[release]
    if is_pickle(name):
        raise ValueError(
            f"SPLAM Loader: {name!r} is a pickle, which can run code when opened; expected a .safetensors file. "
            "Convert it to safetensors, or use the model's .safetensors download."
        )
    listed = list(found)
    shown = ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
    raise ValueError(
        f"SPLAM Loader: there is no model {name!r}. Found: {shown or 'none'}. Put diffusers folders into "
        "models/diffusers, UNet files into models/diffusion_models, whole *.safetensors checkpoints into "
        "models/checkpoints, and refresh the page; SPLAM Fetch downloads the published ones."
    )


def as_listed(name: str, listed: Collection[str]) -> str:
    """The name as the host lists it: a graph from another system may part its folders by the other slash."""
    spelled = {one.replace("\\", "/"): one for one in listed}
    return name if name in listed else spelled.get(name.replace("\\", "/"), name)


def is_pickle(name: str) -> bool:
    return Path(name).suffix.lower() in PICKLES


@contextmanager
def host_names() -> Iterator[None]:
    """Errors raised inside name files by folder and name, checkpoints/x.safetensors, never by the server's own paths.

    Whoever queues a graph on a shared server reads them.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(in_host_names(str(error))) from error


def in_host_names(text: str) -> str:
    """The text with the host's folders in place of their paths, and no longer than a screen."""
    # Not Path.home(), which raises where the system knows no home of this user.
    known = {Path(os.path.expanduser("~")): "~", Path(sys.prefix): "Python"}
    known |= {Path(folder_paths.get_output_directory()): "output"}
    known |= {Path(folder_paths.models_dir): "models", Path(folder_paths.base_path): "ComfyUI", EMBEDDED: "embedded"}
    known |= {Path(folder): kind for kind in KINDS for folder in folder_paths.get_folder_paths(kind)}
    return with_names(text, known)


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is missing or no JSON object."""
    try:
        return checkpoint.read_json(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: missing. Copy the whole diffusers folder, with its small .json files.") from None


def _diffusers_models(base: Path) -> list[Path]:
    """Pipeline folders, UNet folders, and UNet files on their own, below a `diffusers` folder."""
    models = []
    for root, folders, files in os.walk(base, followlinks=True):
        folders.sort()
        folder = Path(root)
        if "model_index.json" in files:
            folders.clear()  # its parts are no models of their own
            if (folder / "unet" / "config.json").is_file():
                models.append(folder)
        elif "config.json" in files:
            if _is_unet_folder(folder):
                models.append(folder)
        else:
            models += [folder / name for name in sorted(files) if is_safetensors(name)]
    return models


def _is_unet_folder(folder: Path) -> bool:
    try:
        kind = read_json(folder / "config.json").get("_class_name", "UNet2DConditionModel")
    except ValueError:
        return False
    return kind == "UNet2DConditionModel" and any(folder.glob("diffusion_pytorch_model*"))


def _release(name: str) -> str:
    """The published release that a relative path names, as a folder of its own or in the hub's cache layout; or ""."""
    for part in Path(name).parts:
        for release in RELEASES:
            if part in (release, f"models--{PUBLISHER}--{release}"):
                return f"{PUBLISHER}/{release}"
    return ""
