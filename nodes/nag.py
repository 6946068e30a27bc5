"""splam_core's normalised attention guidance in a MODEL's cross-attention, by the host's attn2 patches.

They are put in place for each call of the UNet, over whatever other patches it has by then, which see the negative
prompt as they see the positive one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ..splam_core.nag import Nag, normalized_attention
from .host import Conditioning, CrossAttention, Model, ModelSampling, UNet, WrapperExecutor

Options = dict[str, Any]  # the host's transformer_options
Attention = Callable[[Tensor, Tensor, Tensor, Options], Tensor]  # (q, k, v, options) -> z
Patch = Callable[[Tensor, Tensor, Tensor, Options], tuple[Tensor, Tensor, Tensor]]  # of (hidden, context, value)

KEY = "splam_nag"  # of the wrappers: a second negative prompt takes the place of the first


@dataclass(frozen=True)
class Entry:
    """One of a negative CONDITIONING's prompts: where, when and how strongly it holds."""

    context: Tensor  # [B, tokens, C]
    strength: float = 1.0
    area: tuple[Any, ...] | None = None  # (height, width, y, x) in latent pixels; after "percentage", as shares
    mask: Tensor | None = None  # [B, H, W] or [H, W], of any size
    sigmas: tuple[float, float] = (float("inf"), 0.0)  # from the first down to the last

    @property
    def is_everywhere(self) -> bool:
        return self.area is None and self.mask is None

    def weights(self, size: tuple[int, int]) -> Tensor | float:
        """[B, 1, H, W] at the latents' size, or one number for all of the picture."""
        if self.is_everywhere:
            return self.strength
        weights = torch.ones(1, 1, *size)
        if self.mask is not None:
            mask = self.mask.float().cpu().reshape(-1, 1, *self.mask.shape[-2:])
            weights = comfy.utils.common_upscale(mask, size[1], size[0], "bilinear", "disabled")
        if self.area is not None:
            area: Sequence[Any] = self.area
            if area[0] == "percentage":
                area = [round(share * of) for share, of in zip(area[1:], (*size, *size), strict=True)]
            height, width, y, x = area
            inside = torch.zeros(1, 1, *size)
            inside[..., y : y + height, x : x + width] = 1
            weights = weights * inside
        return weights * self.strength


def patch_negative(model: Model, negative: Conditioning, nag: Nag, node: str) -> Model:
    """A clone of the MODEL whose cross-attention is led away from the negative CONDITIONING; itself if nag is off.

    Raises ValueError, in the name of `node`, for a MODEL without Stable Diffusion's UNet, and for a conditioning that
    is empty or of another model's width.
    """
    if nag.is_off:
        return model
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"{node}: the negative prompt of normalised attention guidance acts on the cross-attention of Stable "
            f"Diffusion's UNet (SD1.x, SD2.x, SDXL); this MODEL is a {type(unet).__name__}. Connect one of those, or "
            "set nag_scale to 1."
        )
    guidance = _Guidance(nag, _entries(negative, model.get_model_object("model_sampling")), node)
    guidance.check(unet)
    patched = model.clone()
    kinds = comfy.patcher_extension.WrappersMP
    for kind, wrapper in ((kinds.PREDICT_NOISE, guidance.measure), (kinds.DIFFUSION_MODEL, guidance.guide)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def _entries(negative: Conditioning, sampling: ModelSampling) -> list[Entry]:
    entries = []
    for context, options in negative:
        mask, strength = options.get("mask"), float(options.get("strength", 1.0))
        if mask is not None:
            strength *= options.get("mask_strength", 1.0)
        # The second pair is of prompts whose text encoder changes over the steps.
        start = max(options.get("start_percent", 0.0), options.get("clip_start_percent", 0.0))
        end = min(options.get("end_percent", 1.0), options.get("clip_end_percent", 1.0))
        sigmas = (float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end)))
        entries.append(Entry(context, strength, options.get("area"), mask, sigmas))
    return entries


