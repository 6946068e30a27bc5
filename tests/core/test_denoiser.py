"""Raw output -> x0 -> F: identities on constructed outputs, and LCMScheduler at gamma = 1."""

import pytest
import torch

from splam_core import (
    Denoiser,
    DirectLinking,
    NoiseSchedule,
    SubPathLinear,
    boundary_scalings,
    predict_epsilon,
    predict_x0,
)

pytestmark = pytest.mark.core
TYPES = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
KINDS = pytest.mark.parametrize("kind", [SubPathLinear, DirectLinking])


def network(x, t, gamma):
    """Nonlinear in everything it is told."""
    told = t.to(x.dtype) / 1000 + (0 if gamma is None else gamma)
    return torch.tanh(1.3 * x + told.reshape(-1, *[1] * (x.ndim - 1)))


def consistent_outputs(x0, noise, alpha, sigma):
    """What perfect epsilon and v networks say at x = alpha*x0 + sigma*noise, for levels on or off the unit circle."""
    n = (alpha**2 + sigma**2).sqrt()
    return {"epsilon": noise, "v_prediction": (alpha * noise - sigma * x0) / n}


@TYPES
def test_consistent_outputs_give_back_x0_and_noise_at_any_levels(prediction_type):
    x0, noise = torch.randn(2, 6, 4, 3, 3, dtype=torch.float64).unbind()
    alpha, sigma = torch.rand(2, 6, dtype=torch.float64).add(0.05).unbind()
    a, b = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    output = consistent_outputs(x0, noise, a, b)[prediction_type]
    x = a * x0 + b * noise
    assert torch.allclose(predict_x0(output, x, alpha, sigma, prediction_type), x0, atol=1e-12)
    assert torch.allclose(predict_epsilon(output, x, alpha, sigma, prediction_type), noise, atol=1e-12)


@TYPES
def test_x0_and_epsilon_of_any_output_rebuild_x(prediction_type):
    x, output = torch.randn(2, 6, 4, dtype=torch.float64).unbind()
    alpha, sigma = torch.rand(2, 6, dtype=torch.float64).add(0.05).unbind()
    x0 = predict_x0(output, x, alpha, sigma, prediction_type)
    noise = predict_epsilon(output, x, alpha, sigma, prediction_type)
    assert torch.allclose(alpha[:, None] * x0 + sigma[:, None] * noise, x, atol=1e-12)


def test_boundary_scalings_equal_lcm_scheduler():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler()
    for t in (0, 1, 19, 499, 999):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(t)
        found = boundary_scalings(torch.tensor(t, dtype=torch.float64))
        assert found == pytest.approx(expected, rel=1e-12)
    assert [c.item() for c in boundary_scalings(torch.tensor(0.0))] == [1, 0]


@KINDS
@TYPES
def test_f_at_the_boundary_is_the_identity(schedule, kind, prediction_type):
    x, zero = torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    denoiser = Denoiser(schedule, prediction_type, subpath=kind(schedule))
    assert torch.equal(denoiser(network, x, None, None, zero), x)


@TYPES
@pytest.mark.parametrize("t", [19, 499, 999])
def test_gamma_one_equals_lcm_scheduler(schedule, prediction_type, t):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler(prediction_type=prediction_type)
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.set_timesteps(50)
    x, ts = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.full((2,), t)
    expected = scheduler.step(network(x, ts, torch.ones(2).double()), t, x).denoised
    assert torch.allclose(Denoiser(schedule, prediction_type)(network, x, None, None, ts), expected, atol=1e-12)


