"""SPLAM's sampler and schedule apart, for SamplerCustom and SamplerCustomAdvanced."""

from comfy_api.latest import io

from .families import family_of, family_sigmas, sampler_of
from .host import Model
from .options import denoise_input, eta_input, family_input, refinements_input, search_aliases, steps_input
from .sockets import connected


class SPLAMSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLAMSamplerSelect",
            display_name="SPLAM Sampler Select",
            category="sampling/SPLAM",
            description="SPLAM's few-step sampler, for SamplerCustom (cfg 1) and SamplerCustomAdvanced (BasicGuider).",
            **search_aliases("LCM", "DMD2", "TCD", "Hyper-SD", "few steps"),
            inputs=[refinements_input(), family_input(), eta_input()],
            outputs=[io.Sampler.Output(tooltip="Connect to sampler.")],
        )

    @classmethod
    def execute(cls, refinements: int = 0, family: str = "splam", eta: float = 0.3) -> io.NodeOutput:
        return io.NodeOutput(sampler_of(family, refinements, eta))


class SPLAMScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLAMScheduler",
            display_name="SPLAM Scheduler",
            category="sampling/SPLAM",
            description="The noise levels of SPLAM's few steps, on the timesteps that the model was distilled on.",
            **search_aliases("LCM", "DMD2", "trailing timesteps", "sgm_uniform", "few steps"),
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled: its schedule names the noise levels."),
                steps_input(),
                denoise_input(),
                family_input(),
            ],
            outputs=[io.Sigmas.Output(tooltip="Connect to sigmas.")],
        )

    @classmethod
    @connected
    def execute(cls, model: Model, steps: int, denoise: float, family: str = "splam") -> io.NodeOutput:
        chosen = family_of("SPLAM Scheduler", model, family)
        sampling = model.get_model_object("model_sampling")
        return io.NodeOutput(family_sigmas("SPLAM Scheduler", sampling, chosen, steps, denoise))
