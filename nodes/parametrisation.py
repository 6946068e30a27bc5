"""How the UNet's output becomes a denoised latent: on diffusers' schedule, and as F of eq. 14 and 16 for a SPLAM.

ComfyUI keeps a latent as x = z/alpha(t), at noise level sigma(t)/alpha(t); there F = c_skip*alpha*x + c_out*x0.
"""

from dataclasses import dataclass

import comfy.model_base
import comfy.model_sampling
import torch
from torch import Tensor

from ..splam_core.denoiser import boundary_scalings
from ..splam_core.schedule import NoiseSchedule, broadcast_to
from .host import Model, ModelSampling


@dataclass(frozen=True)
class Point:
    """Where on the sub-path that ends at timestep t: 0 < gamma < 1."""

    gamma: float
    t: int


class _Schedule(comfy.model_sampling.ModelSamplingDiscrete):
    """A NoiseSchedule as ComfyUI's table of sigmas (its own is computed in float64 and differs in the last digits)."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.schedule = schedule
        self.zsnr = schedule.has_zero_terminal_snr  # which the host writes into the files that it saves
        self.set_sigmas(schedule.ve_sigma(torch.arange(schedule.num_train_timesteps)))


class _Consistency(_Schedule):
    """The network's output read as F instead of x0."""

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        x0: Tensor = super().calculate_denoised(sigma, model_output, model_input)
        return consistency(x0, model_input, sigma, self.timestep(sigma))

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        # diffusers starts text-to-image from pure noise, and image-to-image from add_noise at every strength; at
        # denoise 1 ComfyUI would add the first one's noise to the second one's image. A batch may hold both.
        start: Tensor = super().noise_scaling(sigma, noise, latent_image)
        if not max_denoise:
            return start
        pure: Tensor = super().noise_scaling(sigma, noise, latent_image, max_denoise=True)
        return torch.where(broadcast_to(is_empty(latent_image), pure), pure, start)


class _SubPath(_Consistency):
    """Also inside a sub-path, at the point that a call asks about (see gamma.py); `point` is None at all others.

    In ComfyUI's variables the point is x_gamma/alpha(t) at noise level sigma(gamma, t)/alpha(t), for either way of
    telling the network gamma; they differ in what the network sees.
    """

    def __init__(self, schedule: NoiseSchedule, conditioning: str):
        super().__init__(schedule)
        self.conditioning = conditioning
        self.point: Point | None = None
        self.moved = schedule  # on the device that asked last

    def timestep(self, sigma: Tensor) -> Tensor:
        if self.point is None:
            timestep: Tensor = super().timestep(sigma)
            return timestep
        if self.conditioning == "embedding":
            return torch.full_like(sigma, self.point.t)
        if self.moved.alphas_cumprod.device != sigma.device:
            self.moved = self.schedule.to(sigma.device)
        return self.moved.timestep_at(torch.ones_like(sigma), sigma)

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        if self.point is None or self.conditioning != "embedding":
            scaled: Tensor = super().calculate_input(sigma, noise)
            return scaled
        return noise * self.schedule.alpha(self.point.t)

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        if self.point is None:
            return super().calculate_denoised(sigma, model_output, model_input)
        x0: Tensor = super(_Consistency, self).calculate_denoised(sigma, model_output, model_input)
        # At t, not at the inner timestep: below it c_skip + c_out would exceed 1.
        c_skip, c_out = boundary_scalings(torch.tensor(float(self.point.t)))
        return c_skip * self.calculate_input(sigma, model_input) + c_out * x0


class PlainEPS(_Schedule, comfy.model_sampling.EPS):
    pass


class PlainV(_Schedule, comfy.model_sampling.V_PREDICTION):
    pass


class ConsistencyEPS(_Consistency, comfy.model_sampling.EPS):
    pass


class ConsistencyV(_Consistency, comfy.model_sampling.V_PREDICTION):
    pass


class SubPathEPS(_SubPath, comfy.model_sampling.EPS):
    pass


class SubPathV(_SubPath, comfy.model_sampling.V_PREDICTION):
    pass


_CLASSES = {
    ("epsilon", False): PlainEPS,
    ("v_prediction", False): PlainV,
    ("epsilon", True): ConsistencyEPS,
    ("v_prediction", True): ConsistencyV,
}


