"""What --plan says before a run, without weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from training.models.architectures import Architecture
from training.run.config import complete, parse, parse_command
from training.run.measure import measure
from training.run.plan import activation_bytes, describe, largest_batch, plan

pytestmark = pytest.mark.train


def planned(*arguments):
    config = parse_command([*arguments, "--plan"], None)[0]
    return config, plan(config)


def test_sd15_as_a_lora_fits_8_gb():
    config, found = planned("--teacher", "sd15", "--lora")
    assert found.unet_parameters == 859_520_964  # the published model's
    assert 67e6 < found.trained_parameters < 68e6  # LCM-LoRA's of the same layers and rank: 67.5 M
    assert found.frozen == 2 * 859_520_964 and found.optimizer == 8 * found.trained_parameters
    assert found.peak(config.train_batch_size) < 8e9
    text = describe(config, found)
    assert f"UNet evaluations {6000 * 16 * 10}" in text and "pictures 96000" in text


def test_sdxl_as_a_lora_fits_16_gb():
    _, found = planned("--teacher", "sdxl", "--lora")
    assert found.unet_parameters == 2_567_463_684
    assert found.peak(4) < 16e9 < found.peak(8)
    assert largest_batch(found, 16e9) == 4 and largest_batch(found, 8e9) == 0


def test_presets_give_what_was_not_set():
    config = parse(["--teacher", "sd21-v", "--plan"])
    assert (config.skip, config.solver_skip, config.guidance_scale, config.loss_type) == (150, 50, 8.0, "l2")
    assert config.data_options.resolution == 768 and config.learning_rate == 8e-6 and config.max_train_steps == 6000
    config = parse(["--teacher", "sd21-v", "--plan", "--skip", "120", "--learning_rate", "1e-5", "--rank", "8"])
    assert (config.skip, config.solver_skip, config.learning_rate, config.lora_rank) == (120, 40, 1e-5, 8)
    embedded = complete({"teacher": "embedded"})
    assert (embedded.gamma_conditioning, embedded.gamma_one_probability, embedded.learning_rate) == (
        "noise-level", 0.75, 3e-4,
    )  # fmt: skip
    assert (embedded.train_batch_size, embedded.max_train_steps, embedded.mixed_precision) == (32, 2400, "no")


@pytest.mark.parametrize("teacher, k, k_phi", [("sd15", 100, 20), ("sd21-v", 20, 20), ("embedded", 100, 20)])
def test_the_papers_recipe_is_there_to_ask_for(teacher, k, k_phi):
    config = parse(["--teacher", teacher, "--recipe", "paper", "--plan"])
    assert (config.skip, config.solver_skip, config.solver) == (k, k_phi, "ddim")
    assert (config.gamma_conditioning, config.gamma_one_probability, config.timestep_power) == ("embedding", 0.0, 0.0)
    config = parse(["--teacher", teacher, "--recipe", "paper", "--gamma-conditioning", "noise-level", "--skip", "60"])
    assert (config.gamma_conditioning, config.skip, config.solver_skip) == ("noise-level", 60, 20)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(checkpointing):
    """The count on the meta device against the storages that a real forward pass leaves alive."""
    shape = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32}
    shape |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 8}
    shape |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape)
    vae = {"block_out_channels": (32, 32)}
    found, _ = activation_bytes(unet, Architecture(shape, vae, {}), 32, checkpointing)
    real, kept = UNet2DConditionModel(**shape), {}
    weights = {parameter.data_ptr() for parameter in real.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = real(torch.randn(1, 4, 16, 16), torch.ones(1), torch.randn(1, 77, 32)).sample
    assert output.requires_grad
    expected = sum(kept.values())
    if checkpointing:
        assert 0.1 * expected < found < 0.8 * expected
    else:
        assert found == pytest.approx(expected, rel=0.15)


def test_the_presets_are_listed(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--list-teachers"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("sd15", "sd21-base", "sd21-v", "dreamshaper-v7", "sdxl", "embedded"))


def test_measuring_a_few_steps(small, tiny_pipeline):
    config, asked = parse_command([
        "--teacher", str(tiny_pipeline), "--plan", "--measure", "--data", "embedded", "--num-scenes", "8",
        "--num-held-out", "1", "--no-cache-latents", "--train-batch-size", "1",
    ], None)  # fmt: skip
    assert asked.plan and asked.measure
    text = measure(config)
    assert "hours in all" in text and "peak memory" in text
