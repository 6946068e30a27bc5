"""Tar archives as a stream of files: local ones by position, URLs with the connection mended where it breaks."""

from __future__ import annotations

import glob
import http.client
import io
import os
import posixpath
import tarfile
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .files import hidden

RETRIES = 5  # of a cut connection, each from the byte where it broke
PAUSE = 1.0  # s before the second of them; each further one waits twice as long
TEMPORARY = (408, 429)  # HTTP's errors below 500 that pass: too slow, too many requests
LARGEST = 2**30  # bytes of a member of a stream, which is read whole: a few megabytes may unpack to any number
KEPT = 64 * 2**20  # bytes of a stream's last files, which a link further on may stand for
BROKEN = (tarfile.TarError, OSError, EOFError, http.client.HTTPException)  # what reading a damaged archive raises


def expand(spec: str) -> list[str]:
    """The files or URLs that a pattern with {000..012} ranges or * names; a URL's * stays as it is."""
    from braceexpand import braceexpand

    if os.path.exists(spec):  # a name of that kind
        return [spec]
    found: list[str] = []
    for one in braceexpand(spec):
        literal = is_url(one) or os.path.exists(one) or not glob.has_magic(one)
        found += [one] if literal else sorted(file for file in glob.glob(one) if os.path.isfile(file))
    return found


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def bare(name: str) -> str:
    return name.partition("?")[0] if is_url(name) else name


def members(url: str) -> Iterator[tuple[str, Callable[[], io.IOBase]]]:
    """Name and content of the files of an archive, read once from the front.

    Raises one of BROKEN for a damaged one or one that is not there, ConnectionError for one that cannot be had now.
    """
    with _Url(url) if is_url(url) else open(url, "rb") as raw:
        buffered = io.BufferedReader(raw, 2**20) if is_url(url) else raw
        with tarfile.open(fileobj=buffered, mode="r|*", tarinfo=_Strict) as archive:
            kept: OrderedDict[str, bytes] = OrderedDict()  # what a link may still point at
            for member in archive:
                if hidden(member.name):
                    continue
                if member.isfile() and member.size > LARGEST:
                    yield member.name, partial(_too_large, member.size)
                elif member.isfile():
                    content = archive.extractfile(member).read()
                    if len(content) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    kept[_name(member.name)] = content
                    while sum(map(len, kept.values())) > KEPT and len(kept) > 1:
                        kept.popitem(last=False)
                    yield member.name, partial(io.BytesIO, content)
                elif (target := _target(member)) is not None:
                    found = kept.get(target)
                    yield member.name, partial(_lost, target) if found is None else partial(io.BytesIO, found)


def sections(tar: Path) -> Iterator[tuple[str, Callable[[], io.IOBase]]]:
    """Name of the files of a local uncompressed archive, and each as a part of that file. Raises one of BROKEN."""
    whole = tar.stat().st_size
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(tar, "r:", tarinfo=_Strict) as archive:
        for member in archive:
            if hidden(member.name):
                continue
            if member.isfile():
                if member.offset_data + member.size > whole:
                    raise tarfile.ReadError("unexpected end of data")
                places[_name(member.name)] = (member.offset_data, member.size)
                yield member.name, partial(_section, tar, member.offset_data, member.size)
            elif (target := _target(member)) is not None:
                place = places.get(target)
                yield member.name, partial(_lost, target) if place is None else partial(_section, tar, *place)


def _target(member: tarfile.TarInfo) -> str | None:
    """The member that a link stands for; None for what is no link."""
    if member.islnk():
        return _name(member.linkname)
    return _name(posixpath.join(posixpath.dirname(member.name), member.linkname)) if member.issym() else None


def _name(name: str) -> str:
    return posixpath.normpath(name)


def _lost(target: str) -> io.IOBase:
    raise OSError(f"a link to {target}, which the archive lacks, or has too far away for a stream")


def _too_large(size: int) -> io.IOBase:
    raise OSError(f"{size} bytes, more than the {LARGEST} that a file of a stream may have")


def _section(tar: Path, start: int, size: int) -> io.BufferedReader:
    return io.BufferedReader(_Section(tar, start, size))


class _Strict(tarfile.TarInfo):
    """tarfile takes a damaged header in the middle for the end of the archive; this one says what it is."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


class _Section(io.RawIOBase):
    """Bytes [start, start + size) of a file, as a file."""

    def __init__(self, file: Path, start: int, size: int) -> None:
        self.raw, self.start, self.size, self.position = open(file, "rb"), start, size, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def readinto(self, buffer) -> int:
        self.raw.seek(self.start + self.position)
        content = self.raw.read(max(0, min(len(buffer), self.size - self.position)))
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Url(io.RawIOBase):
    """What a URL serves, read on from the same byte when the connection breaks."""

    def __init__(self, url: str) -> None:
        self.url, self.position, self.size, self.response = url, 0, None, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        for attempt in range(RETRIES + 1):
            try:
                if self.response is None:
                    self._connect()
                content = self.response.read(len(buffer))
                if content or self.size is None or self.position >= self.size:
                    buffer[: len(content)] = content
                    self.position += len(content)
                    return len(content)
                error: Exception = EOFError(f"cut at byte {self.position} of {self.size}")
            except urllib.error.HTTPError as answer:
                if answer.code < 500 and answer.code not in TEMPORARY:
                    raise
                error = answer
            except (OSError, http.client.HTTPException) as failure:
                error = failure
            self._hang_up()
            if attempt == RETRIES:
                raise ConnectionError(f"{self.url}: {error}") from error
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
        return 0

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _hang_up(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None

    def _connect(self) -> None:
        request = urllib.request.Request(
            self.url, headers={"Range": f"bytes={self.position}-"} if self.position else {}
        )
        self.response = urllib.request.urlopen(request, timeout=60)
        whole = self.response.status != 206
        if self.size is None:
            length = self.response.headers.get("Content-Length")
            self.size = int(length) if length else None
        if whole and self.position:  # a server without ranges starts over
            left = self.position
            while left and (skipped := len(self.response.read(min(left, 2**20)))):
                left -= skipped
