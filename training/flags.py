"""Flags from dataclasses: a field is a flag of the command line and, under the same name, a key of a TOML file.

A field's metadata: help; choices; also (further names of the flag); parse (a function of its text); metavar;
const (what the bare flag means); repeated (may be given several times, of which none is lost).
`--some-flag` and `--some_flag` are one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def flag(
    default: Any = MISSING,
    help: str = "",
    choices: Iterable[str] | None = None,
    also: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    const: Any = None,
    repeated: bool = False,
) -> Any:
    """A dataclass field that is a flag. One without a default must be in the file or on the command line: see to it."""
    about = {"help": help, "choices": choices, "also": also, "parse": parse, "metavar": metavar, "const": const}
    about["repeated"] = repeated
    return field(metadata=about) if default is MISSING else field(default=default, metadata=about)


def add_flags(group: Any, kind: type, only: Iterable[str] | None = None) -> None:
    """The fields of a dataclass (or those of `only`) as flags of a parser or a group; absent unless they are given."""
    hints, chosen = get_type_hints(kind), set(only) if only is not None else None
    for entry in fields(kind):
        if entry.metadata and (chosen is None or entry.name in chosen):
            names, options = _argument(entry, hints[entry.name])
            group.add_argument(*names, **options)


def given_flags(parser: argparse.ArgumentParser, arguments: list[str] | None) -> dict[str, Any]:
    """What was given, by the fields' names. Flags that the parser holds beyond a dataclass's are there in any case."""
    return vars(parser.parse_args(arguments))


def read_toml(file: Path, *kinds: type) -> dict[str, Any]:
    """The settings of a TOML file that names fields of these dataclasses, as `some-flag` or `some_flag`.

    Raises FileNotFoundError without it, ValueError naming the file for what is no TOML, no flag or of another type.
    """
    try:
        found = tomllib.loads(read_text(file))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is not there: expected a TOML file of settings") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read as TOML: {error}") from error
    known = {entry.name: (entry, get_type_hints(kind)[entry.name]) for kind in kinds for entry in fields(kind)}
    result = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in known or not known[name][0].metadata:
            raise ValueError(f"{file}: {key} is no setting. --help lists them")
        entry, hint = known[name]
        result[name] = _converted(value, hint, entry, f"{file}: {key}")
    return result


def _argument(entry: Field, hint: Any) -> tuple[list[str], dict[str, Any]]:
    about = entry.metadata
    names = [f"--{entry.name.replace('_', '-')}", *(about.get("also") or ())]
    names = sorted({*names, *(f"--{name[2:].replace('-', '_')}" for name in names)})
    options: dict[str, Any] = {
        "dest": entry.name,
        "default": argparse.SUPPRESS,
        "help": about.get("help", "").replace("%", "%%"),
    }
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        parts = about.get("parse") is None and _plain(hint)
        options |= {
            "type": about.get("parse") or _path_or(parts[0]),
            "choices": about.get("choices"),
            "metavar": about.get("metavar"),
        }
        if parts and parts[1]:
            options |= {"nargs": "+", "action": "extend" if about.get("repeated") else "store"}
        if about.get("const") is not None:
            options |= {"nargs": "?", "const": about["const"]}
    default = entry.default
    if default not in (MISSING, None, ()) and hint is not bool:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        options["help"] += f" (default: {shown})"
    return names, options


def _path_or(kind: type) -> Callable[[str], Any]:
    return _path if kind is Path else kind


def with_home(text: str) -> str:
    """What may be a path: a shell leaves the ~ of --flag=~/x as it is, and a TOML file has no shell."""
    return os.path.expanduser(str(text))


def _path(text: str) -> Path:
    return Path(with_home(text))


def _plain(hint: Any) -> tuple[type, bool]:
    """(type of one value, whether there may be several) of a field's annotation."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(one for one in get_args(hint) if one is not type(None))
    return (get_args(hint)[0], True) if get_origin(hint) is tuple else (hint, False)


def _converted(value: Any, hint: Any, entry: Field, where: str) -> Any:
    if entry.metadata.get("parse"):
        return entry.metadata["parse"](value)
    kind, several = _plain(hint)
    if several:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, found {value!r}")
        return tuple(_converted(one, kind, entry, where) for one in value)
    right = {float: (int, float), Path: (str,)}.get(kind, (kind,))
    if not isinstance(value, right) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {kind.__name__}, found {value!r}")
    choices = entry.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{where}: expected one of {', '.join(choices)}, found {value!r}")
    return _path(value) if kind is Path else kind(value)
