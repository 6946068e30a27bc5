"""SPLAM, LCM and Direct Linking trained by the same code at an equal budget of UNet forwards, and scored.

    python -m benchmarks.methods --work-dir runs/methods --json docs/results/methods.json

The budget counts forwards of one sample (a backward pass is 2, a guided teacher step 2); every run takes the same batch
size, learning rate and seed, so that a cheaper iteration means more of them. A finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from training.config import parse
from training.evaluate import Request, evaluate

from .comfy_server import ROOT
from .scores import table

METHODS = {
    "splam-noise-level": {},
    "splam-embedding": {"gamma_conditioning": "embedding"},
    "dl-embedding": {"method": "dl", "gamma_conditioning": "embedding"},
    "lcm-k100": {"method": "lcm"},
    "lcm-k20": {"method": "lcm", "skip": 20},
}
STEPS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--budget", type=int, default=40_000, help="UNet forwards of one sample")
    parser.add_argument("--train-batch-size", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument(
        "--only", choices=METHODS, nargs="+", default=list(METHODS), help="train these, to share the work"
    )
    parser.add_argument("--json", type=Path, help="score all that is trained, and write the scores here")
    options = parser.parse_args()
    for name in options.only:
        train(name, options)
    if not options.json:
        return
    results = {}
    for name in METHODS:
        folder = options.work_dir / name
        if not (folder / "pipeline").is_dir():
            continue
        iterations = len((folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
        for steps in STEPS:
            scores = evaluate(Request(model=str(folder / "pipeline"), steps=steps, num_images=options.num_images))
            scores |= {"model": name, "iterations": iterations, "budget": options.budget, "training_seed": options.seed}
            results[f"{name}, {steps} step{'s' * (steps > 1)}"] = scores
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


def train(name: str, options: argparse.Namespace) -> None:
    """Run one method's training, or go on with it."""
    folder = options.work_dir / name
    if (folder / "pipeline").is_dir():
        return
    settings = {
        "train_batch_size": options.train_batch_size,
        "seed": options.seed,
        "sample_every": 0,
        "num_scenes": 1024,
    }
    settings |= METHODS[name]
    flags = [text for key, value in settings.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    flags = ["--teacher", "embedded", "--output-dir", str(folder), "--resume-from-checkpoint", "latest", *flags]
    steps = round(options.budget / (parse(flags).unet_forwards_per_sample * options.train_batch_size))
    command = [sys.executable, ROOT / "training" / "distill.py", *flags, "--max-train-steps", str(steps)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