def consistency(x0: Tensor, x: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """F from x0 in ComfyUI's variables. x0, x: [B, ...]; sigma, t: [B] or scalar, of one noise level."""
    c_skip, c_out = boundary_scalings(t.to(torch.float32))
    alpha = (1 + sigma**2) ** -0.5
    return broadcast_to(c_skip * alpha, x) * x + broadcast_to(c_out, x0) * x0


def is_empty(latent_image: Tensor) -> Tensor:
    """[B]: which pictures of a latent image are none, for text-to-image."""
    return latent_image.flatten(1).count_nonzero(dim=1) == 0


def patch(model: Model, schedule: NoiseSchedule, prediction_type: str, is_consistency_model: bool) -> Model:
    """A clone of the MODEL with this schedule and prediction type; F instead of x0 when it is a consistency model.

    Raises ValueError for a prediction type other than "epsilon" and "v_prediction".
    """
    if (prediction_type, is_consistency_model) not in _CLASSES:
        raise ValueError(f"the model predicts {prediction_type!r}; expected 'epsilon' or 'v_prediction'.")
    patched = model.clone()
    patched.add_object_patch("model_sampling", _CLASSES[prediction_type, is_consistency_model](schedule))
    return patched


def declare(model: Model, prediction_type: str, schedule: NoiseSchedule) -> None:
    """Tells a freshly loaded MODEL what it predicts, as if the host's own loader had found it out.

    What the host saves, merges and samples without SPLAM's parametrisation then follows it too.
    """
    base, types = model.model, comfy.model_base.ModelType
    base.model_type = types.V_PREDICTION if prediction_type == "v_prediction" else types.EPS
    base.model_config.sampling_settings["zsnr"] = schedule.has_zero_terminal_snr
    base.model_sampling = comfy.model_base.model_sampling(base.model_config, base.model_type)


def as_consistency_model(model: Model) -> Model:
    """The MODEL with SPLAM's parametrisation, whatever loaded it; itself if it has it already.

    Raises ValueError for a model that is not one of discrete variance-preserving diffusion (Flux, SD3, EDM, ...).
    """
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, _Consistency):
        return model
    return patch(model, schedule_of(sampling), prediction_type_of(sampling), True)


def on_sub_paths(model: Model, conditioning: str) -> Model:
    """A clone of a consistency MODEL that takes points inside sub-paths too; conditioning as Denoiser's."""
    sampling = model.get_model_object("model_sampling")
    kind = SubPathV if prediction_type_of(sampling) == "v_prediction" else SubPathEPS
    patched = model.clone()
    patched.add_object_patch("model_sampling", kind(schedule_of(sampling), conditioning))
    return patched


def takes_sub_paths(sampling: ModelSampling) -> bool:
    return isinstance(sampling, _SubPath)


def nearest_timesteps(schedule: NoiseSchedule, sigmas: Tensor) -> Tensor:
    """Integer timesteps [n] nearest to VE noise levels [n]."""
    table = schedule.ve_sigma(torch.arange(schedule.num_train_timesteps)).log()
    return (sigmas.to(table).log()[:, None] - table).abs().argmin(dim=1)


def is_consistency(sampling: ModelSampling) -> bool:
    return isinstance(sampling, _Consistency)


def prediction_type_of(sampling: ModelSampling) -> str:
    """ "epsilon" or "v_prediction", from any MODEL's model_sampling."""
    other = (
        *(comfy.model_sampling.X0, comfy.model_sampling.EDM),
        *(comfy.model_sampling.ModelSamplingDiscreteEDM, comfy.model_sampling.StableCascadeSampling),
    )
    discrete = isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete)
    if not discrete or not isinstance(sampling, comfy.model_sampling.EPS) or isinstance(sampling, other):
        found = ", ".join(base.__name__ for base in type(sampling).__mro__[1:3])
        raise ValueError(
            "SPLAM needs a Stable Diffusion model that predicts noise or v (SD1.x, SD2.x, SDXL); this MODEL samples as "
            f"{found}. Connect a SPLAM or LCM checkpoint of those families."
        )
    return "v_prediction" if isinstance(sampling, comfy.model_sampling.V_PREDICTION) else "epsilon"


def schedule_of(sampling: ModelSampling) -> NoiseSchedule:
    """The schedule of any MODEL's model_sampling: diffusers' table of Stable Diffusion's, or the model's own.

    Raises ValueError as `prediction_type_of`, and for a table from which the timesteps cannot be told.
    """
    if isinstance(sampling, _Schedule):
        return sampling.schedule
    prediction_type_of(sampling)
    standard = NoiseSchedule.scaled_linear()
    sigmas = sampling.sigmas.float().cpu()
    everyday = standard.ve_sigma(torch.arange(standard.num_train_timesteps))
    # ComfyUI's LCM class keeps only every 20th sigma: it is the same schedule.
    kept = max(1, len(everyday) // len(sigmas))
    if len(sigmas) * kept == len(everyday) and torch.allclose(sigmas, everyday[kept - 1 :: kept], rtol=1e-3):
        return standard
    if kept > 1:
        raise ValueError(
            f"SPLAM: this MODEL samples on {len(sigmas)} noise levels that are not Stable Diffusion's, as after "
            "ModelSamplingDiscrete 'lcm' with zsnr. SPLAM needs no such node: take it out, or choose 'v_prediction' in "
            "it for a v model with zero terminal SNR."
        )
    return NoiseSchedule(1 / (1 + sigmas**2))
