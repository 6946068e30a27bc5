"""The autoencoder of emoji scenes: Stable Diffusion's `AutoencoderKL`, factor 8, 4 latent channels, narrow.

    python -m training.embedded.autoencoder --run-dir runs/emoji
    python -m training.embedded.autoencoder --run-dir runs/emoji --polish 4000

The first trains the whole of it and fixes the latents; the second, which may run beside the teacher's training, goes on
with the decoder alone. Both resume from their checkpoints in RUN_DIR and leave a sheet at each.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..pictures import save_sheet, to_images, to_tensor
from ..scenes.emoji import GRID, IMAGE_SIZE, Pictures
from .loop import half_precision, train

SCALING_FACTOR = 0.18215  # Stable Diffusion's, so that every host's latent format fits
CROP = 64
LATENT_NOISE = 0.05
HINTED = 500  # steps until the hint of `reconstruction_loss` has faded


def build() -> AutoencoderKL:
    """The decoder has a layer a level more than the encoder; most weights lie where pictures are small and cheap."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 160),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,  # 32, one or none a group, would normalise a picture's colours away
        sample_size=IMAGE_SIZE,
        scaling_factor=SCALING_FACTOR,
    )


class Scenes(Dataset):
    """Scenes [start, stop) of a stream as float [3, H, W] in [-1, 1]: whole, or a CROP about one of the things.

    Three of four crops begin on the scenes' grid, where the pictures that matter most lie; the others teach the rest.
    """

    def __init__(self, pictures: Pictures, seed: int, start: int, stop: int, crop: bool) -> None:
        self.pictures, self.seed, self.start, self.stop, self.crop = pictures, seed, start, stop, crop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Tensor:
        image, _, placed = self.pictures.scene(self.seed, self.start + index)
        if self.crop:
            rng = np.random.default_rng([self.seed, self.start + index, 1])
            item = placed[rng.integers(len(placed))]
            grid = GRID if rng.random() < 0.75 else 1
            corner = np.array([item.y, item.x]) - CROP / 2 + rng.uniform(-0.5, 0.5, 2) * item.side
            top, left = np.clip(corner, 0, IMAGE_SIZE - CROP).astype(int) // grid * grid
            image = image[top : top + CROP, left : left + CROP]
        return to_tensor(image)


def batches(pictures: Pictures, seed: int, size: int, first: int, last: int, crop: bool) -> DataLoader:
    """Step n sees scenes [n * size, (n + 1) * size) of the stream, drawn by a process beside the training."""
    data = Scenes(pictures, seed, first * size, last * size, crop)
    return DataLoader(data, size, num_workers=1, worker_init_fn=lambda _: torch.set_num_threads(1))


def picture_loss(error: Tensor) -> Tensor:
    """L1, squared error, and L1 of the error's differences, between neighbours and over two pixels: sharp edges."""
    edges = 0.5 * sum(
        (error[..., reach:] - error[..., :-reach]).abs().mean()
        + (error[..., reach:, :] - error[..., :-reach, :]).abs().mean()
        for reach in (1, 2)
    )
    return error.abs().mean() + 4 * error.square().mean() + edges


def noisy(latents: Tensor) -> Tensor:
    """With noise of LATENT_NOISE times each channel's scale: what a generator leaves, and all that regularises them.

    A posterior of learnt width, drawn from and held by a KL term as in Stable Diffusion, begins with more noise than
    signal, and had learnt no colour after 250 steps.
    """
    scale = latents.detach().float().std((0, 2, 3), keepdim=True)
    return latents + LATENT_NOISE * scale * torch.randn_like(latents)


def opponent_colours(images: Tensor) -> Tensor:
    """Brightness, red against green, and blue against yellow, of pictures 8 times as coarse; of about unit scale."""
    red, green, blue = F.avg_pool2d(images, 8).unbind(1)
    return torch.stack([(red + green + blue) / 1.2, (red - green) / 0.35, (red + green - 2 * blue) / 0.7], 1)


def likeness(latents: Tensor) -> Tensor:
    """Mean square of the correlations between channels: 0 where each tells what no other does."""
    channels = latents.float().transpose(0, 1).flatten(1)
    channels = channels - channels.mean(1, keepdim=True)
    channels = channels / channels.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return (channels @ channels.T - torch.eye(len(channels))).square().mean()


