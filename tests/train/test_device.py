"""What a device that is not the CPU would see of a run: torch's meta device, and rules over every operation.

Nothing is mixed with what lies elsewhere, nothing is float64 (Apple has none), and a step waits for the device twice:
for the loss and for the gradient's norm.
"""

import contextlib

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from splam_core.descent import RELEASE_EVERY
from training.models.load import load_pipeline
from training.models.sampling import generate
from training.run import distillation, report, validation
from training.run.config import parse
from training.run.distillation import Distillation
from training.run.loop import train
from training.run.report import Sheets
from training.scoring import curves

pytestmark = pytest.mark.train
aten = torch.ops.aten


class Rules(TorchDispatchMode):
    """Over every operation: raises for one that breaks a rule, and counts how often the CPU waits for the device."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        copied = func in (aten._to_copy.default, aten.copy_.default)
        places = {one.device.type for one in given if one.dim()}
        assert copied or len(places) < 2, f"{func} of tensors on {places}"
        if func is aten._local_scalar_dense.default and given[0].is_meta:
            self.waits.append(func)
            return 0.5 if given[0].is_floating_point() else 1
        if func is aten._to_copy.default and given[0].is_meta and str(kwargs.get("device")) == "cpu":
            self.waits.append(func)
            return torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        if func is aten.copy_.default and given[1].is_meta and not given[0].is_meta:
            self.waits.append(func)
            return args[0]
        result = func(*args, **kwargs)
        wide = [one for one in tree_iter(result) if isinstance(one, Tensor) and one.dtype == torch.float64]
        assert not any(one.is_meta for one in wide), f"{func} makes float64 on the device"
        return result


class Data:
    """Latents and conditioning as training data give them, on the device."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def batch(self, indices):
        latents = torch.zeros(len(indices), *self.pipeline.latent_shape).to("meta")
        return latents, self.pipeline.encode([""] * len(indices))

    def held_out(self, count):
        return self.batch(range(count))


@pytest.fixture
def device(tiny_pipeline, monkeypatch):
    """A pipeline on the device, and the rules."""
    pipeline = load_pipeline(tiny_pipeline)
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # of which meta has none
    monkeypatch.setattr(distillation, "weights_digest", lambda *_: "0")  # reads values
    for module in (curves, validation):  # float64 is taken where there is one: here as on Apple's
        monkeypatch.setattr(module, "float64", lambda x: x.cpu().double(), raising=False)
    monkeypatch.setattr(validation, "SOLVER_SKIP", 150)  # steps of the teacher's path differ in nothing
    with Rules() as rules:
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.to("meta")
        pipeline.schedule = pipeline.schedule.to("meta")
        yield pipeline, rules


@pytest.mark.parametrize(
    ("gamma", "mode"),
    [("embedding", ()), ("noise-level", ("--lora", "--lora-rank", "4", "--gradient-checkpointing"))],
)
def test_a_run_stays_on_its_device_and_a_step_waits_twice(device, tmp_path, tiny_pipeline, mode, gamma):
    pipeline, rules = device
    config = parse([
        "--teacher", str(tiny_pipeline), "--output-dir", str(tmp_path), "--mixed-precision", "no", "--max-train-steps",
        "19", "--train-batch-size", "2", "--gamma-conditioning", gamma, "--validation-samples", "1", *mode,
    ])  # fmt: skip
    run = Distillation(config, pipeline, Accelerator(), data=Data(pipeline))
    steps = train(run)
    while next(steps).step < RELEASE_EVERY:  # until then the release average is the student, and copied
        pass
    rules.waits.clear()
    assert next(steps).step == RELEASE_EVERY + 1
    assert len(rules.waits) <= 2
    assert run.validate().keys() == {"target", "release"}


def test_a_sheet_stays_on_the_device(device, tmp_path, tiny_pipeline, monkeypatch):
    pipeline, _ = device
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a doughnut on a red background\n")
    config = parse([
        "--teacher", str(tiny_pipeline), "--output-dir", str(tmp_path), "--mixed-precision", "no", "--lora",
        "--lora-rank", "4", "--sample-prompts", str(prompts), "--release-decay", "0",
    ])  # fmt: skip
    monkeypatch.setattr(report, "STEPS", (2,))
    run = Distillation(config, pipeline, Accelerator(), data=Data(pipeline))
    Sheets(config, pipeline, run.networks).save(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize("sampler", ["splam", "ddim"])  # diffusers' own look for values
def test_samplers_stay_on_the_device(device, sampler):
    assert generate(device[0], ["a doughnut on a red background"], [0], sampler, 2, 3.0).device.type == "cpu"


def test_the_rules_see_what_breaks_them():
    on_device = torch.ones(2, device="meta")
    with Rules() as rules:
        for broken in (lambda: on_device + torch.ones(2), on_device.double, lambda: on_device[torch.tensor([0])]):
            with pytest.raises(AssertionError):
                broken()
        on_device.sum().item(), on_device.cpu()
    assert len(rules.waits) == 2
