"""What a file says that its network predicts, and on which schedule: noise or v, with or without zero terminal SNR."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .schedule import NoiseSchedule

# Empty tensors by which single files of SDXL say it (ComfyUI, Forge, reForge and Automatic1111 read and write them).
V_KEY, ZERO_SNR_KEY = MARKS = ("v_pred", "ztsnr")
_EDM_KEYS = ("edm_mean", "edm_std", "edm_vpred.")
_METADATA = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
_NAMES = {
    "epsilon": ("epsilon", "eps", "eps_prediction", "noise"),
    "v_prediction": ("v_prediction", "v", "v_pred", "vpred", "velocity"),
}


@dataclass(frozen=True)
class Parametrisation:
    """None where the file does not say: then Stable Diffusion's schedule, and what its family usually predicts."""

    prediction_type: str | None = None  # "epsilon" or "v_prediction"
    schedule: NoiseSchedule | None = None
    contradictions: tuple[str, ...] = ()  # sentences: what the file says twice, differently, and which is believed

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys by which a single file says so to its readers."""
        zero = self.schedule is not None and self.schedule.has_zero_terminal_snr
        return MARKS[: 1 + zero] if self.prediction_type == "v_prediction" else ()


def parametrisation_of(
    keys: Iterable[str], metadata: Mapping[str, str] | None = None, scheduler: Mapping[str, Any] | None = None
) -> Parametrisation:
    """From a file's keys, its metadata, and the scheduler_config.json that came with it, believed in this order.

    The keys speak only where they are there: a file without `v_pred` may predict either. Raises ValueError for what
    SPLAM cannot sample: networks of continuous noise levels (EDM), of flows, of x0, and noise predicted at zero SNR.
    """
    keys, metadata, scheduler = set(keys), metadata or {}, scheduler or {}
    edm = sorted(key for key in keys if key.startswith(_EDM_KEYS))
    kind = str(scheduler.get("_class_name", ""))
    if edm or kind.startswith(("EDM", "FlowMatch")):
        raise ValueError(
            f"{f'the key {edm[0]!r}' if edm else f'the scheduler {kind}'} says that it is a model of continuous noise "
            "levels (EDM or flow matching). SPLAM needs one that predicts noise or v on Stable Diffusion's discrete "
            "schedule; choose such a model."
        )
    said = {f"the key {V_KEY!r}": "v_prediction"} if V_KEY in keys else {}
    if scheduler:
        said["its scheduler configuration"] = _prediction_type(str(scheduler.get("prediction_type") or "epsilon"))
    said |= {f"its metadata {name!r}": _prediction_type(metadata[name]) for name in _METADATA if metadata.get(name)}
    source, prediction_type = next(iter(said.items()), ("", None))
    contradictions = tuple(
        f"{source} says {prediction_type}, {other} {claimed}; the first is believed."
        for other, claimed in said.items()
        if claimed != prediction_type
    )
    zero = ZERO_SNR_KEY in keys or bool(scheduler.get("rescale_betas_zero_snr"))
    if zero and prediction_type != "v_prediction":
        named = ZERO_SNR_KEY if ZERO_SNR_KEY in keys else "rescale_betas_zero_snr"
        raise ValueError(
            f"{named!r} says that the schedule ends in pure noise (zero terminal SNR), and nothing that the network "
            f"predicts v: no picture can be told from noise predicted there. A v model needs the key {V_KEY!r}, or "
            "prediction_type v_prediction in its scheduler_config.json or metadata."
        )
    schedule = NoiseSchedule.from_config({**scheduler, "rescale_betas_zero_snr": False}) if scheduler else None
    if zero:
        schedule = (schedule or NoiseSchedule.scaled_linear()).with_zero_terminal_snr()
    return Parametrisation(prediction_type, schedule, contradictions)


def latent_scale(vae: Mapping[str, Any]) -> float | None:
    """What an autoencoder's config.json says that its latents are multiplied by; None where it does not say.

    Raises ValueError for latents that a mean or a shift is taken from too, and for a scale that is no number above 0.
    """
    for name in ("latents_mean", "latents_std", "shift_factor"):
        if vae.get(name):
            raise ValueError(
                f"the VAE's config.json has {name}, as EDM and flow models do, whose latents are not Stable "
                f"Diffusion's; expected scaling_factor alone. Choose a model of SD1.x, SD2.x or SDXL, or its own VAE."
            )
    scale = vae.get("scaling_factor")
    if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        raise ValueError(f"the VAE's config.json says {scale!r:.40} for scaling_factor; expected a number above 0.")
    return scale


def _prediction_type(name: str) -> str:
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    for known, names in _NAMES.items():
        if plain in names:
            return known
    raise ValueError(f"the model predicts {name!r:.80}; expected 'epsilon' or 'v_prediction'.")
