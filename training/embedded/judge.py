"""The judge's own training.

python -m training.embedded.judge --run-dir runs/emoji
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..pictures import to_tensor
from ..scenes.emoji import BACKGROUNDS, IMAGE_SIZE, VOCABULARY, Caption, Pictures, Placed
from ..scenes.judge import CELL, Judge
from .loop import half_precision, train

CELLS = IMAGE_SIZE // CELL
TESTED = 2000  # fresh composites


def target_of(caption: Caption, placed: tuple[Placed, ...]) -> Tensor:
    """[5, 8, 8]: nearness of a centre (1 in its cell), offsets y and x, thing; everywhere the background, or -1."""
    target = torch.zeros(5, CELLS, CELLS)
    target[4] = list(BACKGROUNDS).index(caption.background) if caption.background else -1
    grid = torch.arange(CELLS) + 0.5
    for item in placed:
        x, y = item.x / CELL, item.y / CELL
        near = torch.exp(-((grid[None, :] - x) ** 2 + (grid[:, None] - y) ** 2) / 0.5)
        target[0] = torch.maximum(target[0], near)
        row, column = int(y), int(x)
        target[0, row, column] = 1.0
        target[1:4, row, column] = torch.tensor([y - row, x - column, VOCABULARY.index(item.thing)])
    return target


class Targets(Dataset):
    """Scenes [start, stop) of a stream, of any combination, as pictures and targets."""

    def __init__(self, pictures: Pictures, seed: int, start: int, stop: int) -> None:
        self.pictures, self.seed, self.start, self.stop = pictures, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, caption, placed = self.pictures.scene(self.seed, self.start + index, held_out=None)
        return to_tensor(image), target_of(caption, placed)


def augmented(images: Tensor) -> Tensor:
    """What the judge is to be indifferent to, since what it sees is generated: coarseness, noise, contrast, tint."""
    count = len(images)
    coarse = F.interpolate(F.avg_pool2d(images, 3, 3), images.shape[-2:], mode="bilinear", align_corners=False)
    images = torch.lerp(images, coarse, 0.9 * torch.rand(count, 1, 1, 1))
    images = images * (1 + 0.08 * torch.randn(count, 1, 1, 1)) + 0.04 * torch.randn(count, 3, 1, 1)
    return images + 0.1 * torch.rand(count, 1, 1, 1) * torch.randn_like(images)


def judge_loss(judge: Judge, images: Tensor, target: Tensor) -> Tensor:
    """Focal loss of the centre map, L1 of offsets, cross-entropy of things and of named backgrounds; a thing."""
    with half_precision():
        maps, grounds, _ = judge(augmented(images).contiguous(memory_format=torch.channels_last))
    maps, grounds = maps.float(), grounds.float()
    centre, weight = maps[:, 0], target[:, 0]
    where, probability = weight == 1, centre.sigmoid()
    focus = torch.where(where, (1 - probability) ** 2, probability**2 * (1 - weight) ** 4)
    loss = (focus * F.binary_cross_entropy_with_logits(centre, where.float(), reduction="none")).sum()
    picked, truth = maps.permute(0, 2, 3, 1)[where], target.permute(0, 2, 3, 1)[where]
    loss = loss + F.l1_loss(picked[:, 1:3], truth[:, 1:3], reduction="sum")
    loss = loss + F.cross_entropy(picked[:, 3:], truth[:, 3].long(), reduction="sum")
    loss = loss + F.cross_entropy(grounds, target[:, 4, 0, 0].long(), ignore_index=-1, reduction="sum")
    return loss / where.sum()


@torch.no_grad()
def test(judge: Judge, pictures: Pictures, seed: int, count: int, vae: AutoencoderKL | None) -> tuple[float, float]:
    """Shares judged fully right of `count` fresh composites, and of their reconstructions where there is a vae."""
    right: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first in range(0, count, 50):
        scenes = [pictures.scene(seed, index, held_out=None) for index in range(first, min(first + 50, count))]
        images, captions = torch.stack([to_tensor(image) for image, _, _ in scenes]), [one for _, one, _ in scenes]
        right[0].append(judge.right(images, captions))
        if vae is not None:
            with half_precision():
                images = vae.decode(vae.encode(images).latent_dist.mean).sample.float()
            right[1].append(judge.right(images, captions))
    fresh, again = (torch.cat(part).float().mean().item() if part else float("nan") for part in right)
    return fresh, again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--steps", type=int, default=2400, help="of 32 pictures")
    parser.add_argument("--seed", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pictures = Pictures()
    judge = Judge().to(memory_format=torch.channels_last)

    def data_from(first: int) -> DataLoader:
        data = Targets(pictures, args.seed, 32 * first, 32 * args.steps)
        return DataLoader(data, 32, num_workers=1, worker_init_fn=lambda _: torch.set_num_threads(1))

    def loss_at(_: int, batch: list[Tensor]) -> Tensor:
        return judge_loss(judge, *batch)

    for _ in train(judge, loss_at, data_from, args.run_dir / "judge.pt", args.steps, 3e-3, save_every=200):
        judge.eval()
        print(f"fresh composites fully right: {test(judge, pictures, args.seed + 1, 200, None)[0]:.3f}", flush=True)
        judge.train()
    judge.eval()
    vae = None
    if (args.run_dir / "vae").exists():
        vae = AutoencoderKL.from_pretrained(args.run_dir / "vae").to(memory_format=torch.channels_last)
    fresh, again = test(judge, pictures, args.seed + 2, TESTED, vae)
    print(f"fully right of {TESTED} fresh composites: {fresh:.4f}, of their reconstructions: {again:.4f}")
    state = judge.to(memory_format=torch.contiguous_format).state_dict()
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(half, args.run_dir / "judge.safetensors")


if __name__ == "__main__":
    main()
