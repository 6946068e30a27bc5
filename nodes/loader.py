"""SPLAM Loader: MODEL, CLIP and VAE of a SPLAM, from a diffusers folder or a single file."""

from comfy_api.latest import io

from .catalogue import find_models, locate
from .checkpoints import load, weight_files


class SPLAMLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SPLAMLoader",
            display_name="SPLAM Loader",
            category="loaders/SPLAM",
            description=(
                "Loads a SPLAM or LCM model as the authors' pipeline does: nothing of the checkpoint is dropped. "
                "Takes diffusers pipeline folders (models/diffusers), single files (models/checkpoints) and the models "
                "embedded in this pack."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list(find_models()),
                    tooltip=(
                        "embedded-*: the small models of this pack. diffusers/*: a folder with model_index.json. "
                        "Otherwise a single file."
                    ),
                )
            ],
            outputs=[
                io.Model.Output(tooltip="The UNet with SPLAM's schedule."),
                io.Clip.Output(tooltip="The text encoder, for CLIP Text Encode."),
                io.Vae.Output(tooltip="The autoencoder, for VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name):
        # A model that was trained on and exported again is loaded again.
        return [(str(file), file.stat().st_mtime_ns) for file in weight_files(locate(model_name))]

    @classmethod
    def execute(cls, model_name) -> io.NodeOutput:
        return io.NodeOutput(*load(locate(model_name)))
