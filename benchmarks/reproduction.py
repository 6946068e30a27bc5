"""The paper's comparisons on the embedded teacher: trains every student of docs/reproduction.md and measures it.

    python -m benchmarks.reproduction --work-dir runs/reproduction                      # everything: hours on a CPU
    python -m benchmarks.reproduction --work-dir runs/reproduction --only fig3-w8 --seed 0
    python -m benchmarks.reproduction_report --work-dir runs/reproduction --docs docs   # tables, plots, docs/results

Students of a group differ in one thing alone. They are trained in lockstep on the same samples, and as their jumps are
the same, the teacher takes each once for all of them; budgets still count it for every one, as the paper's would. A
budget counts UNet forwards of one sample: a guided teacher step is 2, the target 1, the student 1 and its backward 2.
A group that is finished has its file in the work folder and is not run again; several processes may share the groups.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.server import ROOT
from splam_core import (
    Denoiser,
    Objective,
    few_step_timesteps,
    renoise_generator,
    sample,
    solver_path,
)
from training.models.load import load_pipeline
from training.models.pipeline import DTYPES, Pipeline
from training.models.sampling import generate, guided_output, teacher_function, unet_evaluations
from training.models.teachers import ASSETS
from training.pictures import to_uint8
from training.run.config import Config, complete
from training.run.distillation import Distillation
from training.run.loop import train
from training.scenes.judge import load_judge
from training.scoring.curves import (
    TIMESTEPS,
    delta,
    endpoint_squares,
    student_function,
    teacher_endpoints,
)
from training.scoring.embedded_scores import drawn_captions, features, rendered, scores_of
from training.scoring.metrics import frechet_distance, frechet_distance_clipped

# A student: what it changes of its group's settings. Unless it says so gamma is uniform, as in the paper.
STUDENTS: dict[str, dict[str, Any]] = {
    "lcm": {"method": "lcm"},
    "lcm-random-jump": {"method": "lcm"},  # the control: to a random point of the teacher's path
    "dl-embedding": {"method": "dl", "gamma_conditioning": "embedding"},
    "splam-embedding": {"gamma_conditioning": "embedding"},  # --recipe paper
    "splam-embedding-10": {"gamma_conditioning": "embedding", "gamma_bandwidth": 10.0},
    "splam-embedding-100": {"gamma_conditioning": "embedding", "gamma_bandwidth": 100.0},
    "splam-embedding-10000": {"gamma_conditioning": "embedding", "gamma_bandwidth": 10_000.0},  # the authors' code
    "splam-embedding-half": {"gamma_conditioning": "embedding", "gamma_one_probability": 0.5},
    "splam-noise-level": {},
    "splam-noise-level-half": {"gamma_one_probability": 0.5},
    "splam-default": {"gamma_one_probability": Config.gamma_one_probability},
}
EQUAL = {
    "recipe": "paper",
    "gamma_conditioning": "noise-level",
    "train_batch_size": 32,
    "learning_rate": 3e-4,
    "lr_scheduler": "constant_with_warmup",  # so that every checkpoint on the way is a result of its own
    "lr_warmup_steps": 20,
    "release_decay": 0.0,
    "validation_samples": 0,
    "num_scenes": 2048,
    "checkpointing_steps": 10**9,
}
PAIR = ("lcm", "splam-noise-level")


@dataclass(frozen=True)
class Group:
    """Students that share their jumps; `budget` is each one's. Pictures of SHORT and of the budget are scored."""

    students: tuple[str, ...]
    settings: dict[str, Any]
    budget: int
    seeds: tuple[int, ...] = (0,)
    once: tuple[str, ...] = ()  # students of the first seed alone
    steps: tuple[int, ...] = (2, 4)  # of the pictures at the end


