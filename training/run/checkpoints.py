"""Checkpoint folders: whole or not there at all.

checkpoint-STEP holds student, target and release as .safetensors, optimizer.pt (optimizer, gradient scaler, random
state) and state.json. It is written beside, flushed to disk and renamed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX, OPTIMIZER = "checkpoint-", "optimizer.pt"


class CheckpointError(ValueError):
    """A checkpoint that could not be written or read; the message says what to do."""


def checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-N folders, oldest first."""
    found = [folder for folder in output_dir.glob(f"{PREFIX}*") if folder.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix(PREFIX)))


def latest_checkpoint(output_dir: Path) -> Path | None:
    found = checkpoints(output_dir)
    return found[-1] if found else None


def start_folder(folder: Path) -> Path:
    """An empty place beside `folder`, into which it is written."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_weights(partial: Path, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    for name, tensors in weights.items():
        file = partial / f"{name}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)
        _flush(file)
    file = partial / "state.json"
    file.write_text(json.dumps(state, indent=2), encoding="utf-8")
    _flush(file)


def write_optimizer(partial: Path, state: Mapping[str, Any]) -> None:
    file = partial / OPTIMIZER
    torch.save(dict(state), file)
    _flush(file)


def finish_folder(partial: Path, folder: Path) -> None:
    """Give the written folder its name; an older one of that name goes afterwards."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    _flush(partial)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate(output_dir: Path, keep: int) -> None:
    for old in checkpoints(output_dir)[: -max(1, keep)]:
        shutil.rmtree(old)


def read_checkpoint(folder: Path, device: torch.device | str, mmap: bool = False) -> tuple[dict, dict, dict]:
    """(weights by name, optimizer state, state.json). Raises CheckpointError for a folder that is no checkpoint.

    mmap: leave the optimizer's tensors on the disk until they are used; for a device "cpu".
    """
    if not (folder / "state.json").is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: expected state.json in it. Give a checkpoint-N folder, or 'latest'."
        )
    try:
        weights = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        optimizer = torch.load(folder / OPTIMIZER, map_location=device, weights_only=True, mmap=mmap)
        return weights, optimizer, json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}). Resume from another checkpoint.") from error


def explain_write_error(error: Exception, folder: Path) -> CheckpointError:
    """What to say of a failed write; the unfinished folder is removed, so that a full disk has its room back."""
    shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
    full = getattr(error, "errno", None) == errno.ENOSPC or any(
        text in str(error) for text in ("No space left", "os error 28", "PytorchStreamWriter failed", "write failed")
    )
    free = shutil.disk_usage(folder.parent).free / 1e9
    last = latest_checkpoint(folder.parent)
    reason = f"the disk is full ({free:.1f} GB free)" if full else f"it cannot be written ({error})"
    return CheckpointError(
        f"{folder}: {reason}. The last good checkpoint is {last or 'not there yet'}. Make room, or lower "
        f"--checkpoints-total-limit, and go on with --resume-from-checkpoint latest."
    )


WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


def _flush(path: Path) -> None:
    """To the disk itself; a folder's entries too, where the system lets a folder be opened."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
