"""The losses on Gaussian data, where the PF-ODE, the consistency map and the posterior mean are all known."""

from itertools import pairwise

import pytest
import torch

from splam_core import (
    Denoiser,
    DirectLinking,
    Objective,
    boundary_scalings,
    ema_update,
    l2,
    pseudo_huber,
    sample_gamma,
    subpath_for,
)

pytestmark = pytest.mark.core


def output_for(wanted, x, alpha, sigma, t):
    """The epsilon output that makes F = wanted at levels (alpha, sigma), all [B, 1]; anything goes at t = 0."""
    c_skip, c_out = (c[:, None] for c in boundary_scalings(t.double()))
    f = torch.where(c_out > 0, (wanted - c_skip * x) / c_out, x)
    return (x - alpha * f) / sigma


def exact_step(gaussian, schedule, k):
    """A teacher whose one DDIM step of k timesteps lands exactly on the PF-ODE's solution."""

    def teacher(x, t):
        s = (t - k).clamp(min=0)
        r = gaussian.alpha(s) / gaussian.alpha(t)
        return (gaussian.flow(x, t, s) - r * x) / (gaussian.sigma(s) - r * gaussian.sigma(t))

    return teacher


def batch(gaussian, size=64, lowest=19):
    generator = torch.Generator().manual_seed(3)
    t = torch.arange(lowest, 1000, 20)[torch.randint(0, len(range(lowest, 1000, 20)), (size,), generator=generator)]
    z = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    gamma = torch.rand(size, generator=generator, dtype=torch.float64)
    return gaussian.at(z, t), t, gamma


def consistency_maps(gaussian, path, k):
    """(on sub-paths, on the PF path): networks whose F is the trajectory's point at t = 0, the exact answer."""
    origin = torch.zeros(1, dtype=torch.long)

    def student(x, t, gamma):
        s, g = (t - k).clamp(min=0), gamma[:, None]
        alpha, sigma = path.alpha(gamma, s, t)[:, None], path.sigma(gamma, s, t)[:, None]
        start = gaussian.alpha(t) / gaussian.alpha(s) if not isinstance(path, DirectLinking) else torch.ones_like(g)
        mean = ((1 - g) * start * gaussian.alpha(s) + g * gaussian.alpha(t)) * gaussian.mean
        spread = (1 - g) * start * gaussian.spread(s) + g * gaussian.spread(t)  # x_gamma is linear in z
        return output_for(gaussian.at((x - mean) / spread, origin), x, alpha, sigma, t)

    def target(x, t, gamma):
        return output_for(gaussian.flow(x, t, origin), x, gaussian.alpha(t), gaussian.sigma(t), t)

    return student, target


@pytest.mark.parametrize("method", ["splam", "dl", "lcm"])
@pytest.mark.parametrize("sigma_level", ["linear", "independent"])
@pytest.mark.parametrize("k", [20, 100])
def test_the_consistency_map_has_exactly_zero_loss(schedule, gaussian, method, sigma_level, k):
    """With a teacher that solves the PF-ODE exactly, for every gamma; the posterior mean has not."""
    path = subpath_for(method, schedule, sigma_level)
    objective = Objective(Denoiser(schedule, subpath=path), method, k, k, l2)
    x_t, t, gamma = batch(gaussian)
    teacher = exact_step(gaussian, schedule, k)
    student, target = consistency_maps(gaussian, path, k)
    assert objective(student, target, teacher, x_t, t, gamma).max() < 1e-20

    def mean(x, t, gamma):
        return gaussian.epsilon(x, t)

    assert objective(mean, mean, teacher, x_t, t, gamma).mean() > 1e-5