LONG, SHORT, EVERY = 48_000, 24_000, 8_000  # budgets; between two measurements of the endpoint error
ALL = (1, 2, 4, 8)
THREE = (0, 1, 2)
DEFAULT = {key: getattr(Config, key) for key in ("skip", "solver", "solver_skip", "timestep_power")}
GROUPS: dict[str, Group] = {
    "k100": Group(
        ("lcm", "lcm-random-jump", "dl-embedding", "splam-embedding", "splam-noise-level", "splam-noise-level-half"),
        {}, LONG, THREE, ("splam-embedding-10000",), ALL,
    ),
    "k20": Group(("lcm",), {"skip": 20}, LONG, THREE, ("splam-noise-level",), ALL),
    "default": Group(("splam-default", "lcm"), DEFAULT, LONG, THREE, (), ALL),
    "default-single": Group(("splam-default",), {**DEFAULT, "solver_skip": DEFAULT["skip"]}, LONG, THREE, (), ALL),
    "k40": Group(PAIR, {"skip": 40}, SHORT),
    "k200": Group(PAIR, {"skip": 200}, SHORT),
    "k40-single": Group(PAIR, {"skip": 40, "solver_skip": 40}, SHORT),
    "k100-single": Group(PAIR, {"skip": 100, "solver_skip": 100}, SHORT),
    "k200-single": Group(PAIR, {"skip": 200, "solver_skip": 200}, SHORT),
    "bandwidth": Group(("splam-embedding-10", "splam-embedding-100"), {}, SHORT),
    "embedding-half": Group(("splam-embedding-half",), {}, SHORT),
    **{f"fig3-w{w:g}": Group(PAIR, {"guidance_scale": w}, SHORT) for w in (1.5, 5.0, 8.0, 12.0)},
}  # fmt: skip
GUIDANCE = (1.5, 3.0, 5.0, 8.0, 12.0)
TEACHER_W = 3.0
PICTURES, PICTURE_SEED = 256, 0
CURVE_SAMPLES, CURVE_SEED = 128, 0xC0FFEE
DELTA_SAMPLES = 32
# Steps, refinements a step, and whether the noise of every step is that of the first.
SAMPLING = (*((steps, more, False) for steps in (1, 2, 4) for more in (0, 1, 3)), (2, 0, True), (4, 0, True))


class RandomJump(Objective):
    """LCM, but to the end of a random one of the teacher's steps, uniformly: jumps of at most k."""

    def __call__(self, student, target, teacher, x_t: Tensor, t: Tensor, gamma: Tensor) -> Tensor:
        schedule = self.denoiser.schedule
        with torch.no_grad():
            path = solver_path(teacher, x_t, t, self.skip, self.solver_skip, schedule, self.solver)
            steps = 1 + (gamma * (len(path) - 1)).long()
            x_s = torch.stack(path)[steps, torch.arange(len(steps))]
            s = (t - steps * self.solver_skip).clamp(min=0)
            goal = self.denoiser(target, x_s, None, None, s)
        return self.distance(self.denoiser(student, x_t, None, s, t) - goal)


