"""The teacher's solver against DDIMScheduler and against the Gaussian PF-ODE, solved by hand."""

from itertools import pairwise

import pytest
import torch

from splam_core import ddim_step, guided, multiple_estimation, solver_path

pytestmark = pytest.mark.core


def test_guided_is_diffusers_classifier_free_guidance():
    cond, uncond = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    assert torch.allclose(guided(cond, uncond, 7.5), uncond + 7.5 * (cond - uncond), atol=1e-12)
    assert torch.equal(guided(cond, uncond, 1.0), cond)


def test_ddim_step_equals_ddim_scheduler(schedule):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.final_alpha_cumprod = schedule.alphas_cumprod[0]
    scheduler.set_timesteps(50)
    for t in range(19, 1000, 20):
        x, epsilon = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64).unbind()
        expected = scheduler.step(epsilon, t, x).prev_sample
        found = ddim_step(x, epsilon, torch.tensor([t, t]), torch.tensor([t - 20, t - 20]).clamp(min=0), schedule)
        assert torch.allclose(found, expected, atol=1e-12)


def test_ddim_is_exact_where_epsilon_is_constant(schedule):
    """A point mass: the whole PF-ODE in one step."""
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    t, s = torch.tensor([999, 499, 19]), torch.tensor([0, 399, 7])
    x_t, x_s = (schedule.alpha(u)[:, None] * x0 + schedule.sigma(u)[:, None] * noise for u in (t, s))
    assert torch.allclose(ddim_step(x_t, noise, t, s, schedule), x_s, atol=1e-13)


def test_multiple_estimation_converges_to_the_pf_ode_at_first_order(schedule, gaussian):
    t, skip = torch.tensor([979]), 960
    x_t = gaussian.at(torch.tensor([[1.5, -0.4, 0.1]]).double(), t)
    exact = gaussian.flow(x_t, t, t - skip)
    errors = [
        (multiple_estimation(gaussian.epsilon, x_t, t, skip, k_phi, schedule) - exact).abs().max().item()
        for k_phi in (96, 48, 24, 12, 6)
    ]
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert all(1.8 < ratio < 2.2 for ratio in ratios), (errors, ratios)


def test_a_single_step_errs_at_second_order(schedule, gaussian):
    t = torch.tensor([600])
    x_t = gaussian.at(torch.tensor([[1.5]]).double(), t)
    errors = [
        (multiple_estimation(gaussian.epsilon, x_t, t, k, k, schedule) - gaussian.flow(x_t, t, t - k)).abs().item()
        for k in (80, 40, 20, 10)
    ]
    assert all(3.4 < errors[i] / errors[i + 1] < 4.6 for i in range(3)), errors


def test_multiple_estimation_is_the_loop_of_eq_18(schedule):
    asked = []

    def teacher(x, t):
        asked.append(t.tolist())
        return torch.sin(3 * x) + t[:, None] / 1000

    t, x = torch.tensor([999, 519]), torch.randn(2, 5, dtype=torch.float64)
    expected = [x]
    for i in range(5):
        t_i = t - 20 * i
        epsilon = torch.sin(3 * expected[-1]) + t_i[:, None] / 1000
        expected.append(ddim_step(expected[-1], epsilon, t_i, t_i - 20, schedule))
    path = solver_path(teacher, x, t, 100, 20, schedule)
    assert asked == [[999 - 20 * i, 519 - 20 * i] for i in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(path, expected, strict=True))
    assert torch.equal(multiple_estimation(teacher, x, t, 100, 20, schedule), path[-1])


def test_jumps_stop_at_timestep_zero(schedule):
    """One step 19 -> 0 by alphas_cumprod[0], then rest: what a jump of 100 from the lowest grid point means."""
    asked = []

    def teacher(x, t):
        asked.append(t.item())
        return torch.cos(x)

    t, x = torch.tensor([19]), torch.randn(1, 5, dtype=torch.float64)
    expected = ddim_step(x, torch.cos(x), t, torch.tensor([0]), schedule)
    found = multiple_estimation(teacher, x, t, 100, 20, schedule)
    assert asked == [19, 0, 0, 0, 0]
    assert torch.allclose(found, expected, atol=1e-14)


@pytest.mark.parametrize("skip, solver_skip", [(100, 30), (20, 40), (0, 20), (20, 0)])
def test_a_jump_is_made_of_whole_steps(schedule, skip, solver_skip):
    with pytest.raises(ValueError, match=f"skip={skip}, solver_skip={solver_skip}"):
        multiple_estimation(lambda x, t: x, torch.ones(1, 1), torch.tensor([999]), skip, solver_skip, schedule)


def test_dpm_solver_equals_diffusers_from_the_second_step_on(schedule):
    """High on the schedule, where each step is shorter in log-SNR than the one before, so that nothing is limited."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, solver_order=2, lower_order_final=False
    )
    scheduler.set_timesteps(timesteps=[999, 949, 899, 849, 799])
    levels = torch.stack([schedule.alpha(u) for u in torch.tensor([999, 949, 899, 849, 799])])
    scheduler.sigmas = torch.cat([(1 - levels**2).sqrt() / levels, torch.zeros(1).double()])
    x = torch.randn(2, 5, dtype=torch.float64)
    expected = [x]
    for t in scheduler.timesteps[:4]:
        expected.append(scheduler.step(torch.sin(3 * expected[-1]) + t / 1000, t, expected[-1]).prev_sample)
    path = solver_path(
        lambda x, t: torch.sin(3 * x) + t[:, None] / 1000,
        x, torch.tensor([999, 999]), 200, 50, schedule, "dpm-solver++")  # fmt: skip
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(path, expected, strict=True))


def test_dpm_solver_converges_at_second_order(schedule, gaussian):
    t, skip = torch.tensor([979]), 960
    x_t = gaussian.at(torch.tensor([[1.5, -0.4, 0.1]]).double(), t)
    exact = gaussian.flow(x_t, t, t - skip)
    errors = [
        (multiple_estimation(gaussian.epsilon, x_t, t, skip, k_phi, schedule, "dpm-solver++") - exact).abs().max()
        for k_phi in (48, 24, 12, 6)
    ]
    ratios = [float(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(3.2 < ratio < 4.8 for ratio in ratios), (errors, ratios)


def test_dpm_solver_starts_with_ddim_and_rests_at_zero(schedule):
    """Samples of one batch that reach timestep 0 at different steps."""
    t, x = torch.tensor([19, 119, 0]), torch.randn(3, 5, dtype=torch.float64)
    path = solver_path(lambda x, t: torch.cos(x), x, t, 200, 100, schedule, "dpm-solver++")
    first = multiple_estimation(lambda x, t: torch.cos(x), x, t, 100, 100, schedule)
    assert torch.equal(path[1], first)
    assert torch.allclose(path[2][0], path[1][0], atol=1e-14)
    assert torch.allclose(path[2][2], x[2], atol=1e-14)
    assert not torch.allclose(path[2][1], path[1][1])
    assert torch.isfinite(path[2]).all()


def test_an_unknown_solver_is_refused(schedule):
    with pytest.raises(ValueError, match=r"'ddim', 'dpm-solver\+\+'.*'heun'"):
        multiple_estimation(lambda x, t: x, torch.ones(1, 1), torch.tensor([999]), 100, 20, schedule, "heun")
