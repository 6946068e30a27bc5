"""Train the embedded teacher: a narrow `UNet2DConditionModel` and `CLIPTextModel`, together, from scratch.

    python -m training.embedded.teacher --run-dir runs/embedded

Needs the autoencoder in RUN_DIR/vae. Encodes the training scenes once into RUN_DIR/latents.pt, trains on them with
resumable checkpoints and a sheet of samples at each, and writes the diffusers pipeline to RUN_DIR/pipeline.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from splam_core import NoiseSchedule

from ..models.pipeline import Pipeline
from ..models.sampling import generate
from ..models.teachers import EMBEDDED
from ..pictures import save_sheet, to_images
from ..scenes.shapes import IMAGE_SIZE, parse_caption, scene
from .autoencoder import SCALING_FACTOR
from .loop import half_precision, save_whole, scene_pictures, train
from .text import WIDTH, LayoutHead, build_text_encoder, layout, pretrain

CHUNK = 32  # scenes encoded at once
GUIDANCE_SCALE = 3.0
CAPTION_DROP = 0.1
LAYOUT_WEIGHT = 0.1
MIN_SNR_GAMMA = 5.0  # Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, eq. 8


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
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


class EncodedScenes(Dataset):
    """Chunk i of a stream of scenes, as latents of unit scale, fp16 [CHUNK, 4, 16, 16], and captions."""

    def __init__(self, vae: AutoencoderKL, seed: int, count: int) -> None:
        self.vae, self.seed, self.count = vae.to(memory_format=torch.channels_last), seed, count

    def __len__(self) -> int:
        return self.count // CHUNK

    @torch.no_grad()
    def __getitem__(self, chunk: int) -> tuple[torch.Tensor, list[str]]:
        images, captions = scene_pictures(self.seed, range(chunk * CHUNK, (chunk + 1) * CHUNK))
        with half_precision():
            latents = self.vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        return (latents.float() * SCALING_FACTOR).half(), captions


def encode_scenes(vae: AutoencoderKL, seed: int, count: int, path: Path) -> tuple[torch.Tensor, list[str]]:
    """Latents [count, 4, 16, 16] and captions of `count` scenes; kept at `path`."""
    if not path.exists():
        # One process and one thread a worker: threads within one network gain nothing at this size.
        loader = DataLoader(
            EncodedScenes(vae, seed, count),
            None,
            num_workers=os.cpu_count() or 1,
            worker_init_fn=lambda _: torch.set_num_threads(1),
        )
        chunks = []
        for chunk in loader:
            chunks.append(chunk)
            if len(chunks) % 50 == 0:
                print(f"encoded {len(chunks) * CHUNK}/{count} scenes", flush=True)
        captions = [caption for _, texts in chunks for caption in texts]
        save_whole({"latents": torch.cat([latents for latents, _ in chunks]), "captions": captions}, path)
    state = torch.load(path, weights_only=True)
    return state["latents"], state["captions"]


def loss_weight(ratio: torch.Tensor) -> torch.Tensor:
    """Weight of the squared error of epsilon at the noise-to-signal ratio sigma/alpha.

    Min-SNR where the signal is strong. Where noise is, the error of epsilon says little of the layout, which is decided
    there: unweighted, objects were drawn well and stood in the right relation no more often than by chance.
    """
    return (MIN_SNR_GAMMA * ratio**2).clamp(max=1) * ratio.clamp(min=1).pow(1.5).clamp(max=20)


def drawn_levels(schedule: NoiseSchedule, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps [count], three quarters of them in the noisy half, and their losses' weights [count, 1, 1, 1]."""
    last = schedule.num_train_timesteps
    lowest = torch.where(torch.rand(count) < 0.5, last // 2, 0)
    t = lowest + (torch.rand(count) * (last - lowest)).long()
    return t, loss_weight(schedule.sigma(t) / schedule.alpha(t))[:, None, None, None]


def denoising_loss(
    modules: torch.nn.ModuleDict,
    x_t: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """Weighted squared error of epsilon; and the layout that the captions of `target` (all but the dropped) tell."""
    # The fused attention's backward pass takes half of the time on a CPU at these lengths; the plain one does not.
    with half_precision(), sdpa_kernel(SDPBackend.MATH):
        hidden = modules["text_encoder"](tokens).last_hidden_state
        output = modules["unet"](x_t, t, hidden).sample
    told = target.flatten(1).any(1)
    reading, _ = modules["layout"](hidden[told], tokens[told], target[told])
    return (weight * (output.float() - noise) ** 2).mean() + LAYOUT_WEIGHT * reading


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
    parser.add_argument("--run-dir", type=Path, default=Path("runs/embedded"))
    parser.add_argument("--scenes", type=int, default=32000)
    parser.add_argument("--text-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.run_dir / "vae").eval().requires_grad_(False)
    latents, captions = encode_scenes(vae, args.seed, args.scenes, args.run_dir / "latents.pt")
    schedule = NoiseSchedule.scaled_linear()
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")  # CLIP's own, which is not trained
    tokens = tokenizer([*captions, ""], padding="max_length", max_length=77, return_tensors="pt").input_ids

    targets = torch.tensor([layout(parse_caption(caption)) for caption in captions])
    targets = torch.cat([targets, torch.zeros_like(targets[:1])])

    modules = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(), "layout": LayoutHead()})
    if not (args.run_dir / "teacher.pt").exists():
        pretrain(modules, tokenizer, args.text_steps, args.run_dir / "text.pt", args.seed + 2)
    ema = copy.deepcopy(modules).eval().requires_grad_(False)
    pipeline = Pipeline(ema["unet"], vae, ema["text_encoder"], tokenizer, schedule, dict(build_scheduler().config))

    def data_from(first: int):
        """Epoch e visits the scenes in the order of the generator seeded with e."""
        for step in range(first, args.steps):
            per_epoch = len(latents) // args.batch_size
            epoch, position = divmod(step, per_epoch)
            order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(epoch))
            yield order[position * args.batch_size : (position + 1) * args.batch_size]

    def loss_at(_: int, chosen: torch.Tensor) -> torch.Tensor:
        x_0 = latents[chosen].float()
        text = torch.where(torch.rand(len(chosen)) < CAPTION_DROP, len(latents), chosen)  # the last is the empty one
        t, weight = drawn_levels(schedule, len(chosen))
        alpha, sigma = (level(t)[:, None, None, None] for level in (schedule.alpha, schedule.sigma))
        noise = torch.randn_like(x_0)
        return denoising_loss(modules, alpha * x_0 + sigma * noise, noise, t, weight, tokens[text], targets[text])

    checkpoint = args.run_dir / "teacher.pt"
    shown = [str(scene(args.seed + 1, index)[1]) for index in range(36)]
    for step in train(
        modules, loss_at, data_from, checkpoint, args.steps, args.learning_rate, ema=ema, ema_decay=0.9995
    ):
        pictures = to_images(pipeline.decode(generate(pipeline, shown, range(36), "ddim", 25, GUIDANCE_SCALE)))
        columns = [(f"{step}" if i == 0 else "", pictures[i::6]) for i in range(6)]
        save_sheet(args.run_dir / f"sheet-{step:06d}.png", columns)

    save_pipeline(args.run_dir / "pipeline", vae, ema["text_encoder"], tokenizer, ema["unet"])


if __name__ == "__main__":
    main()
