"""Timesteps of the few-step families as their publishers give them, and what a file tells of its family."""

import pytest
import torch

from splam_core.families import FAMILIES, family_told, landings, timesteps_of


@pytest.mark.parametrize(
    ("family", "steps", "strength", "expected"),
    [
        ("splam", 4, 1.0, [999, 759, 499, 259]),
        ("dmd2", 4, 1.0, [999, 749, 499, 249]),
        ("dmd2", 1, 1.0, [399]),
        ("tcd", 4, 1.0, [999, 759, 499, 259]),
        ("hyper", 1, 1.0, [800]),
        ("lightning", 4, 1.0, [999, 749, 499, 249]),
        ("lightning", 8, 1.0, [999, 874, 749, 624, 499, 374, 249, 124]),
        ("ddim", 1, 1.0, [999]),
        ("ddim", 2, 0.5, [499, 249]),
        ("dmd2", 1, 0.5, [499]),
    ],
)
def test_timesteps(family, steps, strength, expected):
    assert timesteps_of(FAMILIES[family], steps, strength).tolist() == expected


def test_ddim_goes_down_as_diffusers_does():
    ddim = FAMILIES["ddim"]
    assert landings(ddim, [999, 749, 499, 249]) == [749, 499, 249, None]
    assert landings(ddim, [999, 666, 332]) == [666, 333, None], "by 333 each"
    assert landings(ddim, timesteps_of(ddim, 7).tolist())[-1] == 0
    assert landings(ddim, [499, 249]) == [249, None]
    assert landings(ddim, [900, 100]) == [100, None], "timesteps of another scheduler"
    assert landings(FAMILIES["lightning"], [999, 666, 332]) == [666, 332, None]


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, 0.0005])
def test_timesteps_that_do_not_fit(strength):
    with pytest.raises(ValueError, match="steps do not fit"):
        timesteps_of(FAMILIES["ddim"], 2, strength)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("slam-lora-sdxl.safetensors", "splam"),
        ("lcm-lora-sdv1-5.safetensors", "splam"),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", "dmd2"),
        ("Hyper-SDXL-1step-lora.safetensors", "hyper"),
        ("Hyper-SD15-8steps-lora.safetensors", "ddim"),
        ("sdxl_lightning_4step_lora.safetensors", "lightning"),
        ("pcm_sd15_smallcfg_4step_converted.safetensors", "ddim"),
        ("tcd_sdxl_lora.safetensors", "tcd"),
        ("DreamShaperXL_Lightning.safetensors", "lightning"),
        ("islamic_patterns.safetensors", None),
        ("sd_xl_base_1.0.safetensors", None),
    ],
)
def test_what_a_files_name_tells(name, family):
    told = family_told(name, {})
    assert (told and told[0]) == family
    assert told is None or name in told[1]


def test_metadata_and_scheduler_come_before_the_name():
    assert family_told("tcd.safetensors", {"splam.method": "splam"})[0] == "splam"
    assert family_told("x", {}, {"_class_name": "TCDScheduler"}) == ("tcd", "its TCDScheduler")
    assert family_told("tcd.safetensors", {"modelspec.title": "My DMD2 merge"})[0] == "dmd2"
    assert family_told("x", {"ss_output_name": "portrait"}) is None


def test_no_number_is_lost_in_half_precision():
    from splam_core.families import step_on
    from splam_core.schedule import NoiseSchedule

    schedule, x = NoiseSchedule.scaled_linear(), torch.randn(2, 4, 4, 4, dtype=torch.float16)
    for family in FAMILIES.values():
        for following in (499, None):
            found = step_on(family, x, x, 999, following, schedule, lambda x, _: torch.randn_like(x))
            assert found.dtype == x.dtype and found.isfinite().all()
