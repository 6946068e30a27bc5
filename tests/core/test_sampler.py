"""Whole few-step trajectories against LCMScheduler, and the promises of the noise generator."""

from itertools import pairwise

import pytest
import torch

from splam_core import (
    Denoiser,
    DirectLinking,
    add_noise,
    few_step_timesteps,
    fresh_noise,
    renoise_generator,
    sample,
)

pytestmark = pytest.mark.core


def network(x, t, gamma):
    return torch.tanh(1.3 * x + t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000)


def lcm_trajectory(schedule, net, x, steps, strength, prediction_type, seed):
    """diffusers' own loop: every x and every denoised x0."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler(prediction_type=prediction_type)
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.set_timesteps(steps, strength=strength)
    generator, visited = torch.Generator().manual_seed(seed), []
    for t in scheduler.timesteps.tolist():  # plain integers: from tensors it would compute c_out in float32
        output = net(x, torch.full((x.shape[0],), t), None)
        step = scheduler.step(output, t, x, generator=generator)
        visited.append((t, x, step.denoised))
        x = step.prev_sample
    return visited


def our_trajectory(schedule, net, x, steps, strength, prediction_type, seed):
    generator, visited = torch.Generator().manual_seed(seed), []
    denoiser = Denoiser(schedule, prediction_type)
    x0 = sample(
        lambda x, t: denoiser(net, x, None, None, t),
        x,
        few_step_timesteps(steps, strength),
        schedule,
        lambda x, t: torch.randn(x.shape, generator=generator, dtype=x.dtype),
        lambda step, t, x, x0: visited.append((t, x, x0)),
    )
    assert torch.equal(x0, visited[-1][2]), "the last step returns x0 itself, without noise"
    return visited


def assert_same(ours, theirs, tolerance):
    assert [t for t, _, _ in ours] == [t for t, _, _ in theirs]
    for (_, x, x0), (_, x_ref, x0_ref) in zip(ours, theirs, strict=True):
        assert (x - x_ref).abs().max() < tolerance
        assert (x0 - x0_ref).abs().max() < tolerance


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("strength", [1.0, 0.7, 0.31])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_trajectories_equal_lcm_scheduler(schedule, steps, strength, prediction_type):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if strength < 1:
        t = few_step_timesteps(steps, strength)[0]
        x = add_noise(torch.ones_like(x), x, t, schedule)
    arguments = (schedule, network, x, steps, strength, prediction_type, 5)
    assert_same(our_trajectory(*arguments), lcm_trajectory(*arguments), 1e-10)


def test_a_diffusers_unet_gives_the_pipelines_latents(schedule, make_unet):
    unet, prompt = make_unet().double(), torch.randn(2, 5, 32, dtype=torch.float64)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)

    @torch.no_grad()
    def net(x, t, gamma):
        return unet(x, t, prompt).sample

    arguments = (schedule, net, x, 4, 1.0, "epsilon", 5)
    assert_same(our_trajectory(*arguments), lcm_trajectory(*arguments), 1e-9)


@pytest.mark.parametrize("t", [0, 259, 999])
def test_add_noise_equals_diffusers(schedule, t):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler()
    x0, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64).unbind()
    expected = scheduler.add_noise(x0, noise, torch.full((3,), t))
    assert torch.allclose(add_noise(x0, noise, torch.tensor(t), schedule), expected, atol=1e-12)
    assert torch.allclose(add_noise(x0, noise, torch.full((3,), t), schedule), expected, atol=1e-12)
    assert add_noise(x0.half(), noise.half(), torch.tensor(t), schedule).dtype == torch.float16


def test_one_evaluation_a_step_and_fresh_noise_between(schedule):
    seen, drawn = [], []

    def noise(x, t):
        drawn.append((t, torch.randn_like(x)))
        return drawn[-1][1]

    def denoise(x, t):
        seen.append((x, t))
        return 0.5 * x

    timesteps = few_step_timesteps(4)
    sample(denoise, torch.randn(3, 4, 8, 8), timesteps, schedule, noise)
    assert [t.tolist() for _, t in seen] == [[t] * 3 for t in timesteps.tolist()]
    assert len(drawn) == 3
    for ((x, _), (x_next, t_next)), (t, fresh) in zip(pairwise(seen), drawn, strict=True):
        assert t_next.tolist() == [t] * 3
        assert torch.allclose(x_next, add_noise(0.5 * x, fresh, t_next, schedule))


def test_half_precision_latents_stay_half(schedule):
    def denoise(x, t):
        assert x.dtype == torch.float16
        return x.float()

    x = torch.randn(1, 4, 8, 8).half()
    assert sample(denoise, x, few_step_timesteps(2), schedule, fresh_noise(0, [0])).dtype == torch.float16


@pytest.mark.parametrize("kind", [None, DirectLinking])
def test_refinements_keep_the_answer_of_a_perfect_student_of_a_point_mass(schedule, kind):
    """Data of one point: every step, every gamma, gives that point. And they cost what they say."""
    subpath = kind(schedule) if kind else None
    denoiser, gammas = Denoiser(schedule, subpath=subpath), []
    data = torch.full((2, 4, 8, 8), 0.3, dtype=torch.float64)

    def perfect(alpha, sigma):
        return lambda x, t, gamma: (x - alpha * data) / sigma

    def denoise(x, t):
        return denoiser(perfect(schedule.alpha(t)[0], schedule.sigma(t)[0]), x, None, None, t)

    def denoise_gamma(x, gamma, s, t):
        gammas.append(gamma[0].item())
        path = denoiser.subpath
        net = perfect(path.alpha(gamma, s, t)[0], path.sigma(gamma, s, t)[0])
        return denoiser(net, x, gamma, s, t)

    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    noise = fresh_noise(0, range(2))
    arguments = {"denoise_gamma": denoise_gamma, "subpath": subpath, "skip": 100}
    x0 = sample(denoise, x, few_step_timesteps(2), schedule, noise, refinements=3, **arguments)
    assert gammas == pytest.approx([0.75, 0.5, 0.25] * 2)
    assert torch.allclose(x0, data, atol=1e-7)  # c_skip leaves 4e-9 of x


def test_refinements_and_empty_schedules_are_explained(schedule):
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="denoise_gamma"):
        sample(lambda x, t: x, x, few_step_timesteps(2), schedule, None, refinements=1)
    with pytest.raises(ValueError, match="few_step_timesteps"):
        sample(lambda x, t: x, x, torch.tensor([]), schedule, None)


def test_fresh_noise_is_a_function_of_seed_timestep_and_picture():
    like = torch.empty(3, 4, 8, 8)
    before = torch.get_rng_state()
    noise = fresh_noise(7, [0, 1, 2])(like, 499)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert noise.shape == like.shape
    assert torch.equal(fresh_noise(7, [0, 1, 2])(like.half(), 499), noise.half()), "drawn in float32"
    assert torch.equal(fresh_noise(7, [1])(like[:1], 499), noise[1:2]), "a batch is its pictures one by one"
    assert torch.equal(fresh_noise(7, [2, 2, 0])(like, 499), noise[[2, 2, 0]])
    others = [fresh_noise(seed, [0])(like[:1], t)[0] for seed, t in ((7, 19), (8, 499), (2**64 - 1, 499))]
    drawn = [*noise, *others]
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(len(drawn)) for j in range(i))


def test_a_run_in_pieces_is_the_whole_run(schedule):
    def denoise(x, t):
        return network(x, t, None)

    x, timesteps, noise = torch.randn(2, 4, 8, 8), few_step_timesteps(4), fresh_noise(3, [0, 1])
    whole = sample(denoise, x, timesteps, schedule, noise)
    for cut in (1, 2, 3):
        x0 = sample(denoise, x, timesteps[:cut], schedule, fresh_noise(3, [0, 1]))
        t = timesteps[cut]
        again = add_noise(x0, noise(x0, int(t)), t, schedule)
        assert torch.equal(sample(denoise, again, timesteps[cut:], schedule, noise), whole)


def test_fresh_noise_never_repeats_the_initial_noise():
    """Hosts draw the initial noise from the seed itself, and some add one to it later."""
    like = torch.empty(1, 4, 8, 8)
    for seed in (0, 1, 123456789, 2**63, 2**64 - 1):
        generator = renoise_generator(seed)
        found = [fresh_noise(seed, [0])(like, t) for t in (0, 1, 999)] + [torch.randn(like.shape, generator=generator)]
        for other in (seed, seed + 1, seed + 2):
            theirs = torch.randn(like.shape, generator=torch.Generator().manual_seed(other % 2**64))
            assert not any(torch.equal(ours, theirs) for ours in found)


def test_fresh_noise_is_fixed_for_good():
    """Pictures are reproducible by seed: these digits may not change."""
    found = fresh_noise(42, [3])(torch.empty(1, 4, 8, 8), 499).flatten()[:4]
    assert torch.allclose(found, torch.tensor(EXPECTED_42_499_3), atol=1e-6)
    found = torch.randn(1, 4, 8, 8, generator=renoise_generator(42)).flatten()[:4]
    assert torch.allclose(found, torch.tensor(EXPECTED_RENOISE_42), atol=1e-6)


EXPECTED_42_499_3 = [0.732239, -0.545629, -0.086365, -0.272540]
EXPECTED_RENOISE_42 = [1.223471, -0.636614, -1.372773, -0.221913]
