"""A few-step model in diffusers, drawn as SPLAM Sampler draws it in ComfyUI: the same picture for the same seed.

python snippets/diffusers_pipeline.py "a yellow star above a doughnut" picture.png
python snippets/diffusers_pipeline.py "a cat in the snow" picture.png --model path/to/pipeline --size 512
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from snippets.any_unet import draw

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "embedded"


def embedded() -> StableDiffusionPipeline:
    """The pipeline inside this repository, with its student's UNet."""
    student = UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="student")
    pipeline = StableDiffusionPipeline.from_pretrained(
        EMBEDDED, unet=student, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    return pipeline.to(torch.float32)


def latents(pipeline, prompt, steps=4, seed=0, size=128, batch=1):
    """[batch, 4, size/8, size/8] of an SD1.x or SD2.x pipeline that predicts noise; no guidance pass."""
    embeds, _ = pipeline.encode_prompt(prompt, pipeline.device, batch, do_classifier_free_guidance=False)
    side = size // pipeline.vae_scale_factor
    return draw(
        lambda x, t: pipeline.unet(x, t, encoder_hidden_states=embeds).sample, (batch, 4, side, side), steps, seed
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="a diffusers folder of a SPLAM or LCM model (default: the embedded student)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128)
    given = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(given.model) if given.model else embedded()
    found = latents(pipeline, given.prompt, given.steps, given.seed, given.size)
    image = pipeline.vae.decode(found / pipeline.vae.config.scaling_factor).sample
    pipeline.image_processor.postprocess(image)[0].save(given.output)


if __name__ == "__main__":
    main()
