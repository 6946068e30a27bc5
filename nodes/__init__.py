"""The ComfyUI nodes: a schema and one call each. Imports are relative: ComfyUI has a module `nodes` of its own."""

from comfy_api.latest import ComfyExtension, io

from .custom_sampling import SPLAMSamplerSelect, SPLAMScheduler
from .distil import SPLAMDistil
from .distil_report import SPLAMDistilReport
from .fetch import SPLAMFetch
from .few_step import register
from .loader import SPLAMLoader
from .lora import SPLAMLoraLoader
from .model_patch import SPLAMModelPatch
from .negative_prompt import SPLAMNegativePrompt
from .sampler import SPLAMSampler


class SPLAMExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register()
        return [
            SPLAMDistil,
            SPLAMDistilReport,
            SPLAMFetch,
            SPLAMLoader,
            SPLAMLoraLoader,
            SPLAMModelPatch,
            SPLAMNegativePrompt,
            SPLAMSampler,
            SPLAMSamplerSelect,
            SPLAMScheduler,
        ]
