"""Guidance, masks, interruption and preview around one evaluation."""

import math

import torch

from . import HOST, prompt_parser, sd_samplers_common, shared


class CFGDenoiser(torch.nn.Module):
    def __init__(self, sampler):
        super().__init__()
        self.sampler = sampler
        self.model_wrap = self.mask = self.nmask = self.init_latent = self.p = None
        self.step = 0
        self.steps = self.total_steps = None
        self.mask_before_denoising = False

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        if shared.state.interrupted or shared.state.skipped:
            raise sd_samplers_common.InterruptedException
        conds_list, tensor = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        uncond = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        evaluate = self.a1111 if HOST == "a1111" else self.forge
        if self.mask is not None and HOST == "forge":
            predictor = self.inner_model.predictor
            noised = predictor.noise_scaling(sigma[:, None, None, None], torch.randn_like(x), self.init_latent)
            x = x * self.nmask + noised * self.mask
        denoised = evaluate(x, sigma, tensor, conds_list, uncond, cond_scale)
        if self.mask is not None:
            denoised = denoised * self.nmask + self.init_latent * self.mask
        self.sampler.last_latent = denoised
        sd_samplers_common.store_latent(denoised)
        self.step += 1
        return denoised

    def a1111(self, x, sigma, tensor, conds_list, uncond, cond_scale):
        """Conditional and unconditional inputs in one batch, the latter left out only by a setting."""
        repeats = torch.tensor([len(conds) for conds in conds_list])
        x_in, sigma_in, cond_in = x.repeat_interleave(repeats, 0), sigma.repeat_interleave(repeats, 0), tensor
        part = shared.opts.skip_early_cond
        skip = part != 0 and self.step / self.total_steps <= part
        if skip:
            self.p.extra_generation_params["Skip Early CFG"] = part
        else:
            x_in, sigma_in, cond_in = (
                torch.cat(pair) for pair in ((x_in, x), (sigma_in, sigma), (tensor, uncond))
            )  # fmt: skip
        out = self.inner_model(x_in, sigma_in, cond=cond_in)
        first = [conds[0][0] for conds in conds_list]
        base = out[first] if skip else out[-len(x) :]
        denoised = base.clone()
        for i, conds in enumerate(conds_list):
            for row, weight in conds:
                denoised[i] += (out[row] - base[i]) * weight * (1.0 if skip else cond_scale)
        return denoised

    def forge(self, x, sigma, tensor, conds_list, uncond, cond_scale):
        """At guidance 1 the unconditional input is left out; the hires pass has its own guidance."""
        if self.p.is_hr_pass:
            cond_scale = self.p.hr_cfg
        predict = self.inner_model.inner_model.forge_objects.unet.model.predictor.denoise
        prompts = list(zip(*conds_list, strict=True))  # the n-th prompt of every picture
        total = sum(prompt[0][1] for prompt in prompts)
        pred = sum(predict(x, sigma, tensor[[row for row, _ in prompt]]) * prompt[0][1] for prompt in prompts) / total
        if math.isclose(cond_scale, 1.0):
            return pred
        without = predict(x, sigma, uncond)
        return without + (pred - without) * cond_scale
