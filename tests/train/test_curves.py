"""Endpoint error and delta against Gaussian data, for which paths and consistency function are known in closed form."""

import itertools

import pytest
import torch

from splam_core import NoiseSchedule
from training.models.load import load_pipeline
from training.models.sampling import generate, teacher_function
from training.scoring.curves import (
    TIMESTEPS,
    delta,
    endpoint_error,
    student_function,
    teacher_endpoints,
)

pytestmark = pytest.mark.train

STD = 0.7  # of the data
SCHEDULE = NoiseSchedule.scaled_linear().to(dtype=torch.float64)


def alpha(t):
    return SCHEDULE.alpha(torch.tensor(t)).item()


def sigma(t):
    return SCHEDULE.sigma(torch.tensor(t)).item()


def variance(t):
    return alpha(t) ** 2 * STD**2 + sigma(t) ** 2


def teacher(x, t):
    """E[noise | x_t]."""
    return x * sigma(int(t[0])) / variance(int(t[0]))


def exact(x, t):
    """Where the probability flow from x_t ends, at t = 0."""
    return x * (variance(0) / variance(int(t[0]))) ** 0.5


def mean(x, t):
    """E[x_0 | x_t]: what a network does before distillation."""
    return x * alpha(int(t[0])) * STD**2 / variance(int(t[0]))


def ddim_factor(t):
    """What the DDIM path t, t-20, .., 19, 0 multiplies x_t with."""
    factor = 1.0
    for now, then in itertools.pairwise([*range(t, 0, -20), 0]):
        factor *= (alpha(then) * alpha(now) * STD**2 + sigma(then) * sigma(now)) / variance(now)
    return factor


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(64, 4, 16, 16, generator=generator, dtype=torch.float64)  # noqa: E731
    return STD * draw(), draw()


def errors(student, samples):
    return endpoint_error(student, teacher, *samples, SCHEDULE)


def test_the_map_that_ddim_computes_has_no_endpoint_error(samples):
    found = errors(lambda x, t: x * ddim_factor(int(t[0])), samples)
    assert list(found) == [999, 759, 499, 259] == list(TIMESTEPS)
    assert max(found.values()) < 1e-12


def test_the_exact_consistency_function_has_ddims_own_error_alone(samples):
    found = errors(exact, samples)
    for t, error in found.items():
        expected = abs((variance(0) / variance(t)) ** 0.5 - ddim_factor(t)) * variance(t) ** 0.5
        assert error == pytest.approx(expected, rel=0.02)  # the sample's deviation is not quite the law's
        assert error < 0.05 * STD
    fine = endpoint_error(exact, teacher, *samples, SCHEDULE, solver_skip=1)
    assert all(fine[t] < 0.1 * found[t] for t in found)


def test_the_undistilled_network_is_off_by_as_much_as_the_posterior_mean(samples):
    for t, error in errors(mean, samples).items():
        expected = abs(alpha(t) * STD**2 / variance(t) - ddim_factor(t)) * variance(t) ** 0.5
        assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("student", "factor"), [
    (exact, lambda t: (variance(0) / variance(t)) ** 0.5),
    (mean, lambda t: alpha(t) * STD**2 / variance(t)),
])  # fmt: skip
@pytest.mark.parametrize("skip", [20, 100])
def test_delta_of_gaussian_data(samples, student, factor, skip):
    found = delta(student, *samples, SCHEDULE, skip)
    assert list(found) == list(range(999, 100, -20))
    for t, value in found.items():
        signal = factor(t) * alpha(t) - factor(t - skip) * alpha(t - skip)
        noise = factor(t) * sigma(t) - factor(t - skip) * sigma(t - skip)
        assert value == pytest.approx((signal**2 * STD**2 + noise**2) ** 0.5, rel=0.02)


def test_no_delta_below_the_skip(samples):
    with pytest.raises(ValueError, match=r"0\.\.999"):
        delta(mean, *samples, SCHEDULE, 20, [19])


@torch.no_grad()
def test_the_teachers_path_from_pure_noise_is_the_ddim_samplers(tiny_pipeline):
    pipeline, prompts = (
        load_pipeline(tiny_pipeline),
        ["a doughnut on a red background", "a yellow star on a blue background"],
    )
    noise = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    path = teacher_function(pipeline, pipeline.encode(prompts), pipeline.unconditional(), 3.0)
    # Latents such that x_999 is the noise itself.
    level = pipeline.schedule.sigma(999)
    latents = noise * (1 - level) / pipeline.schedule.alpha(999)
    x_t, end = teacher_endpoints(path, latents, noise, pipeline.schedule, [999])[999]
    assert (x_t - noise).abs().max() < 1e-5
    assert (end - generate(pipeline, prompts, [3, 4], "ddim", 50, 3.0)).abs().max() / end.std() < 1e-4


@torch.no_grad()
def test_a_student_is_told_its_guidance(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([999, 259])
    conditioning, negative = (
        pipeline.encode(["a doughnut on a red background", "a yellow star on a blue background"]),
        pipeline.unconditional(),
    )
    plain, guided = (student_function(pipeline, conditioning, negative, w)(x, t) for w in (1.0, 3.0))
    blank = student_function(pipeline, {k: v.expand(2, -1, -1) for k, v in negative.items()}, negative)(x, t)
    assert torch.allclose(guided, 3 * plain - 2 * blank, rtol=1e-3, atol=1e-3 * plain.std())