class _Guidance:
    """What is asked of one MODEL, and the two wrappers that do it."""

    def __init__(self, nag: Nag, entries: list[Entry], node: str):
        self.nag, self.entries, self.node = nag, entries, node
        self.size: tuple[int, int] | None = None  # of the latents that are being sampled

    def check(self, unet: UNet) -> None:
        """Raises ValueError for a conditioning that this UNet cannot read."""
        if not self.entries:
            raise ValueError(f"{self.node}: the negative conditioning is empty. Connect a CLIP Text Encode.")
        width = next(block.attn2.to_k.in_features for _, block in _blocks(unet))
        for entry in self.entries:
            if entry.context.shape[-1] != width:
                raise ValueError(
                    f"{self.node}: this MODEL's prompts are {width} wide, the negative conditioning is "
                    f"{entry.context.shape[-1]}. Encode it with the CLIP of this MODEL's loader."
                )

    def measure(self, executor: WrapperExecutor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PREDICT_NOISE wrapper: how large the whole picture is, of which the UNet may see an area."""
        self.size = (x.shape[-2], x.shape[-1])
        output: Tensor = executor(x, *args, **kwargs)
        return output

    def guide(
        self,
        executor: WrapperExecutor,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: Options | None = None,
        **rest: Any,
    ) -> Tensor:
        """DIFFUSION_MODEL wrapper: puts the attn2 patches in place for this call."""
        options = {} if transformer_options is None else transformer_options
        entries, rows = self._active(options), _positive_rows(options, len(x))
        if entries and rows:
            options = self._patched(executor.class_obj, options, self._weighted(entries, x), rows)
        output: Tensor = executor(x, timesteps, context, y, control, options, **rest)
        return output

    def _active(self, options: Options) -> list[Entry]:
        if "sigmas" not in options:
            return self.entries
        sigma = float(options["sigmas"][0])
        return [entry for entry in self.entries if entry.sigmas[0] >= sigma >= entry.sigmas[1]]

    def _weighted(self, entries: list[Entry], x: Tensor) -> list[tuple[Tensor, Tensor | float]]:
        """(context, weights) of each. Raises ValueError for a part of the picture in a part of the picture."""
        size = (x.shape[-2], x.shape[-1])
        if size != (self.size or size) and not all(entry.is_everywhere for entry in entries):
            raise ValueError(
                f"{self.node}: the negative conditioning has an area or a mask, and the positive one an area, which "
                "is evaluated on its own. Give the negative none, or use masks for both."
            )
        return [(entry.context.to(x), entry.weights(size)) for entry in entries]

    def _patched(
        self, unet: UNet, options: Options, entries: list[tuple[Tensor, Tensor | float]], rows: list[int]
    ) -> Options:
        others = options.get("patches", {}).get("attn2_patch", [])
        replaced = options.get("patches_replace", {}).get("attn2", {})
        seen = _Seen()
        patches = {**options.get("patches", {})}
        if others:
            patches["attn2_patch"] = [seen.remember, *others]
        ours = {}
        for key, block in _blocks(unet):
            inner = replaced.get(key, replaced.get(key[:2]))
            ours[key] = _Attention(self.nag, block.attn2, entries, rows, inner, others, seen)
        replaces = {**options.get("patches_replace", {}), "attn2": {**replaced, **ours}}
        return {**options, "patches": patches, "patches_replace": replaces}


class _Seen:
    """The hidden states that reach a block's attn2 patches: what others must see with the negative prompt too."""

    hidden: Tensor

    def remember(self, hidden: Tensor, context: Tensor, value: Tensor, _: Options) -> tuple[Tensor, Tensor, Tensor]:
        self.hidden = hidden
        return hidden, context, value


@dataclass
class _Attention:
    """Takes the place of one block's cross-attention: keys and values of the positive prompt in, guided z out."""

    nag: Nag
    attn2: CrossAttention
    entries: list[tuple[Tensor, Tensor | float]]  # (context, weights)
    rows: list[int]  # of the batch, those with the positive prompt
    inner: Attention | None  # another pack's attn2 replacement, or None
    others: list[Patch]  # other packs' attn2 patches
    seen: _Seen

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        z = self._attend(q, k, v, extra_options)
        whole = len(self.rows) == len(q)
        positive = z if whole else z[self.rows]
        q = q if whole else q[self.rows]
        options = extra_options
        if "cond_or_uncond" in options:
            options = {**options, "cond_or_uncond": [0] * options["cond_or_uncond"].count(0)}
        guided = normalized_attention(positive, self._negative(q, positive, options), self.nag)
        if whole:
            return guided
        z = z.clone()
        z[self.rows] = guided
        return z

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Options) -> Tensor:
        if self.inner is not None:
            return self.inner(q, k, v, extra_options)
        precision = self.attn2.attn_precision
        z: Tensor = optimized_attention(
            q, k, v, self.attn2.heads, attn_precision=precision, transformer_options=extra_options
        )
        return z

    def _negative(self, q: Tensor, positive: Tensor, options: Options) -> Tensor:
        """z- [B, tokens, C]: where the prompts' weights do not reach 1, the rest is z+, which guides nowhere."""
        pictures = len(q) // max(1, len(options.get("cond_or_uncond", [0])))
        outputs: list[tuple[Tensor, Tensor | float]] = []
        total: Tensor | float = 0.0
        for context, weights in self.entries:
            z = self._attend(q, *self._keys(context, len(q), pictures, options), options)
            if not isinstance(weights, float):
                weights = _per_token(weights, q, options)
                weights = _repeated(weights, len(q), pictures)
            outputs.append((z, weights))
            total = total + weights
        if len(outputs) == 1 and isinstance(total, float) and total == 1:
            return outputs[0][0]
        share = 1 / (max(total, 1.0) if isinstance(total, float) else total.clamp(min=1))
        return positive + sum((z - positive) * (weights * share) for z, weights in outputs)

    def _keys(self, context: Tensor, rows: int, pictures: int, options: Options) -> tuple[Tensor, Tensor]:
        if not self.others:
            k, v = self.attn2.to_k(context), self.attn2.to_v(context)
            return _repeated(k, rows, pictures), _repeated(v, rows, pictures)
        context = _repeated(context, rows, pictures)
        value, hidden = context, self.seen.hidden
        hidden = hidden if len(hidden) == rows else hidden[self.rows]
        for patch in self.others:
            hidden, context, value = patch(hidden, context, value, options)
        return self.attn2.to_k(context), self.attn2.to_v(value)


