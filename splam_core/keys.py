"""Names of one model's weights in two worlds: diffusers folders and LDM single files.

Every table is derived from the keys at hand, so any number of levels, layers and widths of the Stable Diffusion
architecture maps. A table pairs module prefixes (diffusers, LDM); what follows a prefix is the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

Pair = tuple[str, str]  # (diffusers prefix, LDM prefix)

_UNET_FIXED: list[Pair] = [
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("time_embedding.cond_proj", "time_embed.cond_proj"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
]
_UNET_RESNET: list[Pair] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
_VAE_RESNET: list[Pair] = [
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("conv_shortcut", "nin_shortcut"),
]
# The second column of diffusers names is what diffusers before 0.15 wrote, and what many hub folders still hold.
_VAE_ATTENTION: list[tuple[str, str, str]] = [
    ("group_norm", "group_norm", "norm"),
    ("to_q", "query", "q"),
    ("to_k", "key", "k"),
    ("to_v", "value", "v"),
    ("to_out.0", "proj_attn", "proj_out"),
]


LORA_PARTS = ("unet", "text_encoder_2", "text_encoder")
# Endings of a LoRA's keys and what they are in kohya's names, longer ones first.
_LORA_ROLES = {
    ".lora_A.default.weight": "lora_down.weight",
    ".lora_B.default.weight": "lora_up.weight",
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    ".lora.down.weight": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight",
    ".down.weight": "lora_down.weight",
    ".up.weight": "lora_up.weight",
    ".lora_down.weight": "lora_down.weight",
    ".lora_up.weight": "lora_up.weight",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".alpha": "alpha",
    ".diff_b": "diff_b",
    ".diff": "diff",
}


@dataclass(frozen=True)
class _Block:
    """One resolution level of a UNet: for each layer whether it has attention, and whether it ends in a resampler."""

    attentions: tuple[bool, ...]
    resampler: bool


def unet_pairs(keys: Iterable[str]) -> list[Pair]:
    """The table of a UNet, from its keys in either world (LDM keys without their prefix)."""
    modules = _modules(keys)
    read = _diffusers_blocks if any(m.startswith("down_blocks.") for m in modules) else _ldm_blocks
    down, up = read(modules)
    pairs = list(_UNET_FIXED)
    for j in range(_count(modules, r"(?:mid_block\.resnets\.|middle_block\.)(\d+)")):
        pairs += _inside(f"mid_block.resnets.{j}", f"middle_block.{2 * j}", _UNET_RESNET)
        pairs.append((f"mid_block.attentions.{j}", f"middle_block.{2 * j + 1}"))
    n = 1  # input_blocks.0 is conv_in
    for i, block in enumerate(down):
        for j, attention in enumerate(block.attentions):
            pairs += _inside(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0", _UNET_RESNET)
            if attention:
                pairs.append((f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"))
            n += 1
        if block.resampler:
            pairs.append((f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op"))
            n += 1
    n = 0
    for i, block in enumerate(up):
        for j, attention in enumerate(block.attentions):
            pairs += _inside(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0", _UNET_RESNET)
            if attention:
                pairs.append((f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1"))
            n += 1
        if block.resampler:  # it sits in the level's last LDM block, after the attention if there is one
            place = 2 if block.attentions[-1] else 1
            pairs.append((f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{n - 1}.{place}.conv"))
    return pairs


def vae_pairs(keys: Iterable[str]) -> list[Pair]:
    """The table of a VAE, from its keys in either world (LDM keys without their prefix)."""
    modules = _modules(keys)
    pairs = [(name, name) for name in ("quant_conv", "post_quant_conv")]
    for side, way in (("encoder", "down"), ("decoder", "up")):
        pairs += [(f"{side}.{name}", f"{side}.{name}") for name in ("conv_in", "conv_out")]
        pairs.append((f"{side}.conv_norm_out", f"{side}.norm_out"))
        for j in range(2):
            pairs += _inside(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}", _VAE_RESNET)
        attention = f"{side}.mid_block.attentions.0"
        old_style = f"{attention}.query" in modules
        for new, old, ldm in _VAE_ATTENTION:
            pairs.append((f"{attention}.{old if old_style else new}", f"{side}.mid.attn_1.{ldm}"))
        levels = _count(modules, rf"{side}\.{way}(?:_blocks)?\.(\d+)")
        layers = _count(modules, rf"{side}\.{way}(?:_blocks)?\.\d+\.(?:resnets|block)\.(\d+)")
        for i in range(levels):
            n = i if way == "down" else levels - 1 - i  # LDM counts the decoder's levels backwards
            for j in range(layers):
                pairs += _inside(f"{side}.{way}_blocks.{i}.resnets.{j}", f"{side}.{way}.{n}.block.{j}", _VAE_RESNET)
            pairs.append((f"{side}.{way}_blocks.{i}.{way}samplers.0.conv", f"{side}.{way}.{n}.{way}sample.conv"))
    return pairs


@dataclass(frozen=True)
class LoraKey:
    """One tensor of a LoRA: in which part of a pipeline, on which of its modules, and what it is to that module."""

    part: str  # "unet", "text_encoder" or "text_encoder_2"
    module: str  # diffusers' dotted name
    role: str  # "lora_down.weight", "lora_up.weight", "magnitude" (DoRA), "alpha", "diff" or "diff_b"


def lora_key(key: str) -> LoraKey | None:
    """A LoRA's key in peft's names or in any that diffusers wrote before; None if it is neither.

    A part's name in front may be missing: then it is the UNet, or the text encoder if the module is one of its own.
    """
    path = key.removeprefix("base_model.model.")
    part = next((name for name in LORA_PARTS if path.startswith(name + ".")), "")
    path = path.removeprefix(part + ".").removeprefix("base_model.model.")
    part = part or ("text_encoder" if path.startswith("text_model.") else "unet")
    ending, role = next(((e, r) for e, r in _LORA_ROLES.items() if path.endswith(e)), ("", ""))
    module = path.removesuffix(ending)
    if not role or not module:
        return None
    # Attention processors once held the LoRA's layers: attn1.processor.to_out_lora is attn1.to_out.0.
    module = module.replace(".processor.", ".").removesuffix("_lora")
    if part == "unet":
        return LoraKey(part, re.sub(r"(\.attn[12]\.to_out)$", r"\1.0", module), role)
    for old, new in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")):
        module = re.sub(rf"self_attn\.{old}$", f"self_attn.{new}", module)
    return LoraKey(part, "text_model." + module.removeprefix("text_model."), role)


def rename(keys: Iterable[str], table: Mapping[str, str], what: str) -> dict[str, str]:
    """{key: its new name}, the longest prefix in `table` that ends at a dot being replaced.

    Raises ValueError naming the first key that no prefix covers; `what` says of which model.
    """
    renamed = {}
    for key in keys:
        head = key
        while head and head not in table:
            head = head.rpartition(".")[0]
        if not head:
            raise ValueError(
                f"{what}: the key {key!r} has no counterpart in the other format. Expected a Stable Diffusion model "
                f"(UNet2DConditionModel, AutoencoderKL, CLIPTextModel); other architectures are not converted."
            )
        renamed[key] = table[head] + key[len(head) :]
    return renamed


def _modules(keys: Iterable[str]) -> set[str]:
    """All dotted prefixes of the keys."""
    modules = set()
    for key in keys:
        while key:
            modules.add(key)
            key = key.rpartition(".")[0]
    return modules


def _count(modules: set[str], pattern: str) -> int:
    """How many numbers, from 0 on without a gap, `pattern` captures among the modules.

    A file may name a layer 1000000000; what comes after a gap has no place, and `rename` says so.
    """
    found, count = {m[1] for m in (re.fullmatch(pattern, name) for name in modules) if m}, 0
    while str(count) in found:
        count += 1
    return count


def _inside(diffusers: str, ldm: str, parts: list[Pair]) -> Iterator[Pair]:
    return ((f"{diffusers}.{theirs}", f"{ldm}.{ours}") for theirs, ours in parts)


def _diffusers_blocks(modules: set[str]) -> tuple[list[_Block], list[_Block]]:
    def side(name: str) -> list[_Block]:
        blocks = []
        for i in range(_count(modules, rf"{name}_blocks\.(\d+)")):
            layers = range(_count(modules, rf"{name}_blocks\.{i}\.resnets\.(\d+)"))
            attentions = tuple(f"{name}_blocks.{i}.attentions.{j}" in modules for j in layers)
            blocks.append(_Block(attentions, f"{name}_blocks.{i}.{name}samplers" in modules))
        return blocks

    return side("down"), side("up")


def _ldm_blocks(modules: set[str]) -> tuple[list[_Block], list[_Block]]:
    """A level of an LDM UNet ends where a resampler is found; the last one ends with the list."""
    down: list[_Block] = []
    layers: list[bool] = []
    for n in range(1, _count(modules, r"input_blocks\.(\d+)")):
        if f"input_blocks.{n}.0.op" in modules:
            down.append(_Block(tuple(layers), True))
            layers = []
        else:
            layers.append(f"input_blocks.{n}.1" in modules)
    down.append(_Block(tuple(layers), False))
    up, layers = [], []
    for n in range(_count(modules, r"output_blocks\.(\d+)")):
        layers.append(f"output_blocks.{n}.1.norm" in modules)
        if f"output_blocks.{n}.1.conv" in modules or f"output_blocks.{n}.2.conv" in modules:
            up.append(_Block(tuple(layers), True))
            layers = []
    up.append(_Block(tuple(layers), False))
    return down, up
