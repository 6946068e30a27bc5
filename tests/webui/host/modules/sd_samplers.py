"""The lists of samplers. Other modules hold `all_samplers` itself, and names found once are remembered."""

import functools

from . import HOST, sd_samplers_common, sd_samplers_kdiffusion, shared

all_samplers = [
    sd_samplers_common.SamplerData(
        "Euler",
        lambda model: sd_samplers_kdiffusion.KDiffusionSampler(sd_samplers_kdiffusion.euler, model),
        ["k_euler"],
        {},
    )
]
all_samplers_map = {sampler.name: sampler for sampler in all_samplers}
samplers = samplers_for_img2img = all_samplers
samplers_map, samplers_hidden = {}, set()
SCHEDULERS = ("Automatic", "Uniform", "Karras", "SGM Uniform")


def set_samplers():
    global samplers, samplers_for_img2img, samplers_hidden
    samplers_hidden = set(shared.opts.hide_samplers)
    samplers = samplers_for_img2img = all_samplers
    samplers_map.clear()
    for sampler in all_samplers:
        assert all(isinstance(value, str) for value in sampler.options.values())  # the API's answer allows no other
        for name in (sampler.name, *sampler.aliases):
            samplers_map[name.lower()] = sampler.name


def find_sampler_config(name):
    return all_samplers_map.get(name) if name is not None else all_samplers[0]


def create_sampler(name, model):
    config = find_sampler_config(name)
    assert config is not None, f"bad sampler name: {name}"
    sampler = config.constructor(model)
    sampler.config = config
    return sampler


def visible_sampler_names():
    return [sampler.name for sampler in samplers if sampler.name not in samplers_hidden]


def find_sampler_and_scheduler(sampler_name, scheduler_name, *, convert_automatic=True):
    """Names from an info text or the API; a scheduler's label at the end of the sampler's name is taken off."""
    scheduler = scheduler_name if scheduler_name in SCHEDULERS else SCHEDULERS[0]
    name = sampler_name or samplers[0].name
    for label in SCHEDULERS:
        if name.endswith(" " + label):
            scheduler, name = label, name.removesuffix(" " + label)
    return all_samplers_map.get(name, samplers[0]).name, scheduler


# One fork among many is without the cache.
get_sampler_and_scheduler = (
    find_sampler_and_scheduler if HOST == "reforge" else functools.cache(find_sampler_and_scheduler)
)  # fmt: skip

set_samplers()
