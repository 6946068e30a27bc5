"""Which timesteps a few steps are best spent on, and how much fresh noise between them, for the shipped student.

    python dev.py python -m benchmarks.few_step --json docs/results/few_step.json --work-dir runs/few-step    # resumes

Every row costs as many UNet evaluations as it has steps. Chosen is on the first half of the pictures, by the share that
shows exactly its caption; what is chosen is measured on the second half, beside the timesteps that sampling takes.
eta is TCD's (`splam_core.families`): of the noise of a step, the part that is drawn anew; "fresh" is eq. 19's, all of
it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from splam_core import Denoiser, few_step_timesteps
from splam_core.families import FAMILIES, landings, step_on
from splam_core.sampler import fresh_noise
from training.models.load import load_pipeline
from training.models.pipeline import Pipeline
from training.pictures import to_uint8

from .reproduction import Yardstick

PICTURES, BATCH = 512, 64
FRESH = "fresh"
SECOND = (759, 679, 599, 499, 399, 299)  # of two steps
THREE = ((999, 679, 339), (999, 759, 499), (999, 759, 399), (999, 599, 299), (999, 599, 199), (999, 839, 499))
FOUR = ((999, 759, 499, 259), (999, 839, 599, 299), (999, 679, 399, 199), (999, 759, 599, 399), (999, 839, 679, 339))
ETAS = (FRESH, 0.6, 0.3, 0.0)


def candidates() -> Iterator[tuple[tuple[int, ...], float | str]]:
    """Timesteps with fresh noise, and the usual ones with less of it."""
    for timesteps in (*((999, second) for second in SECOND), *THREE, *FOUR):
        yield timesteps, FRESH
    for steps in (2, 3, 4):
        for eta in ETAS[1:]:
            yield usual(steps), eta


def usual(steps: int) -> tuple[int, ...]:
    return tuple(few_step_timesteps(steps).tolist())


@torch.no_grad()
def draw(pipeline: Pipeline, prompts: list[str], timesteps: tuple[int, ...], eta: float | str) -> Tensor:
    """Latents [B, C, h, w] of the prompts, of seeds 0, 1, ..."""
    family = FAMILIES["splam" if eta == FRESH else "tcd"]
    denoiser = Denoiser(pipeline.schedule, pipeline.prediction_type)
    done = []
    for start in range(0, len(prompts), BATCH):
        told = pipeline.encode(prompts[start : start + BATCH])
        seeds = range(start, start + len(prompts[start : start + BATCH]))
        noises = [fresh_noise(seed, [0]) for seed in seeds]
        x = torch.stack([torch.randn(pipeline.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

        def net(x: Tensor, t: Tensor, _, told=told) -> Tensor:
            return pipeline.unet(x, t, **told).sample

        def noise(x: Tensor, t: int, noises=noises) -> Tensor:
            return torch.cat([one(x[:1], t) for one in noises])

        for t, following in zip(timesteps, landings(family, list(timesteps)), strict=True):
            x0 = denoiser(net, x, None, None, torch.full((len(x),), t))
            last = following is None
            x = (
                x0
                if last
                else step_on(family, x, x0, t, following, pipeline.schedule, noise, 1.0 if eta == FRESH else eta)
            )
        done.append(x)
    return torch.cat(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument("--work-dir", type=Path, required=True, help="keeps the teacher's pictures and what is done")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="half to choose on, half to confirm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    yardstick = Yardstick(options.work_dir, 3.0, 8, options.pictures)
    student = load_pipeline("embedded-student")
    half = options.pictures // 2

    def measured(timesteps: tuple[int, ...], eta: float | str) -> dict:
        file = options.work_dir / f"{'-'.join(map(str, timesteps))}-{eta}-{options.pictures}.json"
        if not file.exists():
            latents = draw(student, yardstick.prompts, timesteps, eta)
            pictures = torch.cat([to_uint8(yardstick.teacher.decode(part)) for part in latents.split(BATCH)])
            found = {"timesteps": timesteps, "eta": eta}
            for name, part in (("chosen_on", slice(0, half)), ("confirmed_on", slice(half, None))):
                scores = part_scores(yardstick, pictures, part)
                found |= {f"{key}_{name}": value for key, value in scores.items()}
            file.write_text(json.dumps(found), encoding="utf-8")
            print(json.dumps(found), flush=True)
        return json.loads(file.read_text(encoding="utf-8"))

    rows = [measured(*one) for one in candidates()]
    for steps in (2, 3, 4):  # the best timesteps with less noise, too
        timesteps = tuple(best(rows, steps)["timesteps"])
        if timesteps != usual(steps):
            rows += [measured(timesteps, eta) for eta in ETAS[1:]]
    options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("| steps | timesteps | eta | right, chosen on | right, confirmed on | clipped distance to the teacher's |")
    print("| ---: | --- | --- | ---: | ---: | ---: |")
    for steps in (2, 3, 4):
        shown = [row for row in rows if tuple(row["timesteps"]) == usual(steps) and row["eta"] == FRESH]
        for row in (*shown, best(rows, steps)):
            print(
                f"| {steps} | {', '.join(map(str, row['timesteps']))} | {row['eta']} | {row['right_chosen_on']:.1%} "
                f"| {row['right_confirmed_on']:.1%} | {row['frechet_confirmed_on']:.3f} |"
            )


def part_scores(yardstick: Yardstick, pictures: Tensor, part: slice) -> dict[str, float]:
    """Share right in all attributes, and clipped Frechet distance to the teacher's pictures of the same part."""
    scores = yardstick.score(pictures[part], part)
    return {"right": scores["attribute_accuracy"], "frechet": scores["frechet_distance_teacher_clipped"]}


def best(rows: list[dict], steps: int) -> dict:
    return max((row for row in rows if len(row["timesteps"]) == steps), key=lambda row: row["right_chosen_on"])


if __name__ == "__main__":
    main()
