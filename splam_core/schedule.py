"""The discrete variance-preserving noise schedule and the few-step timestep grid.

A latent at timestep t is z_t = alpha(t) * z_0 + sigma(t) * noise, with alpha^2 + sigma^2 = 1 (eq. 1, 21).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GRID = 50  # timesteps that training sees and few-step sampling picks from: 19, 39, .., 999
ZERO_SNR_ALPHA_CUMPROD = 4.8973451890853435e-08  # what ComfyUI takes for the 0 at the end of a zero-SNR schedule
MOST_TIMESTEPS = 100_000  # a hundred times Stable Diffusion's: a file that asks for more asks for memory


def _is_share(value: object) -> bool:
    """Whether it is a number above 0 and below 1, as every beta is."""
    return isinstance(value, (int, float)) and 0 < value < 1


def broadcast_to(levels: Tensor, x: Tensor) -> Tensor:
    """Shape one number per sample, [B] or a scalar [], so that it multiplies x [B, ...]; it moves to the device of x.

    The result has as many dimensions as x, so a product is computed in the wider of the two dtypes.
    """
    return levels.to(x.device).reshape(levels.shape + (1,) * (x.ndim - levels.ndim))


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alpha(t) and sigma(t) of a discrete schedule, t = 0..T-1.

    alphas_cumprod: [T], alpha(t)^2, strictly between 0 and 1 and strictly falling. Levels come out in its dtype and
    on its device: in training, `.to` the device of the latents once.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.ndim != 1 or len(table) < 2 or not table.is_floating_point():
            raise ValueError(
                f"alphas_cumprod must be a float vector of 2 or more timesteps, got {table.dtype} {tuple(table.shape)}."
            )
        if not (table[0] < 1 and table[-1] > 0 and (table.diff() < 0).all()):
            raise ValueError(
                "alphas_cumprod must fall strictly from below 1 to above 0; a schedule with zero terminal SNR "
                "has alpha = 0 at its last timestep, where x0 cannot be recovered from predicted noise."
            )

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """betas: [T], the forward process's variances (Ho et al., DDPM)."""
        return cls(torch.cumprod(1.0 - betas, dim=0))

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Stable Diffusion's schedule: the betas' square roots are evenly spaced. Float32 throughout, as diffusers."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32)
        return cls.from_betas(roots**2)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule named by a diffusers scheduler_config.json, read as a mapping.

        Raises ValueError for a missing key, an unknown beta_schedule or zero terminal SNR.
        """
        if config.get("rescale_betas_zero_snr"):
            raise ValueError(
                "scheduler config: rescale_betas_zero_snr is true. SPLAM divides by alpha(t), which is then 0 at the "
                "last timestep; use a model whose schedule keeps it false."
            )
        trained = config.get("trained_betas")
        if trained is not None:
            if not isinstance(trained, (list, tuple)) or not all(map(_is_share, trained)):
                raise ValueError(
                    f"scheduler config: expected trained_betas to be a list of numbers between 0 and 1, found "
                    f"{trained!r:.40}."
                )
            return cls.from_betas(torch.tensor(trained, dtype=torch.float32))
        for key in ("beta_schedule", "beta_start", "beta_end"):
            if key not in config:
                raise ValueError(f"scheduler config: expected the key {key!r}, found only {sorted(config)}.")
        name, start, end = config["beta_schedule"], config["beta_start"], config["beta_end"]
        steps = config.get("num_train_timesteps", 1000)
        whole = type(steps) is int and 2 <= steps <= MOST_TIMESTEPS
        if not whole or not _is_share(start) or not _is_share(end):
            raise ValueError(
                f"scheduler config: expected 2 to {MOST_TIMESTEPS} num_train_timesteps between two betas above 0 and "
                f"below 1, found {steps!r:.40} between {start!r:.40} and {end!r:.40}."
            )
        if name == "scaled_linear":
            return cls.scaled_linear(steps, start, end)
        if name == "linear":
            return cls.from_betas(torch.linspace(start, end, steps, dtype=torch.float32))
        raise ValueError(f"scheduler config: beta_schedule is {name!r:.40}; expected 'scaled_linear' or 'linear'.")

    def with_zero_terminal_snr(self) -> NoiseSchedule:
        """The schedule that ends in noise alone (Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are
        Flawed"): alpha shifted and scaled so that its first value stays and its last is 0.

        In place of 0 stands 2.2e-4, as in ComfyUI, so that it can be divided by.
        """
        roots = self.alphas_cumprod.sqrt()
        roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
        table = roots**2
        table[-1] = ZERO_SNR_ALPHA_CUMPROD
        return NoiseSchedule(table)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> NoiseSchedule:
        """The same table elsewhere. A float32 table cast to float64 keeps its values: only the arithmetic gains."""
        return NoiseSchedule(self.alphas_cumprod.to(device=device, dtype=dtype))

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last timestep is noise alone (as good as: 1e-6 of signal)."""
        return bool(self.alphas_cumprod[-1] < 1e-6)

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def alpha(self, t: Tensor | float) -> Tensor:
        """Signal level at t, of any shape, 0..T-1. A fractional t interpolates log(sigma/alpha) linearly."""
        return self._alphas_cumprod_at(t)[0].sqrt()

    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise level at t; fractional t as in `alpha`."""
        return self._alphas_cumprod_at(t)[1].sqrt()

    def ve_sigma(self, t: Tensor | float) -> Tensor:
        """sigma(t)/alpha(t): the noise level in variance-exploding coordinates z/alpha(t), as k-diffusion counts it."""
        signal, noise = self._alphas_cumprod_at(t)
        return (noise / signal).sqrt()

    def timestep_at(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The fractional timestep whose signal-to-noise ratio is alpha/sigma, clamped to [0, T-1].

        alpha, sigma: positive, of one shape, any scale. Inverse of alpha(t), sigma(t).
        """
        table = _log_ratio(self.alphas_cumprod, 1 - self.alphas_cumprod)
        wanted = (sigma / alpha).log().to(table)
        below = (torch.searchsorted(table, wanted.contiguous()) - 1).clamp(0, self.num_train_timesteps - 2)
        fraction = (wanted - table[below]) / (table[below + 1] - table[below])
        return (below + fraction).clamp(0, self.num_train_timesteps - 1)

    def _alphas_cumprod_at(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(alpha^2, sigma^2) at t."""
        table, last = self.alphas_cumprod, self.num_train_timesteps - 1
        t = torch.as_tensor(t)
        # Checked on the CPU only: on an accelerator the check would wait for the device at every call.
        if t.device.type == "cpu" and t.numel():
            low, high = (bound.item() for bound in t.aminmax())
            if not (low >= 0 and high <= last):  # so written, NaN is refused
                raise ValueError(f"timesteps must lie in 0..{last}, got {low}..{high}.")
        t = t.to(table.device)
        exact = table[t.long()]
        if not t.is_floating_point():
            return exact, 1 - exact
        below = t.floor().long().clamp(max=last - 1)
        left, right = (_log_ratio(level, 1 - level) for level in (table[below], table[below + 1]))
        log_ratio = left + (right - left) * (t - below).to(table.dtype)
        on_grid = t == t.round()
        signal = torch.where(on_grid, exact, torch.sigmoid(-2 * log_ratio))
        return signal, torch.where(on_grid, 1 - exact, torch.sigmoid(2 * log_ratio))


def _log_ratio(signal: Tensor, noise: Tensor) -> Tensor:
    """log(sigma/alpha) from alpha^2 and sigma^2."""
    return (noise.log() - signal.log()) / 2


def few_step_timesteps(steps: int, strength: float = 1.0, grid: int = GRID, num_train_timesteps: int = 1000) -> Tensor:
    """Descending timesteps [steps] of a few-step run, as diffusers' LCMScheduler picks them.

    The grid {19, 39, .., 999} is the one distillation trained on. Image-to-image keeps its lowest
    int(grid*strength) points and spaces the steps over those: 4 steps give 999, 759, 499, 259 at strength 1.
    Raises ValueError unless 0 < strength <= 1 and 1 <= steps <= int(grid*strength).
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}.")
    if not 1 <= grid <= num_train_timesteps:
        raise ValueError(f"grid must be between 1 and num_train_timesteps = {num_train_timesteps}, got {grid}.")
    kept = int(grid * strength)
    if not 1 <= steps <= kept:
        remedy = "raise the strength" if steps >= 1 else "ask for one step or more"
        raise ValueError(
            f"{steps} steps do not fit: strength {strength} leaves {kept} of the {grid} grid points. "
            f"Steps must be from 1 to {kept}, or {remedy}."
        )
    spacing = num_train_timesteps // grid
    # i * (kept / steps), not i * kept // steps: the rounding of the division is part of what must match.
    picked = [kept - math.floor(i * (kept / steps)) for i in range(steps)]
    return torch.tensor(picked, dtype=torch.long) * spacing - 1
