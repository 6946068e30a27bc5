"""Nodes of the tests' ComfyUI alone: what other packs do to a MODEL or a CONDITIONING, and what can go wrong."""

import copy
import ctypes
import gc
import inspect
import logging
import os
import sys
import uuid
from pathlib import Path

import comfy.controlnet
import comfy.ldm.modules.attention
import comfy.weight_adapter
import torch


def _as_on_windows() -> None:
    """Has Linux refuse what Windows does: to replace a file from which this process still maps tensors."""
    replace = os.replace

    def guarded(source, target, **options):
        if os.path.realpath(target) in Path("/proc/self/maps").read_text(errors="replace"):
            raise PermissionError(f"{target} is mapped")
        replace(source, target, **options)

    os.replace = guarded


if sys.platform == "linux":
    _as_on_windows()


class TestAdaptersAnew:
    """As ComfyUI 0.33 brings a LoRA to the device piece by piece: makes every adapter anew, of its keys and weights."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        def anew(value):
            is_adapter = isinstance(value, comfy.weight_adapter.WeightAdapterBase)
            return type(value)(value.loaded_keys, value.weights) if is_adapter else value

        model = model.clone()
        model.patches = {
            key: [(first, anew(value), *rest) for first, value, *rest in patches]
            for key, patches in model.patches.items()
        }
        model.patches_uuid = uuid.uuid4()
        return (model,)


class TestAttentionPatch:
    """As IPAdapter does it: attn2's keys and values get more tokens, here the prompt's own at another strength."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "strength": ("FLOAT", {"default": 0.5})}}

    def run(self, model, strength):
        def more_tokens(q, k, v, extra_options):
            return q, torch.cat([k, k * strength], dim=1), torch.cat([v, v * strength], dim=1)

        model = model.clone()
        model.set_model_attn2_patch(more_tokens)
        return (model,)


class TestAttentionReplace:
    """As IPAdapter's newer ways: another function in the place of the middle block's cross-attention."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "strength": ("FLOAT", {"default": 1.0})}}

    def run(self, model, strength):
        def scaled(q, k, v, extra_options):
            return strength * comfy.ldm.modules.attention.optimized_attention(q, k, v, extra_options["n_heads"])

        model = model.clone()
        model.set_model_attn2_replace(scaled, "middle", 0)
        return (model,)


class TestFreshWeights:
    """As ComfyUI 0.33 copies what it trains, compiles or hooks into: with weights of its own, by the loader."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}}

    def run(self, model, clip, vae):
        copies = [self.copy(patcher) for patcher in (model, clip.patcher, vae.patcher)]
        clip, vae = clip.clone(), copy.copy(vae)
        clip.patcher, clip.cond_stage_model = copies[1], copies[1].model
        vae.patcher, vae.first_stage_model = copies[2], copies[2].model
        return copies[0], clip, vae

    def copy(self, patcher):
        if "force_deepcopy" in inspect.signature(patcher.clone).parameters:
            made = patcher.clone(force_deepcopy=True)
        else:
            factory, arguments, *part = patcher.cached_patcher_init
            made = factory(*arguments)
            made = made[part[0]] if part else made
        assert made.model is not patcher.model
        return made


class TestChoice:
    """As the selectors of other packs: a name that reaches a loader by a link."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("COMBO",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def run(self, name):
        return (name,)


class TestNotes:
    """What ComfyUI 0.33 writes on its weights, and by which it casts them, must be there whenever the UNet is asked."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        unet = model.model.diffusion_model
        for parameter in unet.parameters():
            parameter._model_dtype = parameter.dtype

        def patch(hidden, transformer_options):
            if not all(hasattr(parameter, "_model_dtype") for parameter in unet.parameters()):
                raise RuntimeError("what the host wrote on its weights is gone")
            return hidden

        model = model.clone()
        model.set_model_input_block_patch(patch)
        return (model,)


class TestLoudClip:
    """A CLIP that says in the log when it reads a prompt."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",)}}

    def run(self, clip):
        encode, clip = clip.encode_from_tokens_scheduled, clip.clone()

        def loud(*arguments, **options):
            logging.info("TestLoudClip reads a prompt")
            return encode(*arguments, **options)

        clip.encode_from_tokens_scheduled = loud
        return (clip,)


class TestParts:
    """A MODEL whose attention logs what parts of a batch it is told of, and how large the batch is."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        def patch(q, k, v, extra_options):
            logging.info("parts %s of %d", extra_options["cond_or_uncond"], len(q))
            return q, k, v

        model = model.clone()
        model.set_model_attn2_patch(patch)
        return (model,)


class TestOutOfMemory:
    """A MODEL for whose second differentiated step the memory does not suffice."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        steps = []

        def patch(hidden, transformer_options):
            if torch.is_grad_enabled() and transformer_options["block"] == ("input", 0):
                steps.append(None)
                if len(steps) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return hidden

        model = model.clone()
        model.set_model_input_block_patch(patch)
        return (model,)


class _Residual(comfy.controlnet.ControlBase):
    """A ControlNet's part of the work without its network: a residual for the middle block.

    It asks the MODEL for the timestep of a noise level, as the host's ControlNets do, and wants the nearest.
    """

    def pre_run(self, model, percent_to_timestep_function):
        super().pre_run(model, percent_to_timestep_function)
        self.sampling = model.model_sampling

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        nearest = (t.log() - self.sampling.log_sigmas[:, None]).abs().argmin(dim=0)
        if not torch.equal(self.sampling.timestep(t).long(), nearest):
            raise RuntimeError(
                f"timestep {self.sampling.timestep(t).tolist()} of a noise level nearest {nearest.tolist()}"
            )
        batch, _, height, width = x_noisy.shape
        return {"middle": [torch.full((batch, 128, height // 4, width // 4), self.strength)], "output": []}

    def copy(self):
        other = _Residual()
        self.copy_to(other)
        return other


class TestControlNet:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONTROL_NET",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return (_Residual(),)


class TestWrapper:
    """A model function wrapper of another pack: passes on, or runs out of memory."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "out_of_memory": ("BOOLEAN", {"default": False})}}

    def run(self, model, out_of_memory):
        def wrapper(apply_model, arguments):
            if out_of_memory:
                raise torch.OutOfMemoryError("Allocation on device would exceed allowed memory.")
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


class TestConditioning:
    """A prompt of random numbers, for UNets whose text encoder is too large for a test."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        inputs = {"width": ("INT", {"default": 768}), "seed": ("INT", {"default": 0})}
        return {"required": inputs, "optional": {"pooled": ("INT", {"default": 0})}}

    def run(self, width, seed, pooled=0):
        generator = torch.Generator().manual_seed(seed)
        more = {"pooled_output": torch.randn((1, pooled), generator=generator)} if pooled else {}
        return ([[torch.randn((1, 77, width), generator=generator), more]],)


class TestTrimHeap:
    """Has the C library give back what it holds for later use, where it is glibc."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls):
        return float("nan")

    def run(self):
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        return ()


NODE_CLASS_MAPPINGS = {
    "TestAdaptersAnew": TestAdaptersAnew,
    "TestAttentionPatch": TestAttentionPatch,
    "TestAttentionReplace": TestAttentionReplace,
    "TestChoice": TestChoice,
    "TestControlNet": TestControlNet,
    "TestFreshWeights": TestFreshWeights,
    "TestLoudClip": TestLoudClip,
    "TestNotes": TestNotes,
    "TestOutOfMemory": TestOutOfMemory,
    "TestParts": TestParts,
    "TestTrimHeap": TestTrimHeap,
    "TestWrapper": TestWrapper,
    "TestConditioning": TestConditioning,
}
