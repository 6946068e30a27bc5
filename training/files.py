"""Files that come with the code; files and folders written whole or not at all, and what to say where they cannot."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

# What torch, safetensors and the system raise where a file cannot be written; `why_not_written` says why.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


def shipped(folder: str) -> Path:
    """A folder of the repository: it lies beside training/, or inside where that is installed as splam_training."""
    here = Path(__file__).resolve().parent
    return here / folder if (here / folder).is_dir() else here.parent / folder


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A place beside `file` to write to. Left without an error, it is flushed to the disk and takes the name.

    A reader sees the file of before or the new one; several processes may write the same.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes) -> None:
    with whole_file(file) as place:
        place.write_bytes(content)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """The same of a folder: an empty one beside it to fill. An older one of that name goes afterwards."""
    take_back(folder)
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            flush(file)
        flush(partial)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(partial, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk has its room back
        shutil.rmtree(old, ignore_errors=True)


def take_back(folder: Path) -> None:
    """Give a folder its name again that it lost where `whole_folder` was killed between its two renamings."""
    old = folder.with_name(f"{folder.name}.old")
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)


def flush(path: Path) -> None:
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


def why_not_written(error: Exception, place: Path) -> str:
    """A part of a sentence for a failed write: whether the disk is full, and what is free of it."""
    full = getattr(error, "errno", None) == errno.ENOSPC or any(
        text in str(error) for text in ("No space left", "os error 28", "PytorchStreamWriter failed", "write failed")
    )
    if not full:
        return f"it cannot be written ({error})"
    return f"the disk is full ({shutil.disk_usage(place.parent).free / 1e9:.1f} GB free)"


def read_text(file: Path) -> str:
    """A UTF-8 file's text, without the byte order mark that some editors put in front. Raises ValueError for others."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not UTF-8: {error}") from error


def read_lines(file: Path) -> list[str]:
    """The same by lines. Only what editors end a line with ends one: U+2028, which JSON may hold, does not."""
    return read_text(file).split("\n")
