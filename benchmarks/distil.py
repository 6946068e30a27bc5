"""SPLAM Distil beside training/distill.py --lora: the same settings on the embedded teacher, losses and accuracy.

    python dev.py python -m benchmarks.distil --json docs/results/distil.json [--steps 600 --batch-size 32 --seeds 0 1]

Each run is one row: the command in this process, the node in a ComfyUI started for it, both on the same captions of
scenes, whose pictures the teacher draws. Their LoRAs are scored by `training/evaluate.py --protocol embedded` at 4
steps. Rows that the file has already are kept, and --work-dir lets a run that was stopped go on.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from harness.graphs import distil
from harness.server import ComfyServer, exit_on_sigterm
from splam_core.checkpoint import read_metadata
from training.distill import distill
from training.evaluate import evaluate
from training.run.config import parse
from training.scenes.emoji import draw_caption
from training.scoring.request import Request

STATE = ".state.safetensors"
CAPTIONS, CAPTION_SEED = 512, 0x715  # what is learned; the protocol's captions are others
ROUTES = ("training/distill.py --lora", "SPLAM Distil")
RATE, GUIDANCE = 3e-4, 3.0


def captions() -> list[str]:
    """Different ones of one and two objects in turn, without the held-out pairs."""
    found: dict[str, None] = {}
    index = 0
    while len(found) < CAPTIONS:
        found[str(draw_caption(np.random.default_rng([CAPTION_SEED, index]), objects=1 + index % 2))] = None
        index += 1
    return list(found)


def by_command(folder: Path, options: argparse.Namespace, seed: int) -> tuple[Path, list[float]]:
    """(the LoRA, the losses) of training/distill.py."""
    out = folder / f"command-{seed}"
    flags = {
        **{"teacher": "embedded", "data": folder / "captions.txt", "cache-dir": folder / "cache", "output-dir": out},
        **{"lora-rank": options.rank, "train-batch-size": options.batch_size, "max-train-steps": options.steps},
        **{"learning-rate": RATE, "guidance-scale": GUIDANCE, "seed": seed, "sample-every": 0, "report-to": "none"},
        **{"lr-warmup-steps": min(50, max(1, options.steps // 10)), "resume-from-checkpoint": "latest"},
        **{"validation-samples": 16, "checkpointing-steps": options.steps},
    }
    distill(parse(["--lora", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]))
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return out / "student.splam-lora.safetensors", [json.loads(line)["loss"] for line in lines]


def by_node(folder: Path, options: argparse.Namespace, seed: int) -> tuple[Path, list[float]]:
    """(the LoRA, the losses) of the node."""
    base = folder / f"node-{seed}"
    graph = distil(
        "embedded-teacher",
        prompts="\n".join(captions()), steps=options.steps, rank=options.rank, batch_size=options.batch_size,
        seed=seed, learning_rate=RATE, guidance=GUIDANCE, autosave_every=100,
    )  # fmt: skip
    with ComfyServer(Path(os.environ["COMFYUI_PATH"]), base) as server:
        server.run(graph, timeout=24 * 3600)
    (state,) = (base / "output" / "splam").glob(f"*{STATE}")
    losses = json.loads(read_metadata(state)["splam_state"])["losses"]
    return state.with_name(state.name.replace(STATE, ".safetensors")), losses


def table(rows: dict[str, dict]) -> str:
    """Markdown: a row a run, and how far the node's losses and accuracy are from the command's."""
    lines = ["| seed | | accuracy, 4 steps | Frechet distance | loss, last 50 steps | hours |"]
    lines.append("| --- | --- |" + " ---: |" * 4)
    for row in rows.values():
        cells = [f"{100 * row['attribute_accuracy']:.1f} %", f"{row['frechet_distance']:.3f}"]
        cells += [f"{np.mean(row['losses'][-50:]):.5f}", f"{row['seconds'] / 3600:.2f}"]
        lines.append(f"| {row['seed']} | {row['route']} | {' | '.join(cells)} |")
    for seed in sorted({row["seed"] for row in rows.values()}):
        pair = [rows.get(_name(route, seed)) for route in ROUTES]
        if all(pair):
            command, node = pair
            share = node["attribute_accuracy"] / command["attribute_accuracy"]
            lines.append(
                f"\nSeed {seed}: the node's accuracy is {100 * share:.1f} % of the command's; the losses of the first "
                f"100 steps differ by {_largest(node['losses'][:100], command['losses']):.1e} of the loss at most, of "
                f"all steps by {_largest(node['losses'], command['losses']):.1e}."
            )
    return "\n".join(lines)


def _largest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(one, other, strict=False))


def _name(route: str, seed: int) -> str:
    return f"{route}, seed {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--num-images", type=int, default=512, help="that are scored")
    parser.add_argument("--work-dir", type=Path, help="where the runs lie; none: a temporary folder")
    options = parser.parse_args()
    if not os.environ.get("COMFYUI_PATH"):
        parser.error("COMFYUI_PATH names no ComfyUI; run this through `python dev.py python`.")
    exit_on_sigterm()
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "rank", "num_images")}
    rows = json.loads(options.json.read_text(encoding="utf-8"))["rows"] if options.json.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "captions.txt").write_text("\n".join(captions()), encoding="utf-8")
        for seed in options.seeds:
            for route, make in zip(ROUTES, (by_command, by_node), strict=True):
                if _name(route, seed) in rows:
                    continue
                since = time.monotonic()
                lora, losses = make(folder, options, seed)
                seconds = time.monotonic() - since
                request = Request(model="embedded-teacher", lora=lora, steps=4, num_images=options.num_images)
                scores = evaluate(request)
                kept = {key: scores[key] for key in ("attribute_accuracy", "frechet_distance")}
                losses = [float(f"{loss:.7g}") for loss in losses]
                rows[_name(route, seed)] = {"route": route, "seed": seed, **kept, "seconds": seconds, "losses": losses}
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps({"settings": settings, "rows": rows}) + "\n", encoding="utf-8")
                print(f"{_name(route, seed)}: {100 * kept['attribute_accuracy']:.1f} %", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
