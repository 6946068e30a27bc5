"""What a few steps really take on this machine."""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from .config import Config
from .distillation import Distillation
from .loop import train
from .plan import GB
from .processes import join_processes
from .report import peak_memory
from .sources import load_teacher


def measure(config: Config, steps: int = 3) -> str:
    """Time a few steps of each stage after a first one; nothing is kept."""
    alone = [replace(config, finish="none")] if config.max_train_steps else []
    if config.finish != "none":
        alone.append(replace(config, max_train_steps=0))
    return "".join(_measure(one, steps) for one in alone)


def _measure(config: Config, steps: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output_dir=Path(folder), checkpointing_steps=10**9, resume_from_checkpoint=None)
        accelerator = join_processes(config.mixed_precision)
        count, finish = config.total_steps, config.max_train_steps == 0
        made = {"finish_steps" if finish else "max_train_steps": min(count, 2 + steps)}  # data are made for all of them
        few = replace(config, **made)
        run = Distillation(few, load_teacher(config, accelerator.device), accelerator)
        seconds = []
        for progress in itertools.islice(train(run), max(1, min(1 + steps, count - 1))):
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(progress.seconds)
        since = time.perf_counter()
        run.save()
        saving = time.perf_counter() - since
    timed = sorted(seconds[1:] or seconds)
    each = timed[len(timed) // 2]
    peak = torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else peak_memory()
    what = ", the finish" if finish else ""
    return (
        f"\nmeasured on {accelerator.device}{what}: {each:.2f} s a step (median of {len(timed)}), "
        f"{config.train_batch_size * config.gradient_accumulation_steps / each:.2f} images/s, "
        f"{each * count / 3600:.1f} hours in all, a checkpoint takes {saving:.1f} s; "
        f"peak memory {peak / GB:.2f} GB"
    )
