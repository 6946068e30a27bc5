"""Inputs that more than one node has: one wording, one range."""

from typing import Any

from comfy_api.latest import io


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
