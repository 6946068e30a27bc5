"""Distil a Stable Diffusion model into one that needs 2-4 steps.

    python training/distill.py --teacher embedded --output-dir runs/student

Writes into OUTPUT_DIR: log.jsonl (one line a step), sheet-STEP.png (the same prompts and seeds each time: teacher 50
steps, student 1, 2, 4), checkpoint-STEP (resume with --resume-from-checkpoint latest), and at the end the student as
a diffusers pipeline in pipeline/ and as the single file NAME.splam.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "training"

from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from training.config import Config, parse
from training.embedded.scenes import scene
from training.export import save_diffusers, save_single_file
from training.generate import generate
from training.pipeline import load_pipeline
from training.sheet import save_sheet, to_images
from training.trainer import DTYPES, Distillation, export_unet

PROMPTS = 8


class Sheets:
    """Sheets of the same prompts and seeds over a run; the teacher's column is drawn once."""

    def __init__(self, run: Distillation) -> None:
        self.run = run
        self.prompts = [str(scene(run.config.seed + 2, index)[1]) for index in range(PROMPTS)]
        self.teacher = self._draw("ddim", 50, run.config.guidance_scale)

    def _draw(self, sampler: str, steps: int, guidance_scale: float = 1.0) -> list:
        pipeline = self.run.pipeline
        return to_images(
            pipeline.decode(generate(pipeline, self.prompts, range(PROMPTS), sampler, steps, guidance_scale))
        )

    def save(self, path: Path) -> None:
        pipeline, teacher = self.run.pipeline, self.run.pipeline.unet
        pipeline.unet = export_unet(self.run.target, teacher)
        try:
            students = [(f"student {steps}", self._draw("splam", steps)) for steps in (1, 2, 4)]
        finally:
            pipeline.unet = teacher
        save_sheet(path, [("teacher 50", self.teacher), *students], self.prompts)


def distill(config: Config) -> None:
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    main = accelerator.is_main_process
    set_seed(config.seed)
    name = "embedded-teacher" if config.teacher == "embedded" else config.teacher
    pipeline = load_pipeline(name, accelerator.device)
    run = Distillation(config, pipeline, accelerator)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if config.resume_from_checkpoint:
        folder = run.resume(config.resume_from_checkpoint)
        accelerator.print(f"resumed {folder}" if folder else f"no checkpoint in {config.output_dir} yet: starting anew")
    log = config.output_dir / "log.jsonl"
    if main:
        _keep_log(log, run.step)
    sheets = Sheets(run) if main and config.sample_every else None
    with (
        tqdm(
            total=config.max_train_steps, initial=run.step, desc=config.method, disable=not main, mininterval=1
        ) as bar,
        open(log, "a", encoding="utf-8") as lines,
    ):
        for progress in run.train():
            bar.update()
            bar.set_postfix_str(f"loss {progress.loss:.4f}, {progress.images / progress.seconds:.1f} images/s")
            if not main:
                continue
            lines.write(json.dumps(vars(progress)) + "\n")
            lines.flush()
            last = progress.step == config.max_train_steps
            if sheets and (progress.step % config.sample_every == 0 or last):
                sheets.save(config.output_dir / f"sheet-{progress.step:06d}.png")
    if main:
        folder, file = config.output_dir / "pipeline", config.output_dir / f"{config.name}.splam.safetensors"
        save_diffusers(pipeline, export_unet(run.target, pipeline.unet), folder, DTYPES[config.export_dtype])
        save_single_file(folder, file, config)
        print(f"student: {folder}\nsingle file: {file}")


def _keep_log(log: Path, step: int) -> None:
    """Drop what the log says of steps after `step`, which will be done again, and a line that was cut off."""
    if log.exists():
        whole = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def main() -> int:
    config = parse(description=__doc__)
    try:
        distill(config)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
