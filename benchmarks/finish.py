"""What a finish by distribution matching makes of a student, against LCM given as many UNet forwards.

    python dev.py python -m benchmarks.finish --json docs/results/quality.json --work-dir runs/finish   # hours; resumes
    python dev.py python -m benchmarks.finish --only lcm default --seed 0 --work-dir runs/finish
    python dev.py python -m benchmarks.finish --search --json docs/results/finish.json --work-dir runs/finish

The last finishes the shipped student, which has had a finish already, by different settings. Every run is the trainer's
own, with its cosine schedule and a batch of 32, in bf16 over fp32 weights; forwards are counted as it counts them, a
backward pass 2, and kept paths are charged what solving them costs. Accuracy is the share of 512 pictures that show
exactly their caption; the Frechet distance is clipped, to the teacher's own 50-step pictures of the same captions and
noise. Two-step accuracy is also taken on the way, for the compute that reaches LCM's best.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from training import prepare
from training.models.load import load_pipeline
from training.run.config import Config, complete
from training.run.distillation import Distillation
from training.run.loop import train

from .reproduction import Yardstick

TOTAL = 48_000  # UNet forwards of a run
FINISH = 0.5  # of them the finish's
BATCH, PICTURES, SAMPLES, SEEDS = 32, 512, 64, (0, 1, 2)
PATH_SHARE, PATH_STEPS = 1 / 12, 8  # of the budget for solving kept paths; steps of one
QUARTERS = (0.25, 0.5, 0.75)  # of a stage, at which two steps are scored
STEPS = (1, 2, 4)
MATCHING = "distribution-matching"
SEARCH_STEPS = 92
PLAIN = {
    "train_batch_size": BATCH, "mixed_precision": "bf16", "num_scenes": 2048, "validation_samples": 0,
    "sample_every": 0, "checkpointing_steps": 10**9, "report_to": "none", "release_decay": 0.0,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "lcm": {"method": "lcm", "skip": 20, "solver": "ddim", "solver_skip": 20, "timestep_power": 0.0},  # the paper's LCM
    "paper": {"recipe": "paper", "finish": MATCHING},
    "default": {"finish": MATCHING},
    "kept paths": {"finish": MATCHING, "gamma_one_probability": 0.5},
    "lcm, default's jumps": {"method": "lcm", "finish": MATCHING},
    "nothing": {"finish": MATCHING},
}
SEARCH: dict[str, dict[str, Any]] = {
    "defaults": {},
    "anchor 0": {"finish_anchor": 0.0},
    "rate doubled": {"finish_learning_rate": 1e-4},
    "rate doubled, anchor 2": {"finish_learning_rate": 1e-4, "finish_anchor": 2.0},
    "rate doubled, 4 fake updates": {"finish_learning_rate": 1e-4, "fake_updates": 4},
}


@dataclass(frozen=True)
class Bench:
    """The yardstick, and the folder where what is done is kept."""

    work: Path
    yardstick: Yardstick
    total: int

    def pictures(self, unet: Any, steps: tuple[int, ...]) -> dict[str, float]:
        found: dict[str, float] = {}
        pipeline = replace(self.yardstick.teacher, unet=unet)
        for count in steps:
            row = self.yardstick.pictures_of(pipeline, "splam", count)
            found[f"accuracy_{count}"] = row["attribute_accuracy"]
            found[f"frechet_teacher_clipped_{count}"] = row["frechet_distance_teacher_clipped"]
        if steps == STEPS:
            errors = self.yardstick.endpoint_error(pipeline)
            found["endpoint_error"] = math.exp(sum(map(math.log, errors.values())) / len(errors))
        return found

    def done(self, name: str, seed: int, settings: dict[str, Any], spent: int = 0) -> list[dict[str, Any]]:
        """Rows of one run, as it goes: one at each quarter of a stage, whole ones where a stage ends."""
        file = self.work / f"{name.replace(' ', '-').replace(',', '')}-{seed}-{self.total}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        given = {"teacher": "embedded", "output_dir": self.work / "unused", "seed": seed}
        config = complete({**given, **PLAIN, **settings})
        run = Distillation(config, load_pipeline(config.teacher), Accelerator(cpu=True, mixed_precision="bf16"))
        first, last = config.max_train_steps, config.total_steps
        marks = {round(first * part) for part in QUARTERS} | {first + round((last - first) * part) for part in QUARTERS}
        rows = []
        for progress in train(run):
            spent += progress.unet_forwards
            ends = progress.step in (first, last)
            if not ends and progress.step not in marks:
                continue
            stage = "after finish" if progress.step > first else "before finish"
            about = {"run": name, "seed": seed, "stage": stage, "ends": ends, "step": progress.step}
            with run.networks.use("target") as unet:
                found = self.pictures(unet, STEPS if ends else (2,))
            rows.append({**about, "unet_forwards": spent, **found})
            print(json.dumps(rows[-1]), flush=True)
        file.write_text(json.dumps(rows), encoding="utf-8")
        return rows

    def recipe(self, name: str, seed: int) -> list[dict[str, Any]]:
        """A recipe with all of its budget, the finish's share of it included."""
        settings, spent = dict(RECIPES[name]), 0
        if name == "kept paths":
            count = round(self.total * PATH_SHARE / (2 * PATH_STEPS))
            settings["paths"], spent = self.kept_paths(count, seed), count * 2 * PATH_STEPS
        probe = complete({"teacher": "embedded", "output_dir": self.work / "unused", **settings})
        finish = 0.0 if "finish" not in settings else 1.0 if name == "nothing" else FINISH
        first = round((self.total * (1 - finish) - spent) / (probe.unet_forwards_per_sample * BATCH))
        settings["max_train_steps"] = max(first, 0)
        settings["lr_warmup_steps"] = max(1, first // 20)
        if finish:
            settings["finish_steps"] = round(self.total * finish / (probe.finish_forwards_per_sample * BATCH))
        return self.done(name, seed, settings, spent)

    def kept_paths(self, count: int, seed: int) -> Path:
        folder = self.work / f"paths-{count}-{seed}"
        words = ["--teacher", "embedded", "--paths", str(count), "--output-dir", str(folder), "--num-held-out", "8"]
        prepare.prepare(*prepare.parse([*words, "--path-seed", str(seed)]))
        return folder

    def search(self, names: list[str]) -> list[dict[str, Any]]:
        """Finishes of the shipped student, one seed, as long as the default."""
        given = {"student": "embedded-student", "max_train_steps": 0, "finish": MATCHING, "finish_steps": SEARCH_STEPS}
        start = self.pictures(load_pipeline("embedded-student").unet, STEPS)
        found = {name: self.done(f"search {name}", 0, {**given, **SEARCH[name]}) for name in names}
        ends = [{"settings": SEARCH[name], **rows[-1]} for name, rows in found.items()]
        return [{"run": "as it ships", "unet_forwards": 0, **start}, *ends]


def reached(rows: list[dict[str, Any]], accuracy: float) -> int | None:
    """Forwards after which two steps are first so accurate, as far as was measured."""
    return next((row["unet_forwards"] for row in rows if row["accuracy_2"] >= accuracy), None)


def summary(found: dict[tuple[str, int], list[dict]], teacher: float) -> Iterator[dict[str, Any]]:
    """The rows of docs/results/quality.json: for each recipe and stage the mean and range over its seeds."""
    for name in RECIPES:
        for stage in ("before finish", "after finish"):
            ends = {
                seed: row
                for (recipe, seed), rows in found.items()
                for row in rows
                if recipe == name and ("lcm", seed) in found and row["ends"] and row["stage"] == stage
            }
            if not ends:
                continue
            seeds, rows, peers = list(ends), list(ends.values()), [found["lcm", seed] for seed in ends]
            yield {
                "recipe": name,
                "stage": stage,
                **{f"accuracy_{count}": over([row[f"accuracy_{count}"] for row in rows], seeds) for count in STEPS},
                "teacher_accuracy_50": over([teacher] * len(seeds), seeds),
                **{f"lcm_accuracy_{n}": over([peer[-1][f"accuracy_{n}"] for peer in peers], seeds) for n in STEPS},
                **{
                    f"frechet_teacher_clipped_{n}": over([row[f"frechet_teacher_clipped_{n}"] for row in rows], seeds)
                    for n in STEPS
                },
                "endpoint_error": over([row["endpoint_error"] for row in rows], seeds),
                "unet_forwards": over([row["unet_forwards"] for row in rows], seeds),
                "compute_to_reach_lcm_best": over(
                    [compute(found[name, seed], found["lcm", seed]) for seed in seeds], seeds
                ),
            }


def compute(ours: list[dict], lcm: list[dict]) -> float | None:
    """Our forwards over LCM's, to LCM's best accuracy at two steps; None where it was not reached."""
    best = max(row["accuracy_2"] for row in lcm)
    mine, theirs = reached(ours, best), reached(lcm, best)
    return None if mine is None or theirs is None else mine / theirs


def over(values: list[float | None], seeds: list[int]) -> dict[str, Any] | None:
    """The mean, lowest and highest; None where a seed has none."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"mean": sum(known) / len(known), "low": min(known), "high": max(known), "seeds": seeds}


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| recipe | stage | right at 1 / 2 / 4 steps | LCM | distance at 2 / 4 | forwards | compute to LCM's best |")
    print("| --- | --- | --- | --- | --- | ---: | --- |")
    for row in rows:
        right, lcm = (
            " / ".join(f"{100 * row[f'{prefix}accuracy_{count}']['mean']:.1f}" for count in STEPS)
            for prefix in ("", "lcm_")
        )
        distance = " / ".join(f"{row[f'frechet_teacher_clipped_{count}']['mean']:.3f}" for count in (2, 4))
        reach = row["compute_to_reach_lcm_best"]
        print(
            f"| {row['recipe']} | {row['stage']} | {right} | {lcm} | {distance} | {row['unet_forwards']['mean']:.0f} "
            f"| {'not reached' if reach is None else round(reach['mean'], 3)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--work-dir", type=Path, required=True, help="keeps the teacher's pictures and what is done")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seed", type=int, nargs="+", default=list(SEEDS), help="of the training")
    parser.add_argument("--total", type=int, default=TOTAL, help="UNet forwards of a run")
    parser.add_argument("--search", nargs="*", choices=SEARCH, help="finishes of the shipped student (all) instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    yardstick = Yardstick(options.work_dir, Config.guidance_scale, SAMPLES, PICTURES)
    bench = Bench(options.work_dir, yardstick, options.total)
    if options.search is not None:
        rows = bench.search(options.search or list(SEARCH))
        print(json.dumps(rows, indent=1))
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        return
    found = {(name, seed): bench.recipe(name, seed) for seed in options.seed for name in options.only}
    teacher = yardstick.score(yardstick.pictures)["attribute_accuracy"]
    rows = list(summary(found, teacher))
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
