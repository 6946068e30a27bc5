"""Small valid files made hostile: safetensors, JSON, TOML, tars and raw bytes, each a function of its seed."""

from __future__ import annotations

import copy
import json
import random
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 300  # seconds after which a file that is still being read counts as a hang
WORDS, SCREEN = 5, 8000  # words and characters of a message that says what was expected, found and to be done
THEIRS = (UnicodeError, json.JSONDecodeError)  # kinds of ValueError that say nothing of a file
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, -1e-30, float("nan"), float("inf")),
    *("", "x", "0", "1e999", "../../evil", "/etc/passwd", "C:\\evil", "a\0b", "\ud800", "☃" * 300, "y" * 10_000),
    *([], {}, [None], [[]], [0, 0], [-1, 2**40], ["x", {}], {"a": None}, {"": {"": {}}}, [1] * 1000),
)
DTYPES = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64"),
    *("I64", "U64", "C64", "F4", "F6_E2M3", "", "F33", "f32", None, 7, ["F32"]),
)
Mutation = Callable[[bytes, random.Random], bytes]


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, parts cut off, doubled, zeroed, moved or put in."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        at, size = rng.randrange(len(found) + 1), rng.choice((1, 1, 2, 8, 64, 1000))
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            found[at:at] = found[at : at + size]
        elif kind == 3:
            found[at : at + size] = bytes(len(found[at : at + size]))
        elif kind == 4:
            found[at:at] = rng.randbytes(size)
        else:
            del found[at : at + size]
    return bytes(found)


