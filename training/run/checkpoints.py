"""Checkpoint folders: whole or not there at all.

checkpoint-STEP holds each of a run's state objects under its name, as NAME.safetensors where its state is tensors alone
(networks) and as NAME.pt otherwise (optimizers), state.json with the facts of the run, and sha256sums.txt, by which a
damaged file is noticed (`sha256sum -c sha256sums.txt` reads it too). It is written beside, flushed to disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from splam_core import shortened

from ..files import WRITE_ERRORS, take_back, whole_folder, why_not_written

PREFIX = "checkpoint-"
SUMS = "sha256sums.txt"


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
            lines = [f"{file_digest(file)}  {file.name}\n" for file in sorted(place.iterdir())]
            (place / SUMS).write_text("".join(lines), encoding="utf-8")
    except WRITE_ERRORS as error:
        raise explain_write_error(error, folder) from error


def verify(folder: Path) -> None:
    """Raises CheckpointError for a checkpoint that lacks a file, or has one that is not what was written.

    One of an earlier version, without sha256sums.txt, passes.
    """
    if not (folder / "state.json").is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: expected state.json in it. Give a checkpoint-N folder, or 'latest'."
        )
    sums = folder / SUMS
    for line in sums.read_bytes().splitlines() if sums.is_file() else ():
        expected, _, name = line.decode(errors="replace").partition("  ")
        # The names are of this folder alone, whatever the file says.
        file = folder / (Path(name).name or SUMS)
        found = file_digest(file) if file.is_file() else "not there"
        if found != expected:
            raise CheckpointError(
                f"{folder} is damaged: {shortened(name, 80)} has the SHA-256 {expected[:64]} by {SUMS}, and is "
                f"{found}. Resume from another checkpoint."
            )


def find_checkpoint(output_dir: Path, wanted: str) -> tuple[Path | None, list[str]]:
    """The whole checkpoint to take up, a folder or "latest", and what to say of others.

    Raises CheckpointError for a named one that is damaged.
    """
    for left in output_dir.glob("*.partial"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    if wanted == "latest":
        return latest_whole(output_dir)
    verify(Path(wanted))
    return Path(wanted), []


def latest_whole(output_dir: Path) -> tuple[Path | None, list[str]]:
    """(The newest checkpoint whose files are as they were written, None if there is none; what to say of the others.)

    Damaged ones are put aside as checkpoint-N.damaged: they must neither be taken again nor push out good ones.
    """
    for left in output_dir.glob("*.old"):  # killed between the two names of a folder
        take_back(left.with_suffix(""))
    said = []
    for folder in reversed(checkpoints(output_dir)):
        try:
            verify(folder)
        except CheckpointError as error:
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            said.append(
                f"{str(error).partition('. Resume')[0]}; it lies in {aside.name} now, and the one before is used"
            )
            continue
        return folder, said
    return None, said


def file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def rotate(output_dir: Path, keep: int) -> None:
    for old in checkpoints(output_dir)[: -max(1, keep)]:
        shutil.rmtree(old)


def read_checkpoint(folder: Path, mmap: bool = False) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """(states by name, facts) of a verified checkpoint. Raises CheckpointError for a folder that is none.

    All tensors are on the CPU: an optimizer takes to its device what belongs there, and AdamW's step count does not.
    mmap: leave the optimizers' on the disk until they are used; for those that copy them. (What stays on the CPU is
    copied here: it would keep the file mapped, and Windows deletes none that is.)
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
            states[file.stem] = _own_scalars(torch.load(file, map_location="cpu", weights_only=True, mmap=mmap))
        return states, json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except Exception as error:  # of torch, of safetensors and of pickles, which have many
        raise CheckpointError(
            f"{folder} cannot be read ({shortened(str(error))}). Resume from another checkpoint."
        ) from error


def _own_scalars(state: Any) -> Any:
    """The state with copies of its tensors of no dimension, such as AdamW's step counts."""
    if isinstance(state, dict):
        return {key: _own_scalars(value) for key, value in state.items()}
    return state.clone() if isinstance(state, Tensor) and state.ndim == 0 else state


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