@KINDS
@TYPES
@pytest.mark.parametrize("sigma_level", ["linear", "independent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_two_conditionings_are_one_at_gamma_one_to_the_bit(kind, prediction_type, sigma_level, dtype):
    schedule = NoiseSchedule.scaled_linear().to(dtype=dtype)
    t = torch.arange(19, 1000, 20)
    s, x = (t - 100).clamp(min=0), torch.randn(len(t), 4, 3, 3, dtype=dtype)

    def deaf(x, t, gamma):
        return network(x, t, None)

    path = kind(schedule, sigma_level)
    embedding = Denoiser(schedule, prediction_type, "embedding", path)
    by_level = Denoiser(schedule, prediction_type, "noise-level", path)
    one = torch.ones(len(t), dtype=dtype)
    expected = embedding(deaf, x, None, None, t)
    for denoiser in (embedding, by_level):
        assert torch.equal(denoiser(deaf, x, one, s, t), expected)
        assert torch.equal(denoiser(deaf, x, None, None, t), expected)
    mixed = torch.where(torch.arange(len(t)) % 2 == 0, one, 0.4)
    assert torch.equal(by_level(deaf, x, mixed, s, t)[::2], expected[::2])


@TYPES
@pytest.mark.parametrize("conditioning", ["embedding", "noise-level"])
def test_f_is_continuous_at_gamma_one(schedule, prediction_type, conditioning):
    denoiser = Denoiser(schedule, prediction_type, conditioning)
    t = torch.arange(99, 1000, 100)
    s, x = t - 99, torch.randn(len(t), 4, dtype=torch.float64)
    end = denoiser(network, x, None, None, t)
    for step in (1e-3, 1e-5, 1e-7):
        near = denoiser(network, x, torch.full((len(t),), 1 - step, dtype=torch.float64), s, t)
        assert (near - end).abs().max() < 200 * step


@KINDS
def test_epsilon_and_v_agree_on_consistent_outputs_at_every_gamma(schedule, kind):
    t = torch.arange(19, 1000, 20)
    s, gamma = (t - 100).clamp(min=0), torch.rand(len(t), dtype=torch.float64)
    x0, noise = torch.randn(2, len(t), 4, dtype=torch.float64).unbind()
    for conditioning in ("embedding", "noise-level"):
        path = kind(schedule)
        alpha, sigma = path.alpha(gamma, s, t)[:, None], path.sigma(gamma, s, t)[:, None]
        x = alpha * x0 + sigma * noise
        outputs = consistent_outputs(x0, noise, alpha, sigma)
        results = []
        for prediction_type, output in outputs.items():
            denoiser = Denoiser(schedule, prediction_type, conditioning, path)
            results.append(denoiser(lambda x, t, gamma, output=output: output, x, gamma, s, t))
        assert torch.allclose(*results, atol=1e-11)
        assert torch.allclose(results[0], x0, atol=2e-3)  # c_skip is not zero at t = 19


@KINDS
def test_noise_level_shows_the_network_a_point_of_the_schedule(schedule, kind):
    """The input and timestep that a perfect teacher of Gaussian noise would recognise: unit power, s <= t_g <= t."""
    t = torch.arange(19, 1000, 20)
    s, gamma = (t - 100).clamp(min=0), torch.rand(len(t), dtype=torch.float64)
    x0, noise = torch.randn(2, len(t), 4, dtype=torch.float64).unbind()
    path, seen = kind(schedule), []
    x = path.alpha(gamma, s, t)[:, None] * x0 + path.sigma(gamma, s, t)[:, None] * noise
    Denoiser(schedule, "epsilon", "noise-level", path)(lambda *a: seen.extend(a) or noise, x, gamma, s, t)
    x_seen, t_seen, gamma_seen = seen
    assert gamma_seen is None
    assert (t_seen >= s).all() and (t_seen <= t).all()
    on_path = schedule.alpha(t_seen)[:, None] * x0 + schedule.sigma(t_seen)[:, None] * noise
    assert torch.allclose(x_seen, on_path, atol=1e-10)


def test_embedding_form_tells_the_network_gamma_and_t(schedule):
    seen = []
    gamma, t = torch.tensor([0.25, 1.0]).double(), torch.tensor([499, 19])
    x = torch.randn(2, 4, dtype=torch.float64)
    Denoiser(schedule)(lambda *a: seen.extend(a) or a[0], x, gamma, torch.tensor([399, 0]), t)
    assert torch.equal(seen[0], x) and torch.equal(seen[1], t) and torch.equal(seen[2], gamma)


@pytest.mark.parametrize("field", ["prediction_type", "gamma_conditioning"])
def test_unknown_choices_are_named(schedule, field):
    with pytest.raises(ValueError, match=f"{field} must be one of .* got 'sample'"):
        Denoiser(schedule, **{field: "sample"})
    with pytest.raises(ValueError, match="'sample'"):
        predict_x0(torch.ones(1), torch.ones(1), torch.ones(1), torch.ones(1), "sample")


def test_noise_level_form_written_out(schedule):
    """Low on the schedule, where c_skip is felt: it and c_out stay those of t, on the rescaled point."""
    gamma, s, t = torch.tensor([0.3, 0.6]).double(), torch.tensor([0, 0]), torch.tensor([1, 19])
    x = torch.randn(2, 4, dtype=torch.float64)
    a_t, a_s = (schedule.alphas_cumprod[u].sqrt()[:, None] for u in (t, s))
    b_t, b_s = ((1 - schedule.alphas_cumprod[u]).sqrt()[:, None] for u in (t, s))
    g = gamma[:, None]
    sigma = (1 - g) * a_t / a_s * b_s + g * b_t
    n = (a_t**2 + sigma**2).sqrt()
    f = (x / n - sigma / n * torch.sin(x / n)) / (a_t / n)
    u = 10 * t[:, None].double()
    expected = 0.25 / (u**2 + 0.25) * (x / n) + u / (u**2 + 0.25).sqrt() * f
    denoiser = Denoiser(schedule, "epsilon", "noise-level")
    assert torch.allclose(denoiser(lambda x, t, gamma: torch.sin(x), x, gamma, s, t), expected, atol=1e-12)
