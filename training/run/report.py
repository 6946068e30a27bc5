"""What a run shows: curves, sheets, and at the end the model card and a ComfyUI workflow."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..files import read_lines, write_whole
from ..models.pipeline import Pipeline
from ..models.sampling import generate
from ..pictures import save_sheet, to_images
from ..scenes.emoji import scene
from ..scoring.variety import OPEN_PROMPTS, TEACHER_STEPS, embedded_judge, spread
from .config import Config
from .networks import Networks
from .validation import Score

PROMPTS = 8
STEPS = (1, 2, 4, 8)
SPREAD_SEEDS = 4
SAMPLE_PROMPTS = (
    "a red fox asleep in fresh snow, soft morning light",
    "a lighthouse on a cliff in a storm, oil painting",
    "portrait of an old fisherman with a white beard, studio photograph",
    "a bowl of ramen with an egg and spring onions, seen from above",
    "a narrow street in a mountain village at dusk, lanterns",
    "a blue steam locomotive crossing a stone bridge",
    "a glass of water on a wooden table, sunlight through it",
    "a robot tending tomatoes in a greenhouse, watercolour",
)


def sample_prompts(config: Config) -> list[str]:
    """The prompts of a run's sheets: of --sample-prompts, else scenes for the embedded teacher, else varied ones."""
    if config.sample_prompts:
        lines = [line.strip() for line in read_lines(config.sample_prompts)]
        prompts = [line for line in lines if line][:PROMPTS]
        if not prompts:
            raise ValueError(f"--sample-prompts {config.sample_prompts}: expected prompts, one a line; it has none")
        return prompts
    if is_embedded(config):
        return [str(scene(config.seed + 2, index)[1]) for index in range(PROMPTS)]
    return list(SAMPLE_PROMPTS)


def is_embedded(config: Config) -> bool:
    return config.teacher in ("embedded", "embedded-teacher")


class Sheets:
    """Sheets of the same prompts and seeds, of the size that is trained; the teacher's column is drawn once."""

    def __init__(self, config: Config, pipeline: Pipeline, networks: Networks) -> None:
        self.config, self.pipeline, self.networks = config, pipeline, networks
        self.prompts = sample_prompts(config)
        self.batch_size = max(1, min(64, config.train_batch_size))
        side = None if is_embedded(config) else config.data_options.resolution  # the judge's pictures are of one size
        self.size = (side, side) if side else None
        self.teacher = self._draw("teacher", "ddim", 50, config.guidance_scale)
        self.teachers_spread: dict[str, float] = {}
        if config.paths is not None:  # it will not be there at the end
            self.teachers_spread = self._spread("teacher", "ddim", TEACHER_STEPS, config.guidance_scale)

    def _draw(self, role: str, *how) -> list[Image.Image]:
        return to_images(self._pictures(role, self.prompts, range(len(self.prompts)), *how))

    def _pictures(
        self, role: str, prompts: Sequence[str], seeds: Sequence[int], sampler: str, steps: int, w: float = 1.0
    ) -> Tensor:
        """[B, 3, H, W] in [-1, 1]."""
        pipeline, home = self.pipeline, self.pipeline.vae.device
        with self.networks.use(role) as unet:
            latents = generate(
                replace(pipeline, unet=unet), prompts, seeds, sampler, steps, w, self.batch_size, self.size
            )
        # Text encoders that are not in use stay where they are; the VAE comes when the UNet's activations have gone.
        pipeline.vae.to(pipeline.device)
        try:
            return pipeline.decode(latents)
        finally:
            pipeline.vae.to(home)

    def spread(self, role: str = "target") -> dict[str, float]:
        """Over four seeds of each prompt: of the student in four steps, and, under "_teacher", of its teacher."""
        theirs = self.teachers_spread or self._spread("teacher", "ddim", TEACHER_STEPS, self.config.guidance_scale)
        return self._spread(role, "splam", 4) | {f"{name}_teacher": value for name, value in theirs.items()}

    def _spread(self, role: str, *how) -> dict[str, float]:
        embedded = is_embedded(self.config)
        prompts, judge = (OPEN_PROMPTS, embedded_judge()) if embedded else (self.prompts, None)
        return spread(lambda *of: self._pictures(role, *of, *how), prompts, range(SPREAD_SEEDS), judge)

    def save(self, path: Path | None, role: str = "target") -> None:
        """None: draw only, for a process that sharded networks need."""
        students = [(f"student {steps}", self._draw(role, "splam", steps)) for steps in STEPS]
        if path is not None:
            save_sheet(path, [("teacher 50", self.teacher), *students], self.prompts)


class Trackers:
    """TensorBoard and Weights & Biases, as --report-to says. Raises ValueError if what it names is not installed."""

    def __init__(self, config: Config, first_step: int) -> None:
        self.board = self.wandb = None
        if config.report_to in ("tensorboard", "all"):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(_not_installed("tensorboard", error)) from error
            # What an earlier attempt logged after the checkpoint is hidden.
            self.board = SummaryWriter(str(config.output_dir / "tensorboard"), purge_step=first_step + 1)
        if config.report_to in ("wandb", "all"):
            try:
                import wandb
            except ImportError as error:
                raise ValueError(_not_installed("wandb", error)) from error
            self.wandb = wandb.init(project="splam", dir=str(config.output_dir), config=config.settings())

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(dict(values), step=step)

    def sheet(self, file: Path, step: int) -> None:
        if self.board:
            self.board.add_image("sheet", np.asarray(Image.open(file).convert("RGB")), step, dataformats="HWC")
        if self.wandb:
            import wandb

            self.wandb.log({"sheet": wandb.Image(str(file))}, step=step)

    def close(self) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def flat_scores(scores: Mapping[str, Score]) -> dict[str, float]:
    """Scores by role as one level of names, for logs."""
    flat: dict[str, float] = {}
    for role, score in scores.items():
        flat[f"validation/{role}/loss"] = score.loss
        flat |= {f"validation/{role}/endpoint_error_{t}": value for t, value in score.endpoint_error.items()}
        flat |= {f"validation/{role}/delta_{t}": value for t, value in score.delta.items()}
    return flat


def keep_log(log: Path, step: int) -> None:
    """Drop what a log says of steps after `step`, which will be done again, and a line that was cut off."""
    if log.exists():
        whole = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        write_whole(log, "".join(f"{line}\n" for line in kept).encode())


def read_log(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def save_curves(output_dir: Path, file: Path) -> None:
    """Training loss and validation losses over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, validations = read_log(output_dir / "log.jsonl"), read_log(output_dir / "validation.jsonl")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5))
    left.plot([line["step"] for line in steps], [line["loss"] for line in steps], linewidth=0.5)
    left.set(title="training loss", xlabel="step", yscale="log")
    for role in ("target", "release"):
        key = f"validation/{role}/loss"
        points = [(line["step"], line[key]) for line in validations if key in line]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=role)
            right.legend()
    right.set(title="validation loss (distance to the teacher's path's end)", xlabel="step")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def _not_installed(package: str, error: Exception) -> str:
    return f"--report-to {package} needs the package {package} ({error}): pip install {package}, or --report-to none"


def peak_memory() -> float:
    """This process's peak memory in bytes; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
