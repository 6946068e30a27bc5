"""What is read of a folder of pictures: which files count, their text, and the tables beside them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..files import read_lines

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # all of a folder's are read


def hidden(name: str) -> bool:
    """Whether a path below a folder or in an archive is none of the user's pictures: .ipynb_checkpoints, ._0001.jpg."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def files_below(folder: Path) -> list[Path]:
    """All files at any depth but hidden ones, sorted. Links are followed; a folder that was met is not met again."""
    met, found = {_place(folder)}, []
    for here, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        kept = []
        # A folder counts under its own name rather than under a link's.
        for name in sorted(folders, key=lambda one: (os.path.islink(os.path.join(here, one)), one)):
            if not hidden(name) and (place := _place(Path(here, name))) not in met:
                met.add(place)
                kept.append(name)
        folders[:] = kept
        found += [Path(here, name) for name in files if not hidden(name)]
    return sorted(file for file in found if file.is_file())


def _unreadable(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}. Allow it, or move it away.") from error


def _place(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def metadata_rows(table: Path) -> Iterator[tuple[str, dict | ValueError]]:
    """Place and row of each row of a METADATA table, or in place of a bad one what is wrong with it."""
    try:
        for number, row in _READERS[table.suffix](table):
            yield f"{table.name}:{number}", row
    except Exception as error:  # pyarrow and csv have classes of their own
        yield table.name, ValueError(f"cannot be read: {error}")


def _jsonl(table: Path) -> Iterator[tuple[int, dict | ValueError]]:
    for number, line in enumerate(read_lines(table), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            yield number, ValueError(f"expected a JSON object: {error}")
            continue
        if row is not None:
            yield number, row if isinstance(row, dict) else ValueError(f"expected a JSON object, found {line[:40]}")


def _csv(table: Path) -> Iterator[tuple[int, dict]]:
    with open(table, encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened)
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if key and value}


def _parquet(table: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(table) as opened:
        number = 0
        for batch in opened.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, {key: value for key, value in row.items() if value is not None}


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
