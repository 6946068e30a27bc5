"""Put finished trainings into assets/: the pipeline with the teacher and the judge, or the student's UNet.

python -m training.embedded.assemble --run-dir runs/emoji
python -m training.embedded.assemble --student runs/student
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from splam_core import load_file

from ..models.files import read_model, write_folder
from ..models.teachers import ASSETS, EMBEDDED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--student", type=Path, help="output folder of training/distill.py")
    args = parser.parse_args()
    if args.student:
        shutil.copytree(args.student / "pipeline" / "unet", EMBEDDED / "student", dirs_exist_ok=True)
        return
    # Not the autoencoder that the teacher was trained with, but the one whose decoder has been polished since.
    vae = load_file(args.run_dir / "vae" / "diffusion_pytorch_model.safetensors")
    assembled = args.run_dir / "assembled"
    write_folder(replace(read_model(args.run_dir / "pipeline"), vae=vae).cast(torch.float16), assembled)
    shutil.copytree(assembled, EMBEDDED, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tokenizer"))
    shutil.copy(args.run_dir / "judge.safetensors", ASSETS / "judge.safetensors")
    for file in ASSETS.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)


if __name__ == "__main__":
    main()
