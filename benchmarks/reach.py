"""Negative prompts at guidance 1 on the embedded student, its variety, and every few-step family against its scheduler.

    python dev.py python -m benchmarks.reach --json docs/results/reach.json [--only negative]

Each prompt leaves the background open ("a dog"). A picture is drawn without a negative prompt; the embedded judge names
its background's colour; the same seed is drawn again with "a dog on a red background", in that colour, as the negative
prompt. Right are pictures of the prompt's thing alone; and, with a negative prompt that has nothing to do with it, all
of "a dog on a red background".
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import quantiles

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load
from torch.utils.flop_counter import FlopCounterMode

from harness.graphs import save_latent, text_to_image
from harness.reference import (
    FAMILIES,
    Reference,
    few_step,
    few_step_of_family,
    node_noises,
    relative_error,
    write_pipeline,
)
from harness.server import ComfyServer
from splam_core import Denoiser, few_step_timesteps, renoise_generator, sample
from splam_core.nag import Nag, normalized_attention
from training.models.load import load_pipeline
from training.models.sampling import generate, guided_output
from training.scenes.emoji import VOCABULARY, Caption, Placed
from training.scenes.judge import shows
from training.scoring.variety import OPEN_PROMPTS, embedded_judge, spread

from .parity import SHAPES as UNETS

STEPS = 4
UNRELATED = VOCABULARY[6::24]  # things that are none of OPEN_PROMPTS
SETTINGS = [Nag(), Nag(3.0, alpha=0.5), Nag(5.0, alpha=0.5), Nag(8.0, alpha=0.5)]
DEFAULT = Nag()  # that of the nodes, whose numbers stand without a name


class Attention:
    """diffusers' attention processor with normalised attention guidance. negative: [B or 1, tokens, C], None is off."""

    def __init__(self) -> None:
        self.negative: torch.Tensor | None = None
        self.nag = DEFAULT

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        def attend(context):
            q, k, v = (
                part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for part in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
            )
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        z = attend(encoder_hidden_states)
        if self.negative is not None:
            z = normalized_attention(z, attend(self.negative.expand(len(z), -1, -1)), self.nag)
        return attn.to_out[0](z)


def with_attention(unet: UNet2DConditionModel) -> Attention:
    """The processor of all cross-attention of this UNet."""
    attention = Attention()
    unet.set_attn_processor({key: attention if ".attn2." in key else own for key, own in unet.attn_processors.items()})
    return attention


@torch.no_grad()
def negation(seeds: int, report: Callable[[str], None] = print) -> dict:
    """Shares over the eight prompts that leave the background open and `seeds` pictures of each.

    The negative prompt is the same thing on a background of the colour that the judge saw without one.
    """
    pipeline, judge = load_pipeline("embedded-student", torch.device("cpu")), embedded_judge()
    attention = with_attention(pipeline.unet)

    def draw(prompts: list[str]) -> list[tuple[list[Placed], str]]:
        latents = generate(pipeline, prompts, list(range(len(prompts))), "splam", STEPS, 1.0, len(prompts))
        return judge.detect(pipeline.decode(latents).clamp(-1, 1).float())

    def embed(prompts: list[str]) -> torch.Tensor:
        return pipeline.encode(prompts)["encoder_hidden_states"]

    kept: dict[Nag | None, list[tuple[bool, bool, bool]]] = {setting: [] for setting in (None, *SETTINGS)}
    for thing, unrelated in zip(OPEN_PROMPTS, UNRELATED, strict=True):
        caption = Caption((thing,), background="red")  # a prompt that names all, and a negative one that has none of it
        attention.negative = None
        plain = draw([thing] * seeds)
        for setting in kept:
            pictures, attention.negative = plain, None
            if setting is not None:
                attention.nag = setting
                attention.negative = embed([str(Caption((thing,), background=ground)) for _, ground in plain])
                pictures = draw([thing] * seeds)
                attention.negative = embed([str(Caption((unrelated,), background="green"))])
            whole = draw([str(caption)] * seeds)
            for (before, ground), (found, now), other in zip(plain, pictures, whole, strict=True):
                if len(before) == 1:
                    right = [placed.thing for placed in found] == [thing]
                    kept[setting].append((now == ground, right, shows(*other, caption)))
        report(f"{thing}: {len(kept[None])} pictures")

    def shares(setting: Nag | None) -> dict:
        negated, right, whole = (sum(column) / len(column) for column in zip(*kept[setting], strict=True))
        return {"negated_share": negated, "accuracy": right, "accuracy_unrelated_negative": whole}

    without, found = shares(None), shares(DEFAULT)
    return {
        "negated_share_without": without["negated_share"],
        "negated_share_with": found["negated_share"],
        "accuracy_without": without["accuracy"],
        "accuracy_with": found["accuracy"],
        "accuracy_cost": without["accuracy"] - found["accuracy"],
        "accuracy_cost_unrelated_negative": without["accuracy_unrelated_negative"]
        - found["accuracy_unrelated_negative"],
        "negation_pictures": len(kept[None]),
        "negation_by_setting": [
            {"scale": nag.scale, "tau": nag.tau, "alpha": nag.alpha, **shares(nag)} for nag in SETTINGS
        ],
    }


