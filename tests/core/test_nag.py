"""Normalised attention guidance against the paper's formula, in float64, on the shapes of the true UNets."""

import pytest
import torch

from splam_core.nag import Nag, normalized_attention

# (tokens, channels) of the cross-attention of SD1.5 at 512 px and of SDXL at 1024 px.
SHAPES = [(4096, 320), (1024, 640), (256, 1280), (64, 1280), (4096, 640)]


def by_the_paper(z_positive, z_negative, scale, tau, alpha):
    """Chen et al.: extrapolation, L1 ratio clipped at tau, blend; token by token."""
    z_positive, z_negative = z_positive.double(), z_negative.double()
    phi = scale - 1
    extrapolated = z_positive + phi * (z_positive - z_negative)
    ratio = extrapolated.abs().sum(-1) / z_positive.abs().sum(-1)
    normalised = extrapolated * (torch.minimum(ratio, torch.tensor(tau).double()) / ratio)[..., None]
    return alpha * normalised + (1 - alpha) * z_positive


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_formula(shape):
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn((2, *shape), generator=generator) for _ in range(2))
    negative[:, ::2] = 0.9 * positive[:, ::2] + 0.1 * negative[:, ::2]  # ratios below tau; of the others above it
    expected = by_the_paper(positive, negative, 5.0, 2.5, 0.5)
    found = normalized_attention(positive, negative, Nag(5.0, 2.5, 0.5))
    assert (found - expected).abs().max() < 1e-5 * expected.std()
    unclipped = by_the_paper(positive, negative, 5.0, 1e9, 0.5)
    changed = ((unclipped - expected).abs().amax(-1) > 1e-6).double().mean()
    assert 0.2 < changed < 1, "both sides of the clip must be met"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype):
    """Norms of 1280 channels of 60 would not fit float16."""
    generator = torch.Generator().manual_seed(1)
    positive, negative = (60 * torch.randn((1, 64, 1280), generator=generator).to(dtype) for _ in range(2))
    found = normalized_attention(positive, negative, Nag(alpha=0.5))
    assert found.dtype == dtype and found.isfinite().all()
    expected = by_the_paper(positive, negative, 5.0, 2.5, 0.5)
    assert (found - expected).abs().max() < 0.05 * expected.std()


def test_zeros_stay_finite():
    zero, one = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    for positive, negative in ((zero, one), (zero, zero), (one * 4, one * 5)):
        assert normalized_attention(positive, negative, Nag()).isfinite().all()


@pytest.mark.parametrize("numbers", [(0.5, 2.5, 0.5), (5, 0, 0.5), (5, 2.5, 1.5), (float("nan"), 2.5, 0.5)])
def test_numbers_out_of_range(numbers):
    with pytest.raises(ValueError, match=r"nag_scale must be 1 or more.*found .*usual ones"):
        Nag(*numbers)


def test_when_it_is_off():
    assert Nag(1.0).is_off and Nag(alpha=0.0).is_off and not Nag().is_off
