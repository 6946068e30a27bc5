"""SPLAM's sampler and schedule apart, for SamplerCustom and SamplerCustomAdvanced."""

import comfy.samplers
from comfy_api.latest import io

from .few_step import check_steps, sample_splam, splam_sigmas
from .host import Model
from .options import denoise_input, refinements_input, steps_input


class SPLAMSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLAMSamplerSelect",
            display_name="SPLAM Sampler Select",
            category="sampling/SPLAM",
            description="SPLAM's few-step sampler, for SamplerCustom (cfg 1) and SamplerCustomAdvanced (BasicGuider).",
            inputs=[refinements_input()],
            outputs=[io.Sampler.Output(tooltip="Connect to sampler.")],
        )

    @classmethod
    def execute(cls, refinements: int = 0) -> io.NodeOutput:
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_splam, extra_options={"refinements": refinements}))


class SPLAMScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLAMScheduler",
            display_name="SPLAM Scheduler",
            category="sampling/SPLAM",
            description="The noise levels of SPLAM's few steps, on the timesteps that the model was distilled on.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled: its schedule names the noise levels."),
                steps_input(),
                denoise_input(),
            ],
            outputs=[io.Sigmas.Output(tooltip="Connect to sigmas.")],
        )

    @classmethod
    def execute(cls, model: Model, steps: int, denoise: float) -> io.NodeOutput:
        check_steps("SPLAM Scheduler", steps, denoise)
        return io.NodeOutput(splam_sigmas(model.get_model_object("model_sampling"), steps, denoise))
