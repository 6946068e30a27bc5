"""Train the teacher of emoji scenes: a narrow `UNet2DConditionModel`, from scratch.

    python -m training.embedded.teacher --run-dir runs/emoji

Needs the autoencoder in RUN_DIR/vae and the text encoder in RUN_DIR/text_encoder, which stay as they are. Encodes
scenes by 1,024 into RUN_DIR/latents (more of them when `--shards` grows, none twice), trains with resumable
checkpoints, a sheet of samples at every 500 steps, and at the end writes the diffusers pipeline to RUN_DIR/pipeline.
`--begin UNET` trains one further that has no checkpoint; `--sheet FILE` only draws from the last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from splam_core import NoiseSchedule

from ..files import write_whole
from ..models.pipeline import Pipeline
from ..models.sampling import generate
from ..models.teachers import EMBEDDED
from ..pictures import save_sheet, to_images, to_tensor
from ..scenes.emoji import IMAGE_SIZE, Pictures, draw_caption
from .autoencoder import SCALING_FACTOR
from .loop import half_precision, save_whole, train
from .text import WIDTH

CAPTION_DROP = 0.1
MIN_SNR_GAMMA = 5.0  # Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, eq. 8
SHARD = 1024  # scenes in a file of latents
CHUNK = 16  # scenes encoded at once
SHOWN, SHOWN_STEPS = 24, 25  # samples on a sheet, and their DDIM steps


def build_unet() -> UNet2DConditionModel:
    """8.5 M parameters, most at 4x4, where they cost little. ComfyUI has no width that is no multiple of the first."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
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
    """Latents of unit scale, fp16 [count, 4, 16, 16], and captions of the scenes from `first` of a stream."""
    latents, captions = [], []
    for start in range(first, first + count, CHUNK):
        scenes = [  # half are of pairs, whose small things are learnt late
            pictures.scene(seed, index, objects=1 + index % 2)
            for index in range(start, min(start + CHUNK, first + count))
        ]
        images = torch.stack([to_tensor(image) for image, _, _ in scenes]).contiguous(memory_format=torch.channels_last)
        with half_precision():
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


def loss_weight(ratio: Tensor) -> Tensor:
    """Weight of the squared error of epsilon at the noise-to-signal ratio sigma/alpha.

    Min-SNR where the signal is strong. Where noise is, the error of epsilon says little of the layout, which is decided
    there: unweighted, objects were drawn well and stood in the right relation no more often than by chance.
    """
    return (MIN_SNR_GAMMA * ratio**2).clamp(max=1) * ratio.clamp(min=1).pow(1.5).clamp(max=20)


def drawn_levels(schedule: NoiseSchedule, count: int) -> tuple[Tensor, Tensor]:
    """Timesteps [count], evenly drawn, and their losses' weights [count, 1, 1, 1]."""
    t = torch.randint(schedule.num_train_timesteps, (count,))
    return t, loss_weight(schedule.sigma(t) / schedule.alpha(t))[:, None, None, None]


def encode_captions(pipeline: Pipeline, captions: list[str]) -> Tensor:
    """What the UNet is told, fp16 [captions, 77, WIDTH]."""
    parts = (pipeline.encode(captions[start : start + 64]) for start in range(0, len(captions), 64))
    return torch.cat([part["encoder_hidden_states"].half() for part in parts])


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


def save_pipeline(folder: Path, vae, text_encoder, tokenizer, unet) -> None:
    """The parts as a diffusers pipeline, in fp16."""
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--shards", type=int, default=16, help="of 1,024 encoded scenes")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--begin", type=Path, help="a UNet's folder to begin with, such as assets/embedded/unet")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="of the sheets")
    parser.add_argument("--sheet", type=Path, help="draw samples of the last checkpoint into this PNG, and end")
    parser.add_argument("--seed", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.run_dir / "vae").eval().requires_grad_(False)
    vae = vae.to(memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")  # CLIP's own, which is not trained
    text_encoder = CLIPTextModel.from_pretrained(args.run_dir / "text_encoder").eval().requires_grad_(False)
    unet, checkpoint = build_unet(), args.run_dir / "teacher.pt"
    if args.begin:
        unet = UNet2DConditionModel.from_pretrained(args.begin, torch_dtype=torch.float32)
    ema = copy.deepcopy(unet).eval().requires_grad_(False)
    schedule = NoiseSchedule.scaled_linear()
    pipeline = Pipeline(ema, vae, text_encoder, tokenizer, schedule, dict(build_scheduler().config))
    if args.sheet:
        ema.load_state_dict(torch.load(checkpoint, weights_only=True)["ema"])
        draw_sheet(pipeline, args.seed + 1, args.guidance_scale, args.sheet)
        return

    latents, captions = encode_scenes(vae, Pictures(), args.seed, args.shards, args.run_dir / "latents", SHARD)
    told = encode_captions(pipeline, [*captions, ""])

    process = PartialState(cpu=True)  # several under `accelerate launch`: each takes its share of a batch

    def data_from(first: int):
        """Epoch e visits the scenes in the order of the generator seeded with e."""
        for step in range(first, args.steps):
            epoch, position = divmod(step, len(latents) // args.batch_size)
            order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(epoch))
            batch = order[position * args.batch_size : (position + 1) * args.batch_size]
            yield batch[process.process_index :: process.num_processes]

    def loss_at(_: int, chosen: Tensor) -> Tensor:
        x_0 = latents[chosen].float()
        text = torch.where(torch.rand(len(chosen)) < CAPTION_DROP, len(latents), chosen)  # the last is the empty one
        t, weight = drawn_levels(schedule, len(chosen))
        alpha, sigma = (level(t)[:, None, None, None] for level in (schedule.alpha, schedule.sigma))
        noise = torch.randn_like(x_0)
        # The fused attention's backward pass takes half of the time on a CPU at these lengths; the plain one does not.
        with half_precision(), sdpa_kernel(SDPBackend.MATH):
            output = unet(alpha * x_0 + sigma * noise, t, told[text].float()).sample
        return (weight * (output.float() - noise) ** 2).mean()

    unet.compile(dynamic=False)  # a seventh faster, after minutes
    for step in train(
        unet,
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
        if process.is_main_process and (step % 500 == 0 or step == args.steps):
            draw_sheet(pipeline, args.seed + 1, args.guidance_scale, args.run_dir / f"sheet-{step:06d}.png")

    if process.is_main_process:
        save_pipeline(args.run_dir / "pipeline", vae, text_encoder, tokenizer, ema)


if __name__ == "__main__":
    main()