class Remembering(torch.nn.Module):
    """A teacher UNet that does not compute again what it was asked since `forget`; `seconds` is what that took."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.forget()

    @property
    def dtype(self) -> torch.dtype:
        """The trainer casts its teacher when it takes it."""
        return self.unet.dtype

    def forget(self) -> None:
        self.known: list[tuple[Tensor, Tensor, Tensor]] = []
        self.seconds = 0.0

    def forward(self, x: Tensor, t: Tensor, **arguments) -> SimpleNamespace:
        for asked, when, output in self.known:
            if torch.equal(when, t) and torch.equal(asked, x):
                return SimpleNamespace(sample=output)
        since = time.perf_counter()
        output = self.unet(x, t, **arguments).sample
        self.seconds += time.perf_counter() - since
        self.known.append((x, t, output))
        return SimpleNamespace(sample=output)


@dataclass
class Yardstick:
    """What students of one w are measured by: the ends of the teacher's paths, and its own pictures."""

    work: Path
    w: float
    samples: int = CURVE_SAMPLES
    count: int = PICTURES  # 0: no pictures
    teacher: Pipeline = field(init=False)

    def __post_init__(self) -> None:
        self.teacher = load_pipeline("embedded-teacher", "cpu", DTYPES["bf16"])
        self.captions = drawn_captions(PICTURE_SEED, self.count)
        self.prompts = [str(caption) for caption in self.captions]
        self.judge = load_judge(ASSETS / "judge.safetensors")
        captions = drawn_captions(CURVE_SEED, self.samples)
        self.latents = self.teacher.latents(rendered(captions, CURVE_SEED)).float()
        generator = torch.Generator().manual_seed(CURVE_SEED)
        self.noise = torch.randn(self.latents.shape, generator=generator)
        self.conditioning = self.teacher.encode([str(caption) for caption in captions])
        self.nothing = self.teacher.unconditional()
        file = self.work / f"teacher-w{self.w:g}.safetensors"
        if not file.exists():
            beside = file.with_suffix(f".{os.getpid()}")
            save_file(self._ask_teacher(), beside)
            beside.replace(file)
        kept = load_file(file)
        self.pictures = kept.get("pictures")
        self.ends = {t: (kept[f"x.{t}"], kept[f"end.{t}"]) for t in TIMESTEPS}

    @torch.no_grad()
    def _ask_teacher(self) -> dict[str, Tensor]:
        teacher = teacher_function(self.teacher, self.conditioning, self.nothing, self.w)
        ends = teacher_endpoints(teacher, self.latents, self.noise, self.teacher.schedule)
        kept = {f"x.{t}": x_t for t, (x_t, _) in ends.items()} | {f"end.{t}": end for t, (_, end) in ends.items()}
        if self.count:
            kept["pictures"] = self.draw(self.teacher, "ddim", 50, self.w)
        return {name: tensor.contiguous() for name, tensor in kept.items()}

    def draw(self, pipeline: Pipeline, sampler: str, steps: int, w: float) -> Tensor:
        latents = generate(pipeline, self.prompts, range(self.count), sampler, steps, w, batch_size=64)
        return torch.cat([to_uint8(self.teacher.decode(part)) for part in latents.split(64)])

    def score(self, pictures: Tensor, part: slice = slice(None)) -> dict[str, float]:
        """Against renders (the same as training/evaluate.py's) and against the teacher's own pictures.

        part: of the captions, those that the pictures, uint8 [B, 3, H, W], are of.
        """
        teachers = self.pictures[part]
        found, own = (features(self.judge, images.float() / 127.5 - 1) for images in (pictures, teachers))
        return {
            **scores_of(tuple(self.captions[part]))(pictures),
            "frechet_distance_teacher": frechet_distance(found, own),
            "frechet_distance_teacher_clipped": frechet_distance_clipped(found, own),
        }

    def pictures_of(self, pipeline: Pipeline, sampler: str, steps: int, w: float = 1.0) -> dict[str, Any]:
        counts = {"steps": steps, "sampler": sampler, "unet_evaluations_per_image": unet_evaluations(steps, w)}
        return {**counts, **self.score(self.draw(pipeline, sampler, steps, w))}

    @torch.no_grad()
    def endpoint_error(self, pipeline: Pipeline, w: float = 1.0) -> dict[str, float]:
        student = student_function(pipeline, self.conditioning, self.nothing, w)
        return {str(t): square.mean().sqrt().item() for t, square in endpoint_squares(student, self.ends).items()}

    def delta(self, pipeline: Pipeline, w: float = 1.0) -> dict[str, float]:
        some = {key: value[:DELTA_SAMPLES] for key, value in self.conditioning.items()}
        student = student_function(pipeline, some, self.nothing, w)
        samples = self.latents[:DELTA_SAMPLES], self.noise[:DELTA_SAMPLES]
        return {str(t): value for t, value in delta(student, *samples, self.teacher.schedule).items()}


