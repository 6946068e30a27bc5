"""Inputs that more than one node has: one wording, one range."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..splam_core.families import FAMILIES

FAMILY_CHOICES = (*FAMILIES, "auto")


def search_aliases(*names: str) -> dict[str, list[str]]:
    """Schema's argument with other names under which the page's search finds a node; none in a host that lacks it."""
    return {"search_aliases": list(names)} if "search_aliases" in {field.name for field in fields(io.Schema)} else {}


def check_choice(node: str, name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError for a value that a list does not have: not every host looks."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{node}: {name} is {value!r:.80}. Choose one of {', '.join(known)}.")


def steps_input() -> io.Int.Input:
    return io.Int.Input(
        "steps", default=4, min=1, max=8, tooltip="Model evaluations. 2 to 4 is what SPLAM is made for."
    )


def denoise_input() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="1 makes a new picture; less keeps more of the latent image. At least steps/50.",
    )


def refinements_input() -> io.Int.Input:
    return io.Int.Input(
        "refinements",
        default=0,
        min=0,
        max=8,
        optional=True,
        tooltip=(
            "EXPERIMENTAL, leave at 0: further evaluations a step along the sub-path. Needs SPLAM Model Patch with "
            "gamma_conditioning; one more step gains more."
        ),
    )


def nag_scale_input(default: float, optional: bool = False) -> io.Float.Input:
    return io.Float.Input(
        "nag_scale",
        default=default,
        min=1.0,
        max=20.0,
        step=0.1,
        optional=optional,
        tooltip=(
            "How far the picture is led away from the negative prompt, in the attention and at one evaluation a step "
            "(normalised attention guidance). 1 is off; 3 to 8 is usual."
        ),
    )


def advanced(widget: Any) -> Any:
    """The same input, which the page shows among the advanced ones; older hosts have no argument for it."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget


def family_input() -> io.Combo.Input:
    return io.Combo.Input(
        "family",
        options=list(FAMILY_CHOICES),
        default="splam",
        optional=True,
        tooltip=(
            "How the model was distilled. splam: SPLAM and LCM. dmd2: DMD2. tcd: TCD. hyper: Hyper-SD's LoRA for any "
            "number of steps. lightning: Lightning. ddim: PCM, and Hyper-SD of a fixed number of steps. auto: what the "
            "model's files tell, which is said when it runs."
        ),
    )


def eta_input() -> io.Float.Input:
    return io.Float.Input(
        "eta",
        default=0.3,
        min=0.0,
        max=1.0,
        step=0.05,
        optional=True,
        tooltip=(
            "Of the families tcd and hyper alone: share of fresh noise between the steps. 0 is none; 0.3 is TCD's, 1 "
            "Hyper-SD's at few steps."
        ),
    )
