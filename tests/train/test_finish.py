"""A student's finish: distribution matching as a stage after the method, or alone."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from splam_core import draw_places
from training.models.load import load_pipeline
from training.models.lora import merged, read_lora
from training.run import loop
from training.run.adapters import LoraNetworks
from training.run.config import FINISH_SETTINGS, complete, parse, parse_command
from training.run.distillation import Distillation
from training.run.processes import join_processes
from training.run.sources import load_student

pytestmark = pytest.mark.train
FINISH = ("--finish", "distribution-matching", "--finish-warmup-steps", 1, "--teacher-dtype", "fp32")


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [(line["loss"], line.get("fake_loss")) for line in lines(folder)]


def weights(folder, role):
    return load_file(folder / f"{role}.safetensors")


MODES = {"full": (), "lora": ("--lora", "--lora-rank", 4, "--gradient-checkpointing")}


@pytest.fixture(scope="module", params=MODES)
def finished(request, small, tiny_pipeline, tmp_path_factory):
    """(folder, flags) of a run of two steps of the method and three of its finish, with all their checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = (
        *FINISH, *MODES[request.param], "--finish-steps", 3, "--checkpointing-steps", 1,
        "--checkpoints-total-limit", 9, "--finish-learning-rate", "1e-3", "--fake-learning-rate", "4e-3",
    )  # fmt: skip
    small(tiny_pipeline, folder, 2, *flags)
    return folder, flags


def test_the_finish_follows_the_method(finished):
    folder, _ = finished
    found = lines(folder)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    assert ["fake_loss" in line for line in found] == [False, False, True, True, True]
    for place, line in enumerate(found[2:]):
        samples = range(4 + 2 * place, 6 + 2 * place)
        # Student 3, guided teacher 2, fake 1, start 1, two updates of the fake network 3 each; and the steps before.
        assert line["unet_forwards"] == 2 * 13 + sum(draw_places(0, samples, (1, 2, 4))[1])
        assert line["learning_rate"] == 1e-3
    method, begun, last = (folder / f"checkpoint-{step}" for step in (2, 3, 5))
    assert (method / "release.safetensors").exists() and not (method / "fake.safetensors").exists()
    for role in ("start", "fake", "fake-optimizer", "fake-watch"):
        assert list(begun.glob(f"{role}.*")), role
    assert not (begun / "release.safetensors").exists()
    release = weights(method, "release")
    assert all(torch.equal(weights(last, "start")[key], release[key]) for key in release)
    for role in ("student", "target", "fake"):
        assert any(not torch.equal(weights(begun, role)[key], one) for key, one in weights(last, role).items()), role
    assert "SPLAM, then distribution matching" in (folder / "README.md").read_text()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_it_goes_on_as_if_nothing_had_happened(finished, small, tiny_pipeline, tmp_path, monkeypatch, step):
    """Ended in the middle of the step after a checkpoint of the method, of the boundary, and of the finish."""
    folder, flags = finished
    real, out = loop.update_averages, tmp_path / "run"

    def ended(networks, now, *rest):
        real(networks, now, *rest)
        if now == step + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "update_averages", ended)
    with pytest.raises(KeyboardInterrupt):
        small(tiny_pipeline, out, 2, *flags)
    monkeypatch.undo()
    assert (out / f"checkpoint-{step}").is_dir() and not (out / f"checkpoint-{step + 1}").exists()
    small(tiny_pipeline, out, 2, *flags, "--resume-from-checkpoint", "latest")
    assert losses(out) == losses(folder)
    for role in ("student", "target", "fake", "start"):
        one, other = (weights(place / "checkpoint-5", role) for place in (out, folder))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), role


@pytest.mark.parametrize(
    ("step", "more", "named"),
    [
        (3, ("--finish-anchor", 2), "--finish-anchor 0.5 -> 2"),
        (3, ("--finish-step-counts", 1), "--finish-step-counts"),
        (3, ("--finish", "none"), "--finish distribution-matching -> none"),
        (4, ("--max-train-steps", 3), "--max-train-steps is 3, and its finish began at step 2"),
        (2, ("--max-train-steps", 1), "--max-train-steps is 1, and its finish cannot begin before step 2"),
        (3, ("--student", "tiny"), "it began with another student"),
    ],
)
def test_another_finish_is_not_taken_up(finished, small, tiny_pipeline, tmp_path, step, more, named):
    folder, flags = finished
    if "--lora" in flags:
        pytest.skip("the same check")
    more = [tiny_pipeline if one == "tiny" else one for one in more]
    if more[0] != "--max-train-steps":
        more = [*more, "--max-train-steps", 2]
    with pytest.raises(ValueError, match=f"checkpoint-{step} does not fit this run: .*{named}"):
        small(tiny_pipeline, tmp_path, 2, *flags, *more, "--resume-from-checkpoint", folder / f"checkpoint-{step}")


