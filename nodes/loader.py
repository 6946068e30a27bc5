"""SPLAM Loader: MODEL, CLIP and VAE of a SPLAM, from a diffusers folder, a UNet or a single file."""

from comfy_api.latest import io

from ..splam_core.checkpoint import reading
from .announce import warn
from .catalogue import find_models, host_names, locate
from .checkpoints import files_of, load
from .options import search_aliases


class SPLAMLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLAMLoader",
            display_name="SPLAM Loader",
            category="loaders/SPLAM",
            description=(
                "Loads a SPLAM or LCM model as the authors' pipeline does: nothing of the checkpoint is dropped. "
                "Takes diffusers pipelines and UNets (models/diffusers), UNet files (models/diffusion_models), single "
                "files (models/checkpoints) and the models embedded in this pack."
            ),
            **search_aliases("LCM", "load checkpoint", "diffusers", "few steps"),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list(find_models()),
                    tooltip=(
                        "embedded-*: the small models of this pack. alimama-creative/*: the published releases. "
                        "diffusers/* and diffusion_models/*: what lies there; a UNet alone has no CLIP and no VAE. "
                        "Otherwise a single file in checkpoints."
                    ),
                ),
                io.Float.Input(
                    "embedded_guidance",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip=(
                        "For checkpoints with time_embedding.cond_proj only. 1: SPLAM's constant. An LCM checkpoint "
                        "holds its guidance there: give the guidance_scale of diffusers' LCM pipeline (its default is "
                        "8.5, embedded as 7.5)."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The UNet with SPLAM's schedule."),
                io.Clip.Output(tooltip="The text encoder, for CLIP Text Encode; none if the file is a UNet alone."),
                io.Vae.Output(tooltip="The autoencoder, for VAE Decode and Encode; none if the file is a UNet alone."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None) -> bool | str:
        # In place of "value not in list": a sentence that says where models go.
        try:
            with host_names():
                return model_name is None or bool(locate(model_name))
        except ValueError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, embedded_guidance: float = 1.0) -> list[tuple[str, int]]:
        if model_name is None:  # by a link, of which the host does not tell the value: what it hangs on tells
            return []
        # A model that was trained on and exported again, or whose configuration was mended, is loaded again.
        with host_names():
            # By name alone: the host writes what this gives into every picture's metadata.
            return [(file.name, file.stat().st_mtime_ns) for file in files_of(locate(model_name))]

    @classmethod
    def execute(cls, model_name: str, embedded_guidance: float = 1.0) -> io.NodeOutput:
        with host_names():
            location = locate(model_name)
            with reading(location.path):
                loaded = load(location, embedded_guidance)
        if loaded.warnings:
            warn("\n".join(loaded.warnings))
        return io.NodeOutput(loaded.model, loaded.clip, loaded.vae)
