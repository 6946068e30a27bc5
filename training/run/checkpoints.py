"""Checkpoint folders: whole or not there at all.

checkpoint-STEP holds each of a run's state objects under its name, as NAME.safetensors where its state is tensors alone
(networks) and as NAME.pt otherwise (optimizers), and state.json with the facts of the run. It is written beside,
flushed to disk and renamed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "checkpoint-"


class Stateful(Protocol):
    """What a checkpoint keeps. With shards all processes must ask for a state; the main one's answer is written."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any:
        """Raises ValueError, KeyError or RuntimeError for the state of another kind of run."""


class RandomState:
    """Torch's own random numbers on the CPU, as a state object."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(state["torch"])


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


def write_objects(partial: Path, states: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """States by name, and the facts, which are JSON."""
    for name, state in states.items():
        if state and all(isinstance(value, Tensor) for value in state.values()):
            file = partial / f"{name}.safetensors"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, file)
        else:
            file = partial / f"{name}.pt"
            torch.save(dict(state), file)
        _flush(file)
    file = partial / "state.json"
    file.write_text(json.dumps(facts, indent=2), encoding="utf-8")
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


def read_checkpoint(folder: Path, mmap: bool = False) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """(states by name, facts). Raises CheckpointError for a folder that is no checkpoint.

    All tensors are on the CPU: an optimizer takes to its device what belongs there, and AdamW's step count does not.
    mmap: leave the optimizers' on the disk until they are used; for those that copy them.
    """
    if not (folder / "state.json").is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: expected state.json in it. Give a checkpoint-N folder, or 'latest'."
        )
    try:
        states: dict[str, dict[str, Any]] = {
            file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))
        }
        for file in sorted(folder.glob("*.pt")):
            states[file.stem] = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        return states, json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}). Resume from another checkpoint.") from error


def load_objects(objects: Mapping[str, Stateful], states: Mapping[str, Any], optional: tuple[str, ...] = ()) -> None:
    """Every object's state into it. Raises ValueError for a name that one side lacks, unless it is optional."""
    for name in sorted(objects.keys() ^ states.keys()):
        if name not in optional:
            raise ValueError(f"{name}: {'this run has none' if name in states else 'the checkpoint has none'}")
    for name in objects.keys() & states.keys():
        objects[name].load_state_dict(states[name])


def explain_write_error(error: Exception, folder: Path) -> CheckpointError:
    """What to say of a failed write; the unfinished folder is removed, so that a full disk has its room back."""
    shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
    last = latest_checkpoint(folder.parent)
    return CheckpointError(
        f"{folder}: {why_not_written(error, folder)}. The last good checkpoint is {last or 'not there yet'}. "
        f"Make room, or lower --checkpoints-total-limit, and go on with --resume-from-checkpoint latest."
    )


def why_not_written(error: Exception, place: Path) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or any(
        text in str(error) for text in ("No space left", "os error 28", "PytorchStreamWriter failed", "write failed")
    )
    if not full:
        return f"it cannot be written ({error})"
    return f"the disk is full ({shutil.disk_usage(place.parent).free / 1e9:.1f} GB free)"


WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


def _flush(path: Path) -> None:
    """To the disk itself; a folder's entries too, where the system lets a folder be opened (Windows does not)."""
    folder = path.is_dir()
    try:
        # Windows flushes only what may be written.
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except OSError:
        if folder:
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
