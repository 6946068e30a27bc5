"""Kept paths: solved as everywhere, drawn by index, and read as what the jumps of Algorithm 1 would have been."""

import pytest
import torch

from splam_core import Denoiser, NoiseSchedule, Objective, PathObjective, solve_paths, solver_path
from splam_core.objective import l2
from splam_core.paths import draw_places, draw_starts

pytestmark = pytest.mark.core
SCHEDULE = NoiseSchedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
SHAPE = (3, 4, 8, 8)


def teacher(x, t):
    return torch.tanh(x + t.view(-1, 1, 1, 1) / 1000)


def network(x, t, gamma):
    return torch.sin(2 * x + t.view(-1, 1, 1, 1) / 500)


def other(x, t, gamma):
    return torch.cos(x)


def never(x, t, gamma=None):
    raise AssertionError("it was asked")


@pytest.fixture
def x_t():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++"])
def test_a_path_is_that_of_the_solver(x_t, solver):
    t = torch.tensor([960, 960, 960])
    points, timesteps = solve_paths(teacher, x_t, t, 8, SCHEDULE, solver)
    assert timesteps.tolist() == [[960, 840, 720, 600, 480, 360, 240, 120, 0]] * 3
    assert torch.equal(points, torch.stack(solver_path(teacher, x_t, t, 960, 120, SCHEDULE, solver), 1))


def test_paths_of_different_beginnings_go_down_to_0_evenly(x_t):
    points, timesteps = solve_paths(teacher, x_t, torch.tensor([999, 19, 3]), 8, SCHEDULE)
    assert points.shape == (3, 9, *SHAPE[1:])
    assert timesteps[0].tolist() == [999, 874, 749, 624, 500, 375, 250, 125, 0]
    assert timesteps[:, 0].tolist() == [999, 19, 3] and not timesteps[:, -1].any()
    assert (timesteps.diff() <= 0).all()
    assert points.isfinite().all()
    alone, _ = solve_paths(teacher, x_t[1:2], torch.tensor([19]), 8, SCHEDULE)
    assert torch.allclose(points[1:2], alone, atol=1e-6)


def test_beginnings_and_places():
    u = torch.linspace(0, 1, 10_001)[:-1]
    t = draw_starts(u, 1000, 0.5, 0.5)
    assert (t[:5000] == 999).all()
    assert t[5000].item() == 19 and ((t + 1) % 20 == 0).all()
    assert torch.equal(draw_starts(u, 1000, 1.0, 0.5), torch.full_like(t, 999))
    places = draw_places(u, 8, 0.25)
    shares = torch.bincount(places, minlength=8) / len(u)
    assert shares[0].item() == pytest.approx(0.25 + 0.75 / 8, abs=1e-3)
    assert shares[1:].tolist() == pytest.approx([0.75 / 8] * 7, abs=1e-3)
    assert not draw_places(u, 1, 0.0).any()


@pytest.mark.parametrize("method", ["splam", "lcm"])
def test_the_next_point_as_goal_is_algorithm_1(x_t, method):
    """Its loss on the sub-path from 750 to 600, when the path's own step is the teacher's jump."""
    points, timesteps = solve_paths(teacher, x_t, torch.tensor([750] * 3), 5, SCHEDULE, "ddim")
    denoiser, gamma = Denoiser(SCHEDULE, gamma_conditioning="noise-level"), torch.tensor([0.2, 0.7, 1.0])
    whole = Objective(denoiser, method, 150, 150, l2)
    expected = whole(network, other, teacher, x_t, timesteps[:, 0], gamma)
    kept = PathObjective(denoiser, "target", l2)
    asked = None if method == "lcm" else gamma
    found = kept(network, other, points, timesteps, torch.zeros(3, dtype=torch.long), asked)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_the_end_as_goal_asks_no_target(x_t):
    points, timesteps = solve_paths(teacher, x_t, torch.tensor([999] * 3), 8, SCHEDULE)
    denoiser, place = Denoiser(SCHEDULE), torch.tensor([0, 3, 7])
    loss = PathObjective(denoiser, "end", l2)(network, never, points, timesteps, place, None)
    rows = torch.arange(3)
    F = denoiser(network, points[rows, place], None, None, timesteps[rows, place])
    assert torch.allclose(loss, (F - points[:, -1]).square().flatten(1).mean(1))


def test_inside_a_sub_path_a_perfect_network_has_no_loss(x_t):
    """A teacher of constant epsilon goes straight to its x0, and so does F from every point of every sub-path."""
    epsilon = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    points, timesteps = solve_paths(lambda x, t: epsilon, x_t, torch.tensor([999] * 3), 8, SCHEDULE, "ddim")

    def constant(x, t, gamma):
        return epsilon

    place, gamma = torch.tensor([0, 2, 5]), torch.tensor([0.2, 0.7, 1.0])
    for goal, most in (("target", 1e-8), ("end", 1e-2)):  # the end is at timestep 0, which has some noise left
        objective = PathObjective(Denoiser(SCHEDULE, gamma_conditioning="noise-level"), goal, l2)
        assert objective(constant, constant, points, timesteps, place, gamma).max() < most


@pytest.mark.parametrize("steps, solver, words", [(0, "ddim", "1 step or more"), (8, "euler", "solver must be one of")])
def test_bad_settings(x_t, steps, solver, words):
    with pytest.raises(ValueError, match=words):
        solve_paths(teacher, x_t, torch.tensor([999] * 3), steps, SCHEDULE, solver)
    with pytest.raises(ValueError, match="goal must be one of"):
        PathObjective(Denoiser(SCHEDULE), "middle")
