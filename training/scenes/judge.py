"""The judge of embedded pictures: finds the objects, names them, and says whether a picture shows its caption.

A small convolutional detector: on a 16x16 grid (8 px cells) one map says where object centres are, the others name
shape, colour and size there. A picture is *fully right* if it shows exactly the caption's things in the caption's
relation. Its pooled features carry the Frechet distance of the `embedded` protocol.

    python -m training.scenes.judge --run-dir runs/embedded
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ..embedded.loop import batches, to_tensor, train
from .shapes import COLOURS, IMAGE_SIZE, SHAPES, SIZES, Caption, Placed, Thing, related, scene

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


def _target(image, caption: Caption, placed: tuple[Placed, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Picture and map [6, 16, 16]: centre weight, offsets, class indices; a soft centre of one cell's width."""
    cells = IMAGE_SIZE // CELL
    target = torch.zeros(6, cells, cells)
    grid = torch.arange(cells) + 0.5
    for item in placed:
        x, y = item.x / CELL, item.y / CELL
        near = torch.exp(-((grid[None, :] - x) ** 2 + (grid[:, None] - y) ** 2) / 0.5)
        target[0] = torch.maximum(target[0], near)
        row, column = int(y), int(x)
        target[0, row, column] = 1.0
        names = (
            SHAPES.index(item.thing.shape),
            list(COLOURS).index(item.thing.colour),
            list(SIZES).index(item.thing.size),
        )
        target[1:, row, column] = torch.tensor([y - row, x - column, *names])
    return to_tensor(image), target


def _loss(judge: Judge, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    images, target = batch
    # What the judge sees is generated: blur, noise and a little brightness make it indifferent to how it was drawn.
    images = images + 0.04 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, torch.rand(len(images), 1, 1, 1))
    maps, _ = judge(images * (1 + 0.1 * torch.randn(len(images), 1, 1, 1)))
    centre, weight = maps[:, 0], target[:, 0]
    probability = centre.sigmoid()
    focus = torch.where(weight == 1, (1 - probability) ** 2, probability**2 * (1 - weight) ** 4)
    loss = (focus * F.binary_cross_entropy_with_logits(centre, (weight == 1).float(), reduction="none")).sum()
    where = weight == 1
    picked, truth = maps.permute(0, 2, 3, 1)[where], target.permute(0, 2, 3, 1)[where]
    loss = loss + F.l1_loss(picked[:, 1:3], truth[:, 1:3], reduction="sum")
    for logits, index in zip(picked[:, 3:].split(GROUPS, 1), truth[:, 3:].long().unbind(1), strict=True):
        loss = loss + F.cross_entropy(logits, index, reduction="sum")
    return loss / where.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/embedded"))
    parser.add_argument("--steps", type=int, default=2500, help="of 32 pictures")
    parser.add_argument("--seed", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    judge = Judge()
    data_from = lambda first: iter(batches(args.seed, 32, first, args.steps, _target, held_out=None))  # noqa: E731
    for _ in train(
        judge, lambda step, batch: _loss(judge, batch), data_from, args.run_dir / "judge.pt", args.steps, 3e-3
    ):
        pass
    judge.eval()
    scenes = [scene(args.seed + 1, index, held_out=None) for index in range(2000)]
    images = torch.stack([to_tensor(image) for image, _, _ in scenes])
    right = torch.cat(
        [
            judge.right(part, [s[1] for s in scenes[start : start + 100]])
            for start, part in zip(range(0, 2000, 100), images.split(100), strict=True)
        ]
    )
    print(f"held-out renders fully right: {right.float().mean().item():.4f} of {len(right)}")
    save_file(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in judge.state_dict().items()},
        args.run_dir / "judge.safetensors",
    )


if __name__ == "__main__":
    main()