def test_a_method_that_is_done_may_be_given_a_finish(finished, small, tiny_pipeline, tmp_path):
    folder, flags = finished
    method = [one for one in flags if one not in ("--finish", "distribution-matching")]
    small(tiny_pipeline, tmp_path, 2, *method)
    assert len(lines(tmp_path)) == 2
    small(tiny_pipeline, tmp_path, 2, *flags, "--resume-from-checkpoint", "latest")
    if "--lora" in flags:  # its adapters are drawn with the finish's
        assert len(lines(tmp_path)) == 5
    else:
        assert losses(tmp_path) == losses(folder)


def test_batches_accumulate_to_one_of_their_size(small, tiny_pipeline, tmp_path):
    small(tiny_pipeline, tmp_path / "one", 0, *FINISH, "--finish-steps", 1, "--train-batch-size", 4)
    more = ("--train-batch-size", 1, "--gradient-accumulation-steps", 4)
    small(tiny_pipeline, tmp_path / "four", 0, *FINISH, "--finish-steps", 1, *more)
    (one,), (four,) = lines(tmp_path / "one"), lines(tmp_path / "four")
    for name in ("loss", "fake_loss", "gradient_norm"):
        assert four[name] == pytest.approx(one[name], rel=1e-4), name
    assert one["unet_forwards"] == four["unet_forwards"]


@pytest.mark.usefixtures("own_precision")
@pytest.mark.parametrize("lora", [False, True])
def test_the_student_learns_under_autocast(tiny_v, tmp_path, lora):
    """Its passes without a gradient come first, and autocast keeps the weights that it has cast."""
    flags = ["--lora", "--lora-rank", "4"] if lora else []
    config = parse([
        "--teacher", str(tiny_v), "--data", "embedded", "--num-scenes", "16", "--no-cache-latents",
        "--train-batch-size", "4", "--mixed-precision", "bf16", "--max-train-steps", "0", "--output-dir", str(tmp_path),
        "--finish", "distribution-matching", "--finish-step-counts", "4", *flags,
    ])  # fmt: skip
    run = Distillation(config, load_pipeline(tiny_v), join_processes("bf16"))
    run.begin_finish()
    learned = []
    for role, _ in loop.backward(run):
        learned.append(role)
        other = run.networks.trainable("student" if role == "fake" else "fake")
        gradients = [one.grad for one in run.networks.trainable(role)]
        assert all(one is not None and one.isfinite().all() for one in gradients)
        assert sum(one.abs().sum() for one in gradients) > 0 and all(one.grad is None for one in other)
        run.learners[role].optimizer.zero_grad(set_to_none=True)
    assert learned == ["student", "fake", "fake"]


def lora_of(tiny, folder, rank=2, only=("attn2.to_q", "conv1")):
    """A LoRA of some layers under kohya's names, with an alpha of its own: its file."""
    generator, found = torch.Generator().manual_seed(0), {}
    for key, weight in load_file(tiny / "unet" / "diffusion_pytorch_model.safetensors").items():
        module = key.removesuffix(".weight")
        if not key.endswith(".weight") or not module.endswith(only):
            continue
        name, rest = f"lora_unet_{module.replace('.', '_')}", weight.shape[2:]
        found[f"{name}.lora_down.weight"] = torch.randn(rank, weight.shape[1], *rest, generator=generator) / 9
        found[f"{name}.lora_up.weight"] = torch.randn(len(weight), rank, *[1] * len(rest), generator=generator) / 9
        found[f"{name}.alpha"] = torch.tensor(3.0)
    file = folder / "few-step.safetensors"
    save_file(found, file)
    return file


@pytest.mark.parametrize("alpha", ["4", "8"])
def test_a_lora_begins_as_the_one_it_is_given(tiny_pipeline, tmp_path, alpha):
    file = lora_of(tiny_pipeline, tmp_path)
    config = parse([
        "--teacher", str(tiny_pipeline), "--lora", "--lora-rank", "4", "--lora-alpha", alpha, "--student", str(file),
        "--max-train-steps", "0", "--finish", "distribution-matching",
    ])  # fmt: skip
    pipeline = load_pipeline(tiny_pipeline)
    own = {key: weight.clone() for key, weight in pipeline.unet.state_dict().items()}
    networks = LoraNetworks(pipeline, config, load_student(config, pipeline))
    networks.begin_finish()
    expected = merged(own, read_lora(file))
    for role, wanted in (("student", expected), ("target", expected), ("start", expected), ("fake", own)):
        found = networks.export(role)
        for key, weight in wanted.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-6)


def test_a_whole_student_begins_as_the_one_it_is_given(small, tiny_pipeline, tmp_path):
    file = lora_of(tiny_pipeline, tmp_path)
    expected = merged(load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors"), read_lora(file))
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file(expected, folder / "diffusion_pytorch_model.safetensors")
    shutil.copy(tiny_pipeline / "unet" / "config.json", folder)
    for name, student in (("lora", file), ("unet", folder)):
        out = tmp_path / name / "run"
        small(tiny_pipeline, out, 0, *FINISH, "--finish-steps", 1, "--student", student)
        start = weights(out / "checkpoint-1", "start")
        assert all(torch.equal(start[key], weight) for key, weight in expected.items())
        assert "distilled from `pipeline` with distribution matching (" in (out / "README.md").read_text()


def test_a_student_that_embeds_what_nothing_names_is_warned_of(tiny_pipeline, tmp_path):
    """An LCM's guidance lies where SPLAM's gamma does, and was folded as that in silence."""
    folder = tmp_path / "lcm"
    config = UNet2DConditionModel.load_config(tiny_pipeline, subfolder="unet")
    UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 256}).save_pretrained(folder)
    with pytest.warns(UserWarning, match="cond_proj is read as SPLAM's, .* training/export.py --embedded-guidance 8.5"):
        load_student(parse(["--teacher", str(tiny_pipeline), "--student", str(folder)]), load_pipeline(tiny_pipeline))


