"""Runs every shipped workflow in ComfyUI's page; writes its thumbnail and the screenshot of its graph.

    python dev.py python -m harness.workflows [--only NAME ...]

Thumbnails go beside the workflows, screenshots to docs/images. A workflow whose model files are nowhere in this
repository is opened but not run: its thumbnail is the graph.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .page import ComfyPage, browser
from .server import ROOT, ComfyServer, ServerError, exit_on_sigterm

FOLDER = ROOT / "workflows"
SIDE = 384  # pixels of a square thumbnail
PANDA, STAR = "a panda on a purple background", "a yellow star above a doughnut"
STRAWBERRY = "a strawberry on a pink background"


@dataclass(frozen=True)
class Embedded:
    """What a workflow shows when the embedded model runs it; nodes are named by their titles."""

    captions: dict[str, str]  # node -> what its picture must show
    thumbnail: tuple[str, ...]  # the main picture and its inset; two halves if `halves`; or a square of four
    halves: bool = False


EMBEDDED = {
    "splam_txt2img": Embedded({"Result": PANDA}, ("Result",)),
    "splam_img2img": Embedded(
        {"Input picture": PANDA, "Result": "a koala on a purple background"}, ("Result", "Input picture")
    ),
    "splam_inpaint": Embedded(
        {"Input picture": STAR, "Result": "a yellow star above a crescent moon"}, ("Result", "Input picture")
    ),
    "splam_hires_fix": Embedded({"First pass": STRAWBERRY, "Result": STRAWBERRY}, ("Result", "First pass")),
    "splam_sampler_custom_advanced": Embedded({"Result": STAR}, ("Result",)),
    "splam_steps_comparison": Embedded({"4 steps": STAR, "8 steps": STAR}, ("1 step", "2 steps", "4 steps", "8 steps")),
    "splam_negative_prompt": Embedded({"Without it": "a yellow star on a red background"}, ("Result", "Without it")),
    "splam_vs_lcm": Embedded({"SPLAM": STAR}, ("SPLAM", "LCM, ComfyUI's way"), halves=True),
}


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def read(name: str) -> dict:
    """The UI-format graph of a shipped workflow."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def node_titled(workflow: dict, title: str) -> dict:
    """Raises ValueError unless just one node bears the title."""
    found = [node for node in workflow["nodes"] if node.get("title") == title]
    if len(found) != 1:
        raise ValueError(f"expected one node titled {title!r}, found {len(found)}.")
    return found[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="harness.workflows", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=names(), choices=names(), metavar="NAME", help="some of them")
    parser.add_argument("--thumbnails", type=Path, default=FOLDER, help="folder of the thumbnails")
    parser.add_argument("--screenshots", type=Path, default=ROOT / "docs" / "images", help="folder of the screenshots")
    options = parser.parse_args()
    if not browser():
        parser.error("needs Chromium and chromedriver on the PATH (Debian: apt install chromium chromium-driver)")
    if not os.environ.get("COMFYUI_PATH"):
        parser.error("COMFYUI_PATH names no ComfyUI; `python dev.py python -m harness.workflows` sets it")
    exit_on_sigterm()
    try:
        with tempfile.TemporaryDirectory(prefix="splam-workflows-") as folder:
            server = ComfyServer(Path(os.environ["COMFYUI_PATH"]), Path(folder) / "comfyui")
            with server, ComfyPage(server, Path(folder) / "browser") as page:
                for name in options.only:
                    show(page, name, options.thumbnails, options.screenshots)
    except ServerError as error:
        print(f"workflows: {error}", file=sys.stderr)
        return 1
    return 0


def show(page: ComfyPage, name: str, thumbnails: Path, screenshots: Path) -> None:
    """Writes <name>.jpg and workflow-<name>.jpg of one workflow."""
    workflow, embedded = read(name), EMBEDDED.get(name)
    page.open(workflow)
    pictures = []
    if embedded:
        page.run()
        pictures = [page.pictures(node_titled(workflow, title)["id"])[0] for title in embedded.thumbnail]
    graph = page.screenshot()
    cover = thumbnail(pictures, embedded.halves) if embedded else at_most(graph, 512)
    for path, image, quality in (
        (thumbnails / f"{name}.jpg", cover, 88),
        (screenshots / f"workflow-{name.removeprefix('splam_')}.jpg", at_most(graph, 1500), 68),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=quality, optimize=True)
        print(f"{path}: {image.width}x{image.height}, {path.stat().st_size / 1000:.0f} kB", flush=True)


def at_most(image: Image.Image, width: int) -> Image.Image:
    scale = min(1, width / image.width)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def thumbnail(pictures: list[Image.Image], halves: bool) -> Image.Image:
    """One square picture of one, two or four."""

    def scaled(picture: Image.Image, side: int) -> Image.Image:
        return picture.resize((side, side), Image.Resampling.LANCZOS)

    if len(pictures) == 4:
        cover, half = Image.new("RGB", (SIDE, SIDE), "white"), SIDE // 2
        for number, picture in enumerate(pictures):
            cover.paste(scaled(picture, half - 2), (number % 2 * (half + 2), number // 2 * (half + 2)))
        return cover
    cover = scaled(pictures[0], SIDE)
    if halves:
        quarter = SIDE // 4
        left, right = (scaled(picture, SIDE).crop((quarter, 0, 3 * quarter, SIDE)) for picture in pictures)
        cover.paste("white", (0, 0, SIDE, SIDE))
        cover.paste(left, (-2, 0))
        cover.paste(right, (SIDE // 2 + 2, 0))
    elif len(pictures) == 2:
        side = SIDE // 3
        cover.paste("white", (0, 0, side + 4, side + 4))
        cover.paste(scaled(pictures[1], side), (0, 0))
    return cover


if __name__ == "__main__":
    sys.exit(main())
