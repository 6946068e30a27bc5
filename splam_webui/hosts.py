"""What Automatic1111, Forge and reForge do differently. Everything else in this package is one code for the three."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from modules import sd_samplers, shared
from torch import Tensor

from splam_core.parametrisation import parametrisation_of

SKIP_UNCONDITIONAL = "skip_early_cond"  # a setting: the part of the steps, from the first on, without negative prompt
SKIP_UNCONDITIONAL_INFOTEXT = "Skip Early CFG"
MODIFIERS = "conditioning_modifiers"  # of Forge and reForge: functions on the conditions of every evaluation
CONTROLNET_MARK = 1024.0
INFOTEXT = "SPLAM guidance"
NAG_INFOTEXT = "SPLAM NAG scale"
FORCED, AS_SET = "1", "as set"

Attention = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]  # (q, k, v, options) -> z


def register_sampler(data: Any) -> None:
    """Put a SamplerData into the host's lists, in place of one of the same name; safe to repeat on "Reload UI".

    In place, because other modules hold the same list. Where names from info texts are cached, the cache is emptied:
    before this it may have learnt that there is no such sampler.
    """
    sd_samplers.all_samplers[:] = [s for s in sd_samplers.all_samplers if s.name != data.name] + [data]
    sd_samplers.all_samplers_map[data.name] = data
    sd_samplers.set_samplers()
    cached = getattr(sd_samplers, "get_sampler_and_scheduler", None)
    if cached is not None and hasattr(cached, "cache_clear"):
        cached.cache_clear()


def request_guidance_one(p: Any, name: str) -> None:
    """Set guidance to 1 in a request `p` for every pass that uses the sampler `name`, before the prompts are encoded.

    Forge then encodes no negative prompt. Forge and reForge have a guidance of their own for the hires pass (where 0
    in reForge means the first pass's); Automatic1111 shares one, which is left alone if only one pass is SPLAM's.
    """
    hires = bool(getattr(p, "enable_hr", False))
    first = p.sampler_name == name
    hr_name = getattr(p, "hr_sampler_name", None)
    second = hires and (p.sampler_name if hr_name in (None, "Use same sampler") else hr_name) == name
    own_guidance = hasattr(p, "hr_cfg")
    if second and own_guidance:
        p.hr_cfg = 1.0
    elif hires and own_guidance and p.hr_cfg == 0:
        p.hr_cfg = p.cfg_scale
    if first and (second or own_guidance or not hires):
        p.cfg_scale = 1.0


def guidance_of(p: Any) -> float:
    """The guidance of the pass that `p` is in."""
    hires = getattr(p, "is_hr_pass", False) and hasattr(p, "hr_cfg")
    guidance: float = p.hr_cfg if hires else p.cfg_scale
    return guidance


def predicts_noise() -> bool:
    """Whether the loaded checkpoint predicts noise, not v. Forge and reForge know it by a function alone."""
    if not hasattr(shared.sd_model, "forge_objects"):
        return bool(shared.sd_model.parameterization == "eps")
    model = shared.sd_model.forge_objects.unet.model
    prediction = model.predictor if hasattr(model, "predictor") else model.model_sampling
    x0 = prediction.calculate_denoised(torch.ones(1), torch.ones(1, 1), torch.zeros(1, 1))
    return bool(x0.item() == -1)  # at sigma 1: noise gives x - output, v (x - sqrt(2) output) / 2


def says_v_prediction() -> bool:
    """Whether the loaded checkpoint's metadata says that it predicts v."""
    info = getattr(shared.sd_model, "sd_checkpoint_info", None)
    try:
        said = parametrisation_of((), getattr(info, "metadata", None))
    except ValueError:  # it names something else
        return False
    return said.prediction_type == "v_prediction"


def without_mark(rows: Tensor) -> Tensor:
    """Prompt embeddings [B, tokens, C] without the first token that the extension sd-webui-controlnet puts before them
    in Automatic1111: 1024 in every channel, -1024 for negative prompts. Its UNet takes it off before the layers."""
    marked = bool(((rows[:, 0].abs() - CONTROLNET_MARK).abs() < 1).all())
    return rows[:, 1:] if marked else rows


def has_patcher() -> bool:
    """Whether the host is Forge or reForge, which change a UNet by a patcher's options, as ComfyUI does."""
    return hasattr(shared.sd_model, "forge_objects")


def one_weight_for_all() -> bool:
    """Whether the host gives every picture of a batch the weights that AND has in the last one's prompt."""
    return has_patcher()


def attention_function() -> Callable[..., Tensor]:
    """Forge's or reForge's attention(q, k, v, heads), in the implementation that it chose for this machine."""
    try:
        from backend.attention import attention_function as attention
    except ImportError:
        from ldm_patched.ldm.modules.attention import optimized_attention as attention
    chosen: Callable[..., Tensor] = attention
    return chosen


@contextmanager
def attention_replaced(replacement: Callable[[Any, Attention | None], Attention]) -> Iterator[None]:
    """While sampling in Forge or reForge: replacement(attn2, the one that is there or None) for every cross-attention,
    in the unet patcher's options."""
    unet = shared.sd_model.forge_objects.unet
    options, network = unet.model_options, unet.model.diffusion_model
    transformer = options.get("transformer_options", {})
    there = transformer.get("patches_replace", {}).get("attn2", {})
    ours = {}
    middle = [network.middle_block]
    for part, blocks in (("input", network.input_blocks), ("middle", middle), ("output", network.output_blocks)):
        for number, block in enumerate(blocks):
            for layer in block:
                for index, inner in enumerate(getattr(layer, "transformer_blocks", [])):
                    key = (part, number, index)
                    ours[key] = replacement(inner.attn2, there.get(key, there.get(key[:2])))
    replaces = {**transformer.get("patches_replace", {}), "attn2": {**there, **ours}}
    with _replaced(options, "transformer_options", {**transformer, "patches_replace": replaces}):
        yield


@contextmanager
def guidance_one(p: Any, negative: bool = False) -> Iterator[None]:
    """While sampling: guidance 1; afterwards, even after an error, all as it was.

    negative: compose prompts as u + sum of w (c - u), c a picture's prompts joined by AND and w their weights, u the
    negative prompt, which is evaluated. Otherwise it is not, so that a step is one evaluation of the UNet.
    """
    with ExitStack() as stack:
        for name, value in (("cfg_scale", 1.0), ("hr_cfg", 1.0), ("s_min_uncond", 0.0)):
            if hasattr(p, name):  # the last is another setting that leaves the negative prompt out, of late steps
                stack.enter_context(_replaced(vars(p), name, value))
        if hasattr(shared.sd_model, "forge_objects"):
            # At guidance 1 Forge and reForge leave the negative prompt out by themselves, and sum w c.
            options = shared.sd_model.forge_objects.unet.model_options
            if negative:
                stack.enter_context(_replaced(options, MODIFIERS, [*options.get(MODIFIERS, []), negative_as_prompt]))
        elif SKIP_UNCONDITIONAL in shared.opts.data_labels:
            # Automatic1111 does so only by a setting, which would also note itself in the info text, to be pasted into
            # pictures of other samplers. With the negative prompt it composes as it should.
            stack.enter_context(_restored(p.extra_generation_params, SKIP_UNCONDITIONAL_INFOTEXT))
            stack.enter_context(_replaced(shared.opts.data, SKIP_UNCONDITIONAL, 0.0 if negative else 1.0))
        yield


def negative_as_prompt(
    model: Any,
    x: Tensor,
    sigma: Tensor,
    uncond: list[dict[str, Any]],
    cond: list[dict[str, Any]],
    cond_scale: float,
    model_options: dict[str, Any],
    seed: int | None,
) -> tuple[Any, ...]:
    """A conditioning modifier: the negative prompt as one prompt more, of the weight that the others lack to 1.

    u + sum of w (c - u) is the sum of w c and (1 - sum of w) u. The hosts divide by the sum of the weights, so that
    their own composition has no value where it is 0 ("a AND b :-1").
    """
    rest = 1 - sum(prompt["strength"] for prompt in cond)
    cond = [*cond, *({**prompt, "strength": rest} for prompt in uncond)]
    return model, x, sigma, uncond, cond, cond_scale, model_options, seed


def encode_negative(p: Any) -> Any:
    """The unconditional conditioning of the pass that `p` is in, where Forge has left it out for guidance 1.

    The positive one is not encoded again: hosts keep the last one.
    """
    with ExitStack() as stack:
        for name in ("cfg_scale", "hr_cfg"):
            if hasattr(p, name):
                stack.enter_context(_replaced(vars(p), name, 2.0))  # any but 1
        p.setup_conds()
    return p.get_conds()[1]


@contextmanager
def _replaced(owner: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    with _restored(owner, key):
        owner[key] = value
        yield


@contextmanager
def _restored(owner: dict[str, Any], key: str) -> Iterator[None]:
    kept = {key: owner[key]} if key in owner else {}
    try:
        yield
    finally:
        owner.pop(key, None)
        owner.update(kept)
