"""Train the teacher of emoji scenes: a narrow `UNet2DConditionModel` and `CLIPTextModel`, together, from scratch.

    python -m training.embedded.emoji.teacher --pictures PICTURES --run-dir runs/emoji

Needs the autoencoder in RUN_DIR/vae. Encodes scenes by 1,024 into RUN_DIR/latents (more of them when `--scenes` grows,
none twice), teaches the text encoder to read, then trains both with resumable checkpoints, a sheet of samples at each,
and at the end writes the diffusers pipeline to RUN_DIR/pipeline. `--sheet FILE` only draws from the last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from splam_core import NoiseSchedule

from ...files import write_whole
from ...models.pipeline import Pipeline
from ...models.sampling import generate
from ...models.teachers import EMBEDDED
from ...pictures import save_sheet, to_images, to_tensor
from ...scenes.emoji import IMAGE_SIZE, Pictures, draw_caption, parse_caption
from ..autoencoder import SCALING_FACTOR
from ..loop import save_whole, train
from ..teacher import CAPTION_DROP, build_scheduler, denoising_loss, drawn_levels, save_pipeline
from ..text import build_text_encoder
from .text import WIDTH, LayoutHead, layout, pretrain

SHARD = 1024  # scenes in a file of latents
CHUNK = 16  # scenes encoded at once
SHOWN, SHOWN_STEPS = 24, 25  # samples on a sheet, and their DDIM steps


def build_unet() -> UNet2DConditionModel:
    """10.8 M parameters, most of them at 6x6, where they cost little."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
    )


def encoder_print(vae: AutoencoderKL) -> str:
    """A short digest of what makes latents; polishing the decoder leaves it as it is."""
    digest = hashlib.sha256()
    for part in (vae.encoder, vae.quant_conv):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_shard(vae: AutoencoderKL, pictures: Pictures, seed: int, first: int, count: int) -> tuple[Tensor, list[str]]:
    """Latents of unit scale, fp16 [count, 4, 24, 24], and captions of the scenes from `first` of a stream."""
    latents, captions = [], []
    for start in range(first, first + count, CHUNK):
        scenes = [pictures.scene(seed, index) for index in range(start, min(start + CHUNK, first + count))]
        images = torch.stack([to_tensor(image) for image, _, _ in scenes]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(images).latent_dist.mean.float().mul(SCALING_FACTOR).half())
        captions += [str(caption) for _, caption, _ in scenes]
    return torch.cat(latents), captions


def encode_scenes(
    vae: AutoencoderKL, pictures: Pictures, seed: int, shards: int, folder: Path, size: int
) -> tuple[Tensor, list[str]]:
    """Latents and captions of `shards` times `size` scenes, each shard kept in `folder` as it is made.

    Raises ValueError where a shard there was made by another encoder.
    """
    wanted, latents, captions = encoder_print(vae), [], []
    for shard in range(shards):
        file = folder / f"{seed}-{shard:04d}.pt"
        if not file.exists():
            found, texts = encode_shard(vae, pictures, seed, shard * size, size)
            save_whole({"latents": found, "captions": texts, "encoder": wanted}, file)
            print(f"encoded {(shard + 1) * size} scenes", flush=True)
        state = torch.load(file, weights_only=True)
        if state["encoder"] != wanted:
            raise ValueError(
                f"{file} was encoded by another autoencoder than RUN_DIR/vae; remove {folder} to encode anew"
            )
        latents.append(state["latents"])
        captions += state["captions"]
    return torch.cat(latents), captions


def shown_captions(seed: int) -> list[str]:
    """Captions of a sheet, in turn of one thing, of one, and of two; every fourth of a held-out combination."""
    return [
        str(draw_caption(np.random.default_rng([seed, index]), objects=1 + (index % 3 == 2), held_out=index % 4 == 3))
        for index in range(SHOWN)
    ]


def draw_sheet(pipeline: Pipeline, seed: int, guidance_scale: float, file: Path) -> None:
    """Samples of `shown_captions` unpicked, six in a row, and their captions in FILE.txt."""
    captions = shown_captions(seed)
    pictures = to_images(
        pipeline.decode(generate(pipeline, captions, range(SHOWN), "ddim", SHOWN_STEPS, guidance_scale))
    )
    save_sheet(file, [("", pictures[column::6]) for column in range(6)])
    write_whole(file.with_suffix(".txt"), "\n".join(captions).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="assets/ of @lobehub/fluent-emoji-3d 1.1.0")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--shards", type=int, default=32, help="of 1,024 encoded scenes")
    parser.add_argument("--text-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="of the sheets")
    parser.add_argument("--sheet", type=Path, help="draw samples of the last checkpoint into this PNG, and end")
    parser.add_argument("--seed", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.run_dir / "vae").eval().requires_grad_(False)
    vae = vae.to(memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")  # CLIP's own, which is not trained
    modules = nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(WIDTH), "layout": LayoutHead()})
    checkpoint = args.run_dir / "teacher.pt"
    ema = copy.deepcopy(modules).eval().requires_grad_(False)
    schedule = NoiseSchedule.scaled_linear()
    pipeline = Pipeline(ema["unet"], vae, ema["text_encoder"], tokenizer, schedule, dict(build_scheduler().config))
    if args.sheet:
        ema.load_state_dict(torch.load(checkpoint, weights_only=True)["ema"])
        draw_sheet(pipeline, args.seed + 1, args.guidance_scale, args.sheet)
        return

    latents, captions = encode_scenes(
        vae, Pictures(args.pictures), args.seed, args.shards, args.run_dir / "latents", SHARD
    )
    tokens = tokenizer([*captions, ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    targets = torch.tensor([layout(parse_caption(caption)) for caption in captions])
    targets = torch.cat([targets, torch.zeros_like(targets[:1])])
    if not checkpoint.exists():
        pretrain(modules, tokenizer, args.text_steps, args.run_dir / "text.pt", args.seed + 2)
        ema.load_state_dict(modules.state_dict())

    def data_from(first: int):
        """Epoch e visits the scenes in the order of the generator seeded with e."""
        for step in range(first, args.steps):
            epoch, position = divmod(step, len(latents) // args.batch_size)
            order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(epoch))
            yield order[position * args.batch_size : (position + 1) * args.batch_size]

    def loss_at(_: int, chosen: Tensor) -> Tensor:
        x_0 = latents[chosen].float()
        text = torch.where(torch.rand(len(chosen)) < CAPTION_DROP, len(latents), chosen)  # the last is the empty one
        t, weight = drawn_levels(schedule, len(chosen))
        alpha, sigma = (level(t)[:, None, None, None] for level in (schedule.alpha, schedule.sigma))
        noise = torch.randn_like(x_0)
        return denoising_loss(modules, alpha * x_0 + sigma * noise, noise, t, weight, tokens[text], targets[text])

    modules["unet"].compile(dynamic=False)  # a seventh faster, after minutes
    for step in train(
        modules,
        loss_at,
        data_from,
        checkpoint,
        args.steps,
        args.learning_rate,
        ema=ema,
        ema_decay=0.999,
        save_every=100,
        report_every=20,
    ):
        if step % 500 == 0 or step == args.steps:
            draw_sheet(pipeline, args.seed + 1, args.guidance_scale, args.run_dir / f"sheet-{step:06d}.png")

    save_pipeline(args.run_dir / "pipeline", vae, ema["text_encoder"], tokenizer, ema["unet"])


if __name__ == "__main__":
    main()