@torch.no_grad()
def formula_error() -> float:
    """Largest error against the paper's formula in float64 over its deviation, on SD1.5's and SDXL's shapes."""
    worst = 0.0
    for tokens, channels in ((4096, 320), (1024, 640), (256, 1280), (64, 1280), (4096, 640)):
        generator = torch.Generator().manual_seed(tokens)
        positive, negative = (torch.randn((1, tokens, channels), generator=generator) for _ in range(2))
        negative[:, ::2] = 0.9 * positive[:, ::2] + 0.1 * negative[:, ::2]
        z, other, nag = positive.double(), negative.double(), DEFAULT
        guided = z * nag.scale - other * (nag.scale - 1)
        ratio = guided.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True)
        expected = guided / ratio * ratio.clamp(max=nag.tau) * nag.alpha + z * (1 - nag.alpha)
        error = (normalized_attention(positive, negative, nag) - expected).abs().max() / expected.std()
        worst = max(worst, error.item())
    return worst


@torch.no_grad()
def cost(repeats: int) -> dict:
    """One evaluation with over one without: the embedded student's seconds, and operations of the true SD1.5 at 512 px.

    The pairs are timed in turn, so that what else runs on the machine meets both.
    """
    pipeline = load_pipeline("embedded-student", torch.device("cpu"))
    prompts = pipeline.encode(["a dog", "a dog on a red background"])["encoder_hidden_states"]

    def call(unet, attention, negative, positive, x):
        attention.negative = negative
        unet(x, torch.tensor([499], device=x.device), positive)

    unet, attention = pipeline.unet, with_attention(pipeline.unet)
    x, ratios = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0)), []
    for _ in range(repeats + 1):
        seconds = []
        for negative in (None, prompts[1:]):
            since = time.perf_counter()
            call(unet, attention, negative, prompts[:1], x)
            seconds.append(time.perf_counter() - since)
        ratios.append(seconds[1] / seconds[0])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS["sd15-true-size"].unet).eval()
        attention, operations = with_attention(unet), []
        x, positive = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768)
        for negative in (None, positive):
            with FlopCounterMode(display=False) as counter:
                call(unet, attention, negative, positive, x)
            operations.append(counter.get_total_flops())
    low, middle, high = quantiles(ratios[1:], n=4)
    return {
        "nag_cost_ratio": middle,
        "nag_cost_ratio_quartiles": [low, high],
        "nag_cost_ratio_sd15_operations": operations[1] / operations[0],
    }


def families(comfyui: Path, report: Callable[[str], None] = print) -> dict[str, float]:
    """Largest error of SPLAM Sampler's latents over their deviation: 1, 2, 4 and 8 steps, noise and v predictions."""
    prompt, seed, shape, worst = "a dog on a red background", 7, (1, 4, 16, 16), {}
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models" / "diffusers"
        for number, kind in enumerate(("epsilon", "v_prediction")):
            write_pipeline(models / kind, prediction_type=kind, seed=number)
        references = {kind: Reference(models / kind) for kind in ("epsilon", "v_prediction")}
        tokenizer = load_pipeline("embedded-student", torch.device("cpu")).tokenizer
        token_ids = tokenizer(prompt)["input_ids"]
        with ComfyServer(comfyui, Path(folder), arguments=("--cpu",)) as server:
            for family in ("splam", *FAMILIES):
                errors = []
                for kind, reference in references.items():
                    call = reference.unet, reference.scheduler_config, reference.embed(token_ids)
                    for steps in (1, 2, 4, 8):
                        noises = node_noises(shape, seed)
                        run = few_step if family == "splam" else partial(few_step_of_family, family)
                        graph = text_to_image(f"diffusers/{kind}", prompt, seed=seed, steps=steps, family=family)
                        (file,) = server.files(server.run(save_latent(graph)))
                        found = load(file)["latent_tensor"] * 0.31
                        errors.append(relative_error(found, run(*call, *noises, steps)))
                worst[family] = max(errors)
                report(f"{family}: {worst[family]:.1e}")
    return worst