def _blocks(unet: UNet) -> Iterator[tuple[tuple[str, int, int], Any]]:
    """((part, number, index), transformer block) of every cross-attention, as the host numbers them."""
    middle = [] if unet.middle_block is None else [unet.middle_block]
    for part, blocks in (("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks)):
        for number, block in enumerate(blocks):
            for layer in block:
                for index, transformer in enumerate(getattr(layer, "transformer_blocks", [])):
                    if transformer.attn2 is not None:
                        yield (part, number, index), transformer


def _positive_rows(options: Options, count: int) -> list[int]:
    """The rows of a batch of `count` that carry the positive prompt."""
    kinds = options.get("cond_or_uncond", [0])
    pictures = count // len(kinds)
    return [row for row in range(count) if kinds[row // pictures] == 0]


def _repeated(tensor: Tensor, rows: int, pictures: int) -> Tensor:
    """[rows, ...]: a batch of `pictures`, made from as many as there are, once for each prompt of the positive."""
    tensor = comfy.utils.repeat_to_batch_size(tensor, pictures)
    return tensor.repeat(rows // pictures, *(1,) * (tensor.ndim - 1))


def _per_token(weights: Tensor, q: Tensor, options: Options) -> Tensor:
    """Weights [B, 1, H, W] of latent pixels as [B, tokens, 1] of the block's tokens."""
    size = options["activations_shape"][-2:]
    resized = torch.nn.functional.interpolate(weights.to(q), size=size, mode="area")
    return resized.flatten(1)[..., None]
