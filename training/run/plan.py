"""What a run will take, before it starts: memory, UNet evaluations, steps and pictures, by arithmetic alone.

Shapes come from the teacher's own config.json or, where it is not on this machine, from the published ones; the network
is laid out on torch's meta device, which has shapes and no values, so that counting costs neither memory nor weights.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from splam_core.recipe import LORA_TARGETS

from ..models.architectures import ARCHITECTURES, Architecture
from ..models.files import family_of_file
from ..models.pipeline import DTYPES
from ..models.teachers import TEACHERS, resolve
from .config import Config
from .networks import GAMMA_DIM, base_dtype
from .optimizers import state_bytes

GB = 1e9
CARDS = (8, 12, 16, 24, 48, 80)  # GB
# CUDA's context and what its allocator cannot use.
RESERVED, FRAGMENTED = 0.5 * GB, 1.05


@dataclass(frozen=True)
class Plan:
    """Bytes on the device, but for `release`, which lies in main memory."""

    unet_parameters: int
    trained_parameters: int
    frozen: float  # UNet as teacher
    encoders: float  # VAE and text encoders, while they encode the data
    trained: float  # student or its adapters, fp32
    target: float
    gradients: float
    optimizer: float
    casts: float  # 16-bit copies that mixed precision makes of fp32 weights
    release: float
    activations: float  # one sample's, kept for the backward pass
    working: float  # one sample's, of the teacher's guided pass (two UNet rows)

    @property
    def fixed(self) -> float:
        return self.frozen + self.trained + self.target + self.gradients + self.optimizer + self.casts

    def peak(self, batch_size: int) -> float:
        """While training. Data that are cached first need `encoders` and the UNet before that, which is less."""
        return (self.fixed + batch_size * max(self.activations, self.working)) * FRAGMENTED + RESERVED


def plan(config: Config) -> Plan:
    """The arithmetic of a run. Raises ValueError for a teacher that is neither here nor a preset."""
    architecture, resolution = shapes(config)
    dtype = base_dtype(config)
    running = DTYPES[config.mixed_precision] if config.mixed_precision != "no" else torch.float32
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(architecture.unet)
        encoders = [AutoencoderKL.from_config(architecture.vae), CLIPTextModel(architecture.clip())]
        if architecture.text_encoder_2:
            encoders.append(CLIPTextModelWithProjection(architecture.clip(second=True)))
    parameters = _count(unet)
    projection = GAMMA_DIM * unet.config.block_out_channels[0] * (config.conditioning == "embedding")
    unet.requires_grad_(not config.lora)
    if config.lora:
        targets = config.lora_target_modules.split(",") if config.lora_target_modules else LORA_TARGETS
        with torch.device("meta"):
            unet.add_adapter(LoraConfig(r=config.lora_rank, target_modules=list(targets)), "student")
        trained = _count(unet) - parameters + projection
    else:
        trained = parameters + projection
    saved, working = activation_bytes(
        nn.Module.to(unet, running), architecture, resolution, config.gradient_checkpointing
    )
    mixed = config.mixed_precision != "no"
    return Plan(
        unet_parameters=parameters,
        trained_parameters=trained,
        frozen=parameters * _size(dtype),
        encoders=4.0 * sum(map(_count, encoders)),
        trained=4.0 * trained,
        target=4.0 * trained,
        gradients=4.0 * trained,
        optimizer=state_bytes(config.optimizer) * trained,
        casts=2.0 * trained if mixed else 0.0,
        release=4.0 * trained if config.release_decay else 0.0,
        activations=saved,
        working=2 * working,
    )


def shapes(config: Config) -> tuple[Architecture, int]:
    """The teacher's shapes and the pictures' side in pixels."""
    preset = TEACHERS.get(config.teacher)
    try:
        folder = resolve(config.teacher, config.revision)
    except FileNotFoundError:
        if preset is None:
            raise
        folder = None
    if folder is not None and folder.is_dir():
        folder = folder / "pipeline" if (folder / "pipeline" / "unet").is_dir() else folder
        second = folder / "text_encoder_2" / "config.json"
        architecture = Architecture(
            unet=_json(folder / "unet" / "config.json"),
            vae=_json(folder / "vae" / "config.json"),
            text_encoder=_json(folder / "text_encoder" / "config.json"),
            text_encoder_2=_json(second) if second.is_file() else None,
        )
    else:
        architecture = ARCHITECTURES[preset.family if preset else family_of_file(folder)]
    native = architecture.unet["sample_size"] * 2 ** (len(architecture.vae["block_out_channels"]) - 1)
    return architecture, config.data_options.resolution or (preset.resolution if preset else native)


def activation_bytes(
    unet: UNet2DConditionModel, architecture: Architecture, resolution: int, checkpointing: bool
) -> tuple[float, float]:
    """(bytes kept for the backward pass, bytes at work without one) of one sample; unet on the meta device.

    Autograd's own hooks say what it keeps. Checkpointed blocks keep their input, and one at a time all the rest.
    Attention is counted as the fused kernels keep it: queries, keys, values and output, no matrix.
    """
    side = resolution // 2 ** (len(architecture.vae["block_out_channels"]) - 1)
    width = unet.config.cross_attention_dim
    dtype = next(p.dtype for p in unet.parameters())
    weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    inside: list[nn.Module] = []
    kept: dict[nn.Module | None, dict[int, int]] = {None: {}}
    entering, largest = 0.0, 0.0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[inside[-1] if inside else None][storage._cdata] = tensor.numel() * tensor.element_size()
        alive.append(tensor)  # or another tensor would take its storage's address
        return tensor

    def enter(module: nn.Module, inputs: tuple, arguments: dict) -> None:
        nonlocal entering
        if not inside:
            tensors = [one for one in (*inputs, *arguments.values()) if isinstance(one, Tensor)]
            entering += sum(one.numel() * one.element_size() for one in tensors[:1])
        inside.append(module)
        kept[module] = {}

    def leave(module: nn.Module, *_) -> None:
        inside.pop()

    def watch(_: nn.Module, __: tuple, output) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size())

    alive: list[Tensor] = []
    hooks = [module.register_forward_hook(watch) for module in unet.modules()]
    if checkpointing:
        for module in unet.modules():
            if isinstance(module, (ResnetBlock2D, BasicTransformerBlock)):
                hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.append(module.register_forward_hook(leave))
    with torch.device("meta"):
        x = torch.empty(1, unet.config.in_channels, side, side, dtype=dtype)
        added = {}
        if unet.config.addition_embed_type == "text_time":
            pooled = architecture.text_encoder_2["projection_dim"]
            added = {"added_cond_kwargs": {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}}
        arguments = {"encoder_hidden_states": torch.empty(1, 77, width, dtype=dtype), **added}
        if added:
            added["added_cond_kwargs"]["text_embeds"] = added["added_cond_kwargs"]["text_embeds"].to(dtype)
        with _fused_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unet(x, torch.empty(1), **arguments)
    for hook in hooks:
        hook.remove()
    blocks = [sum(own.values()) for module, own in kept.items() if module is not None]
    outside = sum(kept[None].values())
    saved = outside + (entering + max(blocks, default=0.0) if checkpointing else 0.0)
    # Without a backward pass: the skip connections (about as much as enters the down blocks) and a block's few tensors.
    channels, skips, level = unet.config.block_out_channels, 0.0, side
    for place, channel in enumerate(channels):
        skips += (unet.config.layers_per_block + 1) * channel * level**2 * _size(dtype)
        level = level // 2 if place + 1 < len(channels) else level
    return saved, skips + 4 * largest


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: _FusedAttention.apply(q, k, v)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def largest_batch(found: Plan, memory: float) -> int:
    """The largest power of two that fits into so many bytes; 0 if one sample does not."""
    fitting = itertools.takewhile(lambda size: found.peak(size) <= memory, (2**n for n in range(12)))
    return max(fitting, default=0)


def describe(config: Config, found: Plan) -> str:
    """The plan as text."""
    batch, many = config.train_batch_size, config.gradient_accumulation_steps
    images = config.max_train_steps * batch * many
    kind = f"LoRA of rank {config.lora_rank}" if config.lora else "full weights"
    rows = [
        ("frozen UNet" if config.lora else "frozen teacher", found.frozen, str(base_dtype(config))[6:]),
        ("trained weights, fp32", found.trained, f"{found.trained_parameters / 1e6:.1f} M parameters"),
        ("target", found.target, "fp32"),
        ("gradients", found.gradients, "fp32"),
        (f"optimizer ({config.optimizer})", found.optimizer, ""),
        ("16-bit copies of trained weights", found.casts, ""),
        (f"activations, batch {batch}", batch * max(found.activations, found.working), "an estimate"),
    ]
    lines = [
        f"{config.method.upper()} of {config.teacher}: {kind}, UNet of {found.unet_parameters / 1e6:.1f} M parameters",
        f"k={config.skip}, k_phi={config.solver_skip} ({config.solver}), w={config.guidance_scale:g}, "
        f"{config.loss_type}, gamma by {config.conditioning}, learning rate {config.learning_rate:g}, "
        f"mixed precision {config.mixed_precision}, "
        f"gradient checkpointing {'on' if config.gradient_checkpointing else 'off'}",
        "",
        "memory on the device",
        *(f"  {name:<34} {size / GB:8.2f} GB  {note}".rstrip() for name, size, note in rows),
        f"  {'in all, with allocator and context':<34} {found.peak(batch) / GB:8.2f} GB",
        f"  before training, while the data are cached: {found.encoders / GB:.2f} GB of VAE and text encoders "
        "(fp32) beside the UNet",
        f"main memory: {found.release / GB:.2f} GB for the release average",
        "",
        "largest --train-batch-size with these flags: "
        + ", ".join(f"{card} GB: {largest_batch(found, card * GB) or 'none'}" for card in CARDS),
        "",
        f"steps {config.max_train_steps}, pictures {images} a process ({batch} x {many} a step), UNet evaluations "
        f"{images * config.unet_forwards_per_sample} ({config.unet_forwards_per_sample} a picture; a backward pass "
        "counts 2)",
    ]
    if not config.lora and largest_batch(found, 24 * GB) == 0:
        lines.append("--lora needs far less memory.")
    return "\n".join(lines)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _size(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))