@torch.no_grad()
def variety(seeds: int) -> dict[str, float]:
    """How far pictures of one prompt lie apart over seeds: of the student (4 steps), of its teacher (DDIM, 20, w 3),
    and of the student after a first step by the teacher at w 3 (`teacher_first`).

    `spread` and `spread_features` are those of training/scoring/variety.py. `spread_colours`: the share of pairs of one
    prompt's pictures in which the judge sees backgrounds of different colours; the prompts leave it open.
    `spread_accuracy`: pictures of the prompt's thing alone.
    """
    teacher, student = (load_pipeline(f"embedded-{name}", torch.device("cpu")) for name in ("teacher", "student"))

    def teacher_first(prompts: list[str], numbers: list[int]) -> torch.Tensor:
        known, nothing, schedule = student.encode(prompts), student.unconditional(), student.schedule
        grid, generators = few_step_timesteps(STEPS), [renoise_generator(number) for number in numbers]
        denoiser = Denoiser(schedule, student.prediction_type)

        def denoise(x, t):
            who, w = (teacher, 3.0) if int(t[0]) == int(grid[0]) else (student, 1.0)
            return denoiser(lambda x, t, _: guided_output(who, x, t, known, nothing, w), x, None, None, t)

        def noise(x, _):
            return torch.stack([torch.randn(x.shape[1:], generator=one) for one in generators])

        begun = [torch.randn(student.latent_shape, generator=torch.Generator().manual_seed(n)) for n in numbers]
        return sample(denoise, torch.stack(begun), grid, schedule, noise)

    draws = {
        "teacher": lambda *of: generate(teacher, *of, "ddim", 20, 3.0, seeds),
        "student": lambda *of: generate(student, *of, "splam", STEPS, 1.0, seeds),
        "teacher_first": teacher_first,
    }
    judge, found = embedded_judge(), {}
    for name, draw in draws.items():
        drawn: list[torch.Tensor] = []

        def pictures(*of, draw=draw, drawn=drawn) -> torch.Tensor:
            drawn.append(student.decode(draw(*of)).float())
            return drawn[-1]

        apart = spread(pictures, OPEN_PROMPTS, range(seeds), judge)
        colours, right = [], []
        for thing, some in zip(OPEN_PROMPTS, drawn, strict=True):
            detected = judge.detect(some)
            right += [[one.thing for one in placed] == [thing] for placed, _ in detected]
            differ = [one != other for (_, one), (_, other) in combinations(detected, 2)]
            colours.append(sum(differ) / len(differ))
        found |= {
            **{f"{key}_{name}": value for key, value in apart.items()},
            f"spread_colours_{name}": sum(colours) / len(colours),
            f"spread_accuracy_{name}": sum(right) / len(right),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go, beside those that are there")
    parser.add_argument("--seeds", type=int, default=16, help="pictures of each of the eight prompts")
    parser.add_argument("--only", choices=("negative", "families", "variety"), help="one part of the numbers")
    options = parser.parse_args()
    if options.only in (None, "families") and not os.environ.get("COMFYUI_PATH"):
        parser.error("COMFYUI_PATH names no ComfyUI; run this through `python dev.py python`.")
    numbers: dict = {}
    if options.only in (None, "negative"):
        numbers |= {"nag_formula_error": formula_error(), **cost(repeats=40), **negation(options.seeds)}
    if options.only in (None, "variety"):
        numbers |= variety(options.seeds)
    if options.only in (None, "families"):
        numbers["families"] = families(Path(os.environ["COMFYUI_PATH"]))
    there = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(there | numbers, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
