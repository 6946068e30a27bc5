"""SPLAM Distil Report: teacher and student at several steps for the same prompts and seeds, as one picture."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io

from ..splam_core.denoiser import Denoiser
from .announce import tell
from .distilling.host import HostUNet
from .distilling.judging import endpoint_error, teacher_ends
from .distilling.pictures import sheet, student_latents, teacher_latents, to_images, to_tensor
from .distilling.prompts import prompt_file, read_prompts
from .host import Clip, Conditioning, Model, Vae
from .options import search_aliases
from .sockets import connected

NAME = "SPLAM Distil Report"
STUDENT_STEPS = (1, 2, 4, 8)
ROWS = 8  # prompts of a report at most


class SPLAMDistilReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLAMDistilReport",
            display_name="SPLAM Distil Report",
            category="training/SPLAM",
            description=(
                "How good a distilled model is: the teacher at many steps beside the student at 1, 2, 4 and 8, for the "
                "same prompts and seeds, with the endpoint error and the loss curve, as one labelled picture."
            ),
            **search_aliases("distillation report", "compare steps", "loss curve"),
            inputs=[
                io.Model.Input("teacher", tooltip="The model that was distilled."),
                io.Model.Input("student", tooltip="The same with its few-step LoRA: of SPLAM Distil, or any loader."),
                io.Clip.Input("clip", tooltip="Reads the prompts; from the checkpoint's loader."),
                io.Vae.Input("vae", tooltip="Makes the pictures; from the checkpoint's loader."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="Up to eight, one a line, or a .txt file of the input folder. Empty: those of this pack.",
                ),
                io.Int.Input("rows", default=4, min=1, max=ROWS, tooltip="How many of the prompts are drawn."),
                io.Int.Input(
                    "resolution", default=512, min=64, max=2048, step=8, tooltip="Pixels of the square pictures."
                ),
                io.Int.Input(
                    "teacher_steps", default=25, min=4, max=100, tooltip="Of the teacher, with DPM-Solver++: 20 to 50."
                ),
                io.Float.Input(
                    "guidance", default=3.0, min=1.0, max=30.0, step=0.1, tooltip="The teacher's, as in SPLAM Distil."
                ),
                io.Custom("LOSS_MAP").Input("loss_map", optional=True, tooltip="Of SPLAM Distil: the curve below."),
            ],
            outputs=[
                io.Image.Output(display_name="report", tooltip="The labelled picture, for Save Image."),
                io.Float.Output(
                    display_name="endpoint_error",
                    tooltip="RMS distance of the student's jump to the end of the teacher's path; lower is better.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, prompts: str | None, **_: Any) -> int:
        file = prompt_file(prompts, NAME) if prompts else None
        return 0 if file is None else file.stat().st_mtime_ns

    @classmethod
    @connected
    def execute(
        cls,
        teacher: Model,
        student: Model,
        clip: Clip,
        vae: Vae,
        prompts: str,
        rows: int,
        resolution: int,
        teacher_steps: int,
        guidance: float,
        loss_map: dict[str, list[float]] | None = None,
    ) -> io.NodeOutput:
        if resolution % 8:
            raise ValueError(
                f"{NAME}: resolution must be a multiple of 8, got {resolution}. Use {resolution // 8 * 8}."
            )
        chosen = read_prompts(prompts, NAME)[:rows]
        bar = comfy.utils.ProgressBar(len(STUDENT_STEPS) + 2)
        with torch.inference_mode(False), torch.no_grad():
            first = HostUNet(teacher, checkpointing=False, node=NAME)
            shape = (first.channels, resolution // 8, resolution // 8)
            blank = torch.zeros(1, *shape)
            *told, empty = [first.told(one, blank, torch.float32)[0] for one in read(clip, [*chosen, ""])]
            nothing = first.nothing(empty)
            with _ready(first, shape):
                latents = teacher_latents(first, told, nothing, shape, guidance, teacher_steps)
                bar.update(1)
                ends = teacher_ends(first, told, nothing, guidance, latents.to(first.device), seed=0)
                bar.update(1)
            columns = [(f"teacher, {teacher_steps} steps", to_images(first, vae, latents))]
            second = HostUNet(student, checkpointing=False, node=NAME)
            denoiser, drawn = Denoiser(second.schedule, second.prediction_type, "noise-level"), []
            with _ready(second, shape):
                error = endpoint_error(second, denoiser, told, ends)
                for steps in STUDENT_STEPS:
                    drawn.append(student_latents(second, denoiser, told, shape, steps))
                    bar.update(1)
            for steps, made in zip(STUDENT_STEPS, drawn, strict=True):
                columns.append((f"student, {steps} step{'s' if steps > 1 else ''}", to_images(second, vae, made)))
        losses = (loss_map or {}).get("loss", [])
        lines = [f"endpoint error {error:.4g}"] + ([f"loss over {len(losses)} steps"] if losses else [])
        tell(f"{NAME}: {lines[0]}")
        return io.NodeOutput(to_tensor(sheet(columns, lines, losses)), error)


def read(clip: Clip, prompts: Sequence[str]) -> list[Conditioning]:
    return [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts]


@contextmanager
def _ready(host: HostUNet, shape: tuple[int, int, int]) -> Iterator[None]:
    """The UNet is loaded and can be asked outside the host's sampling meanwhile."""
    try:
        host.load((2, *shape))
        with host.differentiable(None):
            yield
    finally:
        host.release()
