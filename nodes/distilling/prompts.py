"""The prompts of a run: what the node's text says, a file of the host's input folder, or the shipped list."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from .host import NAME

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "prompts.txt"


def read_prompts(text: str, node: str = NAME) -> list[str]:
    """One a line; a text that is one name ending in .txt is a file of input/. Raises ValueError for a file without."""
    found = _lines(text)
    if not found:
        return _lines(SHIPPED.read_text(encoding="utf-8"))
    path = prompt_file(text, node)
    if path is None:
        return found
    try:
        prompts = _lines(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{node}: {found[0]} is not text in UTF-8 ({error}). Save it as UTF-8.") from error
    if not prompts:
        raise ValueError(f"{node}: {found[0]} holds no prompts. Write one a line, or leave prompts empty for our list.")
    return prompts


def prompt_file(text: str, node: str = NAME) -> Path | None:
    """The file of input/ that the text names; None for prompts. Raises ValueError where there is no such file."""
    found = _lines(text)
    if len(found) != 1 or not found[0].lower().endswith(".txt"):
        return None
    home = Path(folder_paths.get_input_directory()).resolve()
    path = (home / found[0]).resolve()
    if not path.is_relative_to(home) or not path.is_file():
        raise ValueError(f"{node}: there is no file {found[0]!r} in the folder input. Put it there, or write prompts.")
    return path


def _lines(text: str) -> list[str]:
    """Lines that are neither empty nor begin with #."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
