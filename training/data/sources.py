"""Where training pictures come from. Every source yields the same records, and a `Skip` in place of a bad one."""

from __future__ import annotations

import functools
import glob
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from splam_core.order import digest

from ..files import read_lines, read_text
from ..models.hub import HUB_ID
from .files import METADATA, files_below, metadata_rows
from .images import EXTENSIONS, Picture
from .tars import BROKEN, bare, expand, is_url, members, sections

LONGEST = 2**16  # characters of a caption: what is longer is no caption, and a tokenizer's for minutes
CAPTIONS = ("caption", "text", "txt", "prompt", "TEXT")
TEXTS = ("txt", "caption", "text")  # endings of files that hold a caption, the first that is there
PICTURES = ("image", "jpg", "jpeg", "png", "webp", "img")
_REMOTE = ("hf://", "https://", "http://")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """One picture with its caption; `picture` None is a picture that the teacher has yet to make."""

    name: str
    caption: str
    picture: Callable[[], Picture] | None
    columns: Mapping[str, object] = field(default_factory=dict)
    number: int = 0  # of a prompt's picture; seeds the teacher's noise
    size: tuple[int, int] | None = None  # height and width in px, where they are known without the picture


@dataclass(frozen=True)
class Skip:
    """What could not be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """Records in any order; `identity` changes when they do."""

    records: Sequence[Record | Skip]
    identity: str
    shuffled: bool = False  # whether their order says nothing already

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record | Skip:
        return self.records[index]


@dataclass(frozen=True)
class Stream:
    """Records that can only be read from the front, in `parts` that are independent of one another.

    `read` raises ConnectionError where the rest of a part cannot be had now, and may be at another time.
    """

    parts: int
    read: Callable[[int], Iterator[Record | Skip]]
    identity: str


Source = Listing | Stream


def open_source(
    spec: str,
    caption_column: str | None = None,
    image_column: str | None = None,
    config: str | None = None,
    split: str = "train",
    streaming: bool = True,
    images_per_prompt: int = 1,
) -> Source:
    """What --data names: a folder, prompts, tars, a dataset. Raises FileNotFoundError saying what would do."""
    path = Path(spec)
    columns = (caption_column, image_column)
    if path.is_dir():
        below = files_below(path)
        tars = [file for file in below if file.suffix == ".tar" and file.parent == path]
        pictures = any(file.suffix.lower() in EXTENSIONS for file in below)
        tables = [file for file in below if file.suffix == ".parquet" and not (pictures and file.name in METADATA)]
        if tars:
            return tar_listing(tars, *columns)
        if tables:
            return dataset(str(path), [str(table) for table in tables], *columns, config, split, streaming=False)
        return image_folder(path, *columns, below)
    if path.is_file() and path.suffix == ".txt":
        return prompt_list(path, images_per_prompt)
    files = expand(spec)
    if files and all(bare(file).endswith((".tar", ".tar.gz", ".tgz")) for file in files):
        missing = [file for file in files if not is_url(file) and not Path(file).is_file()]
        if missing:
            raise FileNotFoundError(f"{spec}: of {len(files)} tars {len(missing)} are not there: {missing[:3]}")
        if all(not is_url(file) and file.endswith(".tar") for file in files):
            return tar_listing([Path(file) for file in files], *columns)
        return tar_stream(files, *columns)
    if files and all(bare(file).endswith(".parquet") for file in files):
        remote = any(is_url(file) for file in files)
        return dataset(spec, files, *columns, config, split, streaming=remote and streaming)
    if HUB_ID.fullmatch(spec) and not path.exists():
        return dataset(spec, None, *columns, config, split, streaming)
    raise FileNotFoundError(
        f"--data {spec} is nothing to train on: expected a folder of pictures (with .txt files beside them, "
        f"or a metadata.jsonl, .csv or .parquet), a folder that training/prepare.py filled, .tar files or URLs "
        f"(a-{{000..099}}.tar), .parquet files, a Hugging Face dataset (owner/name), a .txt file with a "
        f"prompt on each line, or 'embedded'"
    )


def image_folder(folder: Path, caption_column=None, image_column=None, below: list[Path] | None = None) -> Listing:
    """Pictures below `folder`, captioned by a file of TEXTS beside each, or by METADATA tables ("file_name", "text").

    below: its files, where they are known.
    """
    below = files_below(folder) if below is None else below
    told: dict[str, dict] = {}
    records: list[Record | Skip] = []
    named = image_column or "file_name"
    for table in (file for file in below if file.name in METADATA):
        for place, row in metadata_rows(table):
            if isinstance(row, ValueError) or not row.get(named):
                found = row if isinstance(row, ValueError) else f"expected {named}, found {', '.join(map(str, row))}"
                records.append(Skip((table.parent / place).relative_to(folder).as_posix(), str(found)))
                continue
            file = Path(os.path.normpath(table.parent / str(row[named])))
            name = (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()
            told[name] = told.get(name, {}) | row
    files = [file for file in below if file.suffix.lower() in EXTENSIONS]
    endings = {f".{ending}" for ending in TEXTS}
    beside = {file.with_suffix(file.suffix.lower()): file for file in below if file.suffix.lower() in endings}
    for file in files:
        name = file.relative_to(folder).as_posix()
        sidecar = next((beside[one] for ending in TEXTS if (one := file.with_suffix(f".{ending}")) in beside), None)
        row = told.pop(name, {})
        caption = _caption(row, caption_column)
        try:
            if caption is None and sidecar is not None:
                if sidecar.stat().st_size > 4 * LONGEST:
                    raise ValueError(f"{sidecar.name} is {sidecar.stat().st_size} bytes long, expected a caption")
                caption = read_text(sidecar)
        except ValueError as error:
            records.append(Skip(name, str(error)))
            continue
        records.append(_record(name, caption, lambda file=file: file, row))
    records += [Skip(name, "named by metadata, but not there") for name in sorted(told)]
    if not records:
        raise FileNotFoundError(f"{folder} holds no pictures: expected files {', '.join(EXTENSIONS)} in it or below")
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    said = [(record.caption, record.columns) for record in records if isinstance(record, Record)]
    return Listing(records, digest("folder", stats, said))


def prompt_list(file: Path, images_per_prompt: int = 1) -> Listing:
    """Prompts, one on a line (empty lines and lines that start with # are none), for the teacher to draw."""
    lines = [line.strip() for line in read_lines(file)]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise FileNotFoundError(f"{file} holds no prompts: expected one on each line")
    return prompts_of(prompts, images_per_prompt)


def prompts_of(prompts: Sequence[str], images_per_prompt: int = 1) -> Listing:
    """The teacher's pictures of these prompts, each `images_per_prompt` times."""
    records = [
        Record(f"prompt {line}, picture {again}", prompt, None, number=(again - 1) * len(prompts) + line)
        for again in range(1, images_per_prompt + 1)
        for line, prompt in enumerate(prompts, 1)
    ]
    return Listing(records, digest("prompts", list(prompts), images_per_prompt), shuffled=True)


def tar_listing(tars: Sequence[Path], caption_column=None, image_column=None) -> Listing:
    """Local uncompressed webdataset tars: their headers are read now, their pictures when they are needed."""
    records: list[Record | Skip] = []
    for tar in tars:
        records += _samples(tar.name, sections(tar), caption_column, image_column)
    stats = [(str(tar), tar.stat().st_size, tar.stat().st_mtime_ns) for tar in tars]
    return Listing(records, digest("tars", stats, caption_column, image_column))


def tar_stream(urls: Sequence[str], caption_column=None, image_column=None) -> Stream:
    """webdataset tars by URL (or compressed ones), each a part."""

    def read(part: int) -> Iterator[Record | Skip]:
        return _samples(bare(urls[part]).rpartition("/")[2], members(urls[part]), caption_column, image_column)

    return Stream(len(urls), read, digest("tars", list(urls), caption_column, image_column))


def dataset(
    spec: str,
    files: list[str] | None,
    caption_column=None,
    image_column=None,
    config=None,
    split="train",
    streaming=True,
) -> Source:
    """A Hugging Face dataset: of the Hub (streamed, unless it is to be downloaded) or of parquet files."""
    import datasets

    try:
        if files is None:
            table = datasets.load_dataset(spec, config, split=split, streaming=streaming)
        else:
            files = [file if is_url(file) else glob.escape(file) for file in files]
            table = datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
    except Exception as error:  # of the hub, the network, the file format: each library has its own
        what = f"the parquet files {spec} cannot be read"
        if files is None:
            what = f"no folder or file of that name is here, and the Hugging Face dataset {spec} cannot be opened"
        first = str(error).partition("\n")[0]
        raise FileNotFoundError(f"--data {spec}: {what}: {type(error).__name__}: {first}") from error
    features = table.features or {}
    picture = image_column or next((name for name in PICTURES if name in features), None)
    if features and (picture not in features or not any(n in features for n in (caption_column, *CAPTIONS, "json"))):
        raise ValueError(
            f"{spec} has the columns {', '.join(features)}: name the picture's and the caption's with --image-column "
            f"and --caption-column"
        )
    if isinstance(features.get(picture), datasets.Image):
        table = table.cast_column(picture, datasets.Image(decode=False))  # decoded here, so that a bad one is skipped

    below = (Path(spec) if os.path.isdir(spec) else Path(spec).parent).resolve()

    def record(number: int, row: dict) -> Record | Skip:
        name = str(row.get("__key__") or f"row {number}")
        told = {key: value for key, value in row.items() if key != picture}
        if isinstance(told.get("json"), dict):
            told |= told.pop("json")
        content = row.get(picture) if picture else None
        if isinstance(content, dict):
            content = content.get("bytes") or content.get("path")
        if not content:
            return Skip(name, f"no picture in the column {picture}")
        # A stranger's table names no file of this machine.
        if files is not None and not isinstance(content, bytes):
            content = (below / str(content)).resolve()
            if not content.is_relative_to(below) or not content.is_file():
                return Skip(name, f"its picture {content.name!r} is no file below the table's folder")
        if files is None and streaming and not isinstance(content, bytes):
            if not str(content).rpartition("::")[2].startswith(_REMOTE):
                return Skip(name, f"its picture {str(content)!r:.200} is no file of the dataset")
            content = functools.cache(functools.partial(_fetched, str(content)))
            return _record(name, _caption(told, caption_column), lambda: io.BytesIO(content()), told)
        opened = (lambda: io.BytesIO(content)) if isinstance(content, bytes) else (lambda: Path(content))
        return _record(name, _caption(told, caption_column), opened, told)

    if not streaming:
        rows = Lazily(len(table), lambda number: record(number, table[number]))
        return Listing(rows, digest("dataset", table._fingerprint, picture, caption_column))

    def read(part: int) -> Iterator[Record | Skip]:
        rows = table.shard(table.num_shards, part) if table.num_shards > 1 else table
        return (record(number, row) for number, row in enumerate(rows))

    return Stream(max(1, table.num_shards), read, digest("dataset", spec, config, split, picture, caption_column))


def _fetched(url: str) -> bytes:
    """A file of a dataset that is a folder of pictures on the Hub, or in an archive there. Raises OSError."""
    from datasets.utils.file_utils import xopen

    try:
        with xopen(url, "rb") as file:
            return file.read()
    except OSError:
        raise
    except Exception as error:  # of the hub, the network, the archive: each library has its own
        raise OSError(f"{url}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


class Lazily(Sequence):
    """`length` records, each made when it is asked for."""

    def __init__(self, length: int, record: Callable[[int], Record | Skip]) -> None:
        self.length, self.record = length, record

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record | Skip:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.record(index)


def _record(name: str, caption: str | None, picture: Callable[[], Picture], columns: Mapping) -> Record | Skip:
    if caption is None or not str(caption).strip():
        return Skip(name, "no caption")
    if len(str(caption)) > LONGEST:
        return Skip(name, f"a caption of {len(str(caption))} characters, expected {LONGEST} or fewer")
    if _SURROGATE.search(str(caption)):  # of JSON that was cut within an emoji
        return Skip(name, "its caption holds half of a character (a lone surrogate), expected Unicode")
    return Record(name, " ".join(str(caption).split()), picture, columns)


def _caption(row: Mapping, column: str | None) -> str | None:
    """The caption among a row's columns; of a list of captions, the first."""
    value = row.get(column) if column else next((row[name] for name in CAPTIONS if row.get(name)), None)
    return value[0] if isinstance(value, list) and value else value


def _samples(
    tar: str, files: Iterable[tuple[str, Callable[[], io.IOBase]]], caption_column=None, image_column=None
) -> Iterator[Record | Skip]:
    """webdataset's convention: neighbours that share the name up to the first dot are one sample."""
    groups = itertools.groupby(_until_broken(tar, files), lambda file: _key(file[0]))
    for key, group in groups:
        members = [(_field(name), content) for name, content in group]
        fields = dict(members)
        if None in fields:  # the tar broke off here
            yield fields[None]()
            continue
        name, told = f"{tar}/{key}", {}
        if len(fields) < len(members):
            twice = sorted({field for field, count in Counter(field for field, _ in members).items() if count > 1})
            yield Skip(name, f"several files of that name: .{', .'.join(twice)}")
            continue
        try:
            if "json" in fields:
                told |= json.loads(fields.pop("json")().read())
            texts = {f: fields.pop(f) for f in TEXTS if f in fields}
            told |= {f: content().read().decode("utf-8-sig") for f, content in texts.items()}
        except (ValueError, TypeError, OSError) as error:
            yield Skip(name, f"unreadable caption: {error}")
            continue
        found = [f for f in ([image_column] if image_column else fields) if f in fields and f".{f}" in EXTENSIONS]
        if not found:
            yield Skip(name, f"no picture among {', '.join([*fields, *told]) or 'its files'}")
            continue
        yield _record(name, _caption(told, caption_column), fields[found[0]], told)


def _until_broken(tar: str, files: Iterable) -> Iterator[tuple[str, Callable]]:
    """The files, and in place of an error in the middle a last one, without a field, that says so.

    Raises ConnectionError for a connection that is lost: the archive need not be broken.
    """
    count = 0
    try:
        for count, file in enumerate(files, 1):  # noqa: B007
            yield file
    except ConnectionError as error:
        raise ConnectionError(f"{tar}: broken after {count} files: {error}") from error
    except BROKEN as error:
        skip = Skip(tar, f"broken after {count} files: {error}")
        yield "\0", lambda: skip


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _field(name: str) -> str | None:
    return None if name == "\0" else name.rpartition("/")[2].partition(".")[2].lower()
