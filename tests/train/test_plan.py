"""What --plan says before a run, without weights."""

import contextlib
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from training.models.files import read_model, write_single_file
from training.models.load import load_pipeline
from training.run import distillation, loop
from training.run import plan as plans
from training.run.config import PRESETS, complete, parse, parse_command
from training.run.distillation import Distillation
from training.run.measure import measure
from training.run.plan import Phase, describe, largest_batch, plan

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.train


def planned(*arguments):
    config = parse_command([*arguments, "--plan"], None)[0]
    return config, plan(config)


def test_sd15_as_a_lora_fits_8_gb():
    config, found = planned("--config", "sd15-lora-8gb")
    assert found.unet_parameters == 859_520_964  # the published model's
    assert 67e6 < found.trained_parameters < 68e6  # LCM-LoRA's of the same layers and rank: 67.5 M
    assert found.frozen == 2 * 859_520_964 and found.optimizer == 8 * found.trained_parameters
    # The whole command over fake tensors of a GPU with torch's own autocast, once: 4.38 GB (batch 8), 5.96 (16).
    assert found.allocated(8) == pytest.approx(4.381e9, rel=0.05)
    assert found.allocated(16) == pytest.approx(5.955e9, rel=0.05)
    assert found.peak(config.train_batch_size) < 8e9
    text = describe(config, found)
    images = 6000 * config.train_batch_size * config.gradient_accumulation_steps
    assert f"UNet evaluations {images * 10}" in text and f"pictures {images}" in text


@pytest.mark.parametrize("predicts_v", [False, True])
def test_a_single_files_shapes_are_its_own(tiny_pipeline, tmp_path, predicts_v):
    """They were the published ones of its family, and those of Stable Diffusion 2 at 512 px."""
    model = replace(read_model(tiny_pipeline), family="sd2")
    if predicts_v:
        scheduler = {**model.configs["scheduler"], "prediction_type": "v_prediction"}
        model = replace(model, configs={**model.configs, "scheduler": scheduler})
    unet = {name: value for name, value in model.configs["unet"].items() if name != "sample_size"}
    file = tmp_path / "sd2.safetensors"
    write_single_file(replace(model, configs={**model.configs, "unet": unet}), file, "sd2")
    config, found = planned("--teacher", str(file))
    assert found.unet_parameters == sum(one.numel() for one in model.unet.values())
    assert plans.shapes(config)[1] == (768 if predicts_v else 512)


def test_phases_lie_on_the_lines_through_what_was_counted():
    phase = Phase({1: 10.0, 4: 13.0, 16: 49.0})
    assert [phase.bytes(size) for size in (1, 2, 4, 10, 16, 32)] == [10, 11, 13, 31, 49, 97]
    assert Phase({1: 7.0}).bytes(64) == 7


def test_the_presets_fit_the_memory_that_they_name(monkeypatch):
    """SDXL's takes long to count: its numbers are those of --plan, and its flags are what they were counted with."""
    for name in PRESETS:
        config = parse(["--config", name, "--plan"])
        assert config.gradient_checkpointing and name.split("-")[0] == config.teacher
        assert config.train_batch_size * config.gradient_accumulation_steps == 16  # the defaults' for one GPU
        assert config.lora == ("lora" in name)
    monkeypatch.setattr(plans, "BATCHES", (1, 4))
    config, found = planned("--config", "sd15-24gb")
    assert found.peak(config.train_batch_size) < 24e9 and largest_batch(found, 16e9) == 0


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("lora", [True, False])
def test_a_plan_is_what_a_real_step_holds(tiny_pipeline, tmp_path, monkeypatch, lora, finish):
    """Against the storages that live while the loop itself takes a step on the CPU."""
    for module in (distillation, loop):
        monkeypatch.setattr(module, "plain_attention", lambda _: contextlib.nullcontext())
    stage = ["--max-train-steps", "0", "--finish", "distribution-matching"] if finish else ["--max-train-steps", "2"]
    config, _ = parse_command([
        "--teacher", str(tiny_pipeline), "--data", "embedded", "--num-scenes", "16", "--num-held-out", "1",
        "--no-cache-latents", "--train-batch-size", "4", "--mixed-precision", "no", *stage,
        "--release-decay", "0", "--teacher-dtype", "fp32", "--gradient-checkpointing",
        "--output-dir", str(tmp_path), *(["--lora", "--lora-rank", "8"] if lora else []),
    ], None)  # fmt: skip
    run = Distillation(config, load_pipeline(tiny_pipeline), Accelerator(cpu=True))
    if finish:
        run.begin_finish()
    held = {one.untyped_storage()._cdata for one in run.pipeline.vae.parameters()}
    networks = {"student": run.networks.student}
    if not lora:
        networks |= {"target": run.networks.target, "teacher": run.networks.teacher}
        networks |= {"fake": run.networks.fake, "start": run.networks.start} if finish else {}
    weights = {one.untyped_storage()._cdata: one.nbytes for net in networks.values() for one in net.parameters()}
    assert not held & weights.keys()
    with Storages() as storages:
        for role, _ in loop.backward(run):
            run.learners[role].optimizer.zero_grad(set_to_none=True)
    found = plan(config)
    phase = found.phases["finish" if finish else "step"].bytes(4)
    if finish:
        learning = sum(one.numel() for one in run.networks.trainable("fake"))
        assert "step" not in found.phases
        assert found.finish == pytest.approx(4 * learning * 2 + 8 * learning, rel=0.05)  # of blocks of 512 bytes
        phase -= 8 * learning
    assert phase - found.optimizer == pytest.approx(sum(weights.values()) + storages.peak, rel=0.1)


class Storages(TorchDispatchMode):
    """The most bytes alive of what is made inside."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor) and not func.is_view:
                storage = one.untyped_storage()
                if storage._cdata not in self.live and not func._schema.is_mutable:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


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


def test_a_plan_may_follow_what_loads_a_model():
    """transformers exchanges torch.linspace while it loads, and torch may take that one for good."""
    code = (
        "from transformers import CLIPTextModel; CLIPTextModel.from_pretrained('assets/embedded/text_encoder'); "
        "from training.run.config import parse; from training.run.plan import plan; "
        "print(plan(parse(['--teacher', 'embedded'])).peak(1) > 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr
