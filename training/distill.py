"""Distil a Stable Diffusion model into one that needs 2-4 steps.

    python training/distill.py --teacher embedded --output-dir runs/student
    python training/distill.py --teacher dreamshaper-v7 --data pictures/ --lora
    accelerate launch --config_file training/configs/ddp.yaml training/distill.py --teacher sd15 ...

Writes into OUTPUT_DIR: log.jsonl (one line a step), validation.jsonl, tensorboard/, sheet-STEP.png (the same prompts
and seeds each time: teacher 50 steps; student 1, 2, 4, 8), checkpoint-STEP (resume with --resume-from-checkpoint
latest), best/, and at the end the student as a diffusers pipeline in pipeline/ and as the single file
NAME.splam.safetensors or NAME.splam-lora.safetensors, with README.md and a ComfyUI workflow.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

if __package__ in (None, ""):  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "training"

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from .run.config import Config, parse_command
from .run.distillation import Distillation
from .run.identity import check_folder, only_writer
from .run.loop import Progress, train
from .run.measure import measure
from .run.plan import describe, plan
from .run.processes import join_processes, on_main
from .run.publish import finish
from .run.report import (
    Sheets,
    Trackers,
    flat_scores,
    keep_log,
    peak_memory,
)
from .run.sources import load_teacher
from .run.stopping import StoppedError, StopRequest, memory_explained
from .run.validation import Score


def distill(config: Config, stop: StopRequest | None = None) -> None:
    """Train, show and export. Raises what the parts raise, each with one clear message.

    stop: listens for signals while steps are made.
    """
    stop = stop or StopRequest()
    accelerator = join_processes(config.mixed_precision)
    with contextlib.ExitStack() as held, memory_explained(config):
        on_main(accelerator, lambda: held.enter_context(only_writer(config.output_dir)))
        on_main(accelerator, lambda: check_folder(config.output_dir, config.resume_from_checkpoint))
        _run(config, accelerator, stop)
        accelerator.wait_for_everyone()


def _run(config: Config, accelerator: Accelerator, stop: StopRequest) -> None:
    set_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    run = Distillation(config, load_teacher(config, accelerator.device), accelerator)
    if config.resume_from_checkpoint:
        folder, changed = run.resume(config.resume_from_checkpoint)
        accelerator.print(f"resumed {folder}" if folder else f"no checkpoint in {config.output_dir}: starting anew")
        for one in changed:
            accelerator.print(f"changed since: {one}")
    accelerator.print(f"data: {run.data.describe()}")
    if accelerator.is_main_process:
        (config.output_dir / "config.json").write_text(json.dumps(config.settings(), indent=2), encoding="utf-8")
        _watched(run, stop)
    else:
        _beside(run, stop)


def _shows(config: Config, step: int) -> bool:
    """Whether validation and a sheet follow this step."""
    every = config.sample_every or config.checkpointing_steps
    return step % every == 0 or step in (config.max_train_steps, config.total_steps)


def _beside(run: Distillation, stop: StopRequest) -> None:
    """Another process's run: sharded networks need it for all that is shown and exported, too."""
    config, sheets, scores = run.config, None, None
    if run.networks.sharded and config.sample_every:
        with run.accelerator.autocast():
            sheets = Sheets(config, run.pipeline, run.networks)
    with stop:
        for progress in train(run, stop):
            if not run.networks.sharded or not _shows(config, progress.step):
                continue
            if config.validation_samples:
                scores = run.validate()
            if sheets:
                with run.accelerator.autocast():
                    sheets.save(None)
    if run.networks.sharded:
        if scores is None and config.validation_samples:
            scores = run.validate()
        role = _best(scores)
        if sheets:
            with run.accelerator.autocast():
                sheets.spread(role)
        run.networks.export(role)


def _best(scores: dict[str, Score] | None) -> str:
    """The role to export."""
    return min(scores, key=lambda one: scores[one].loss) if scores else "target"


def _watched(run: Distillation, stop: StopRequest) -> None:
    """The main process's run: log, sheets, validation and the finished student."""
    config, out = run.config, run.config.output_dir
    log, validations = out / "log.jsonl", out / "validation.jsonl"
    for file in (log, validations):
        keep_log(file, run.step)
    skipped = run.skipped
    with run.accelerator.autocast():
        sheets = Sheets(config, run.pipeline, run.networks) if config.sample_every else None
    sheet, scores = None, None
    with (
        contextlib.closing(Trackers(config, run.step)) as trackers,
        stop,
        tqdm(total=config.total_steps, initial=run.step, desc=config.method, mininterval=1) as bar,
        open(log, "a", encoding="utf-8") as lines,
    ):
        for progress in train(run, stop):
            bar.update()
            bar.set_postfix_str(_line(progress))
            lines.write(json.dumps(_finite(vars(progress))) + "\n")
            lines.flush()
            if progress.skipped > skipped:
                skipped = progress.skipped
                bar.write(f"step {progress.step}: the gradient is not finite; nothing is moved ({skipped} so far)")
            names = ("loss", "gradient_norm", "learning_rate")
            if progress.fake_loss is not None:
                names += ("fake_loss",)
            trackers.scalars({f"train/{name}": getattr(progress, name) for name in names}, progress.step)
            if not _shows(config, progress.step):
                continue
            if config.validation_samples:
                scores = run.validate()
                flat = flat_scores(scores)
                trackers.scalars(flat, progress.step)
                with open(validations, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": progress.step, **flat}) + "\n")
                shown = ", ".join(f"{role} {score.loss:.4f}" for role, score in scores.items())
                bar.write(f"step {progress.step}: validation loss: {shown}")
            if sheets:
                sheet = out / f"sheet-{progress.step:06d}.png"
                with run.accelerator.autocast():
                    sheets.save(sheet)
                trackers.sheet(sheet, progress.step)
    if scores is None and config.validation_samples:  # resumed after the last step
        scores = run.validate()
    role, spread = _best(scores), {}
    if sheets:
        with run.accelerator.autocast():
            spread = sheets.spread(role)
    sheets = None
    sheet = sheet or max(out.glob("sheet-*.png"), default=None)
    losses = {} if scores is None else {name: score.loss for name, score in scores.items()}
    finish(run, role, losses, spread, sheet)


def _finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """JSON has no numbers that are not finite; what a stage has not is left out."""
    there = {name: value for name, value in values.items() if value is not None}
    return {name: value if math.isfinite(value) else None for name, value in there.items()}


def _line(progress: Progress) -> str:
    text = f"loss {progress.loss:.4f}, {progress.images / progress.seconds:.1f} images/s"
    if torch.cuda.is_available():
        return f"{text}, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    return f"{text}, {peak_memory() / 1e9:.1f} GB"


def main() -> int:
    stop = StopRequest()
    try:
        config, asked = parse_command(None, __doc__)
        if asked.plan:
            print(describe(config, plan(config)))
            if asked.measure:
                with memory_explained(config):
                    print(measure(config))
        else:
            distill(config, stop)
    except (ValueError, FileNotFoundError, ConnectionError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}. What was saved is kept: go on with --resume-from-checkpoint latest.", file=sys.stderr)
        return 1
    except StoppedError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return stop.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
