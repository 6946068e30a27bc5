"""The schedule against diffusers and against its own inverse; the few-step grid against LCMScheduler."""

import random

import pytest
import torch

from splam_core import NoiseSchedule, few_step_timesteps

pytestmark = pytest.mark.core
diffusers = pytest.importorskip("diffusers")


def test_scaled_linear_equals_diffusers_to_the_bit():
    assert torch.equal(NoiseSchedule.scaled_linear().alphas_cumprod, diffusers.LCMScheduler().alphas_cumprod)


@pytest.mark.parametrize("name", ["scaled_linear", "linear"])
def test_from_config_equals_the_scheduler_it_describes(name):
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=500, beta_schedule=name, beta_start=0.0004, beta_end=0.02)
    assert torch.equal(NoiseSchedule.from_config(dict(scheduler.config)).alphas_cumprod, scheduler.alphas_cumprod)


def test_from_config_reads_trained_betas():
    betas = [0.1, 0.2, 0.3]
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=3, trained_betas=betas)
    assert torch.equal(NoiseSchedule.from_config(dict(scheduler.config)).alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_start": ...}, "'beta_start'"),
        ({"beta_start": -0.1, "beta_schedule": "scaled_linear"}, "betas above 0 and below 1, found 1000 between -0.1"),
        ({"beta_start": 10**400}, "betas above 0 and below 1"),
        ({"trained_betas": "abc"}, "expected trained_betas to be a list of numbers between 0 and 1, found 'abc'"),
        ({"trained_betas": [None, 0.1]}, "list of numbers"),
        ({"trained_betas": {"0": 0.1}}, "list of numbers"),
    ],
)
def test_from_config_says_what_it_cannot_read(change, words):
    config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, **change}
    with pytest.raises(ValueError, match=words):
        NoiseSchedule.from_config({key: value for key, value in config.items() if value is not ...})


def test_a_table_that_reaches_zero_is_refused():
    zero_snr = diffusers.LCMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    with pytest.raises(ValueError, match="zero terminal SNR"):
        NoiseSchedule(zero_snr)


def test_levels_are_the_forward_process(schedule):
    t = torch.arange(1000)
    acp = diffusers.LCMScheduler().alphas_cumprod.double()
    assert torch.equal(schedule.alpha(t), acp.sqrt())
    assert torch.equal(schedule.sigma(t), (1 - acp).sqrt())
    assert torch.allclose(schedule.ve_sigma(t), ((1 - acp) / acp).sqrt(), rtol=1e-14)


def test_integer_valued_floats_give_the_table_exactly(schedule):
    t = torch.arange(1000).reshape(10, 100)
    for level in (schedule.alpha, schedule.sigma, schedule.ve_sigma):
        assert torch.equal(level(t), level(t.double()))
        assert level(t).shape == t.shape


def test_fractional_timesteps_interpolate_log_snr(schedule):
    t, part = torch.tensor([0, 19, 500, 998]), 0.3
    expected = (1 - part) * schedule.ve_sigma(t).log() + part * schedule.ve_sigma(t + 1).log()
    assert torch.allclose(schedule.ve_sigma(t + part).log(), expected, atol=1e-12)
    assert torch.allclose(schedule.alpha(t + part) ** 2 + schedule.sigma(t + part) ** 2, torch.ones(4).double())


def test_timestep_at_inverts_the_levels_at_any_scale(schedule):
    t = torch.linspace(0, 999, 4001, dtype=torch.float64)
    assert torch.allclose(schedule.timestep_at(schedule.alpha(t), schedule.sigma(t)), t, atol=1e-8)
    assert torch.allclose(schedule.timestep_at(7 * schedule.alpha(t), 7 * schedule.sigma(t)), t, atol=1e-8)


def test_timestep_at_is_clamped_to_the_table(schedule):
    found = schedule.timestep_at(torch.tensor([1.0, 1e-6]).double(), torch.tensor([1e-6, 1.0]).double())
    assert found.tolist() == [0, 999]


@pytest.mark.parametrize("t", [-1, 1000, 999.5])
def test_timesteps_outside_the_schedule_are_refused(schedule, t):
    with pytest.raises(ValueError, match=r"0\.\.999"):
        schedule.alpha(torch.tensor([t]))


def test_four_steps_are_the_published_four():
    assert few_step_timesteps(4).tolist() == [999, 759, 499, 259]


def test_timesteps_equal_lcm_scheduler_everywhere():
    scheduler = diffusers.LCMScheduler()
    draw = random.Random(0)
    strengths = [i / 100 for i in range(1, 101)] + [draw.random() for _ in range(50)]
    for strength in strengths:
        for steps in range(1, 51):
            if steps <= int(50 * strength):
                scheduler.set_timesteps(steps, original_inference_steps=50, strength=strength)
                assert torch.equal(few_step_timesteps(steps, strength), scheduler.timesteps), (steps, strength)
            else:
                with pytest.raises(ValueError):
                    few_step_timesteps(steps, strength)


@pytest.mark.parametrize("grid", [10, 25, 30, 100])
def test_other_grids_equal_lcm_scheduler(grid):
    scheduler = diffusers.LCMScheduler()
    for steps in range(1, grid + 1):
        scheduler.set_timesteps(steps, original_inference_steps=grid)
        assert torch.equal(few_step_timesteps(steps, grid=grid), scheduler.timesteps)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((0, 1.0), "one step or more"),
        ((51, 1.0), "from 1 to 50"),
        ((4, 0.06), "from 1 to 3, or raise the strength"),
        ((1, 0.01), "leaves 0"),
        ((4, 0.0), "strength"),
        ((4, 1.01), "strength"),
        ((1, 1.0, 1001), "num_train_timesteps = 1000"),
    ],
)
def test_impossible_runs_are_explained(arguments, words):
    with pytest.raises(ValueError, match=words):
        few_step_timesteps(*arguments)
