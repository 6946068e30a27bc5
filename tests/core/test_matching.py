"""Distribution matching between Gaussians, where both scores and their divergence are known, by exact quadrature."""

import math
from collections import Counter

import pytest
import torch

from splam_core import (
    Denoiser,
    DistributionMatching,
    draw_places,
    few_step_timesteps,
    l2,
    matching_draws,
    sample,
    simulate,
)

pytestmark = pytest.mark.core
STUDENT = (0.3, 0.8)  # mean and standard deviation of its samples


def normal_grid(points=7):
    """(values [n], weights [n]) with which the mean of any polynomial up to degree 13 of a standard normal is exact."""
    # Golub & Welsch: the eigenvalues of the Jacobi matrix of the Hermite polynomials.
    off = torch.arange(1, points, dtype=torch.float64).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return values, vectors[0] ** 2


def plane():
    """z [n, 1], noise [n, 1], weights [n] of two independent normals."""
    values, weights = normal_grid()
    z, noise = torch.meshgrid(values, values, indexing="ij")
    return z.reshape(-1, 1), noise.reshape(-1, 1), torch.outer(weights, weights).flatten()


def epsilon_of(schedule, mean, std):
    """E[noise | x] of N(mean, std^2)."""

    def epsilon(x, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return epsilon


def network_of(schedule, mean, std, prediction_type):
    """A perfect network of that distribution, in its raw output."""
    exact = epsilon_of(schedule, mean, std)

    def net(x, t, _):
        epsilon = exact(x, t)
        if prediction_type == "epsilon":
            return epsilon
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return alpha * epsilon - sigma * (x - sigma * epsilon) / alpha

    return net


def objective(schedule, prediction_type="epsilon", **options):
    return DistributionMatching(Denoiser(schedule, prediction_type), **options)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("level", [60, 500, 960])
def test_the_gradient_is_that_of_the_divergence(schedule, gaussian, prediction_type, level):
    z, noise, weights = plane()
    t = torch.full((len(z),), level)
    mean, std = (torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in STUDENT)

    # KL between the two Gaussians that N(mean, std^2) and the teacher's data become at this level.
    alpha, sigma = schedule.alpha(level), schedule.sigma(level)
    own, other = alpha**2 * std**2 + sigma**2, alpha**2 * gaussian.std**2 + sigma**2
    divergence = ((other / own).log() + (own + alpha**2 * (mean - gaussian.mean) ** 2) / other - 1) / 2
    expected = torch.autograd.grad(divergence, (mean, std))

    x0 = mean + std * z
    teacher = epsilon_of(schedule, gaussian.mean, gaussian.std)
    fake = network_of(schedule, *STUDENT, prediction_type)
    matching = objective(schedule, prediction_type, weighting="kl")
    loss = matching.student_loss(x0, matching.gradient(x0, teacher, fake, t, noise), t)
    found = torch.autograd.grad((weights * loss).sum(), (mean, std))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_fake_network_learns_the_score_of_the_samples(schedule, prediction_type):
    z, noise, weights = plane()
    t = torch.full((len(z),), 400)
    exact = network_of(schedule, *STUDENT, prediction_type)
    shift, slope = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    x0 = STUDENT[0] + STUDENT[1] * z
    loss = objective(schedule, prediction_type).fake_loss(
        lambda x, t, g: exact(x, t, g) + shift + slope * x, x0, t, noise
    )
    found = torch.autograd.grad((weights * loss).sum(), (shift, slope))
    assert max(abs(one.item()) for one in found) < 1e-12, "the exact score is where its loss is least"


def test_the_normalised_gradient_is_the_difference_over_the_teachers_distance(schedule, gaussian):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    t = torch.tensor([100, 500, 900])
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    teacher = epsilon_of(schedule, gaussian.mean, gaussian.std)
    fake = network_of(schedule, *STUDENT, "epsilon")
    x = alpha * x0 + sigma * noise
    real, wrong = (x - sigma * teacher(x, t)) / alpha, (x - sigma * fake(x, t, None)) / alpha
    expected = (wrong - real) / (x0 - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(objective(schedule).gradient(x0, teacher, fake, t, noise), expected)


def test_the_loss_hands_the_gradient_and_the_anchor_on(schedule):
    generator = torch.Generator().manual_seed(0)
    x0, gradient, start = torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64)
    x0.requires_grad_(True)
    matching, t = objective(schedule, anchor=0.5), torch.tensor([999, 759, 499, 0])
    (found,) = torch.autograd.grad(matching.student_loss(x0, gradient, t).sum(), x0)
    torch.testing.assert_close(found, gradient / 6)
    (found,) = torch.autograd.grad(matching.student_loss(x0, gradient, t, start).sum(), x0)
    seen = schedule.alpha(t).square()[:, None, None]
    torch.testing.assert_close(found, (gradient + 4 * 0.5 * seen * (x0.detach() - start)) / 6)
    assert seen.flatten().tolist() == pytest.approx([0.0047, 0.052, 0.278, 0.999], abs=1e-3)


@pytest.mark.parametrize("weighting", ["kl", "normalised"])
def test_a_student_that_follows_it_becomes_the_teacher(schedule, gaussian, weighting):
    z, noise, weights = plane()
    parameters = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.Adam([parameters], 0.02)
    matching = objective(schedule, weighting=weighting)
    teacher, t = epsilon_of(schedule, gaussian.mean, gaussian.std), torch.full((len(z),), 500)
    for _ in range(300):
        x0 = parameters[0] + parameters[1] * z
        fake = network_of(schedule, *parameters.tolist(), "epsilon")
        loss = matching.student_loss(x0, matching.gradient(x0, teacher, fake, t, noise), t)
        descent.zero_grad()
        (weights * loss).sum().backward()
        descent.step()
    assert parameters.tolist() == pytest.approx([gaussian.mean, gaussian.std], abs=1e-2)


def test_simulation_stands_where_sampling_does(schedule):
    """Each sample as few-step sampling alone would have it at that step."""
    drawn = matching_draws(3, range(40), (2, 3), uses=1)
    noise = drawn.noise.double()

    def student(x, t, rows):
        return x * 0.3 + t[:, None, None] / 1000 + rows[:, None, None]  # each sample has its own prompt

    x, t = simulate(student, drawn.steps, drawn.places, noise, schedule)
    assert set(drawn.places) == {0, 1, 2, 3}
    for row, (many, place) in enumerate(zip(drawn.steps, drawn.places, strict=True)):
        grid, seen = few_step_timesteps(many), []
        fresh = iter(noise[1:, row : row + 1])
        sample(
            lambda x, t, row=row: student(x, t, torch.tensor([row])),
            noise[0, row : row + 1],
            grid,
            schedule,
            lambda x, t, fresh=fresh: next(fresh),
            lambda step, t, x, x0, seen=seen: seen.append(x),
        )
        assert t[row] == grid[place]
        torch.testing.assert_close(x[row], seen[place][0])


def test_simulation_in_step_makes_as_many_passes_whatever_was_drawn(schedule):
    passes = []

    def student(x, t, rows):
        passes.append(len(rows))
        return x

    noise = torch.randn(4, 2, 3)
    for places in ([0, 0], [3, 1]):
        passes.clear()
        simulate(student, [4, 4], places, noise, schedule, in_step=True)
        assert len(passes) == 3
    passes.clear()
    x, t = simulate(student, [1, 1], [0, 0], noise, schedule)
    assert passes == [] and torch.equal(x, noise[0]) and t.tolist() == [999, 999]


def test_draws_are_a_samples_own():
    whole, part = matching_draws(5, range(8), (2, 2)), matching_draws(5, range(6, 8), (2, 2))
    assert whole.steps[6:] == part.steps and whole.places[6:] == part.places
    for name in ("noise", "u", "level_noise"):
        assert torch.equal(getattr(whole, name)[:, 6:], getattr(part, name))
    assert draw_places(5, range(8), (1, 2, 4)) == (whole.steps, whole.places)
    assert whole.forwards == sum(whole.places)


def test_steps_and_their_places_are_as_likely():
    steps, places = draw_places(0, range(6000), (1, 2, 4))
    found = Counter(zip(steps, places, strict=True))
    assert set(found) == {(many, place) for many in (1, 2, 4) for place in range(many)}
    for (many, _), count in found.items():
        assert abs(count - 2000 / many) < 5 * math.sqrt(2000 / many)


def test_timesteps_span_the_noise_range(schedule):
    u = torch.tensor([0.0, 0.5, 1 - 1e-7])
    assert objective(schedule).timesteps(u).tolist() == [20, 500, 979]
    assert objective(schedule, noise_range=(0.0, 1.0)).timesteps(u).tolist() == [0, 500, 999]


def test_the_student_sample_is_the_samplers(schedule):
    x, t = torch.randn(2, 3, dtype=torch.float64), torch.tensor([999, 499])
    matching = objective(schedule)
    net = lambda x, t, _: x / 2  # noqa: E731
    assert torch.equal(matching.sample(net, x, t), matching.denoiser(net, x, None, None, t))
    ones = torch.ones_like(x)
    assert matching.student_loss(x, ones, t).tolist() == pytest.approx((l2(ones) / 2).tolist())


@pytest.mark.parametrize(
    "options, named",
    [
        ({"noise_range": (0.5, 0.5)}, "noise_range"),
        ({"noise_range": (-0.1, 0.5)}, "noise_range"),
        ({"anchor": -1.0}, "anchor"),
        ({"weighting": "other"}, "weighting"),
    ],
)
def test_settings_that_make_no_sense_are_named(schedule, options, named):
    with pytest.raises(ValueError, match=named):
        objective(schedule, **options)
