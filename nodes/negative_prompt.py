"""SPLAM Negative Prompt: a negative prompt at guidance 1, for any sampler."""

from comfy_api.latest import io

from ..splam_core.nag import Nag
from .host import Conditioning, Model
from .nag import patch_negative
from .options import nag_scale_input, search_aliases
from .sockets import connected


class SPLAMNegativePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLAMNegativePrompt",
            display_name="SPLAM Negative Prompt",
            category="model_patches/SPLAM",
            description=(
                "A negative prompt that works at guidance (cfg) 1, at one evaluation a step: normalised attention "
                "guidance (NAG) in the cross-attention of any UNet of Stable Diffusion 1.x, 2.x or XL, SPLAM or not, "
                "under any sampler."
            ),
            **search_aliases("NAG", "normalized attention guidance", "negative prompt cfg 1"),
            inputs=[
                io.Model.Input("model", tooltip="After LoRAs, IPAdapter and other patches, or before: they all stay."),
                io.Conditioning.Input("negative", tooltip="What the picture should not show."),
                nag_scale_input(5.0),
                io.Float.Input(
                    "nag_tau",
                    default=2.5,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    tooltip="How far the attention's L1 norm may grow: more is stronger, too much burns the picture.",
                ),
                io.Float.Input(
                    "nag_alpha",
                    default=0.25,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the guided attention in its blend with the plain one. 0 is off.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched model; the one that came in stays as it was.")],
        )

    @classmethod
    @connected
    def execute(
        cls, model: Model, negative: Conditioning, nag_scale: float, nag_tau: float, nag_alpha: float
    ) -> io.NodeOutput:
        nag = Nag(nag_scale, nag_tau, nag_alpha)
        return io.NodeOutput(patch_negative(model, negative, nag, "SPLAM Negative Prompt"))
