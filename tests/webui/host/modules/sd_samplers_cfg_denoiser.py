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
        if uncond is not None or HOST != "forge":
            uncond = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        if self.mask is not None and HOST == "forge":
            predictor = self.inner_model.predictor
            noised = predictor.noise_scaling(sigma[:, None, None, None], torch.randn_like(x), self.init_latent)
            x = x * self.nmask + noised * self.mask
        evaluate = self.a1111 if HOST == "a1111" else self.forge
        denoised = evaluate(x, sigma, tensor, conds_list, uncond, cond_scale, self.skips(sigma, s_min_uncond))
        if self.mask is not None:
            denoised = denoised * self.nmask + self.init_latent * self.mask
        self.sampler.last_latent = denoised
        sd_samplers_common.store_latent(denoised)
        self.step += 1
        return denoised

    def skips(self, sigma, s_min_uncond):
        """Whether two settings leave the negative prompt out of this step: early ones, and of late ones every other."""
        part = shared.opts.skip_early_cond
        if part != 0 and self.step / self.total_steps <= part:
            self.p.extra_generation_params["Skip Early CFG"] = part
            return True
        odd = self.step % 2 == (0 if HOST == "reforge" else 1)
        least = shared.opts.s_min_uncond if HOST == "reforge" else s_min_uncond
        if odd and least > 0 and sigma[0] < least:
            self.p.extra_generation_params["NGMS"] = least
            return True
        return False

    def a1111(self, x, sigma, tensor, conds_list, uncond, cond_scale, skip):
        """Conditional and unconditional inputs in one batch, or two where prompts differ in length. Without the
        unconditional one, the first prompt's output is in its place."""
        repeats = torch.tensor([len(conds) for conds in conds_list])
        x_in, sigma_in = x.repeat_interleave(repeats, 0), sigma.repeat_interleave(repeats, 0)
        if skip:
            out = self.inner_model(x_in, sigma_in, cond=tensor)
            without = out[[conds[0][0] for conds in conds_list]]
        elif tensor.shape[1] == uncond.shape[1]:
            pairs = ((x_in, x), (sigma_in, sigma), (tensor, uncond))
            x_in, sigma_in, cond_in = (torch.cat(pair) for pair in pairs)
            out = self.inner_model(x_in, sigma_in, cond=cond_in)
            without = out[-len(x) :]
        else:
            out = self.inner_model(x_in, sigma_in, cond=tensor)
            without = self.inner_model(x, sigma, cond=uncond)
        denoised = without.clone()
        for i, conds in enumerate(conds_list):
            for row, weight in conds:
                denoised[i] += (out[row] - without[i]) * weight * (1.0 if skip else cond_scale)
        return denoised

    def forge(self, x, sigma, tensor, conds_list, uncond, cond_scale, skip):
        """The prompts' outputs are averaged by weight, and the guidance multiplied by the sum of the weights. At
        guidance 1 the unconditional output is left out, and zeros are in its place.

        A prompt's weight is that of the last picture, and the number of prompts that of the picture with the fewest.
        """
        if self.p.is_hr_pass:
            cond_scale = self.p.hr_cfg
        unet = self.inner_model.inner_model.forge_objects.unet
        prompts = list(zip(*conds_list, strict=False))  # the n-th prompt of every picture
        cond = [{"cond": tensor[[row for row, _ in prompt]], "strength": prompt[-1][1]} for prompt in prompts]
        negative = None if uncond is None else [{"cond": uncond}]
        model, options = unet.model, unet.model_options
        for modifier in options.get("conditioning_modifiers", []):
            arguments = modifier(model, x, sigma, negative, cond, cond_scale, options, self.p.seeds[0])
            model, x, sigma, negative, cond, cond_scale, options, _ = arguments
        if skip:
            negative, cond_scale = (None if HOST == "reforge" else negative), 1.0
        if math.isclose(cond_scale, 1.0) and not options.get("disable_cfg1_optimization", False):
            negative = None

        predictor = model.predictor if HOST == "forge" else model.model_sampling

        def average(conds):
            total, count = torch.zeros_like(x), torch.full_like(x, 1e-37)
            for part in conds or []:
                total += predictor.denoise(x, sigma, part["cond"]) * part.get("strength", 1.0)
                count += part.get("strength", 1.0)
            return total / count

        pred, without = average(cond), average(negative)
        strength = sum(part.get("strength", 1.0) for part in cond)
        return without + (pred - without) * cond_scale * (1.0 if math.isclose(strength, 1.0) else strength)