@pytest.mark.parametrize(
    ("rank", "only", "more", "named"),
    [
        (8, ("attn2.to_q",), (), "is of rank 8: expected 4 or less. Take --lora-rank 8"),
        (2, ("conv_in",), (), "it changes conv_in, which --lora-target-modules does not name"),
        (2, ("attn2.to_q",), ("whole",), "is a whole model, and a --lora goes on from a LoRA"),
    ],
)
def test_a_student_that_does_not_fit_is_named(small, tiny_pipeline, tmp_path, rank, only, more, named):
    student = tiny_pipeline if more else lora_of(tiny_pipeline, tmp_path, rank, only)
    with pytest.raises(ValueError, match=named):
        small(
            tiny_pipeline, tmp_path / "run", 0, *FINISH, "--student", student, "--lora", "--lora-rank", 4
        )  # fmt: skip


def test_a_student_of_another_teacher_is_named(small, tiny_v, tiny_xl, tiny_pipeline, tmp_path):
    for teacher, named in ((tiny_v, "predicts epsilon, .* v_prediction"), (tiny_xl, "is another architecture")):
        with pytest.raises(ValueError, match=named):
            small(teacher, tmp_path / "run", 0, *FINISH, "--student", tiny_pipeline)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"max_train_steps": 0}, "--max-train-steps must be 1 or more, or with --finish"),
        ({"finish_steps": 0}, "--finish-steps must be 1 or more"),
        ({"fake_updates": 0}, "--fake-updates must be 1 or more"),
        ({"finish_step_counts": (1, 51)}, "--finish-step-counts must be from 1 to 50"),
        ({"finish_noise_range": (0.5,)}, "--finish-noise-range must be two rising numbers"),
        ({"finish_anchor": -1.0}, "--finish-anchor must be 0 or more"),
        ({"finish_ema_decay": 1.0}, "--finish-ema-decay must be at least 0 and below 1"),
        ({"finish": "distribution-matching", "optimizer": "prodigy"}, "--optimizer prodigy sets its own"),
    ],
)
def test_settings_that_make_no_sense_are_named(given, named):
    with pytest.raises(ValueError, match=named):
        complete({"teacher": "embedded", **given})


def test_settings_come_from_a_file_and_from_the_teacher(tmp_path):
    file = tmp_path / "finish.toml"
    file.write_text('teacher = "sd15"\nfinish = "distribution-matching"\nfinish-step-counts = [2, 4]\nsteps = 7\n')
    with pytest.raises(SystemExit):  # a flag's other names are the command line's
        parse(["--config", str(file)])
    file.write_text(file.read_text().replace("steps = 7", "max-train-steps = 7"))
    config, _ = parse_command(["--config", str(file), "--lora", "--plan"], None)
    assert config.finish_step_counts == (2, 4) and config.total_steps == 607
    assert (config.finish_learning_rate, config.fake_learning_rate) == (2e-5, 8e-5)
    assert config.settings()["finish_step_counts"] == [2, 4]
    assert config.finish_forwards_per_sample == 1 + 13
    assert parse(["--teacher", "embedded"]).total_steps == 2400
    assert parse(["--teacher", "embedded", "--steps", "3"]).max_train_steps == 3
    assert config.settings().keys() >= FINISH_SETTINGS


@pytest.mark.parametrize("mode", MODES)
def test_validation_and_sheets_go_on_and_choose_nothing(small, tiny_pipeline, tmp_path, mode):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a doughnut on a red background\n")
    more = ("--finish-steps", 1, "--sample-every", 9, "--validation-samples", 4, "--sample-prompts", prompts)
    small(tiny_pipeline, tmp_path / "run", 1, *FINISH, *MODES[mode], *more, "--skip", 500, "--solver-skip", 500)
    run = tmp_path / "run"
    assert sorted(file.name for file in run.glob("sheet-*")) == ["sheet-000001.png", "sheet-000002.png"]
    method, finish = (json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines())
    assert "validation/release/loss" in method and "validation/target/loss" in finish
    assert "validation/release/loss" not in finish
    assert json.loads((run / "best" / "state.json").read_text())["step"] == 1
    exported = load_file(run / "checkpoint-2" / "target.safetensors")
    if mode == "full":
        found = load_pipeline(run / "pipeline").unet.state_dict()
        assert all(torch.equal(found[key], weight.half().float()) for key, weight in exported.items())
