"""Checkpoint folders: whole or not there at all.

checkpoint-STEP holds each of a run's state objects under its name, as NAME.safetensors where its state is tensors alone
(networks) and as NAME.pt otherwise (optimizers), and state.json with the facts of the run. It is written beside,
flushed to disk and renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from splam_core import shortened

from ..files import WRITE_ERRORS, whole_folder, why_not_written

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


def write_checkpoint(folder: Path, states: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """States by name, and the facts, which are JSON. Raises CheckpointError where it cannot be written."""
    try:
        with whole_folder(folder) as place:
            for name, state in states.items():
                if state and all(isinstance(value, Tensor) for value in state.values()):
                    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
                    save_file(tensors, place / f"{name}.safetensors")
                else:
                    torch.save(dict(state), place / f"{name}.pt")
            (place / "state.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    except WRITE_ERRORS as error:
        raise explain_write_error(error, folder) from error


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
    except Exception as error:  # of torch, of safetensors and of pickles, which have many
        raise CheckpointError(
            f"{folder} cannot be read ({shortened(str(error))}). Resume from another checkpoint."
        ) from error


def load_objects(objects: Mapping[str, Stateful], states: Mapping[str, Any], optional: tuple[str, ...] = ()) -> None:
    """Every object's state into it. Raises ValueError for a name that one side lacks, unless it is optional."""
    for name in sorted(objects.keys() ^ states.keys()):
        if name not in optional:
            raise ValueError(f"{name}: {'this run has none' if name in states else 'the checkpoint has none'}")
    for name in objects.keys() & states.keys():
        objects[name].load_state_dict(states[name])


def explain_write_error(error: Exception, folder: Path) -> CheckpointError:
    """What to say of a failed write."""
    last = latest_checkpoint(folder.parent)
    return CheckpointError(
        f"{folder}: {why_not_written(error, folder)}. The last good checkpoint is {last or 'not there yet'}. "
        f"Make room, or lower --checkpoints-total-limit, and go on with --resume-from-checkpoint latest."
    )
