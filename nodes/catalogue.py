"""Which models SPLAM Loader offers, and where each lies. A name from a graph means only what is listed here."""

import os
from dataclasses import dataclass
from pathlib import Path

import folder_paths

EMBEDDED = Path(__file__).parents[1] / "assets" / "embedded"


@dataclass(frozen=True)
class Location:
    """One model on disk: a diffusers pipeline folder, or a single file with UNet, VAE and text encoder."""

    path: Path
    unet: Path | None = None  # a UNet folder that takes the place of the pipeline's own

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def unet_folder(self) -> Path:
        return self.unet or self.path / "unet"


def find_models() -> dict[str, Location]:
    """Name -> location: the embedded pipeline, then the host's `diffusers` folders, then its checkpoints."""
    found = {}
    if (EMBEDDED / "student" / "config.json").is_file():
        found["embedded-student"] = Location(EMBEDDED, EMBEDDED / "student")
    if (EMBEDDED / "unet" / "config.json").is_file():
        found["embedded-teacher"] = Location(EMBEDDED)
    for base in map(Path, folder_paths.get_folder_paths("diffusers")):
        for root, _, files in sorted(os.walk(base, followlinks=True)):
            folder = Path(root)
            if "model_index.json" in files and (folder / "unet" / "config.json").is_file():
                found.setdefault(f"diffusers/{folder.relative_to(base).as_posix()}", Location(folder))
    for name in folder_paths.get_filename_list("checkpoints"):
        if name.endswith(".safetensors"):
            found.setdefault(Path(name).as_posix(), Location(Path(folder_paths.get_full_path("checkpoints", name))))
    return found


def locate(name: str) -> Location:
    """Raises ValueError, naming the folders to look in, when there is no such model."""
    found = find_models()
    if name not in found:
        raise ValueError(
            f"SPLAM Loader: there is no model {name!r}. Found: {', '.join(found) or 'none'}. "
            "Put diffusers pipeline folders into "
            f"{' or '.join(folder_paths.get_folder_paths('diffusers'))}, single *.safetensors files into "
            f"{' or '.join(folder_paths.get_folder_paths('checkpoints'))}, and refresh the page."
        )
    return found[name]
