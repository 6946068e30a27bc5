"""Variety: how far a model's pictures of one prompt lie apart over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..models.teachers import ASSETS
from ..scenes.emoji import VOCABULARY
from ..scenes.judge import Judge, load_judge
from .embedded_scores import coarse, features

OPEN_PROMPTS = VOCABULARY[::24]  # of the embedded models; each leaves the background open
SEEDS = 16
TEACHER_STEPS = 20  # DDIM's

Draw = Callable[[list[str], list[int]], Tensor]


def spread(draw: Draw, prompts: Sequence[str], seeds: Sequence[int], judge: Judge | None = None) -> dict[str, float]:
    """Means over pairs of one prompt's pictures, and over the prompts.

    draw(prompts, seeds) gives pictures [B, 3, H, W] in [-1, 1]. "spread" is the root mean square distance of pixels
    averaged to 32x32; "spread_features", with the judge of the embedded protocol alone, that of its pooled features.
    Raises ValueError for fewer than two seeds.
    """
    if len(seeds) < 2:
        raise ValueError(f"variety needs two seeds or more of each prompt, got {len(seeds)}")
    spaces: dict[str, Callable[[Tensor], Tensor]] = {"spread": coarse}
    if judge is not None:
        spaces["spread_features"] = partial(features, judge)
    first, second = torch.triu_indices(len(seeds), len(seeds), 1)
    found: dict[str, list[float]] = {name: [] for name in spaces}
    for prompt in prompts:
        pictures = draw([prompt] * len(seeds), list(seeds)).float().cpu()
        for name, space in spaces.items():
            points = space(pictures)
            found[name].append((points[first] - points[second]).square().mean(dim=1).sqrt().mean().item())
    return {name: sum(values) / len(values) for name, values in found.items()}


def embedded_judge() -> Judge:
    return load_judge(ASSETS / "judge.safetensors")
