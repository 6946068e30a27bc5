"""The sampler "SPLAM": `splam_core.sample` on the host's model, noise, masks, preview and interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from modules import sd_samplers_common, sd_samplers_kdiffusion, shared
from torch import Tensor

from splam_core import NoiseSchedule, boundary_scalings, broadcast_to, few_step_timesteps, sample
from splam_core.nag import Nag
from splam_core.schedule import GRID

from . import hosts
from .nag import Negative, guided

NAME = "SPLAM"
MOST_STEPS = 8  # more are allowed, with a hint
ZERO_SNR_SIGMA = 1000.0  # Stable Diffusion's own schedule ends at 14.6; hosts end one of zero SNR at 4519
HINT = (
    "SPLAM is made for 1 to 8 steps (4 is usual): more take longer and change little. "
    "It takes at most 50, and fewer at a low denoising strength."
)
UNLIKE = (
    "The prompts of this batch are joined by AND with different weights; this program gives all its pictures those of "
    "the last one. Set the batch size to 1."
)
TAKEN_FOR_NOISE = (
    "The checkpoint's metadata says that it predicts v, and this program takes it for one that predicts noise: the "
    "picture is wrong. Put a configuration beside the checkpoint, of the same name with the ending .yaml, that says "
    'parameterization: "v", and load it again. Forge, which takes every SD 1.x and 2.x checkpoint for noise '
    'prediction, needs only the line: model: {params: {parameterization: "v"}}'
)


class SplamSampler(sd_samplers_kdiffusion.KDiffusionSampler):
    """The host's k-diffusion sampler with LCMScheduler's timesteps, and eq. 19 in place of an ODE step.

    The host's variables are variance-exploding, z/alpha(t); `splam_core` computes in z. "Schedule type" is not read:
    the timesteps are those that distillation trained on.
    """

    def __init__(self, sd_model: Any) -> None:
        super().__init__(self.few_steps, sd_model)
        self.timesteps: Tensor | None = None

    def get_sigmas(self, p: Any, steps: int) -> Tensor:
        """[steps + 1], falling to 0, on the CPU: the run's noise levels, the first one repeated in front as needed.

        Image-to-image asks for more than it runs and takes the tail, which is then the strength-cut grid.
        """
        timesteps = few_step_timesteps(min(steps, GRID)) if self.timesteps is None else self.timesteps
        sigmas = self.model_wrap.sigmas.detach().float().cpu()[timesteps]
        padding = sigmas[:1].expand(max(0, steps - len(sigmas)))
        return torch.cat([padding, sigmas, torch.zeros(1)])

    def sample(
        self,
        p: Any,
        x: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Tensor | None = None,
    ) -> Tensor:
        """Latents from unit noise x."""
        self.timesteps = self.pick_timesteps(p, steps or p.steps, 1.0)
        sigma = self.get_sigmas(p, len(self.timesteps))[0].item()
        # The host multiplies x by sigma, or by sqrt(1 + sigma^2); x_T of LCM, unit noise in z, is the latter.
        if not shared.opts.sgm_noise_multiplier:
            x = x * ((1 + sigma**2) ** 0.5 / sigma)
        with self.guidance(p, conditioning, unconditional_conditioning) as negative:
            latents: Tensor = super().sample(p, x, conditioning, negative, len(self.timesteps), image_conditioning)
            return latents

    def sample_img2img(
        self,
        p: Any,
        x: Tensor,
        noise: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Tensor | None = None,
    ) -> Tensor:
        """Latents from an image's x, in the number of steps asked for, as in diffusers: strength cuts the grid."""
        self.timesteps = self.pick_timesteps(p, steps or p.steps, p.denoising_strength)
        if len(self.timesteps) == 0:
            return x
        # With a number of steps given, the host runs exactly these, whatever its setting "do exactly the amount" says.
        with self.guidance(p, conditioning, unconditional_conditioning) as negative:
            count = len(self.timesteps)
            latents: Tensor = super().sample_img2img(p, x, noise, conditioning, negative, count, image_conditioning)
            return latents

    def few_steps(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """What the host runs in place of a k-diffusion function. x: [B, ...], noised to sigmas[0]; returns x0."""
        table = self.model_wrap.sigmas.detach().float().cpu()
        schedule = NoiseSchedule(1 / (1 + table**2))

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            sigma = table[t.cpu()].to(x)
            x0: Tensor = model(z / broadcast_to(schedule.alpha(t), z).to(z), sigma, **(extra_args or {}))
            c_skip, c_out = (broadcast_to(c.to(x), z) for c in boundary_scalings(t))
            return c_skip * z + c_out * x0

        def report(step: int, t: int, z: Tensor, x0: Tensor) -> None:
            if callback is not None:
                at = {"x": z / schedule.alpha(t).to(z), "i": step, "denoised": x0}
                callback(at | {"sigma": sigmas[step], "sigma_hat": sigmas[step]})

        def noise(z: Tensor, _: int) -> Tensor:
            drawn: Tensor = self.p.rng.next()  # the host's own, so that a batch equals its pictures made one by one
            return drawn.to(z)

        timesteps = self.timesteps
        assert timesteps is not None  # picked by what called the host, which calls this
        return sample(denoise, x * schedule.alpha(timesteps[0]).to(x), timesteps, schedule, noise, report)

    def pick_timesteps(self, p: Any, steps: int, strength: float) -> Tensor:
        """LCMScheduler's timesteps [n]: `steps` of them, or as many as the grid has at this strength, which may be 0.

        Raises ValueError for a model without Stable Diffusion's 1000 timesteps, and for noise prediction where the
        schedule has zero terminal SNR and the run starts there.
        """
        sigmas = self.model_wrap.sigmas
        if len(sigmas) != 1000 or sigmas[-1] <= 1:
            raise ValueError(
                f"SPLAM: expected a Stable Diffusion 1.x, 2.x or XL checkpoint (1000 timesteps), found a model with "
                f"{len(sigmas)} noise levels up to {float(sigmas[-1]):.3g}. Choose another checkpoint or sampler."
            )
        fit = min(steps, int(GRID * strength))
        if steps > MOST_STEPS or fit < steps:
            p.comment(HINT)
        if hosts.says_v_prediction() and hosts.predicts_noise():
            p.comment(TAKEN_FOR_NOISE)
        timesteps = few_step_timesteps(fit, strength) if fit > 0 else torch.empty(0, dtype=torch.long)
        if any(sigmas[t] > ZERO_SNR_SIGMA for t in timesteps) and hosts.predicts_noise():
            raise ValueError(
                "SPLAM: the checkpoint predicts noise, and the noise schedule has zero terminal SNR: at its first "
                'timestep predicted noise says nothing about the picture. Set "Noise schedule for sampling" (Settings, '
                'Sampler parameters) to "Default", or choose a checkpoint with v prediction.'
            )
        return timesteps

    @contextmanager
    def guidance(self, p: Any, conditioning: Any, negative: Any) -> Iterator[Any]:
        """The context in which to sample, with the unconditional conditioning to take: guidance 1, unless the request
        was told to keep its own; noted either way.

        At guidance 1 the negative prompt is read by normalised attention guidance, if the request was told so, and
        evaluated only where prompts joined by AND need it: if their weights do
        not add up to 1, it does not cancel in u + sum of w (c - u).
        """
        keep = getattr(p, "splam_keeps_guidance", False)
        p.extra_generation_params[hosts.INFOTEXT] = hosts.AS_SET if keep else hosts.FORCED
        weights = [[part.weight for part in parts] for parts in conditioning.batch]
        if hosts.one_weight_for_all() and any(picture != weights[0] for picture in weights):
            p.comment(UNLIKE)
        if keep and hosts.guidance_of(p) != 1:
            yield negative
            return
        composed = any(abs(sum(picture) - 1) > 1e-6 for picture in weights)
        nag = Nag(getattr(p, "splam_nag_scale", 1.0))
        if (composed or not nag.is_off) and negative is None:
            negative = hosts.encode_negative(p)
        with ExitStack() as stack:
            stack.enter_context(hosts.guidance_one(p, composed))
            if not nag.is_off:
                p.extra_generation_params[hosts.NAG_INFOTEXT] = f"{nag.scale:g}"
                stack.enter_context(guided(nag, Negative(negative, lambda: self.model_wrap_cfg.step)))
            yield negative


def register() -> None:
    """Offer the sampler everywhere the host lists its own: both tabs, hires fix, the API, the X/Y/Z plot."""
    hosts.register_sampler(sd_samplers_common.SamplerData(NAME, SplamSampler, ["k_splam"], {}))
