"""The judge of embedded pictures: finds the objects, names them, and says whether a picture shows its caption.

A small convolutional detector: on a 16x16 grid (8 px cells) one map says where object centres are, the others name
shape, colour and size there. A picture is *fully right* if it shows exactly the caption's things in the caption's
relation. Its pooled features carry the Frechet distance of the `embedded` protocol.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .shapes import COLOURS, SHAPES, SIZES, Caption, Placed, Thing, related

GROUPS = (len(SHAPES), len(COLOURS), len(SIZES))
CELL = 8


class Judge(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()

        def block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())

        self.features = nn.Sequential(
            block(3, width // 2, 2),
            block(width // 2, width, 2),
            block(width, width),
            block(width, 2 * width, 2),
            block(2 * width, 2 * width),
            block(2 * width, 2 * width),
            block(2 * width, 2 * width),
        )
        self.head = nn.Conv2d(2 * width, 1 + 2 + sum(GROUPS), 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 3, 128, 128] in [-1, 1] to maps [B, 21, 16, 16] (centre, offset y, x, classes) and features [B, 96]."""
        features = self.features(images)
        return self.head(features), features.mean((2, 3))

    @torch.no_grad()
    def detect(self, images: torch.Tensor) -> list[list[Placed]]:
        """The objects of each picture: local maxima of the centre map above one half."""
        maps, _ = self(images)
        centre = maps[:, 0].sigmoid()
        peaks = (centre == F.max_pool2d(centre[:, None], 3, 1, 1)[:, 0]) & (centre > 0.5)
        found: list[list[Placed]] = [[] for _ in images]
        for picture, row, column in peaks.nonzero().tolist():
            cell = maps[picture, :, row, column]
            shape, colour, size = (int(part.argmax()) for part in cell[3:].split(GROUPS))
            thing = Thing(list(SIZES)[size], list(COLOURS)[colour], SHAPES[shape])
            y, x = (row + cell[1].item()) * CELL, (column + cell[2].item()) * CELL
            found[picture].append(Placed(thing, x, y, sum(SIZES[thing.size]) / 2, 0.0))
        return found

    def right(self, images: torch.Tensor, captions: list[Caption]) -> torch.Tensor:
        """bool [B]: whether each picture shows exactly its caption."""
        return torch.tensor(
            [shows(found, caption) for found, caption in zip(self.detect(images), captions, strict=True)]
        )


def shows(found: list[Placed], caption: Caption) -> bool:
    if len(found) != len(caption.things):
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
