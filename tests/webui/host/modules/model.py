"""The loaded checkpoint, and the three ways in which hosts turn its output into a denoised latent."""

from types import SimpleNamespace

import numpy
import torch

from . import HOST


def alphas_cumprod():
    """Computed in float64 and rounded once, as in these hosts (diffusers computes in float32)."""
    betas = numpy.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=numpy.float64) ** 2
    return torch.tensor(numpy.cumprod(1 - betas), dtype=torch.float32)


def zero_terminal_snr(alphas):
    """The table of the setting "Noise schedule: Zero Terminal SNR": rescaled to 0 at the end, where 4.9e-8 is put."""
    roots = alphas.sqrt()
    rescaled = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    rescaled[-1] = 4.8973451890853435e-08
    return rescaled


def expand(sigma, x):
    return sigma.view(-1, *[1] * (x.ndim - 1))


class Checkpoint:
    """unet(x, t, context) -> output. Forge and reForge keep the network behind `forge_objects`."""

    is_sdxl = False

    def __init__(self, unet, host, parameterization="eps", zero_snr=False):
        self.parameterization, self.calls = parameterization, []
        self.sd_checkpoint_info = SimpleNamespace(metadata={})

        def apply_model(x, t, context):
            self.calls.append(len(x))
            return unet(x, t, context)

        self.apply_model = apply_model
        self.alphas_cumprod = zero_terminal_snr(alphas_cumprod()) if zero_snr else alphas_cumprod()
        if host != "a1111":
            predictor = Predictor(self)
            self.forge_objects = SimpleNamespace(
                unet=SimpleNamespace(
                    model=SimpleNamespace(**{"predictor" if host == "forge" else "model_sampling": predictor}),
                    model_options={},
                )
            )


class Predictor:
    """Forge's and, under another name, reForge's: sigma to the nearest timestep."""

    def __init__(self, checkpoint):
        self.checkpoint, self.v = checkpoint, checkpoint.parameterization == "v"
        if HOST == "reforge":
            checkpoint.parameterization = "eps"  # as of an XL checkpoint that is known by its key "v_pred"
        self.sigmas = ((1 - checkpoint.alphas_cumprod) / checkpoint.alphas_cumprod) ** 0.5
        self.log_sigmas = self.sigmas.log()

    def timestep(self, sigma):
        return (sigma.log() - self.log_sigmas[:, None]).abs().argmin(dim=0)

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return noise * ((1 + sigma**2) ** 0.5 if max_denoise else sigma) + latent

    def denoise(self, x, sigma, context):
        s = expand(sigma, x)
        out = self.checkpoint.apply_model(x / (s**2 + 1) ** 0.5, self.timestep(sigma).float(), context)
        return self.calculate_denoised(sigma, out, x)

    def calculate_denoised(self, sigma, out, x):
        s = expand(sigma, x)
        if self.v:
            return x / (s**2 + 1) - out * s / (s**2 + 1) ** 0.5
        return x - out * s


class ScheduleLinker:
    """Forge's model_wrap: the schedule only."""

    def __init__(self, checkpoint):
        self.predictor, self.inner_model = checkpoint.forge_objects.unet.model.predictor, checkpoint

    @property
    def sigmas(self):
        return self.predictor.sigmas


class CompVisDenoiser:
    """Automatic1111's and reForge's model_wrap: sigma to a fractional timestep, linear in log sigma."""

    def __init__(self, checkpoint):
        self.inner_model = checkpoint
        self.sigmas = ((1 - checkpoint.alphas_cumprod) / checkpoint.alphas_cumprod) ** 0.5
        self.log_sigmas = self.sigmas.log()

    def sigma_to_t(self, sigma):
        log_sigma, table = sigma.log(), self.log_sigmas
        low = (torch.searchsorted(table, log_sigma, right=True) - 1).clamp(0, len(table) - 2)
        weight = (table[low] - log_sigma) / (table[low] - table[low + 1])
        return low + weight.clamp(0, 1)

    def __call__(self, x, sigma, cond):
        s = expand(sigma, x)
        out = self.inner_model.apply_model(x / (s**2 + 1) ** 0.5, self.sigma_to_t(sigma), cond)
        if self.inner_model.parameterization == "v":
            return x / (s**2 + 1) - out * s / (s**2 + 1) ** 0.5
        return x - out * s
