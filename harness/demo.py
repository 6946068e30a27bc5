"""`python dev.py demo`: a real ComfyUI runs the shipped workflow on the embedded student.

A sheet then sets the student's few steps beside the teacher's fifty.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from training.pictures import save_sheet

from .graphs import save_image, stock, text_to_image
from .server import ROOT, ComfyServer, ServerError, exit_on_sigterm, to_api

WORKFLOW = ROOT / "workflows" / "splam_txt2img.json"
SEED = 7
PROMPTS = (
    "a panda on a purple background",
    "a slice of pizza to the left of a red apple",
    "a face with sunglasses",
    "a woman cook with dark skin on a yellow background",
)
# Heading -> the graph of a prompt.
COLUMNS = (
    *(
        (
            f"student, {steps} step{'s' * (steps > 1)}",
            lambda prompt, steps=steps: text_to_image("embedded-student", prompt, seed=SEED, steps=steps),
        )
        for steps in (1, 2, 4, 8)
    ),
    ("teacher, 2 steps", lambda prompt: text_to_image("embedded-teacher", prompt, seed=SEED, steps=2)),
    ("teacher, 50 steps, w = 3", lambda prompt: stock("embedded-teacher", prompt, seed=SEED, steps=50, cfg=3.0)),
)
TILE = 192


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="the ComfyUI folder to run")
    parser.add_argument("--out", type=Path, required=True, help="where splam.png and sheet.png go")
    parser.add_argument("--serve", action="store_true", help="leave the server up until Ctrl-C")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    exit_on_sigterm()
    try:
        with tempfile.TemporaryDirectory(prefix="splam-demo-") as folder:
            print(f"starting the ComfyUI in {options.comfyui}", flush=True)
            with ComfyServer(options.comfyui, Path(folder)) as server:
                paths = draw(server, options.out)
                if options.serve:
                    print(f"ComfyUI is at {server.url} until Ctrl-C", flush=True)
                print(*paths, sep="\n", flush=True)
                if options.serve:
                    server.process.wait()
    except KeyboardInterrupt:
        return 0 if options.serve else 130
    except ServerError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def draw(server: ComfyServer, out: Path) -> tuple[Path, Path]:
    """Writes splam.png, from the shipped workflow, and sheet.png."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    started = time.monotonic()
    (picture,) = server.files(server.run(to_api(workflow, server.get("/object_info"))))
    print(f"{WORKFLOW.name}: {time.monotonic() - started:.1f} s, loading included", flush=True)
    (out / "splam.png").write_bytes(picture)

    columns = []
    for number, (heading, graph) in enumerate(COLUMNS, 1):
        queued = [server.queue(save_image(graph(prompt))) for prompt in PROMPTS]
        pictures = [Image.open(io.BytesIO(server.files(server.wait(one))[0])).convert("RGB") for one in queued]
        columns.append((heading, [picture.resize((TILE, TILE), Image.Resampling.LANCZOS) for picture in pictures]))
        print(f"sheet: column {number} of {len(COLUMNS)}", flush=True)
    save_sheet(out / "sheet.png", columns, PROMPTS)
    return out / "splam.png", out / "sheet.png"


if __name__ == "__main__":
    sys.exit(main())