def reconstruction_loss(vae: AutoencoderKL, images: Tensor, hint: Tensor) -> Tensor:
    """The picture's loss, `likeness`, and `hint` times the distance of three channels to colours.

    Without the last two all four channels told the same one or two colours for a thousand steps, and what else they
    told was less than the noise. The hint belongs to the first steps.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    with half_precision():
        latents = vae.encode(images).latent_dist.mean
        decoded = vae.decode(noisy(latents)).sample
    told = (latents[:, :3].float() - opponent_colours(images)).square().mean()
    return picture_loss(decoded.float() - images) + likeness(latents) + hint * told


def polish_loss(vae: AutoencoderKL, images: Tensor, _: Tensor) -> Tensor:
    """The decoder's part of it."""
    images = images.contiguous(memory_format=torch.channels_last)
    with half_precision():
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
        decoded = vae.decode(noisy(latents)).sample
    return picture_loss(decoded.float() - images)


@torch.no_grad()
def normalise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold a shift and a scale a channel into the convolutions about the latents: unit scale after SCALING_FACTOR."""
    mean = latents.mean((0, 2, 3))
    gain = 1 / (SCALING_FACTOR * latents.std((0, 2, 3)))
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:4] *= gain[:, None, None, None]
    encode.bias[:4] = (encode.bias[:4] - mean) * gain
    encode.bias[4:] += 2 * gain.log()
    decode.bias += torch.einsum("oihw,i->o", decode.weight, mean)
    decode.weight /= gain[None, :, None, None]


@torch.no_grad()
def fix_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Latents of unit scale after SCALING_FACTOR, and a posterior of LATENT_NOISE about them."""
    normalise(vae, torch.cat([vae.encode(part).latent_dist.mean for part in images.split(16)]))
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = 2 * math.log(LATENT_NOISE / SCALING_FACTOR)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    error = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample - part for part in images.split(16)])
    return 10 * torch.log10(4 / error.square().mean()).item()


@torch.no_grad()
def show(vae: AutoencoderKL, images: Tensor, file: Path) -> None:
    """Six rows of four pairs: a picture of `images` [24 or more, 3, H, W], and its reconstruction."""
    pairs = [to_images(images[:24]), to_images(vae.decode(vae.encode(images[:24]).latent_dist.mean).sample)]
    save_sheet(file, [("", pairs[column % 2][column // 2 :: 4][:6]) for column in range(8)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/emoji"))
    parser.add_argument(
        "--steps", type=int, default=4000, help="of 8 crops of 64x64 px; the last 30 %% on 2 whole pictures each"
    )
    parser.add_argument(
        "--polish", type=int, default=0, help="steps of 2 pictures for the decoder alone, after the first command"
    )
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pictures = Pictures()
    held_out = torch.stack([to_tensor(pictures.scene(args.seed + 3, i, held_out=True)[0]) for i in range(48)])

    def run(vae: AutoencoderKL, loss: Callable, data_from: Callable, name: str, steps: int, rate: float) -> None:
        compiled = torch.compile(loss, dynamic=False)  # GroupNorm's backward pass is slow on a CPU
        file = args.run_dir / f"{name}.pt"

        def loss_at(step: int, images: Tensor) -> Tensor:
            return compiled(vae, images, torch.tensor(max(0.0, 1 - step / HINTED)))

        for step in train(vae, loss_at, data_from, file, steps, rate, save_every=250, report_every=25):
            print(f"step {step}: reconstruction PSNR {psnr(vae, held_out):.2f} dB", flush=True)
            show(vae, held_out, args.run_dir / f"{name}-{step:06d}.png")

    if args.polish:
        vae = AutoencoderKL.from_pretrained(args.run_dir / "vae").to(memory_format=torch.channels_last)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        run(
            vae,
            polish_loss,
            lambda first: batches(pictures, args.seed + 4, 2, first, args.polish, crop=False),
            "polish",
            args.polish,
            args.learning_rate / 3,
        )
    else:
        vae = build().to(memory_format=torch.channels_last)
        crops = int(args.steps * 0.7)

        def data_from(first: int):
            if first < crops:
                yield from batches(pictures, args.seed + 1, 8, first, crops, crop=True)
            yield from batches(pictures, args.seed + 2, 2, max(first - crops, 0), args.steps - crops, crop=False)

        run(vae, reconstruction_loss, data_from, "autoencoder", args.steps, args.learning_rate)
        fix_latents(vae, held_out)
    vae.eval().to(memory_format=torch.contiguous_format).save_pretrained(args.run_dir / "vae")


if __name__ == "__main__":
    main()
