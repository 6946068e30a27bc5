"""What a file says of its prediction type and schedule, against diffusers' schedules; contradictions and refusals."""

import pytest
import torch

from splam_core import NoiseSchedule, latent_scale, parametrisation_of

pytestmark = pytest.mark.core
diffusers = pytest.importorskip("diffusers")
CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
V = {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    "keys, metadata, scheduler, expected",
    [
        ([], {}, None, None),
        (["v_pred"], {}, None, "v_prediction"),
        ([], {}, CONFIG, "epsilon"),
        ([], {}, CONFIG | V, "v_prediction"),
        ([], {"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ([], {"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ([], {"modelspec.predict_key": "v"}, None, "v_prediction"),
        ([], {"prediction_type": "V-Prediction"}, None, "v_prediction"),
    ],
)
def test_where_the_prediction_type_stands(keys, metadata, scheduler, expected):
    found = parametrisation_of(keys, metadata, scheduler)
    assert (found.prediction_type, found.contradictions) == (expected, ())
    assert found.keys == (("v_pred",) if expected == "v_prediction" else ())


def test_keys_beat_metadata_and_say_so():
    found = parametrisation_of(["v_pred"], {"modelspec.prediction_type": "epsilon"}, CONFIG)
    assert found.prediction_type == "v_prediction"
    assert found.contradictions == (
        "the key 'v_pred' says v_prediction, its scheduler configuration epsilon; the first is believed.",
        "the key 'v_pred' says v_prediction, its metadata 'modelspec.prediction_type' epsilon; the first is believed.",
    )


@pytest.mark.parametrize(
    "keys, scheduler", [(["v_pred", "ztsnr"], None), ([], CONFIG | V | {"rescale_betas_zero_snr": True})]
)
def test_zero_terminal_snr_is_diffusers_but_for_the_last_alpha(keys, scheduler):
    found = parametrisation_of(keys, {}, scheduler)
    assert found.schedule.has_zero_terminal_snr and found.keys == ("v_pred", "ztsnr")
    expected = diffusers.DDIMScheduler(**CONFIG, rescale_betas_zero_snr=True).alphas_cumprod
    assert torch.allclose(found.schedule.alphas_cumprod[:-1], expected[:-1], rtol=2e-4)
    assert found.schedule.alphas_cumprod[-1] == 4.8973451890853435e-08
    assert not NoiseSchedule.scaled_linear().has_zero_terminal_snr


@pytest.mark.parametrize(
    "keys, metadata, scheduler, words",
    [
        (["edm_mean", "edm_std"], {}, None, "'edm_mean'.*EDM or flow"),
        (["v_pred", "edm_vpred.sigma_max"], {}, None, "'edm_vpred.sigma_max'"),
        ([], {}, {"_class_name": "EDMDPMSolverMultistepScheduler"}, "the scheduler EDMDPMSolverMultistepScheduler"),
        ([], {}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ([], {}, CONFIG | {"prediction_type": "sample"}, "predicts 'sample'"),
        ([], {"modelspec.prediction_type": "edm"}, None, "predicts 'edm'"),
        (["ztsnr"], {}, None, "'ztsnr' says .* needs the key 'v_pred'"),
        ([], {}, CONFIG | {"rescale_betas_zero_snr": True}, "'rescale_betas_zero_snr' says"),
    ],
)
def test_what_splam_cannot_sample_is_refused(keys, metadata, scheduler, words):
    with pytest.raises(ValueError, match=words):
        parametrisation_of(keys, metadata, scheduler)


def test_an_autoencoder_says_its_latents_scale():
    assert latent_scale({}) is None
    assert latent_scale({"scaling_factor": 0.13025, "shift_factor": None, "latents_mean": None}) == 0.13025


@pytest.mark.parametrize(
    "vae, found",
    [
        ({"scaling_factor": 0.5, "latents_mean": [0.1] * 4, "latents_std": [1.0] * 4}, "latents_mean"),
        ({"scaling_factor": 1.5, "shift_factor": 0.06}, "shift_factor"),
        ({"scaling_factor": 0}, "0 for scaling_factor"),
        ({"scaling_factor": "large"}, "'large' for scaling_factor"),
    ],
)
def test_latents_that_are_not_stable_diffusions_are_refused(vae, found):
    with pytest.raises(ValueError, match=f"config.json .*{found}.*; expected"):
        latent_scale(vae)
