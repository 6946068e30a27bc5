"""The optimizers that --optimizer names."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch

# Name -> (package, class, what --optimizer does not say itself)
OPTIONAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw-8bit": ("bitsandbytes", "optim.AdamW8bit", {}),
    "prodigy": ("prodigyopt", "Prodigy", {"use_bias_correction": True, "safeguard_warmup": True}),
    "adafactor": (
        "transformers",
        "Adafactor",
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
}
OPTIMIZERS = ("adamw", *OPTIONAL)


def build_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    """Raises ValueError, naming the package to install, for an optimizer whose package is missing."""
    if name == "adamw":
        parameters = list(parameters)
        # What torch takes on a GPU by itself holds a copy of all weights while it steps.
        fused = all(one.device.type == "cuda" for one in parameters) or None
        return torch.optim.AdamW(
            parameters, learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=fused
        )
    package, path, options = OPTIONAL[name]
    try:
        kind: Any = importlib.import_module(package)
        for part in path.split("."):
            kind = getattr(kind, part)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"--optimizer {name} needs the package {package} ({error}). Install it with `pip install {package}`, or "
            f"take --optimizer adamw."
        ) from error
    if name != "adafactor":  # it has no betas of this kind
        options = {**options, "betas": betas, "eps": epsilon}
    return kind(parameters, lr=learning_rate, weight_decay=weight_decay, **options)


def state_bytes(name: str) -> float:
    """Bytes of optimizer state a trained parameter, for --plan."""
    return {"adamw": 8, "adamw-8bit": 2, "prodigy": 16, "adafactor": 0.1}[name]
