"""The judge's own training.

python -m training.embedded.judge --run-dir runs/embedded
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ..pictures import to_tensor
from ..scenes.judge import CELL, GROUPS, Judge
from ..scenes.shapes import COLOURS, IMAGE_SIZE, SHAPES, SIZES, Caption, Placed, scene
from .loop import batches, train


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