def mutated_json(content: bytes, rng: random.Random) -> bytes:
    """Values replaced, keys dropped, renamed or doubled; one time in eight its bytes."""
    if rng.randrange(8) == 0:
        return mutated_bytes(content, rng)
    if rng.randrange(20) == 0:
        return rng.choice((b"", b"[" * 99_999, b'{"a":' * 50_000, b"null", b"NaN", b'"x"', b"[]", b"{}", b"\xff\xfe"))
    tree = [json.loads(content)]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        _change(rng, tree)
    return json.dumps(tree[0], ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def mutated_toml(content: bytes, rng: random.Random) -> bytes:
    """A line's value replaced, lines dropped, doubled or of unknown names; sometimes its bytes."""
    if rng.randrange(6) == 0:
        return mutated_bytes(content, rng)
    lines = content.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(len(lines)), rng.randrange(5)
        name = lines[at].partition("=")[0].strip() or "x"
        if kind < 3:
            lines[at] = f"{name} = {json.dumps(rng.choice(VALUES))}".replace("Infinity", "inf").replace("NaN", "nan")
        elif kind == 3:
            lines.insert(at, lines[rng.randrange(len(lines))])
        else:
            lines[at] = rng.choice(("[table]", "[[x]]", f"{name}.a.b = 1", '"a\\u0000" = 2', "é = 3", "= 4", f"{name}"))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutated_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Header length, types, shapes, offsets, names, metadata and values."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    kind = rng.randrange(11)
    if kind == 0:
        return mutated_bytes(content, rng)
    if kind == 1:
        text = mutated_bytes(content[8 : 8 + length], rng)
        return struct.pack("<Q", len(text)) + text + data
    if kind == 2:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(content), 2**31, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong) + content[8:]
    if kind == 3:
        text = mutated_json(content[8 : 8 + length], rng)
        return struct.pack("<Q", len(text)) + text + data
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice(names)
        entry = header.setdefault(name, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
        if kind == 4:
            entry["dtype"] = rng.choice(DTYPES)
        elif kind == 5:
            entry["shape"] = _shape(entry["shape"], rng)
        elif kind == 6:
            start, end = entry["data_offsets"]
            wrong = ((end, start), (-1, end), (start, end + 4), (0, len(data)), (2**63, 2**64), (start, start))
            entry["data_offsets"] = rng.choice((*wrong, (0, 1.5)))
        elif kind == 7:
            other = rng.choice((*_near(name, rng), rng.choice(names), "", ".", "../x", "a" * 5000, "\0", "☃"))
            header[other] = header.pop(name)
        elif kind == 8:
            said = header.setdefault("__metadata__", {})
            key = rng.choice((*said, *METADATA))
            value = rng.choice((*VALUES, "{", "[]", "null", "[" * 100_000, '{"a": [1, {"b": null}]}', said.get(key)))
            said[key] = value if isinstance(value, str) or rng.randrange(4) == 0 else json.dumps(value)
            if key in METADATA[:5] and rng.random() < 0.5:
                said[key] = mutated_json(b'{"_class_name": "x", "layers_per_block": 1}', rng).decode(errors="replace")
        elif kind == 9:
            start, end = entry["data_offsets"]
            at = start + rng.randrange(max(1, (end - start) // 8)) * 8
            infinite, largest = (b"\0\0\x80\x7f" * 2, b"\0\x7c" * 4), b"\xff\xff\x7f\x7f" * 2
            value = rng.choice((b"\xff" * 8, *infinite, rng.randbytes(8), largest))
            data[at : min(at + 8, end)] = value[: max(0, min(8, end - at))]
        elif kind == 10 and len(names) > 1:
            header[name], header[names[0]] = header[names[0]], header[name]  # each other's shapes
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


METADATA = (
    *("splam.unet", "splam.vae", "splam.text_encoder", "splam.text_encoder_2", "splam.scheduler", "splam.family"),
    *("splam.method", "splam.gamma_bandwidth", "modelspec.prediction_type", "modelspec.architecture", "format"),
    *("_quantization_metadata", "lora_adapter_metadata", "ss_network_alpha", "prediction_type"),
)


def mutated_tar(content: bytes, rng: random.Random) -> bytes:
    """Fields of a header, its checksum put right again; sometimes raw bytes."""
    if rng.randrange(4) == 0:
        return mutated_bytes(content, rng)
    found = bytearray(content)
    blocks = [at for at in range(0, len(found) - 511, 512) if found[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.choice(blocks)
        place, size = rng.choice(((0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (157, 100), (345, 155)))
        words = (b"../../evil.png", b"/etc/passwd", b"\0", b"\xff" * size, rng.randbytes(size), *b"0125LxgS-")
        numbers = (b"77777777777\0", b"\x80" + b"\xff" * 11, b"-1")
        value = rng.choice((*words, *numbers))
        value = bytes([value]) if isinstance(value, int) else value[:size]
        found[at + place : at + place + size] = value.ljust(size, b"\0")
        found[at + 148 : at + 156] = b" " * 8
        found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + 512])
    return bytes(found)


def _change(rng: random.Random, tree: list) -> None:
    """One value somewhere below replaced, dropped, doubled or renamed."""
    owner, key = tree, 0
    while isinstance(owner[key], (dict, list)) and owner[key] and rng.random() < 0.85:
        owner = owner[key]
        key = rng.choice(list(owner)) if isinstance(owner, dict) else rng.randrange(len(owner))
    kind = rng.randrange(8)
    if kind == 0 and owner is not tree:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[rng.choice(("", "x", str(key) + "_", "_class_name"))] = owner.pop(key)
    elif kind == 2 and isinstance(owner, list) and owner is not tree:
        owner.insert(key, owner[key])
    elif kind == 3 and isinstance(owner[key], (int, float)):
        owner[key] = owner[key] * rng.choice((-1, 2, 10**6, 10**12, 0.5)) + rng.choice((0, 1))
    else:
        owner[key] = copy.deepcopy(rng.choice(VALUES))


def _shape(shape: Any, rng: random.Random) -> Any:
    dims = list(shape or [])  # which may have been changed before
    at = rng.randrange(len(dims)) if dims else 0
    choices = [[], [0], [-1], [2**62, 0], [2**32, 2**32], [1] * 70, dims[::-1], [*dims, 1], dims[:-1], "x", None, [1.5]]
    if dims:
        choices += [[*dims[:at], value, *dims[at + 1 :]] for value in (0, 1, -1, dims[at] * 2, 2**40)]
        whole = 1
        for side in dims:
            whole *= side
        choices += [[whole], [1, whole], [whole, 1, 1, 1]]
    return rng.choice(choices)


def _near(name: str, rng: random.Random) -> tuple[str, ...]:
    """Names that look alike: another number, another ending."""
    digits = [i for i, letter in enumerate(name) if letter.isdigit()]
    other = name
    if digits:
        at = rng.choice(digits)
        other = name[:at] + rng.choice(("7", "99", "-1", "1000000000", "x")) + name[at + 1 :]
    return other, name.replace(".weight", ".bias"), name + ".weight", name.partition(".")[2], f"unet.{name}"


@dataclass(frozen=True)
class Target:
    """A file of a corpus and what reads it. `files` are one of which is changed at a time."""

    name: str
    files: dict[Path, Mutation]
    read: Callable[[], Any]


@dataclass
class Report:
    """What became of hostile files: read all the same, refused in a sentence, or neither."""

    files: int = 0
    read: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    memory: int = 0  # bytes by which the process's peak grew


def attack(target: Target, seeds: Iterable[int], hidden: Iterable[str] = ()) -> Report:
    """Reads a file of the target changed by each seed, and puts it back.

    What counts as a sentence: ValueError or FileNotFoundError of WORDS words or more and a SCREEN at most that names
    a file or folder of the target and shows nothing of `hidden`; or a command line's own exit, which has printed one.
    Everything else is a fault, and so is a file that is still being read after PATIENCE.
    """
    report, before = Report(), peak()
    kept = {file: file.read_bytes() for file in target.files}
    named = {name for file in target.files for name in (file.name, file.parent.name, file.parent.parent.name)}
    for seed in seeds:
        rng = random.Random(f"{target.name} {seed}")
        file = rng.choice(list(target.files))
        file.write_bytes(target.files[file](kept[file], rng))
        report.files += 1
        try:
            with _patience():
                target.read()
            report.read += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            if fault := _fault(error, named, hidden):
                report.faults.append(f"{target.name}, seed {seed} ({file.name}): {fault}")
            else:
                report.refused += 1
        finally:
            file.write_bytes(kept[file])
    report.memory = peak() - before
    return report


def _fault(error: BaseException, named: Iterable[str], hidden: Iterable[str]) -> str | None:
    text = str(error)
    if isinstance(error, SystemExit) and error.code == 2:  # argparse has printed it
        return None
    ours = isinstance(error, (ValueError, FileNotFoundError)) and not isinstance(error, THEIRS)
    named = any(name in text for name in named)
    if not ours or not named or len(text.split()) < WORDS or len(text) > SCREEN:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {text[:200]!r}"
    shown = [name for name in hidden if name in text]
    return f"shows {shown[0]}: {text[:200]!r}" if shown else None


class _patience:
    """Raises TimeoutError inside after PATIENCE seconds."""

    def __enter__(self) -> None:
        def late(*_):
            raise TimeoutError(f"still reading after {PATIENCE} s")

        self.before = signal.signal(signal.SIGALRM, late)
        signal.alarm(PATIENCE)

    def __exit__(self, *_) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.before)


def peak() -> int:
    """The largest memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
