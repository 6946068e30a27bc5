"""What comes in by a node's sockets: another node's result, or whatever someone wrote into a graph by hand."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def _is_conditioning(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, (list, tuple))
        and len(one) >= 2
        and isinstance(one[0], torch.Tensor)
        and isinstance(one[1], dict)
        for one in value
    )


# Kind of the host -> whether a value can be one, by what is asked of it: other packs bring classes of their own.
FITS: dict[str, Callable[[Any], bool]] = {
    "MODEL": lambda value: hasattr(value, "get_model_object") and hasattr(value, "model_options"),
    "CLIP": lambda value: hasattr(value, "tokenize"),
    "VAE": lambda value: hasattr(value, "decode"),
    "CONDITIONING": _is_conditioning,
    "LATENT": lambda value: isinstance(value, dict) and isinstance(value.get("samples"), torch.Tensor),
    "LOSS_MAP": lambda value: isinstance(value, dict) and isinstance(value.get("loss"), list),
}


def connected(execute: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A node's `execute` that is asked only with what fits its sockets; the host checks links, but not plain values.

    Raises ValueError that names the node, the input and what was found there.
    """
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def checked(cls: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(cls, *args, **kwargs).arguments
        schema = cls.SCHEMA or cls.define_schema()
        for one in schema.inputs:
            fits, value = FITS.get(str(one.io_type)), given.get(one.id)
            if fits is None or (value is None and one.optional):
                continue
            for found in value if schema.is_input_list and isinstance(value, list) else [value]:
                if not fits(found) and not (found is None and one.optional):
                    raise ValueError(
                        f"{schema.display_name}: expected a {one.io_type} at {one.id}, found {found!r:.60} "
                        f"({type(found).__name__}). Connect the output of a node that makes one."
                    )
        return execute(cls, *args, **kwargs)

    return checked
