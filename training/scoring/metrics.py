"""Distances between sets of feature vectors [n, d]: Frechet, a form of it that outliers do not rule, the nearest.

Frechet distances here are squared, as every published FID is (Heusel et al., GANs Trained by a Two Time-Scale Update
Rule, eq. 6). All is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_of_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of two Gaussians; means [d], covariances [d, d]."""
    mean_a, cov_a, mean_b, cov_b = (part.double() for part in (mean_a, cov_a, mean_b, cov_b))
    # S_a S_b is similar to a positive semi-definite matrix: real, non-negative eigenvalues but for rounding.
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to features [n, d] and [m, d]. Raises ValueError for fewer than two rows on a side."""
    _two_or_more(a, b)
    a, b = a.double(), b.double()
    return frechet_of_gaussians(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def frechet_distance_clipped(a: Tensor, reference: Tensor, tail: float = 0.005) -> float:
    """`frechet_distance` after both sides are clipped to the reference's central range along its principal axes.

    The range of an axis runs from the reference's quantile `tail` to its quantile 1 - tail. However far off a picture
    is, it then counts as one on the rim of what the reference holds, so that few cannot rule the distance.
    Not symmetric. Raises ValueError as `frechet_distance`.
    """
    _two_or_more(a, reference)
    a, reference = a.double(), reference.double()
    axes = torch.linalg.eigh(torch.cov(reference.T)).eigenvectors
    a, reference = a @ axes, reference @ axes
    low, high = torch.quantile(reference, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return frechet_distance(a.clamp(low, high), reference.clamp(low, high))


def nearest_distances(queries: Tensor, candidates: Tensor, chunk: int = 256) -> Tensor:
    """Distance [n] of each query [n, d] to the nearest of candidates [m, d], as the RMS over the d components."""
    if not len(candidates):
        raise ValueError("there are no candidates to be near to")
    candidates = candidates.flatten(1).double()
    parts = queries.flatten(1).double().split(chunk)
    return torch.cat([torch.cdist(part, candidates).amin(1) for part in parts]) / candidates.shape[1] ** 0.5


def _two_or_more(a: Tensor, b: Tensor) -> None:
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs two pictures or more on each side, got {len(a)} and {len(b)}")
