"""Asking a MODEL about points inside a sub-path, by ModelPatcher's means: wrappers, object patches, attachments.

The sampler names a point (gamma, t) in the call's transformer_options; only such calls are changed. At every other call
a patched MODEL computes what it did before, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor

from ..splam_core.gamma import authors_embedding, gamma_embedding
from .host import Model, WrapperExecutor
from .parametrisation import Point, as_consistency_model, on_sub_paths

POINT = "splam_point"  # in transformer_options
ATTACHMENT = "splam_gamma"  # on a MODEL whose checkpoint had gamma weights
KEY = "splam"  # of the wrapper: patching twice leaves one
TIME_EMBEDDING = "diffusion_model.time_embed.0"


@dataclass(frozen=True)
class GammaWeights:
    """What told the UNet gamma, before its constant at gamma = 1 was folded away.

    cond_proj: [C, dim]; bandwidth: of an embedding that is zero at gamma = 1, or None for the authors'.
    """

    cond_proj: Tensor
    bandwidth: float | None = None

    def shift(self, gamma: float) -> Tensor:
        """[C]: what gamma adds to the timestep's sinusoid beyond the folded constant; zero at gamma = 1."""
        # In float64, as the fold.
        points = torch.tensor([gamma, 1.0], dtype=torch.float64)
        dim = self.cond_proj.shape[1]
        if self.bandwidth is None:
            phi = authors_embedding(points.float(), dim).double()
        else:
            phi = gamma_embedding(points, dim, self.bandwidth)
        shift: Tensor = self.cond_proj.double().cpu() @ (phi[0] - phi[1])
        return shift


class _TimeEmbedding:
    """The forward of time_embed.0, which sees gamma's shift added to its input while a point is asked about."""

    def __init__(self, forward: Callable[[Tensor], Tensor], weights: GammaWeights):
        self.inner, self.weights = forward, weights
        self.gamma: float | None = None  # of the point that is asked about
        # Sent to the device once for each gamma.
        self.shifts: dict[tuple[float, torch.device, torch.dtype], Tensor] = {}

    def forward(self, tau: Tensor) -> Tensor:
        if self.gamma is None:
            return self.inner(tau)
        key = (self.gamma, tau.device, tau.dtype)
        if key not in self.shifts:
            self.shifts[key] = self.weights.shift(self.gamma).to(tau)
        return self.inner(tau + self.shifts[key])


def patch_gamma(model: Model, conditioning: str) -> Model:
    """A clone of the MODEL that can be asked about points inside sub-paths.

    conditioning: "noise-level" or "embedding". Raises ValueError where the second has no weights, and for a MODEL that
    is not one of discrete variance-preserving diffusion.
    """
    # Copied: a cached MODEL that stands elsewhere in the graph keeps its own.
    patched = on_sub_paths(as_consistency_model(model), conditioning)
    embedding = None
    if conditioning == "embedding":
        weights = model.get_attachment(ATTACHMENT)
        if weights is None:
            raise ValueError(
                "SPLAM Model Patch: gamma_conditioning 'embedding' needs a checkpoint with the weight "
                "time_embedding.cond_proj, loaded by SPLAM Loader with embedded_guidance 1; this MODEL has none. "
                "Choose 'noise-level', which needs no weights, or 'none'."
            )
        embedding = _TimeEmbedding(patched.get_model_object(f"{TIME_EMBEDDING}.forward"), weights)
        patched.add_object_patch(f"{TIME_EMBEDDING}.forward", embedding.forward)

    def at_point(
        executor: WrapperExecutor,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        sampling, point = executor.class_obj.model_sampling, options.get(POINT)
        sampling.point = point
        if embedding is not None:
            embedding.gamma = None if point is None else point.gamma
        try:
            x0: Tensor = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
            return x0
        finally:
            sampling.point = None
            if embedding is not None:
                embedding.gamma = None

    wrappers = comfy.patcher_extension.WrappersMP
    patched.remove_wrappers_with_key(wrappers.APPLY_MODEL, KEY)
    patched.add_wrapper_with_key(wrappers.APPLY_MODEL, KEY, at_point)
    return patched


def asking_at(point: Point, extra_args: dict[str, Any]) -> dict[str, Any]:
    """A sampler's extra_args for a call at this point."""
    model_options = extra_args.get("model_options", {})
    transformer_options = {**model_options.get("transformer_options", {}), POINT: point}
    return {**extra_args, "model_options": {**model_options, "transformer_options": transformer_options}}
