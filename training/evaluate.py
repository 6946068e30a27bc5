"""Score a model: pictures from its prompts, judged.

    python training/evaluate.py --protocol embedded --model embedded-student --steps 4 --json scores.json

The `embedded` protocol draws captions of the procedural scenes (half of one object, half of two), or takes those of
--prompts, one a line; a small detector says which pictures show exactly their caption (attribute accuracy), and the
Frechet distance between its features of the pictures and of rendered scenes says how alike the distributions are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "training"

import numpy as np
import torch
from torch import Tensor

from training.embedded.judge import Judge, load_judge
from training.embedded.loop import to_tensor
from training.embedded.scenes import Caption, draw_caption, parse_caption, place, render
from training.generate import SAMPLERS, generate, unet_evaluations
from training.pipeline import ASSETS, EMBEDDED, NAMED, load_pipeline
from training.sheet import to_images

PROTOCOLS = ("embedded",)
REFERENCE_SCENES = 2048
REFERENCE_SEED = 0x5EED  # of the rendered scenes that the Frechet distance compares with


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) between Gaussians fitted to features [n, d] and [m, d].

    Heusel et al., GANs Trained by a Two Time-Scale Update Rule, eq. 6. Raises ValueError for fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs two pictures or more on each side, got {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # S_a S_b is similar to a positive semi-definite matrix: real, non-negative eigenvalues but for rounding.
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


@torch.no_grad()
def features(judge: Judge, pictures: Tensor) -> Tensor:
    """The judge's pooled features [B, 96] of pictures [B, 3, 128, 128] in [-1, 1]."""
    return torch.cat([judge(part)[1] for part in pictures.split(64)])


def rendered(captions: list[Caption], seed: int) -> Tensor:
    """One fresh scene for each caption."""
    generators = (np.random.default_rng([seed, index]) for index in range(len(captions)))
    pairs = zip(captions, generators, strict=True)
    return torch.stack([to_tensor(render(place(caption, rng), rng)) for caption, rng in pairs])


def drawn_captions(seed: int, count: int) -> list[Caption]:
    """Captions of one and of two objects in turn, held-out pairs of shape and colour as often as chance has them."""
    return [
        draw_caption(np.random.default_rng([seed, 7, index]), objects=1 + index % 2, held_out=None)
        for index in range(count)
    ]


def read_captions(file: Path) -> list[Caption]:
    """One caption a line; blank lines are skipped. Raises ValueError naming file and line."""
    captions = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                captions.append(parse_caption(line))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
    if not captions:
        raise ValueError(f"{file} holds no captions; expected one a line, e.g. 'a large red star'")
    return captions


def score(judge: Judge, pictures: Tensor, captions: list[Caption]) -> dict[str, float]:
    """Attribute accuracy (all, one object, two, held-out pairs; those that occur) and the Frechet distance."""
    parts = zip(pictures.split(64), (captions[i : i + 64] for i in range(0, len(captions), 64)), strict=True)
    right = torch.cat([judge.right(images, wanted) for images, wanted in parts]).double()
    single = torch.tensor([len(caption.things) == 1 for caption in captions])
    held_out = torch.tensor([caption.held_out for caption in captions])
    groups = {"": torch.ones_like(single), "_one_object": single, "_two_objects": ~single, "_held_out": held_out}
    result = {f"attribute_accuracy{name}": right[mask].mean().item() for name, mask in groups.items() if mask.any()}
    repeated = (captions * (1 + REFERENCE_SCENES // len(captions)))[: max(REFERENCE_SCENES, len(captions))]
    reference = features(judge, rendered(repeated, REFERENCE_SEED))
    return result | {"frechet_distance": frechet_distance(features(judge, pictures), reference)}


@dataclass(frozen=True)
class Request:
    """What to draw and to score; the command's flags."""

    model: str  # a name of NAMED, a folder, or "renders" and "reconstructions", which bound what a model can reach
    sampler: str = "splam"
    steps: int = 4
    guidance_scale: float = 1.0  # w; 1 is none
    num_images: int = 512
    seed: int = 0  # of captions and noise
    prompts: Path | None = None
    output_dir: Path | None = None  # keeps the pictures
    batch_size: int = 64
    device: str = "cpu"


def evaluate(request: Request) -> dict:
    """The scores of a request. Raises ValueError or FileNotFoundError for one that cannot be met."""
    if request.num_images < 2:
        raise ValueError(f"--num-images must be 2 or more, got {request.num_images}")
    captions = read_captions(request.prompts) if request.prompts else drawn_captions(request.seed, request.num_images)
    captions = [captions[index % len(captions)] for index in range(request.num_images)]
    judge = load_judge(ASSETS / "judge.safetensors")
    pictures, evaluations = draw(request, captions)
    if request.output_dir:
        request.output_dir.mkdir(parents=True, exist_ok=True)
        for index, (picture, caption) in enumerate(zip(to_images(pictures), captions, strict=True)):
            picture.save(request.output_dir / f"{index:05d} {caption}.png")
    return score(judge, pictures, captions) | {
        "images": len(captions),
        "unet_evaluations_per_image": evaluations,
        "seed": request.seed,
        "model": request.model,
        "sampler": request.sampler,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
    }


def draw(request: Request, captions: list[Caption]) -> tuple[Tensor, int]:
    """A picture [B, 3, 128, 128] for each caption, and the UNet evaluations that each took."""
    if request.model == "renders":
        return rendered(captions, request.seed), 0
    if request.model == "reconstructions":
        pipeline = load_pipeline(EMBEDDED, request.device)
        images = rendered(captions, request.seed).split(request.batch_size)
        with torch.no_grad():
            latents = torch.cat([pipeline.vae.encode(part.to(pipeline.device)).latent_dist.mean for part in images])
        return pipeline.decode(latents * pipeline.vae.config.scaling_factor).cpu(), 0
    pipeline = load_pipeline(request.model, request.device)
    seeds = range(request.seed * 1_000_003, request.seed * 1_000_003 + len(captions))
    prompts = [str(caption) for caption in captions]
    latents = generate(
        pipeline, prompts, seeds, request.sampler, request.steps, request.guidance_scale, request.batch_size
    )
    evaluations = unet_evaluations(request.steps, request.guidance_scale)
    return pipeline.decode(latents.to(pipeline.device)).cpu(), evaluations


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=PROTOCOLS, default="embedded")
    parser.add_argument(
        "--model", required=True, help=f"{', '.join(NAMED)}, a folder, or 'renders' or 'reconstructions' (the ceilings)"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, default="splam")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--guidance-scale", type=float, default=1.0, help="w; 1 is none, anything else costs two evaluations a step"
    )
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of captions and noise")
    parser.add_argument("--prompts", type=Path, help="captions, one a line, repeated until there are --num-images")
    parser.add_argument("--output-dir", type=Path, help="keep the pictures here, named after their captions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where the scores go; they are printed in any case")
    options = vars(parser.parse_args())
    file, _ = options.pop("json"), options.pop("protocol")
    try:
        result = evaluate(Request(**options))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=2)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, file)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
