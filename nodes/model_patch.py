"""SPLAM Model Patch: SPLAM's parametrisation, and gamma where it is wanted, for a MODEL from anywhere."""

from comfy_api.latest import io

from .gamma import patch_gamma
from .host import Model
from .options import check_choice, search_aliases
from .parametrisation import as_consistency_model
from .sockets import connected

GAMMA_CONDITIONINGS = ("none", "noise-level", "embedding")


class SPLAMModelPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLAMModelPatch",
            display_name="SPLAM Model Patch",
            category="model_patches/SPLAM",
            description=(
                "Gives any MODEL of Stable Diffusion 1.x, 2.x or XL the sampling parametrisation of SPLAM and LCM, "
                "after LoRAs, IPAdapter and other patches. Other samplers of the host then read its output rightly."
            ),
            **search_aliases("LCM", "ModelSamplingDiscrete"),
            inputs=[
                io.Model.Input("model", tooltip="A few-step model from any loader, with or without LoRAs and patches."),
                io.Combo.Input(
                    "gamma_conditioning",
                    options=list(GAMMA_CONDITIONINGS),
                    default="none",
                    tooltip=(
                        "Only for the experimental refinements: how the UNet is told where on a sub-path it is. "
                        "noise-level needs no weights; embedding needs a checkpoint with time_embedding.cond_proj."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched model; the one that came in stays as it was.")],
        )

    @classmethod
    @connected
    def execute(cls, model: Model, gamma_conditioning: str) -> io.NodeOutput:
        check_choice("SPLAM Model Patch", "gamma_conditioning", gamma_conditioning, GAMMA_CONDITIONINGS)
        if gamma_conditioning == "none":
            return io.NodeOutput(as_consistency_model(model))
        return io.NodeOutput(patch_gamma(model, gamma_conditioning))
