"""The judge of embedded pictures: finds the things, names them and the background, and says whether a caption is shown.

A small convolutional detector: on an 8x8 grid (16 px cells) one map says where things'
centres are, the others name the thing there; the pooled features name the background and carry the Frechet distance.
A picture is *fully right* if it shows exactly the caption's things, in its relation, on its background where it names
one.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .emoji import BACKGROUNDS, VOCABULARY, Caption, Placed, related

CELL = 16


class Judge(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()

        def block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())

        self.features = nn.Sequential(
            block(3, width, 2),
            block(width, 2 * width, 2),
            block(2 * width, 2 * width),
            block(2 * width, 4 * width, 2),
            block(4 * width, 4 * width),
            block(4 * width, 6 * width, 2),
            block(6 * width, 6 * width),
            block(6 * width, 6 * width),
            block(6 * width, 6 * width),
        )
        self.head = nn.Conv2d(6 * width, 3 + len(VOCABULARY), 1)
        self.background = nn.Linear(6 * width, len(BACKGROUNDS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, 128, 128] in [-1, 1] to maps [B, 3 + things, 8, 8] (centre, offset y, x, things), the background's
        logits [B, backgrounds] and pooled features [B, 192]."""
        features = self.features(images)
        pooled = features.mean((2, 3))
        return self.head(features), self.background(pooled), pooled

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[tuple[list[Placed], str]]:
        """Each picture's things, where the centre map has its maxima above one half, and its likeliest background.

        Sides and the way they face are not read.
        """
        maps, grounds, _ = self(images)
        centre = maps[:, 0].sigmoid()
        peaks = (centre == F.max_pool2d(centre[:, None], 3, 1, 1)[:, 0]) & (centre > 0.5)
        found: list[tuple[list[Placed], str]] = [
            ([], list(BACKGROUNDS)[ground]) for ground in grounds.argmax(1).tolist()
        ]
        for picture, row, column in peaks.nonzero().tolist():
            cell = maps[picture, :, row, column]
            y, x = (row + cell[1].item()) * CELL, (column + cell[2].item()) * CELL
            found[picture][0].append(Placed(VOCABULARY[int(cell[3:].argmax())], x, y, 0))
        return found

    def right(self, images: Tensor, captions: list[Caption]) -> Tensor:
        """bool [B]: whether each picture shows exactly its caption."""
        seen = zip(self.detect(images), captions, strict=True)
        return torch.tensor([shows(found, ground, caption) for (found, ground), caption in seen])


def shows(found: list[Placed], background: str, caption: Caption) -> bool:
    if caption.background not in (None, background) or len(found) != len(caption.things):
        return False
    if caption.relation is None:
        return found[0].thing == caption.things[0]
    return any(
        (a.thing, b.thing) == caption.things and related(a, b, caption.relation) for a, b in (found, found[::-1])
    )


def load_judge(path: Path) -> Judge:
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()
