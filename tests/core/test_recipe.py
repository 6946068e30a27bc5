"""The settings of training refuse, when they are made, what would only fail in the midst of a run."""

import pytest
import torch

from splam_core import Recipe, pseudo_huber
from splam_core.descent import release_decay_at

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "tcd"}, "--method must be one of splam, dl, lcm, got tcd"),
        ({"skip": 150, "solver_skip": 40}, "--solver-skip must divide --skip, got 40 and 150"),
        ({"gamma_one_probability": 1.5}, "--gamma-one-probability must be between 0 and 1, got 1.5"),
        ({"gamma_one_probability": float("nan")}, "--gamma-one-probability must be between 0 and 1, got nan"),
        ({"huber_c": 0.0}, "--huber-c must be above 0, got 0.0"),
        ({"timestep_power": float("nan")}, "--timestep-power must be 0 or more, got nan"),
        ({"ema_decay": 1.0}, "--ema-decay must be at least 0 and below 1, got 1.0"),
        ({"sigma_level": "independent"}, "--gamma-conditioning noise-level is only right with --sigma-level linear"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**settings)


def test_a_huber_of_no_width_has_no_gradient():
    """Why --huber-c 0 is refused: where prediction and target are equal, its slope is 0/0."""
    difference = torch.zeros(1, 4, requires_grad=True)
    pseudo_huber(difference, 0.0).sum().backward()
    assert difference.grad.isnan().all()


def test_a_teacher_without_guidance_costs_half():
    """One evaluation a step, as the log and --plan count them."""
    guided, plain = Recipe(), Recipe(guidance_scale=1.0)
    assert (guided.unet_forwards_per_sample, plain.unet_forwards_per_sample) == (2 * 3 + 4, 3 + 4)


def test_the_release_average_is_the_student_until_its_first_average():
    """It was the untrained start, and nearer to the teacher on some: runs of less than ten steps gave that out."""
    assert [release_decay_at(step, 0.999) for step in range(1, 10)] == [0.0] * 9
    assert release_decay_at(10, 0.999) == 0.1 and release_decay_at(11, 0.999) is None
    assert release_decay_at(10**6, 0.999) == 0.999**10
