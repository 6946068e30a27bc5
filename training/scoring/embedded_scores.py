"""The `embedded` protocol: captions of the scenes, and what the shipped detector says of their pictures."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import read_lines
from ..models.teachers import ASSETS
from ..pictures import to_tensor
from ..scenes.emoji import Caption, draw_caption, parse_caption, pictures, place, scene
from ..scenes.judge import Judge, load_judge
from .metrics import (
    frechet_distance,
    frechet_distance_clipped,
    nearest_distances,
)

REFERENCE_SCENES = 2048
REFERENCE_SEED = 0x5EED  # of the rendered scenes that the Frechet distance compares with
FRESH_SCENES = 512
FRESH_SEED = 0xF2E5  # of the renders that give floor and yardstick
TRAINING_SEED = 1  # of training/distill.py's pool of scenes at its default --seed 0
TRAINING_SCENES = 1024
COPY_QUANTILE = 0.01
PIXELS = 32  # side to which pictures are averaged for the distance in pixels


def rendered(captions: list[Caption], seed: int, first: int = 0) -> Tensor:
    """One fresh scene for each caption, [B, 3, 128, 128] in [-1, 1]; number `first` and on of the stream `seed`."""
    generators = (np.random.default_rng([seed, index]) for index in range(first, first + len(captions)))
    pairs = zip(captions, generators, strict=True)
    return torch.stack([to_tensor(pictures().render(caption, place(caption, rng), rng)) for caption, rng in pairs])


def drawn_captions(seed: int, count: int) -> list[Caption]:
    """Captions of one and of two things in turn, held-out combinations as often as chance has them."""
    return [
        draw_caption(np.random.default_rng([seed, 7, index]), objects=1 + index % 2, held_out=None)
        for index in range(count)
    ]


def read_scene_captions(file: Path) -> list[Caption]:
    """One caption a line; blank lines are skipped. Raises ValueError naming file and line."""
    captions = []
    for number, line in enumerate(read_lines(file), 1):
        if line.strip():
            try:
                captions.append(parse_caption(" ".join(line.split())))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
    if not captions:
        raise ValueError(f"{file} holds no captions; expected one a line, e.g. 'a panda on a blue background'")
    return captions


class EmbeddedScores:
    """Scores sets of pictures of one list of captions; what does not depend on the pictures is made once."""

    def __init__(self, captions: list[Caption], training_scenes: int = TRAINING_SCENES) -> None:
        self.captions, self.judge = captions, load_judge(ASSETS / "judge.safetensors")
        self.reference = features(self.judge, rendered(_at_least(REFERENCE_SCENES, captions), REFERENCE_SEED))
        self.fresh = rendered(_at_least(FRESH_SCENES, captions), FRESH_SEED)
        self.training = torch.stack([to_tensor(scene(TRAINING_SEED, i)[0]) for i in range(training_scenes)])

    def __call__(self, pictures: Tensor) -> dict[str, float]:
        """pictures: uint8 [len(captions), 3, 128, 128]. The keys are explained in docs/evaluation.md."""
        images = pictures.float() / 127.5 - 1
        seen, fresh = features(self.judge, images), features(self.judge, self.fresh)
        return {
            **self.accuracy(images),
            "frechet_distance": frechet_distance(seen, self.reference),
            "frechet_distance_clipped": frechet_distance_clipped(seen, self.reference),
            "frechet_distance_floor": frechet_distance(fresh[: len(pictures)], self.reference),
            **self.nearest(images, seen, fresh),
        }

    def accuracy(self, images: Tensor) -> dict[str, float]:
        """Attribute accuracy: all, one object, two, held-out pairs; those that occur."""
        parts = zip(
            images.split(64), (self.captions[i : i + 64] for i in range(0, len(self.captions), 64)), strict=True
        )
        right = torch.cat([self.judge.right(part, wanted) for part, wanted in parts]).double()
        single = torch.tensor([len(caption.things) == 1 for caption in self.captions])
        held_out = torch.tensor([caption.held_out for caption in self.captions])
        groups = {"": torch.ones_like(single), "_one_object": single, "_two_objects": ~single, "_held_out": held_out}
        return {f"attribute_accuracy{name}": right[mask].mean().item() for name, mask in groups.items() if mask.any()}

    def nearest(self, images: Tensor, seen: Tensor, fresh: Tensor) -> dict[str, float]:
        """How much nearer the pictures lie to the training scenes than fresh renders of the same captions do.

        ratio: of the medians of the distances to the nearest training scene (1 where nothing is copied, 0 for copies).
        copies: share of pictures nearer than the nearest 1 % of fresh renders.
        """
        scores = {}
        spaces = {
            "features": (seen, fresh, features(self.judge, self.training)),
            "pixels": (coarse(images), coarse(self.fresh), coarse(self.training)),
        }
        for name, (ours, theirs, training) in spaces.items():
            near, yardstick = nearest_distances(ours, training), nearest_distances(theirs, training)
            scores[f"nearest_training_ratio_{name}"] = (near.median() / yardstick.median()).item()
            limit = torch.quantile(yardstick, COPY_QUANTILE)
            scores[f"nearest_training_copies_{name}"] = (near < limit).double().mean().item()
        return scores


def _at_least(count: int, captions: list[Caption]) -> list[Caption]:
    """All captions, over and over where they are fewer than count."""
    return (captions * (1 + count // len(captions)))[: max(count, len(captions))]


@lru_cache(maxsize=1)
def scores_of(captions: tuple[Caption, ...]) -> EmbeddedScores:
    """EmbeddedScores, kept for the next model with the same captions: its renders take longer than few steps do."""
    return EmbeddedScores(list(captions))


@torch.no_grad()
def features(judge: Judge, images: Tensor) -> Tensor:
    """The judge's pooled features [B, 192] of pictures [B, 3, 128, 128] in [-1, 1]."""
    return torch.cat([judge(part)[2] for part in images.split(64)])


def coarse(images: Tensor) -> Tensor:
    """[B, 3, 128, 128] to [B, 3 * 32 * 32] block averages: near copies stay near under a shift of a pixel."""
    return F.adaptive_avg_pool2d(images, PIXELS).flatten(1)