class Student:
    """One run of the trainer, stepped from outside."""

    def __init__(self, name: str, config: Config, first: Student | None = None) -> None:
        """first: the student whose teacher and data this one shares."""
        self.name, self.config, pipeline = name, config, load_pipeline(config.teacher)
        self.teacher = first.teacher if first else Remembering(pipeline.unet)
        objective = config.objective(pipeline.schedule, pipeline.prediction_type)
        if name == "lcm-random-jump":
            objective = RandomJump(**vars(objective))
        data = first.run.data if first else None
        self.run = Distillation(config, pipeline, Accelerator(cpu=True), data, objective, self.teacher)
        self.steps, self.seconds = train(self.run), 0.0

    def row(self) -> dict[str, Any]:
        """What every measurement of this student says of it."""
        config, samples = self.config, self.run.samples
        jumps = config.skip // config.solver_skip
        return {
            "method": self.name,
            "k": config.skip,
            "k_phi": config.solver_skip,
            "solver": config.solver,
            "multiple_estimation": jumps > 1,
            "guidance_scale": config.guidance_scale,
            "seed": config.seed,
            "iterations": self.run.step,
            "teacher_evaluations": samples * 2 * jumps,
            "unet_forwards": samples * config.unet_forwards_per_sample,
            "seconds": self.seconds,
        }

    def judged(self):
        return self.run.networks.use("target")


def run_group(
    group: Group, seed: int, work: Path, scale: float = 1.0, samples: int = CURVE_SAMPLES, pictures: int = PICTURES
) -> list[dict[str, Any]]:
    """Train the group's students in lockstep: a row for each measurement.

    scale multiplies all budgets; endpoint errors are of so many samples, scores of so many pictures (0: none).
    """
    names = group.students + (group.once if seed == group.seeds[0] else ())
    given = {**EQUAL, "teacher": "embedded", "output_dir": work / "unused", "seed": seed, **group.settings}
    configs = [complete({**given, **STUDENTS[name]}) for name in names]
    every, budget = round(EVERY * scale), round(group.budget * scale)
    cost = configs[0].unet_forwards_per_sample * configs[0].train_batch_size
    last = max(1, round(budget / cost))
    students: list[Student] = []
    for name, config in zip(names, configs, strict=True):
        students.append(Student(name, replace(config, max_train_steps=last), students[0] if students else None))
    yardstick = Yardstick(work, configs[0].guidance_scale, samples, pictures)
    teacher = students[0].teacher
    marks = {max(1, round(budget * part / cost)): part == 1 for part in _parts(every, budget)}
    short = round(SHORT * scale / cost)
    rows = []
    for step in range(1, last + 1):
        teacher.forget()
        first = students[0].run
        first.data.batch(
            range(first.samples, first.samples + first.config.train_batch_size)
        )  # encoded at nobody's cost
        for student in students:
            before, since = teacher.seconds, time.perf_counter()
            next(student.steps)
            # Each is charged the teacher's time, though one alone had to wait for it.
            student.seconds += time.perf_counter() - since - (teacher.seconds - before) + teacher.seconds
        if step not in marks and step != last:
            continue
        for student in students:
            with student.judged() as unet:
                pipeline = replace(yardstick.teacher, unet=unet)
                row = {**student.row(), "endpoint_error": yardstick.endpoint_error(pipeline)}
                print(_line(row), flush=True)
                if step == last and pictures and len(group.seeds) > 1 and seed == group.seeds[0]:
                    row["delta"] = yardstick.delta(pipeline)
                rows.append(row)
                counts = group.steps if step == last else (2, 4) if step == short and seed == group.seeds[0] else ()
                for steps in counts if pictures else ():
                    rows.append({**student.row(), **yardstick.pictures_of(pipeline, "splam", steps)})
                    print(_line(rows[-1]), flush=True)
    return rows


def _parts(every: int, budget: int) -> Iterator[float]:
    done = every
    while done < budget:
        yield done / budget
        done += every
    yield 1


def run_teacher(work: Path) -> list[dict[str, Any]]:
    """The teacher by itself: its solvers at few steps, its 50 steps at every w, and F of it before distillation."""
    rows = []
    for w in GUIDANCE:
        yardstick = Yardstick(work, w)
        pipeline = load_pipeline("embedded-teacher")
        about = {"guidance_scale": w, "seed": None, "iterations": 0, "teacher_evaluations": 0, "unet_forwards": 0}
        rows.append({**about, "method": "teacher", "steps": 50, "sampler": "ddim", "unet_evaluations_per_image": 100}
                    | yardstick.score(yardstick.pictures))  # fmt: skip
        undistilled = {**about, "method": "teacher-undistilled"}
        rows.append({**undistilled, "endpoint_error": yardstick.endpoint_error(pipeline, w)})
        if w != TEACHER_W:
            continue
        rows.append({**undistilled, "endpoint_error_unguided": yardstick.endpoint_error(pipeline)})
        rows[-1]["delta"] = yardstick.delta(pipeline, w)
        for steps in ALL:
            for sampler in ("ddim", "dpm-solver++"):
                rows.append({**about, "method": sampler, **yardstick.pictures_of(pipeline, sampler, steps, w)})
            rows.append({**undistilled, **yardstick.pictures_of(pipeline, "splam", steps)})
    return rows


