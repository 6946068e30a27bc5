"""What a run shows: curves, sheets, and at the end the model card and a ComfyUI workflow."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .config import Config
from ..scenes.shapes import scene
from ..models.sampling import generate
from .networks import Networks
from ..models.pipeline import Pipeline
from ..pictures import save_sheet, to_images
from .validation import Score

PROMPTS = 8
STEPS = (1, 2, 4, 8)
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
WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "splam_txt2img.json"


def sample_prompts(config: Config) -> list[str]:
    """The prompts of a run's sheets: of --sample-prompts, else scenes for the embedded teacher, else varied ones."""
    if config.sample_prompts:
        lines = [line.strip() for line in config.sample_prompts.read_text(encoding="utf-8").splitlines()]
        prompts = [line for line in lines if line][:PROMPTS]
        if not prompts:
            raise ValueError(f"--sample-prompts {config.sample_prompts}: expected prompts, one a line; it has none")
        return prompts
    if config.teacher in ("embedded", "embedded-teacher"):
        return [str(scene(config.seed + 2, index)[1]) for index in range(PROMPTS)]
    return list(SAMPLE_PROMPTS)


class Sheets:
    """Sheets of the same prompts and seeds over a run; the teacher's column is drawn once."""

    def __init__(self, config: Config, pipeline: Pipeline, networks: Networks) -> None:
        self.pipeline, self.networks, self.prompts = pipeline, networks, sample_prompts(config)
        self.batch_size = max(1, min(64, config.train_batch_size))
        self.teacher = self._draw("teacher", "ddim", 50, config.guidance_scale)

    def _draw(self, role: str, sampler: str, steps: int, guidance_scale: float = 1.0) -> list[Image.Image]:
        pipeline, home = self.pipeline, self.pipeline.vae.device
        pipeline.encoders_to(pipeline.device)  # where they were, if training needs them
        try:
            with self.networks.use(role):
                seeds = range(len(self.prompts))
                latents = generate(pipeline, self.prompts, seeds, sampler, steps, guidance_scale, self.batch_size)
            # One by one where a picture is large: the decoder's own activations are.
            return to_images(pipeline.decode(latents, 1 if latents.shape[-1] > 64 else self.batch_size))
        finally:
            pipeline.encoders_to(home)

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
        log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


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


def save_card(
    config: Config, folder: Path, result: Mapping[str, Any], data: str, sheet: Path | None, files: list[str]
) -> None:
    """README.md with the command, the data, the curves and the sheet."""
    shown = [f"| {key} | {value} |" for key, value in result.items() if value is not None]
    command = "python training/distill.py " + shlex.join(_without_paths(sys.argv[1:]))
    base = re.sub(r".*[/\\]", "", config.teacher) if Path(config.teacher).exists() else config.teacher
    text = f"""# {config.name}

A few-step model distilled from `{base}` with {config.method.upper()} ({"LoRA" if config.lora else "full weights"}).
Sample it with 2 to 4 steps of `LCMScheduler` (diffusers) or SPLAM Sampler (ComfyUI), guidance scale 1, no negative
prompt.

{chr(10).join(f"- `{name}`" for name in files)}

## How it was made

```sh
{command}
```

Data: {data}

| | |
| --- | --- |
{chr(10).join(shown)}

Validation loss is the RMS distance, in latents of unit scale, between the student's prediction and the end of the
teacher's own guided path from the same noise, at the timesteps of four-step sampling, on samples that were not trained
on. All settings are in `config.json`.

![curves](curves.png)
"""
    if sheet is not None:
        text += f"\n![the teacher's pictures with 50 steps and the student's with 1, 2, 4 and 8]({sheet.name})\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def save_workflow(config: Config, pipeline: Pipeline, folder: Path, model_name: str, lora_name: str | None) -> Path:
    """The pack's text-to-image workflow with this model, its picture size and a prompt set."""
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    side = pipeline.latent_shape[1] * pipeline.vae_scale
    by_type = {node["type"]: node for node in graph["nodes"]}
    by_type["SPLAMLoader"]["widgets_values"][0] = model_name
    by_type["CLIPTextEncode"]["widgets_values"] = [sample_prompts(config)[0]]
    by_type["EmptyLatentImage"]["widgets_values"][:2] = [side, side]
    for note in (node for node in graph["nodes"] if node["type"] in ("MarkdownNote", "Note")):
        where = "`models/loras/`" if lora_name else "`models/checkpoints/`"
        note["widgets_values"] = [f"## {config.name}\n\nPut `{lora_name or model_name}` into {where}, refresh, run."]
    if lora_name:
        _insert_lora(graph, by_type["SPLAMLoader"], lora_name)
    file = folder / f"{config.name}.workflow.json"
    file.write_text(json.dumps(graph, indent=2) + "\n", encoding="utf-8")
    return file


def _insert_lora(graph: dict, loader: dict, lora_name: str) -> None:
    """A LoraLoaderModelOnly on the MODEL link of the loader."""
    link = next(one for one in graph["links"] if one[1] == loader["id"] and one[5] == "MODEL")
    node_id, link_id = graph["last_node_id"] + 1, graph["last_link_id"] + 1
    node = {
        "id": node_id,
        "type": "LoraLoaderModelOnly",
        "pos": [loader["pos"][0], loader["pos"][1] + 160],
        "size": [320, 82],
        "flags": {},
        "order": 1,
        "mode": 0,
        "inputs": [{"name": "model", "type": "MODEL", "link": link_id}],
        "outputs": [{"name": "MODEL", "type": "MODEL", "slot_index": 0, "links": [link[0]]}],
        "properties": {"Node name for S&R": "LoraLoaderModelOnly"},
        "widgets_values": [lora_name, 1],
    }
    loader["outputs"][0]["links"] = [link_id]
    graph["links"].append([link_id, loader["id"], link[2], node_id, 0, "MODEL"])
    link[1], link[2] = node_id, 0
    graph["nodes"].append(node)
    graph["last_node_id"], graph["last_link_id"] = node_id, link_id


def _without_paths(arguments: list[str]) -> list[str]:
    """Absolute paths as their last part: a card is published, and where a file lay is nobody's business."""
    return [Path(one).name if Path(one).is_absolute() else one for one in arguments]


def _not_installed(package: str, error: Exception) -> str:
    return f"--report-to {package} needs the package {package} ({error}): pip install {package}, or --report-to none"
