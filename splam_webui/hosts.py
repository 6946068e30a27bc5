"""What Automatic1111, Forge and reForge do differently. Everything else in this package is one code for the three."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modules import sd_samplers, shared

SKIP_UNCONDITIONAL = "skip_early_cond"  # a setting: the part of the steps, from the first on, without negative prompt
SKIP_UNCONDITIONAL_INFOTEXT = "Skip Early CFG"
INFOTEXT = "SPLAM guidance"
FORCED, AS_SET = "1", "as set"


def register_sampler(data: Any) -> None:
    """Put a SamplerData into the host's lists, in place of one of the same name; safe to repeat on "Reload UI".

    In place, because other modules hold the same list. Where names from info texts are cached, the cache is emptied:
    before this it may have learnt that there is no such sampler.
    """
    sd_samplers.all_samplers[:] = [s for s in sd_samplers.all_samplers if s.name != data.name] + [data]
    sd_samplers.all_samplers_map[data.name] = data
    sd_samplers.set_samplers()
    cached = getattr(sd_samplers, "get_sampler_and_scheduler", None)
    if hasattr(cached, "cache_clear"):
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


@contextmanager
def guidance_one(p: Any) -> Iterator[None]:
    """While sampling: guidance 1 and one UNet evaluation a step; afterwards, even after an error, all as it was.

    At guidance 1 Forge and reForge leave the unconditional pass out by themselves. Automatic1111 does so only by a
    setting, which would also note itself in the info text, to be pasted into pictures of other samplers.
    """
    kept = {name: getattr(p, name) for name in ("cfg_scale", "hr_cfg") if hasattr(p, name)}
    by_setting = not hasattr(shared.sd_model, "forge_objects") and SKIP_UNCONDITIONAL in shared.opts.data_labels
    settings, absent = shared.opts.data, object()
    setting = settings.get(SKIP_UNCONDITIONAL, absent)
    noted = SKIP_UNCONDITIONAL_INFOTEXT in p.extra_generation_params
    try:
        for name in kept:
            setattr(p, name, 1.0)
        if by_setting:
            settings[SKIP_UNCONDITIONAL] = 1.0
        yield
    finally:
        for name, value in kept.items():
            setattr(p, name, value)
        if by_setting:
            if setting is absent:
                settings.pop(SKIP_UNCONDITIONAL, None)
            else:
                settings[SKIP_UNCONDITIONAL] = setting
            if not noted:
                p.extra_generation_params.pop(SKIP_UNCONDITIONAL_INFOTEXT, None)