def run_sampling(work: Path) -> list[dict[str, Any]]:
    """The shipped student, sampled otherwise: refinements along the sub-path, and one noise for all steps."""
    yardstick, pipeline = Yardstick(work, TEACHER_W), load_pipeline("embedded-student")
    schedule, count = pipeline.schedule, range(PICTURES)
    denoiser = Denoiser(schedule, pipeline.prediction_type, "noise-level")
    first = [torch.randn(pipeline.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in count]
    rows = []
    for steps, refinements, fixed in SAMPLING:
        generators = [renoise_generator(seed) for seed in count]
        latents = []
        for part in torch.arange(PICTURES).split(64):
            start = torch.stack([first[index] for index in part])
            conditioning = pipeline.encode([yardstick.prompts[index] for index in part])

            def net(x: Tensor, t: Tensor, _: Tensor | None, conditioning=conditioning) -> Tensor:
                return guided_output(pipeline, x, t, conditioning, yardstick.nothing, 1.0)

            def noise(x: Tensor, _: int, part=part, generators=generators) -> Tensor:
                return torch.stack([torch.randn(x.shape[1:], generator=generators[index]) for index in part])

            with torch.no_grad():
                latents.append(
                    sample(
                        lambda x, t, net=net: denoiser(net, x, None, None, t),
                        start,
                        few_step_timesteps(steps),
                        schedule,
                        (lambda _, t, start=start: start) if fixed else noise,
                        refinements=refinements,
                        denoise_gamma=lambda x, gamma, s, t, net=net: denoiser(net, x, gamma, s, t),
                        skip=Config.skip,
                    )
                )
        pictures = torch.cat([to_uint8(pipeline.decode(part)) for part in latents])
        evaluations = steps * (1 + refinements)
        about = {"method": "shipped student", "steps": steps, "refinements": refinements, "noise_fixed": fixed}
        about |= {"k": Config.skip, "guidance_scale": TEACHER_W, "seed": 0, "unet_forwards": None}
        rows.append({**about, "unet_evaluations_per_image": evaluations, **yardstick.score(pictures)})
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    about = f"{row['method']} k={row['k']} w={row['guidance_scale']:g} seed {row['seed']}, {row['unet_forwards']}"
    if "steps" not in row:
        return f"{about}: endpoint error {' '.join(f'{value:.4f}' for value in row['endpoint_error'].values())}"
    return (
        f"{about}, {row['steps']} steps: {100 * row['attribute_accuracy']:.1f} % right, Frechet distance "
        f"{row['frechet_distance']:.3f}, to the teacher's pictures {row['frechet_distance_teacher']:.3f}"
    )


ALONE = {"teacher": run_teacher, "sampling": run_sampling}  # what trains nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "reproduction")
    parser.add_argument("--only", choices=(*ALONE, *GROUPS), nargs="+", default=(*ALONE, *GROUPS))
    parser.add_argument("--seed", type=int, nargs="+", help="of the training (default: all of a group's)")
    parser.add_argument("--scale", type=float, default=1.0, help="of all budgets; for a trial")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        seeds = GROUPS[name].seeds if name in GROUPS else (0,)
        for seed in seeds:
            file = options.work_dir / f"{name}-seed{seed}.json"
            if file.exists() or (options.seed is not None and seed not in options.seed):
                continue
            if name in ALONE:
                rows = ALONE[name](options.work_dir)
            else:
                rows = run_group(GROUPS[name], seed, options.work_dir, options.scale)
            file.write_text(json.dumps([{"group": name, **row} for row in rows]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