def test_consistency_defect_of_a_ddim_teacher_vanishes_one_order_faster_than_the_posterior_means(schedule, gaussian):
    """Per jump of k: O(k^2) for the exact map, the teacher's own error; O(k) for the posterior mean, a wrong answer."""
    x_t, t, gamma = batch(gaussian, 256, lowest=399)

    def mean(x, t, gamma):
        return gaussian.epsilon(x, t)

    defects = {"map": [], "mean": []}
    for k in (80, 40, 20, 10):
        path = subpath_for("splam", schedule)
        objective = Objective(Denoiser(schedule, subpath=path), "splam", k, k, l2)
        student, target = consistency_maps(gaussian, path, k)
        for name, networks in (("map", (student, target)), ("mean", (mean, mean))):
            loss = objective(*networks, gaussian.epsilon, x_t, t, torch.ones_like(gamma))
            defects[name].append(loss.mean().sqrt().item())
    order = {name: [a / b for a, b in pairwise(d)] for name, d in defects.items()}
    assert all(3.3 < ratio < 4.5 for ratio in order["map"]), defects
    assert all(1.7 < ratio < 2.3 for ratio in order["mean"]), defects


def test_noise_level_form_of_the_consistency_map_tends_to_zero_with_k(schedule, gaussian):
    """One network for every gamma, told only a noise level: its defect is the chord's distance from the curve."""

    def interpolated(t):
        return schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]

    origin = torch.zeros(1, dtype=torch.long)
    losses = []
    for k in (80, 40, 20):
        objective = Objective(Denoiser(schedule, "epsilon", "noise-level"), "splam", k, k, l2)

        def student(x, t, gamma, k=k):
            alpha, sigma = interpolated(t)
            z = (x - alpha * gaussian.mean) / (alpha**2 * gaussian.std**2 + sigma**2).sqrt()
            return (x - alpha * gaussian.at(z, origin)) / sigma  # F up to c_skip, below 1e-7 from t = 399 on

        _, target = consistency_maps(gaussian, subpath_for("splam", schedule), k)
        x_t, t, gamma = batch(gaussian, 256, lowest=399)
        losses.append(objective(student, target, exact_step(gaussian, schedule, k), x_t, t, gamma).mean().sqrt().item())
    assert losses[0] < 0.01
    assert all(3 < a / b < 5 for a, b in pairwise(losses)), losses


def test_algorithm_1_step_by_step(schedule):
    """Eq. 17 written out, against the object."""

    def net(x, t, gamma):
        return torch.sin(2 * x + gamma[:, None] + t[:, None] / 500)

    def ema(x, t, gamma):
        return torch.cos(x + gamma[:, None])

    def teacher(x, t):
        return torch.tanh(x) + t[:, None] / 1000

    t, gamma = torch.tensor([999, 119, 39]), torch.tensor([0.2, 0.9, 0.5]).double()
    x_t = torch.randn(3, 6, dtype=torch.float64)
    a, sg = (lambda u: schedule.alpha(u)[:, None]), (lambda u: schedule.sigma(u)[:, None])
    x = x_t
    for i in range(2):
        here, there = (t - 20 * i).clamp(min=0), (t - 20 * (i + 1)).clamp(min=0)
        epsilon = teacher(x, here)
        x = a(there) * (x - sg(here) * epsilon) / a(here) + sg(there) * epsilon
    s, g = (t - 40).clamp(min=0), gamma[:, None]
    r = a(t) / a(s)
    x_g = (1 - g) * r * x + g * x_t
    sigma = (1 - g) * r * sg(s) + g * sg(t)

    def f(output, x, alpha, sigma, t):
        c_skip, c_out = (c[:, None] for c in boundary_scalings(t.double()))
        return c_skip * x + c_out * (x - sigma * output) / alpha

    goal = f(ema(x, s, torch.ones(3)), x, a(s), sg(s), s)
    expected = ((f(net(x_g, t, gamma), x_g, a(t), sigma, t) - goal) ** 2).mean(1)
    loss, x_s = Objective(Denoiser(schedule), skip=40, solver_skip=20, distance=l2)(
        net, ema, teacher, x_t, t, gamma, return_x_s=True
    )
    assert torch.allclose(loss, expected, atol=1e-12)
    assert torch.allclose(x_s, x, atol=1e-12)


