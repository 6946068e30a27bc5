"""A request, from its settings to latents and the info text."""

import torch

from . import HOST, prompt_parser, sd_samplers, shared
from .rng import ImageRNG


class Request:
    """Latents are [4, size, size]; `prompts` are embeddings [L, C], one for every picture, or as `prompt_parser` says.

    `encoded` notes which negative prompts went through the text encoder: "uc" and, for the hires pass, "hr_uc".
    """

    def __init__(self, prompts, negative, seeds, **settings):
        self.prompts, self.negative, self.seeds = prompts, negative, seeds
        self.sampler_name, self.scheduler, self.steps, self.cfg_scale = "SPLAM", "Automatic", 4, 7.0
        self.subseeds, self.subseed_strength, self.size = None, 0.0, 8
        self.init_latent = self.mask = self.nmask = None
        self.denoising_strength = 0.75
        self.enable_hr, self.hr_sampler_name, self.hr_second_pass_steps = False, None, 0
        if HOST != "a1111":
            self.hr_cfg = 7.0
        self.is_hr_pass, self.s_min_uncond, self.encoded = False, shared.opts.s_min_uncond, []
        self.sampler_noise_scheduler_override = self.image_cfg_scale = None
        self.scripts, self.script_args = None, []
        self.extra_generation_params, self.comments, self.passes = {}, {}, []
        self.__dict__.update(settings)

    def comment(self, text):
        self.comments[text] = 1

    def setup_conds(self):
        """Encode the prompts of both passes, or in the hires pass its own; Forge no negative prompt at guidance 1."""
        if not self.is_hr_pass:
            self.c, self.uc = self.encode("uc", self.cfg_scale)
        if self.enable_hr:
            self.hr_c, self.hr_uc = self.encode("hr_uc", getattr(self, "hr_cfg", self.cfg_scale))

    def encode(self, name, cfg_scale):
        cond = prompt_parser.get_multicond_learned_conditioning(self.prompts)
        if HOST == "forge" and cfg_scale == 1:
            return cond, None
        self.encoded.append(name)
        return cond, prompt_parser.get_learned_conditioning([self.negative] * len(self.prompts))

    def get_conds(self):
        return (self.hr_c, self.hr_uc) if self.is_hr_pass else (self.c, self.uc)

    def new_rng(self, size):
        self.rng = ImageRNG((4, size, size), self.seeds, self.subseeds, self.subseed_strength)
        self.passes.append(self.rng)
        return self.rng.next()

    def sample(self):
        self.sampler = sd_samplers.create_sampler(self.sampler_name, shared.sd_model)
        cond, uncond = self.get_conds()
        noise = self.new_rng(self.size)
        if self.init_latent is not None:
            samples = self.sampler.sample_img2img(self, self.init_latent, noise, cond, uncond)
            return samples if self.mask is None else samples * self.nmask + self.init_latent * self.mask
        samples = self.sampler.sample(self, noise, cond, uncond)
        return self.sample_hires(samples) if self.enable_hr else samples

    def sample_hires(self, samples):
        self.is_hr_pass = True
        if HOST == "reforge" and self.hr_cfg == 0:
            self.hr_cfg = self.cfg_scale
        self.sampler = sd_samplers.create_sampler(self.hr_sampler_name or self.sampler_name, shared.sd_model)
        samples = torch.nn.functional.interpolate(samples, scale_factor=2)
        noise = self.new_rng(2 * self.size)
        cond, uncond = self.get_conds()
        steps = self.hr_second_pass_steps or self.steps
        samples = self.sampler.sample_img2img(self, samples, noise, cond, uncond, steps=steps)
        self.is_hr_pass = False
        return samples


def process_images(p):
    """(latents, info text)."""
    if p.scripts is not None:
        p.scripts.before_process(p)
    p.sampler_name, p.scheduler = sd_samplers.get_sampler_and_scheduler(
        p.sampler_name, p.scheduler, convert_automatic=False
    )
    with torch.no_grad():
        p.setup_conds()
        samples = p.sample()
    parameters = {"Steps": p.steps, "Sampler": p.sampler_name, "CFG scale": p.cfg_scale, **p.extra_generation_params}
    return samples, ", ".join(f"{key}: {value}" for key, value in parameters.items())
