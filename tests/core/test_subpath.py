"""Sub-path levels against the forward process itself: by algebra for shared noise, by Monte Carlo for fresh noise."""

import pytest
import torch

from splam_core import DirectLinking, SubPathLinear

pytestmark = pytest.mark.core
BOTH = pytest.mark.parametrize("kind", [SubPathLinear, DirectLinking])
LEVELS = pytest.mark.parametrize("sigma_level", ["linear", "independent"])


def pairs(skip=100):
    t = torch.arange(19, 1000, 20)
    return (t - skip).clamp(min=0), t


@BOTH
@pytest.mark.parametrize("skip", [20, 100])
def test_linear_is_exact_when_the_ends_share_their_noise(schedule, kind, skip):
    s, t = pairs(skip)
    x0, noise = torch.randn(2, len(t), 7, dtype=torch.float64).unbind()
    gamma = torch.rand(len(t), dtype=torch.float64)
    x_s, x_t = (schedule.alpha(u)[:, None] * x0 + schedule.sigma(u)[:, None] * noise for u in (s, t))
    path = kind(schedule)
    expected = path.alpha(gamma, s, t)[:, None] * x0 + path.sigma(gamma, s, t)[:, None] * noise
    assert torch.allclose(path.point(x_s, x_t, gamma, s, t), expected, atol=1e-13)


@BOTH
@pytest.mark.parametrize("s, t", [(0, 19), (399, 499), (899, 999)])
@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_independent_is_exact_for_fresh_forward_noise(schedule, kind, s, t, gamma):
    draws = 200_000
    generator = torch.Generator().manual_seed(0)
    first, fresh = torch.randn(2, 1, draws, generator=generator, dtype=torch.float64).unbind()
    x0 = 0.3
    s, t, gamma = torch.tensor([s]), torch.tensor([t]), torch.tensor([gamma]).double()
    r = schedule.alpha(t) / schedule.alpha(s)
    x_s = schedule.alpha(s) * x0 + schedule.sigma(s) * first
    x_t = r * x_s + (1 - r**2).sqrt() * fresh  # eq. 20
    path = kind(schedule, "independent")
    x = path.point(x_s, x_t, gamma, s, t)
    # Five standard errors of a mean and of a standard deviation over the draws.
    level = path.sigma(gamma, s, t).item()
    assert abs(x.mean().item() - path.alpha(gamma, s, t).item() * x0) < 5 * level / draws**0.5
    assert abs(x.std().item() / level - 1) < 5 / (2 * draws) ** 0.5


def test_independent_equals_the_printed_formulas(schedule):
    """Eq. 24 and 28 as printed; the first is also what the authors' script computes."""
    s, t = pairs(20)
    gamma = torch.rand(len(t), dtype=torch.float64)
    a_s, a_t, s_s = schedule.alpha(s), schedule.alpha(t), schedule.sigma(s)
    authors = ((s_s * a_t / a_s) ** 2 + gamma**2 * (1 - (a_t / a_s) ** 2)).sqrt()
    assert torch.allclose(SubPathLinear(schedule, "independent").sigma(gamma, s, t), authors, rtol=1e-14)
    dl = ((1 - gamma + a_t / a_s * gamma) ** 2 * s_s**2 + gamma**2 * (1 - a_t**2 / a_s**2)).sqrt()
    assert torch.allclose(DirectLinking(schedule, "independent").sigma(gamma, s, t), dl, rtol=1e-14)


@BOTH
@LEVELS
def test_gamma_one_is_the_forward_process_to_the_bit(schedule, kind, sigma_level):
    s, t = pairs()
    path, one = kind(schedule, sigma_level), torch.ones(len(t), dtype=torch.float64)
    x_s, x_t = torch.randn(2, len(t), 5, dtype=torch.float64).unbind()
    assert torch.equal(path.point(x_s, x_t, one, s, t), x_t)
    assert torch.equal(path.alpha(one, s, t), schedule.alpha(t))
    assert torch.equal(path.sigma(one, s, t), schedule.sigma(t))


@LEVELS
def test_gamma_zero_is_the_start_in_the_signal_level_of_the_path(schedule, sigma_level):
    s, t = pairs()
    zero = torch.zeros(len(t), dtype=torch.float64)
    x_s, x_t = torch.randn(2, len(t), 5, dtype=torch.float64).unbind()
    r = schedule.alpha(t) / schedule.alpha(s)
    sl, dl = SubPathLinear(schedule, sigma_level), DirectLinking(schedule, sigma_level)
    assert torch.allclose(sl.point(x_s, x_t, zero, s, t), r[:, None] * x_s, rtol=1e-14)
    assert torch.allclose(sl.sigma(zero, s, t), r * schedule.sigma(s), rtol=1e-14)
    assert torch.equal(dl.point(x_s, x_t, zero, s, t), x_s)
    assert torch.allclose(dl.sigma(zero, s, t), schedule.sigma(s), rtol=1e-14)


def test_signal_level_of_the_sub_path_linear_ode_never_moves(schedule):
    s, t = pairs()
    for gamma in torch.rand(5, len(t), dtype=torch.float64):
        assert torch.equal(SubPathLinear(schedule).alpha(gamma, s, t), schedule.alpha(t))


@BOTH
def test_the_path_is_a_chord_of_constant_velocity(schedule, kind):
    """dx/dgamma has no factor gamma, unlike eq. 13 and 26 as printed."""
    s, t = pairs()
    x_s, x_t = torch.randn(2, len(t), 5, dtype=torch.float64).unbind()
    at = [kind(schedule).point(x_s, x_t, torch.full((len(t),), g, dtype=torch.float64), s, t) for g in (0, 0.2, 0.4, 1)]
    assert torch.allclose(at[1] - at[0], at[2] - at[1], atol=1e-13)
    assert torch.allclose((at[3] - at[0]) * 0.2, at[1] - at[0], atol=1e-13)


def test_images_and_unknown_levels(schedule):
    x = torch.randn(2, 4, 3, 3)
    s, t, gamma = torch.tensor([0, 399]), torch.tensor([19, 499]), torch.tensor([0.5, 0.1])
    assert SubPathLinear(schedule).point(x, x, gamma, s, t).shape == x.shape
    with pytest.raises(ValueError, match="'exact'"):
        SubPathLinear(schedule, "exact")
