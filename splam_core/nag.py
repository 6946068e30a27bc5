"""Normalised attention guidance: a negative prompt without guidance of the output (Chen et al., arXiv 2505.21179)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Nag:
    """How far attention is led away from the negative prompt, section 3.2.

    scale: of the extrapolation z+ * scale - z- * (scale - 1), 1 or more; 1 is no guidance.
    tau: the largest growth of a token's L1 norm over that of z+, above 0.
    alpha: share of the result in its blend with z+, 0..1.
    Raises ValueError for a number outside these ranges.
    """

    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25

    def __post_init__(self) -> None:
        ranges = {"nag_scale": self.scale >= 1, "nag_tau": self.tau > 0, "nag_alpha": 0 <= self.alpha <= 1}
        if not all(ranges.values()):
            raise ValueError(
                f"nag_scale must be 1 or more, nag_tau above 0 and nag_alpha from 0 to 1; found {self.scale:g}, "
                f"{self.tau:g} and {self.alpha:g}. The usual ones are 5, 2.5 and 0.25."
            )

    @property
    def is_off(self) -> bool:
        return self.scale == 1 or self.alpha == 0


def normalized_attention(positive: Tensor, negative: Tensor, nag: Nag) -> Tensor:
    """What takes the place of the attention output z+, before its output projection (eq. 7-10).

    positive, negative: z+ and z- [B, tokens, C], of one query and two prompts. The norms are taken in float32 over all
    channels of a token.
    """
    guided = positive * nag.scale - negative * (nag.scale - 1)
    # min(r, tau) / r at r = |guided| / |positive|, without the division by a |positive| of 0.
    tiny = torch.finfo(torch.float32).tiny
    share = (nag.tau * _l1_norm(positive) / _l1_norm(guided).clamp(min=tiny)).clamp(max=1)
    return guided * (share * nag.alpha).to(guided.dtype) + positive * (1 - nag.alpha)


def _l1_norm(z: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(z, ord=1, dim=-1, keepdim=True, dtype=torch.float32)
    return norm
