"""The frame in which k-diffusion functions run: noise levels, initial noise, the image-to-image cut."""

import inspect

import torch

from . import HOST, sd_samplers_cfg_denoiser, sd_samplers_common, shared
from .model import CompVisDenoiser, ScheduleLinker

sampler_extra_params = {}


class CFGDenoiserKDiffusion(sd_samplers_cfg_denoiser.CFGDenoiser):
    @property
    def inner_model(self):
        if self.model_wrap is None:
            self.model_wrap = (ScheduleLinker if HOST == "forge" else CompVisDenoiser)(shared.sd_model)
        return self.model_wrap


class KDiffusionSampler(sd_samplers_common.Sampler):
    def __init__(self, funcname, sd_model, options=None):
        super().__init__(funcname)
        self.extra_params = sampler_extra_params.get(funcname, [])
        self.model_wrap_cfg = CFGDenoiserKDiffusion(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def get_sigmas(self, p, steps):
        """The host's own schedule, evenly spaced timesteps; settings and "Schedule type" can bend it."""
        timesteps = torch.linspace(999, 0, steps + bool(shared.opts.always_discard_next_to_last_sigma))
        sigmas = torch.cat([self.model_wrap.sigmas[timesteps.long()], torch.zeros(1)])
        return torch.cat([sigmas[:-2], sigmas[-1:]]) if shared.opts.always_discard_next_to_last_sigma else sigmas

    def sample_img2img(
        self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None
    ):
        steps, t_enc = sd_samplers_common.setup_img2img_steps(p, steps)
        sigmas = self.get_sigmas(p, steps)[steps - t_enc - 1 :]
        if HOST == "forge":
            xi = self.model_wrap.predictor.noise_scaling(sigmas[0], noise, x, max_denoise=False)
        else:
            xi = x + noise * sigmas[0]
        self.model_wrap_cfg.init_latent = x
        return self.run(p, x, xi, sigmas, t_enc + 1, conditioning, unconditional_conditioning, image_conditioning)

    def sample(self, p, x, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        steps = steps or p.steps
        sigmas = self.get_sigmas(p, steps)
        most = shared.opts.sgm_noise_multiplier
        if HOST == "forge":
            x = self.model_wrap.predictor.noise_scaling(sigmas[0], x, torch.zeros_like(x), max_denoise=most)
        else:
            x = x * (torch.sqrt(1 + sigmas[0] ** 2) if most else sigmas[0])
        return self.run(p, x, x, sigmas, steps, conditioning, unconditional_conditioning, image_conditioning)

    def run(self, p, latent, x, sigmas, steps, cond, uncond, image_cond):
        keywords = self.initialize(p)
        if "sigmas" in inspect.signature(self.func).parameters:
            keywords["sigmas"] = sigmas
        self.last_latent = latent
        self.sampler_extra_args = {
            "cond": cond,
            "image_cond": image_cond,
            "uncond": uncond,
            "cond_scale": p.cfg_scale,
            "s_min_uncond": self.s_min_uncond,
        }
        samples = self.launch_sampling(
            steps,
            lambda: self.func(
                self.model_wrap_cfg,
                x,
                extra_args=self.sampler_extra_args,
                disable=False,
                callback=self.callback_state,
                **keywords,
            ),
        )
        self.add_infotext(p)
        return samples


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A sampler of the host's own, to be next to ours in the lists."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = denoised + (x - denoised) * (sigmas[i + 1] / sigmas[i])
    return x
