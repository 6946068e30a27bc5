"""What all samplers share: the request's bookkeeping, interruption, the number of image-to-image steps."""

import inspect
from collections import namedtuple

from . import HOST, shared


class SamplerData(namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])):
    def total_steps(self, steps):
        return steps * 2 if self.options.get("second_order", False) else steps


class InterruptedException(BaseException):
    pass


def setup_img2img_steps(p, steps=None):
    """(steps of the whole schedule, steps run less one)."""
    strength = min(p.denoising_strength, 0.999)
    if shared.opts.img2img_fix_steps or steps is not None:
        run = steps or p.steps
        return (int(run / strength) if p.denoising_strength > 0 else 0), run - 1
    return p.steps, int(strength * p.steps)


def store_latent(latent):
    shared.state.current_latent = latent
    shared.state.latents.append(latent)
    if callable(getattr(shared.state, "on_latent", None)):
        shared.state.on_latent()


class Sampler:
    def __init__(self, funcname):
        self.funcname = self.func = funcname
        self.extra_params = []
        self.stop_at = None
        self.config = self.last_latent = self.p = self.sampler_extra_args = None
        self.s_min_uncond = None

    def callback_state(self, d):
        assert {"x", "i", "sigma", "sigma_hat", "denoised"} <= d.keys()
        if self.stop_at is not None and d["i"] > self.stop_at:
            raise InterruptedException
        if HOST == "reforge" and self.p.scripts is not None:
            self.p.steps_seen = [*getattr(self.p, "steps_seen", []), d["i"]]
        shared.state.sampling_step = d["i"]
        shared.total_tqdm.update()

    def launch_sampling(self, steps, func):
        self.model_wrap_cfg.steps = steps
        self.model_wrap_cfg.total_steps = self.config.total_steps(steps)
        shared.state.sampling_steps, shared.state.sampling_step = steps, 0
        try:
            return func()
        except InterruptedException:
            return self.last_latent

    def initialize(self, p):
        self.p = self.model_wrap_cfg.p = p
        self.model_wrap_cfg.mask, self.model_wrap_cfg.nmask = p.mask, p.nmask
        self.model_wrap_cfg.step = 0
        self.s_min_uncond = getattr(p, "s_min_uncond", 0.0)
        assert "eta" not in inspect.signature(self.func).parameters
        return {}

    def add_infotext(self, p):
        pass
