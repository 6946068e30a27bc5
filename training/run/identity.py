"""Whether a run is the one that was begun: its folder, its settings and its teacher's weights."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .checkpoints import PREFIX, checkpoints
from .config import FINISH_SETTINGS, Config

# What a resumed run may have otherwise than it began, which is said; the rest makes it another run.
MAY_CHANGE = frozenset((
    "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler",
    "lr_warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "ema_decay",
    "release_decay", "mixed_precision", "teacher_dtype", "gradient_checkpointing", "compile", "checkpointing_steps",
    "checkpoints_total_limit", "sample_every", "sample_prompts", "validation_samples", "report_to", "export_dtype",
    "name", "allow_tf32", "data", "paths", "finish_steps", "finish_learning_rate", "fake_learning_rate",
    "finish_beta1", "finish_beta2", "finish_warmup_steps", "finish_ema_decay", "lora_holds",
))  # fmt: skip
# Teacher, its LoRAs and student are known by their weights, wherever they lie; a recipe by what it sets.
UNSAID = frozenset((
    "teacher", "teacher_lora", "student", "revision", "download_teacher", "recipe", "output_dir",
    "resume_from_checkpoint",
))  # fmt: skip
LEFT = (f"{PREFIX}*", "best", "log.jsonl", "validation.jsonl", "pipeline")  # what a run leaves in its folder


def weights_digest(weights: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """SHA-256 (16 digits of it, and the dtype) over names, shapes and values as they are in `dtype`."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().to(dtype).cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"{digest.hexdigest()[:16]} in {str(dtype).removeprefix('torch.')}"


def changes(now: Mapping[str, Any], then: Mapping[str, Any], free: frozenset[str] = frozenset()) -> list[str]:
    """What has changed of a run's settings since it began, as "--flag was -> is".

    free: names of settings that may change besides: the data's, and those of a stage to come. Raises ValueError naming
    those that may not. A setting that one side does not know is not compared.
    """
    differing = [name for name in now if name in then and name not in UNSAID and now[name] != then[name]]
    said = {name: f"--{name.replace('_', '-')} {then[name]} -> {now[name]}" for name in differing}
    wrong = [text for name, text in said.items() if name not in MAY_CHANGE | free]
    if wrong:
        raise ValueError(
            f"it was begun with other settings: {', '.join(wrong)}. Resume with those it was begun with, or start anew "
            f"in another --output-dir."
        )
    return list(said.values())


@dataclass
class Origin:
    """What a run began with, by hash."""

    teacher_hash: str
    teacher_loras: str | None
    student_hash: str | None


def changes_since(config: Config, origin: Origin, facts: Mapping[str, Any]) -> list[str]:
    """What a run that takes up the checkpoint of these facts has otherwise than it began, as `changes` says it.

    Raises ValueError where it is another run: by its settings, where its finish begins, or its teacher's, the
    teacher's LoRAs' or its student's weights.
    """
    finishing = facts.get("finishing", False)
    free = frozenset(vars(config.data_options)) | (frozenset() if finishing else FINISH_SETTINGS)
    found = changes(config.settings(), facts["config"], free)
    begun = facts["config"]["max_train_steps"] if finishing else config.max_train_steps
    if begun != config.max_train_steps or (config.finish != "none" and facts["step"] > begun and not finishing):
        raise ValueError(
            f"--max-train-steps is {config.max_train_steps}, and its finish "
            f"{f'began at step {begun}' if finishing else 'cannot begin before step ' + str(facts['step'])}: give that"
        )
    if facts.get("student_hash") != origin.student_hash:
        raise ValueError(f"it began with another student than --student {config.student}: give its own")
    if facts.get("teacher_loras") != origin.teacher_loras:
        raise ValueError(
            f"it was begun with other LoRAs on its teacher, or at other weights, than --teacher-lora "
            f"{' '.join(config.teacher_lora) or 'none'}: its own were "
            f"{' '.join(facts['config'].get('teacher_lora', [])) or 'none'}"
        )
    begun, now = (one.rpartition(" ")[2] for one in (facts["teacher_hash"], origin.teacher_hash))
    if begun != now:  # of a LoRA, which is one on the UNet as it is computed with
        raise ValueError(
            f"its LoRA was begun on a UNet in {begun}, and this one is in {now}: give --mixed-precision "
            f"{facts['config']['mixed_precision']} and --teacher-dtype {facts['config']['teacher_dtype']}, as then"
        )
    if facts["teacher_hash"] != origin.teacher_hash:
        raise ValueError(
            f"its teacher has other weights (SHA-256 {facts['teacher_hash']}) than --teacher {config.teacher} "
            f"({origin.teacher_hash}). Resume with its own teacher, or start anew in another --output-dir."
        )
    return found


@contextlib.contextmanager
def only_writer(output_dir: Path) -> Iterator[None]:
    """Hold a run's folder, which is made. However the process ends, the system lets go of it.

    Raises ValueError where another process holds it, or where it is no folder.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output-dir {output_dir} is a file: expected a folder, or nothing yet.")
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / ".lock", "ab") as file:
        if not _locked(file):
            raise ValueError(f"another run is writing {output_dir}. Take another --output-dir, or end that one first.")
        yield


def _locked(file: BinaryIO) -> bool:
    """Whether nobody else has locked an open file; so too where the file system knows no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def check_folder(output_dir: Path, resume: str | None) -> None:
    """Raises ValueError where a run would write over what another left: nothing has been written then.

    resume: None, "latest" or a checkpoint's folder.
    """
    found = sorted(path.name for pattern in LEFT for path in output_dir.glob(pattern))
    own = resume == "latest" or (resume is not None and Path(resume).resolve().parent == output_dir.resolve())
    if found and not own:
        raise ValueError(
            f"{output_dir} holds another run ({', '.join(found)}). Go on with that one by --resume-from-checkpoint "
            f"latest, or take another --output-dir."
        )
    later = [folder.name for folder in checkpoints(output_dir)]
    if own and resume != "latest" and Path(resume).name in later:
        later = later[later.index(Path(resume).name) + 1 :]
        if later:
            raise ValueError(
                f"{output_dir} has later checkpoints than {Path(resume).name} ({', '.join(later)}), which the resumed "
                f"run would mix with its own. Take another --output-dir, or remove them."
            )
