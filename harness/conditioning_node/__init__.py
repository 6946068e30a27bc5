"""A custom node for the benchmark's ComfyUI alone: prompt embeddings from a file, so that no text encoder is needed."""

from pathlib import Path

import folder_paths
from safetensors.torch import load_file


class ConditioningFromFile:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "load"
    CATEGORY = "benchmark"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def load(self, name: str):
        """The tensors "embeds" [B, 77, C] and, for SDXL, "pooled" [B, C2] of a file in the input folder."""
        tensors = load_file(Path(folder_paths.get_input_directory()) / Path(name).name)
        extra = {"pooled_output": tensors["pooled"]} if "pooled" in tensors else {}
        return ([[tensors["embeds"], extra]],)


NODE_CLASS_MAPPINGS = {"ConditioningFromFile": ConditioningFromFile}