def test_lcm_is_splam_at_gamma_one(schedule):
    def net(x, t, gamma):
        return torch.sin(2 * x + gamma[:, None])

    x_t, t = torch.randn(3, 6, dtype=torch.float64), torch.tensor([999, 119, 39])
    arguments = (net, net, lambda x, t: torch.tanh(x), x_t, t)
    splam, lcm = (Objective(Denoiser(schedule), method) for method in ("splam", "lcm"))
    expected = splam(*arguments, torch.ones(3).double())
    assert torch.equal(lcm(*arguments, None), expected)
    assert torch.equal(lcm(*arguments, torch.rand(3).double()), expected)


def test_gradients_flow_through_the_student_alone(schedule):
    weights = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    student, target, teacher = weights
    loss = Objective(Denoiser(schedule))(
        lambda x, t, gamma: student * x,
        lambda x, t, gamma: target * x,
        lambda x, t: teacher * x,
        torch.randn(2, 4, dtype=torch.float64),
        torch.tensor([999, 19]),
        torch.rand(2, dtype=torch.float64),
    )
    assert loss.shape == (2,)
    loss.sum().backward()
    assert student.grad.abs() > 0 and target.grad is None and teacher.grad is None


def test_the_goal_at_timestep_zero_is_x_s(schedule):
    """s = 0: c_skip = 1, whatever the target network says."""
    x_t, t = torch.randn(2, 4, dtype=torch.float64), torch.tensor([19, 99])
    arguments = (lambda x, t: torch.sin(x), x_t, t, torch.rand(2).double())
    objective = Objective(Denoiser(schedule))
    losses = [
        objective(lambda x, t, gamma: x, lambda x, t, gamma, w=wild: w * x.exp(), *arguments) for wild in (1e6, -3)
    ]
    assert torch.equal(*losses)


def test_pseudo_huber_is_elementwise_and_keeps_its_digits():
    d = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    assert torch.allclose(pseudo_huber(d, 0.1), ((d**2 + 0.01).sqrt() - 0.1).mean((1, 2, 3)), rtol=1e-12)
    tiny = torch.full((1, 4), 1e-6)
    assert pseudo_huber(tiny).item() == pytest.approx(5e-10, rel=1e-3)
    assert pseudo_huber(torch.full((1, 4), 50.0)).item() == pytest.approx(50 - 1e-3, rel=1e-6)


def test_l2_is_the_mean_square_per_sample():
    d = torch.randn(3, 4, 8, 8)
    assert torch.allclose(l2(d), torch.stack([torch.nn.functional.mse_loss(x, torch.zeros_like(x)) for x in d]))


@pytest.mark.parametrize("p_one", [0.0, 0.5, 1.0])
def test_sample_gamma_has_its_point_mass_and_is_uniform_elsewhere(p_one):
    u = (torch.arange(100_000) + 0.5).double() / 100_000
    gamma = sample_gamma(u, p_one)
    assert gamma.min() >= 0 and gamma.max() <= 1
    assert (gamma == 1).double().mean().item() == pytest.approx(p_one, abs=1e-4)
    if p_one < 1:
        rest = gamma[gamma < 1].sort().values
        assert torch.allclose(rest, torch.linspace(0, 1, len(rest)).double(), atol=1e-4)


def test_sample_gamma_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match=r"1\.5"):
        sample_gamma(torch.rand(3), 1.5)


def test_ema_update_in_place_and_in_the_targets_precision():
    target, source = [torch.ones(3), torch.zeros(2)], [torch.full((3,), 3.0).half(), torch.ones(2).half()]
    ema_update(target, source, 0.95)
    assert torch.allclose(target[0], torch.full((3,), 1.1)) and torch.allclose(target[1], torch.full((2,), 0.05))
    with pytest.raises(ValueError):
        ema_update(target, source[:1], 0.95)


def test_a_method_and_its_sub_path_must_agree(schedule):
    with pytest.raises(ValueError, match="'gan'"):
        Objective(Denoiser(schedule), "gan")
    with pytest.raises(ValueError, match="DirectLinking, but the denoiser has SubPathLinear"):
        Objective(Denoiser(schedule), "dl")
    with pytest.raises(ValueError, match="SubPathLinear, but the denoiser has DirectLinking"):
        Objective(Denoiser(schedule, subpath=DirectLinking(schedule)), "splam")
