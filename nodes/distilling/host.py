"""The UNet of a MODEL, asked outside the host's sampling and differentiated, and left as it was."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import comfy.weight_adapter
import torch
import torch.utils.checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...splam_core.denoiser import predict_epsilon
from ...splam_core.lora import LoraAdapters, is_lora_target
from ...splam_core.order import digest
from ...splam_core.solver import Teacher, guided
from ..announce import warn
from ..gamma import KEY as GAMMA_POINTS
from ..host import Cond, Conditioning, Model
from ..parametrisation import prediction_type_of, schedule_of

CHECKPOINTED = ("ResBlock", "BasicTransformerBlock")  # the host's classes whose activations are computed again
NAME = "SPLAM Distil"

# What the UNet is told of one sample: the host's names -> its COND objects.
Told = Mapping[str, Cond]


class HostUNet:
    """A MODEL's UNet, with the patches and LoRAs that are on the MODEL.

    Raises ValueError, in the name of `node`, for a MODEL that takes more than latents, and for one that is not of
    discrete noise- or v-prediction.
    """

    def __init__(self, model: Model, checkpointing: bool, node: str = NAME):
        sampling = model.get_model_object("model_sampling")
        self.schedule, self.prediction_type = schedule_of(sampling), prediction_type_of(sampling)
        self.patcher, self.checkpointing = model.clone(), checkpointing
        self.base, self.unet = model.model, model.model.diffusion_model
        self.channels = model.get_model_object("latent_format").latent_channels
        wanted = getattr(self.base.model_config, "unet_config", {}).get("in_channels", self.channels)
        if wanted != self.channels:
            raise ValueError(
                f"{node}: this MODEL takes {wanted} channels, latents have {self.channels}: it is made for inpainting "
                "or for pictures as input. Connect a text-to-image checkpoint."
            )
        self.device = self.patcher.load_device
        self.schedule = self.schedule.to(self.device)
        dtype = self.base.manual_cast_dtype or self.base.get_dtype()
        if dtype == torch.float16 and comfy.model_management.should_use_bf16(self.device):
            dtype = torch.bfloat16  # the gradients of fp16 leave its range
        # 16 bits: each operation in the type that autocast says, as the trainer has it; the weights stay as they are.
        self.autocast = dtype if dtype in (torch.float16, torch.bfloat16) else None
        self.dtype = torch.float32
        if self.autocast is not None:
            self.patcher.set_model_compute_dtype(torch.float32)
        options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
        self.options = options.pop("transformer_options", {})
        unheard = {name for name, value in options.items() if value and value is not True}
        unheard |= {str(key) for calls in self.patcher.wrappers.values() for key, found in calls.items() if found}
        unheard -= {GAMMA_POINTS}
        if unheard:
            warn(
                f"{node}: {', '.join(sorted(unheard))} on the MODEL acts on sampling and is left out: teacher and "
                "student are the UNet, with the LoRAs and patches that are on it."
            )
        # Whatever attention the host was started with: not all have a backward pass.
        self.options.setdefault("optimized_attention_override", _plain_attention)

    def layers(self) -> dict[str, torch.nn.Module]:
        """The layers that a LoRA is trained of, by diffusers' names."""
        names = comfy.utils.unet_to_diffusers(self.base.model_config.unet_config)
        modules = dict(self.unet.named_modules())
        found: dict[str, torch.nn.Module] = {}
        for diffusers, own in names.items():
            name, _, kind = diffusers.rpartition(".")
            module = modules.get(own.rpartition(".")[0])
            if kind == "weight" and is_lora_target(name) and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                found[name] = module
        if not found:
            raise ValueError(f"{NAME}: this MODEL has none of Stable Diffusion's layers that a LoRA is trained of.")
        return found

    def fingerprint(self) -> str:
        """Equal for equal weights, patches and schedules, and no others: by the first values of each tensor."""
        patches = {key: _told(parts) for key, parts in self.patcher.patches.items()}
        values, backup = {}, self.patcher.backup
        for key, weight in self.base.state_dict().items():
            if key in backup:  # the host has a LoRA in it now, perhaps of another MODEL of these weights
                weight = backup[key].weight
            values[key] = _told(weight)
        attention = _told(self.options)
        return digest(values, patches, attention, self.prediction_type, float(self.schedule.alphas_cumprod.sum()))

    def load(self, shape: Sequence[int]) -> None:
        """Brings the UNet to its device, as far as the host's settings let it."""
        needed = self.patcher.memory_required([2 * shape[0], *shape[1:]]) * (2 if self.checkpointing else 6)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)

    def release(self) -> None:
        """Hands the memory of the UNet back to the host."""
        loaded = comfy.model_management.current_loaded_models
        for one in [one for one in loaded if one.model is self.patcher]:
            loaded.remove(one)
            one.model_unload()
        comfy.model_management.soft_empty_cache()

    def told(self, conditioning: Conditioning, latent: torch.Tensor, dtype: torch.dtype = torch.float16) -> list[Told]:
        """What the UNet is told by each entry of a CONDITIONING, for latents like this one [1, C, h, w].

        Kept on the CPU in dtype, half precision as the trainer keeps it.
        """
        with torch.no_grad():
            entries = comfy.sampler_helpers.convert_cond([[one[0], dict(one[1])] for one in conditioning])
            encoded = comfy.samplers.encode_model_conds(self.base.extra_conds, entries, latent, "cpu", "positive")
        told: list[Told] = []
        for entry in encoded:
            conds = {name: one for name, one in entry["model_conds"].items() if isinstance(one.cond, torch.Tensor)}
            told.append(
                {name: one._copy_with(one.cond.detach().to("cpu", dtype, copy=True)) for name, one in conds.items()}
            )
        return told

    def nothing(self, empty: Told) -> Told:
        """What guidance takes for no prompt: the empty one, or zeros where the model has pooled text (SDXL).

        Sizes, which come after the pooled text, stay.
        """
        if "y" not in empty:
            return empty
        blank = dict(empty)
        for name in ("c_crossattn", "y"):
            cond = torch.zeros_like(empty[name].cond)
            if name == "y":  # the pooled text comes first, the sizes after it stay
                text = self.base.model_config.unet_config["adm_in_channels"] - 6 * 256
                cond = empty[name].cond.clone()
                cond[:, :text] = 0
            blank[name] = empty[name]._copy_with(cond)
        return blank

    @contextlib.contextmanager
    def differentiable(self, adapters: LoraAdapters | None) -> Iterator[None]:
        """The UNet can be differentiated meanwhile, with the adapters on it; after it, it is what it was.

        The host must not move the UNet in between.
        """
        owners = [(module, name) for module in self.unet.modules() for name in module._parameters]
        before = [module._parameters[name] for module, name in owners]
        parts = [m for m in self.unet.modules() if type(m).__name__ in CHECKPOINTED]
        blocks = parts if self.checkpointing else []
        hooks = [part.register_forward_hook(_interruptible) for part in parts]
        training = getattr(comfy.model_management, "in_training", None)
        mode = self.unet.training
        try:
            for (module, name), parameter in zip(owners, before, strict=True):
                if parameter is not None:
                    module._parameters[name] = made = torch.nn.Parameter(_usable(parameter), requires_grad=False)
                    # ComfyUI 0.33 writes on a weight what it is to be cast to.
                    vars(made).update({**vars(parameter), **vars(made)})
            for block in blocks:
                block.forward = _again(block.forward)
            if training is not None:
                comfy.model_management.in_training = True
            self.unet.train(False)
            # On a CPU the fused attention's backward pass takes longer than all the rest; the plain one does not.
            attention = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
            with attention, adapters.attached() if adapters is not None else contextlib.nullcontext():
                yield
        finally:
            self.unet.train(mode)
            if training is not None:
                comfy.model_management.in_training = training
            for block in blocks:
                del block.forward
            for hook in hooks:
                hook.remove()
            for (module, name), parameter in zip(owners, before, strict=True):
                module._parameters[name] = parameter

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, told: Sequence[Told], parts: Sequence[int] = (0,)
    ) -> torch.Tensor:
        """The raw output [B, C, h, w], fp32, at (fractional) timesteps [B], told one thing a sample.

        parts: what equal parts of the batch are, as patches of the UNet are told it: 0 a prompt, 1 none.
        """
        first, rest = told[0], told[1:]
        conds = {name: one.concat([other[name] for other in rest]) for name, one in first.items()}
        conds = {name: cond.to(self.device, self.dtype) for name, cond in conds.items()}
        context = conds.pop("c_crossattn", None)
        options = {**self.options, "sigmas": self.schedule.ve_sigma(t), "cond_or_uncond": list(parts)}
        with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            output: torch.Tensor = self.unet(
                x.to(self.device, self.dtype), t.float(), context=context, transformer_options=options, **conds
            )
        return output.float()

    def guided_epsilon(self, told: Sequence[Told], nothing: Told, guidance_scale: float) -> Teacher:
        """The teacher as a function of (x [B, ...], t [B]): both prompts in one batch; 1 takes one pass."""

        def teacher(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            if guidance_scale == 1:
                output = self(x, t, told)
            else:
                both = self(torch.cat([x, x]), torch.cat([t, t]), [*told, *[nothing] * len(told)], (0, 1))
                conditional, unconditional = both.chunk(2)
                output = guided(conditional, unconditional, guidance_scale)
            return predict_epsilon(output, x, self.schedule.alpha(t), self.schedule.sigma(t), self.prediction_type)

        return teacher


def _told(value: Any) -> Any:
    """What tells a weight or a patch from others, as JSON.

    Of an adapter its kind, of a tensor shape and beginning, of a function its name and the values it was made with.
    """
    if isinstance(value, torch.Tensor):
        return [list(value.shape), value.flatten()[:8].to(torch.bfloat16).float().tolist()]
    if isinstance(value, (list, tuple)):
        return [_told(one) for one in value]
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        return [type(value).__name__, *map(_told, vars(value).values())]
    if isinstance(value, dict):
        return {str(key): _told(one) for key, one in value.items()}
    if callable(value) and not isinstance(value, torch.nn.Module):
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if cell != types.CellType()]
        own = [one for one in (*cells, *getattr(value, "__dict__", {}).values()) if not callable(one)]
        return [getattr(value, "__qualname__", type(value).__name__), _told(own)]
    return value if isinstance(value, (int, float, str)) else None


def _usable(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The same memory as a tensor that autograd may keep: the host makes its weights in inference mode."""
    if not parameter.is_inference():
        return parameter.data
    if type(parameter.data) is not torch.Tensor:
        return parameter.clone()
    alias = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return alias.set_(parameter.untyped_storage(), parameter.storage_offset(), parameter.size(), parameter.stride())


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward pass that keeps its inputs alone and is made once more in the backward pass."""

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The host goes on writing into these options; the second time must read what the first did.
        kept = [dict(one) if isinstance(one, dict) else one for one in args]
        kwargs = {key: dict(one) if isinstance(one, dict) else one for key, one in kwargs.items()}
        return torch.utils.checkpoint.checkpoint(forward, *kept, use_reentrant=False, **kwargs)

    return checkpointed


def _interruptible(_: torch.nn.Module, inputs: Any, output: Any) -> None:
    """Has Cancel stop a backward pass as well, which the host does not watch."""
    if isinstance(output, torch.Tensor) and output.requires_grad:
        output.register_hook(_stop_if_cancelled)


def _stop_if_cancelled(_: torch.Tensor) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def _plain_attention(_: Any, *args: Any, **kwargs: Any) -> Any:
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
