"""What a training step costs beyond the UNet evaluations that it counts, and what kept paths are worth.

    python dev.py python -m benchmarks.training --json docs/results/performance.json [--full-size]
    python dev.py python -m benchmarks.training --json FILE --only path-reuse --work-dir runs/paths    # goes on

train-bound: the trainer's step against its counted evaluations (backward 2) times that of one bare UNet forward of the
same batch, in turn; the ratio is bound/ours. train-vs-naive: the same step against Algorithm 1 as one would write it
down first: picture and caption encoded in the loop, prompt and no prompt asked of the teacher one after the other.
lora-memory: bytes alive in the step of a LoRA against those of a plain one. scaling: two processes against one.
path-reuse: students of equal budgets in UNet evaluations, those of the paths themselves included, by the distance of
their predictions to the ends of the teacher's own 50-step paths (RMS, geometric mean over four timesteps) and by their
pictures, of one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from splam_core import guided
from training import prepare
from training.models.load import load_pipeline
from training.pictures import to_tensor
from training.run.config import complete
from training.run.consistency import plain_attention
from training.run.distillation import Distillation
from training.run.loop import train
from training.scenes.emoji import scene

from .performance import paired_row, print_table, write_rows
from .reproduction import Yardstick
from .training_cost import bound_row, memory_row, scaling_rows

BUDGET, BATCH = 24_000, 32
SHARES, STEPS = (6, 3, 1.5), 8  # a budget is so many times what its paths cost; steps of a path
SAMPLES, PICTURES = 64, 128  # of an endpoint error, of a score
PARTS = ("train-bound", "train-vs-naive", "lora-memory", "scaling", "path-reuse")


def trainer(folder: Path, **settings: Any) -> Distillation:
    """A run of the embedded teacher, fp32 throughout, so that each of its evaluations costs what a bare one does.

    folder: where its checkpoints go.
    """
    given = {"teacher": "embedded", "output_dir": folder, "teacher_dtype": "fp32", "train_batch_size": BATCH}
    plain = {"validation_samples": 0, "sample_every": 0, "checkpointing_steps": 10**9, "report_to": "none"}
    config = complete({**given, **plain, **settings})
    return Distillation(config, load_pipeline(config.teacher), Accelerator(cpu=True))


def naive(run: Distillation) -> Callable[[], None]:
    """A step of Algorithm 1 with the settings of a run, and no care for its cost."""
    config, pipeline = run.config, load_pipeline("embedded")
    student, target = load_pipeline("embedded").unet, load_pipeline("embedded").unet
    student.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate)
    objective = config.objective(pipeline.schedule, pipeline.prediction_type)
    seen = 0

    def network(unet: torch.nn.Module, told: Tensor):
        return lambda x, t, _: unet(x, t, encoder_hidden_states=told).sample

    def step() -> None:
        nonlocal seen
        indices = range(seen, seen + BATCH)
        pictures, captions = zip(*(scene(config.seed, index)[:2] for index in indices), strict=True)
        latents = pipeline.latents(torch.stack([to_tensor(picture) for picture in pictures]))
        told, empty = (
            pipeline.encode(list(texts))["encoder_hidden_states"] for texts in (map(str, captions), [""] * BATCH)
        )

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            return guided(
                network(pipeline.unet, told)(x, t, None),
                network(pipeline.unet, empty)(x, t, None),
                config.guidance_scale,
            )

        with plain_attention(latents.device):
            loss = config.loss(
                objective, network(student, told), network(target, told), teacher, latents, config.seed, indices
            )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, own in zip(target.parameters(), student.parameters(), strict=True):
                average.lerp_(own, 1 - config.ema_decay)
        seen += BATCH

    return step


def timed(act: Callable[[], Any]) -> float:
    since = time.perf_counter()
    act()
    return time.perf_counter() - since


def step_rows(parts: set[str], repeats: int, folder: Path) -> list[dict]:
    """train-bound and train-vs-naive, whole weights and LoRA; all that is timed comes in turn."""
    rows = []
    for shape, settings in (("embedded, whole", {}), ("embedded, LoRA 64", {"lora": True})):
        run = trainer(folder, max_train_steps=10 * repeats + 10, **settings)
        steps, other = train(run), naive(run)
        latents, conditioning = run.data.batch(range(BATCH))
        unet, t = load_pipeline("embedded").unet, torch.full((BATCH,), 499)

        @torch.no_grad()
        def bare(unet=unet, latents=latents, t=t, conditioning=conditioning) -> None:
            with plain_attention(latents.device):
                unet(latents, t, **conditioning)

        against_naive = "train-vs-naive" in parts and not settings
        acts = [bare, lambda steps=steps: next(steps), *([other] if against_naive else [])]
        for act in acts:
            act()
        found = list(zip(*([timed(act) for act in acts] for _ in range(repeats)), strict=True))
        bound = [seconds * run.config.unet_forwards_per_sample for seconds in found[0]]
        if "train-bound" in parts:
            row = paired_row("train-bound", f"{shape}, batch {BATCH}, k=150 in three", found[1], bound, "s a step")
            low, high = row["spread"]
            rows.append({**row, "ratio": 1 / row["ratio"], "spread": [1 / high, 1 / low]})
        if against_naive:
            rows.append(paired_row("train-vs-naive", f"{shape}, batch {BATCH}", found[1], found[2], "s a step"))
    return rows


def path_rows(work: Path, budget: int) -> list[dict]:
    """path-reuse: sets of different sizes against fresh jumps, SPLAM's by the default recipe and LCM's of one step."""
    yardstick = Yardstick(work, 3.0, SAMPLES, PICTURES)
    fresh = {
        "SPLAM, default recipe": {},
        "LCM, one DDIM step of 150": {"method": "lcm", "solver": "ddim", "solver_skip": 150},
    }
    kept = {}
    for share in SHARES:
        count = round(budget / share / (2 * STEPS))
        folder = work / f"paths-{count}"
        words = ["--teacher", "embedded", "--paths", str(count), "--output-dir", str(folder), "--num-held-out", "8"]
        given, options = prepare.parse(words)
        prepare.prepare(given, options)
        kept[f"{count} paths"] = {"paths": folder, "gamma_one_probability": 0.5}
    scores = {name: scored(work, yardstick, name, settings, budget) for name, settings in (fresh | kept).items()}
    rows = []
    for name in kept:
        for peer in fresh:
            for measure in ("endpoint error", *(f"right at {steps} steps" for steps in (1, 2, 4))):
                ours, theirs = scores[name][measure], scores[peer][measure]
                shape = f"embedded, {budget} evaluations: {name} against {peer}"
                rows.append(
                    {"benchmark": "path-reuse", "shape": shape, "ours": ours, "peer": theirs, "ratio": ours / theirs,
                     "spread": None, "unit": measure}
                )  # fmt: skip
    return rows


def scored(work: Path, yardstick: Yardstick, name: str, settings: dict[str, Any], budget: int) -> dict[str, float]:
    """Train a student of this budget, one seed, and measure it; kept in the work folder."""
    file = work / f"{budget}-{name.replace(' ', '-').replace(',', '')}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    spent = 0
    if "paths" in settings:
        meta = json.loads((settings["paths"] / "meta.json").read_text(encoding="utf-8"))
        spent = 2 * meta["paths"] * meta["path_steps"]
    probe = complete({"teacher": "embedded", **settings})
    updates = (budget - spent) // (probe.unet_forwards_per_sample * BATCH)
    warm = max(1, updates // 20)
    run = trainer(
        work / "unused", max_train_steps=updates, lr_warmup_steps=warm, release_decay=0.0, num_scenes=2048, **settings
    )
    for _ in train(run):
        pass
    with run.networks.use("target") as unet:
        pipeline = replace(yardstick.teacher, unet=unet)
        errors = yardstick.endpoint_error(pipeline)
        found = {"endpoint error": math.exp(sum(map(math.log, errors.values())) / len(errors)), "updates": updates}
        for steps in (1, 2, 4):
            row = yardstick.pictures_of(pipeline, "splam", steps)
            found[f"right at {steps} steps"] = row["attribute_accuracy"]
            found[f"Frechet distance to the teacher's, clipped, at {steps} steps"] = row[
                "frechet_distance_teacher_clipped"
            ]
    print(name, json.dumps({**errors, **found}), flush=True)
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, required=True, help="where the rows go, beside those of benchmarks.sampling"
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--full-size", action="store_true", help="train-bound of the true SD1.5 too, 860 M parameters")
    parser.add_argument("--repeats", type=int, default=12, help="steps timed")
    parser.add_argument("--budget", type=int, default=BUDGET, help="UNet evaluations of a student of path-reuse")
    parser.add_argument("--work-dir", type=Path, help="where path-reuse keeps what is done (none: nowhere)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        if {"train-bound", "train-vs-naive"} & set(options.only):
            rows += step_rows(set(options.only), options.repeats, Path(temporary))
        if options.full_size and "train-bound" in options.only:
            few = max(2, options.repeats // 4)
            rows.append(bound_row("sd15-true-size", "SD1.5, LoRA 64, 256 px", 1, few, Path(temporary), timed))
        if "lora-memory" in options.only:
            rows.append(memory_row("sd15", "SD1.5 with two levels, LoRA 64, 256 px", 4, Path(temporary)))
        if "scaling" in options.only:
            rows += scaling_rows(max(2, options.repeats // 4), 8, Path(temporary))
        if "path-reuse" in options.only:
            work = options.work_dir or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            rows += path_rows(work, options.budget)
    write_rows(options.json, rows)
    print_table(rows)


if __name__ == "__main__":
    main()
