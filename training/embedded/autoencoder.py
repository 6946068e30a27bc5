"""The embedded pipeline's autoencoder: Stable Diffusion's `AutoencoderKL`, factor 8, 4 latent channels, narrow.

    python -m training.embedded.autoencoder --run-dir runs/embedded
    python -m training.embedded.autoencoder --run-dir runs/embedded --polish 4000

The first trains the whole of it and fixes the latents; the second, which may run beside the teacher's training, goes on
with the decoder alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ..pictures import to_tensor
from ..scenes.shapes import IMAGE_SIZE, scene
from .loop import batches, half_precision, train

SCALING_FACTOR = 0.18215  # Stable Diffusion's, so that every host's latent format fits
CROP = 64


def build() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,  # 4 channels a group, as Stable Diffusion's 128/32; one a group loses a picture's colours
        sample_size=IMAGE_SIZE,
        scaling_factor=SCALING_FACTOR,
    )


def crop_at_things(image, caption, placed) -> torch.Tensor:
    """A CROP-sized window near one of the objects: most pixels of a scene are background, most of the work is not."""
    rng = np.random.default_rng(image.reshape(-1)[:64].astype(np.uint64))
    thing = placed[rng.integers(len(placed))]
    reach = thing.radius + 6
    left, top = (
        int(np.clip(centre - CROP / 2 + rng.uniform(-reach, reach), 0, IMAGE_SIZE - CROP))
        for centre in (thing.x, thing.y)
    )
    return to_tensor(image[top : top + CROP, left : left + CROP].copy())


def whole(image, caption, placed) -> torch.Tensor:
    return to_tensor(image)


def pixel_loss(error: torch.Tensor) -> torch.Tensor:
    """L1 and squared error, which keeps small saturated objects from being taken for background, and L1 of edges."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + edges


def reconstruction_loss(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """The pixels' loss, and a KL weight of 1e-5 a latent value."""
    images = images.contiguous(memory_format=torch.channels_last)
    with half_precision():
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    return pixel_loss(decoded.float() - images) + 1e-5 * posterior.kl().mean() / 64


@torch.no_grad()
def normalise(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Fold a shift and a scale a channel into the convolutions about the latents: unit scale after SCALING_FACTOR."""
    mean = latents.mean((0, 2, 3))
    gain = 1 / (SCALING_FACTOR * latents.std((0, 2, 3)))
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:4] *= gain[:, None, None, None]
    encode.bias[:4] = (encode.bias[:4] - mean) * gain
    encode.bias[4:] += 2 * gain.log()
    decode.bias += torch.einsum("oihw,i->o", decode.weight, mean)
    decode.weight /= gain[None, :, None, None]


def polish_loss(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """The decoder's part of the loss, on latents with noise of 5 % of their scale, as a generator would leave."""
    images = images.contiguous(memory_format=torch.channels_last)
    with half_precision():
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
        decoded = vae.decode(latents + 0.05 / SCALING_FACTOR * torch.randn_like(latents)).sample
    return pixel_loss(decoded.float() - images)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    error = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample - part for part in images.split(16)])
    return 10 * torch.log10(4 / error.square().mean()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/embedded"))
    parser.add_argument(
        "--steps", type=int, default=2400, help="of 16 crops of 64x64 px; the last 40 %% on 6 whole pictures each"
    )
    parser.add_argument(
        "--polish", type=int, default=0, help="steps of 6 pictures for the decoder alone, after the first command"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    held_out = torch.stack([to_tensor(scene(args.seed + 3, index)[0]) for index in range(256)])

    if args.polish:
        vae = AutoencoderKL.from_pretrained(args.run_dir / "vae").to(memory_format=torch.channels_last)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        loss, file = torch.compile(polish_loss), args.run_dir / "polish.pt"
        data_from = lambda first: iter(batches(args.seed + 4, 6, first, args.polish, whole))  # noqa: E731
        for step in train(vae, lambda _, images: loss(vae, images), data_from, file, args.polish, 8e-4):
            print(f"step {step}: reconstruction PSNR {psnr(vae, held_out):.2f} dB", flush=True)
    else:
        vae = build().to(memory_format=torch.channels_last)
        crops = int(args.steps * 0.6)

        def data_from(first: int):
            if first < crops:
                yield from batches(args.seed + 1, 16, first, crops, crop_at_things)
            yield from batches(args.seed + 2, 6, max(first - crops, 0), args.steps - crops, whole)

        loss = torch.compile(reconstruction_loss)  # three times as fast: GroupNorm's backward is slow on a CPU
        file = args.run_dir / "autoencoder.pt"
        for _ in train(vae, lambda _, images: loss(vae, images), data_from, file, args.steps, 1.5e-3):
            pass
        with torch.no_grad():
            normalise(vae, torch.cat([vae.encode(part).latent_dist.mean for part in held_out.split(16)]))
        print(f"reconstruction PSNR {psnr(vae, held_out):.2f} dB")
    vae.eval().to(memory_format=torch.contiguous_format).save_pretrained(args.run_dir / "vae")


if __name__ == "__main__":
    main()
