"""The student starts as the teacher, a resumed run is the same run, and what comes out is plain Stable Diffusion."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import splam_core.gamma
from splam_core import draw_timesteps, draws, fold, gamma_embedding
from splam_core.checkpoint import ldm_to_diffusers, read_metadata
from training.models.files import read_model
from training.models.load import load_pipeline
from training.models.sampling import generate
from training.run import validation
from training.run.adapters import LoraNetworks
from training.run.config import complete, parse
from training.run.distillation import Distillation
from training.run.publish import save_workflow
from training.run.whole import FullNetworks, make_student
from training.scoring.curves import mean_squares

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.train


def distill(*arguments):
    command = [sys.executable, str(ROOT / "training" / "distill.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("conditioning", ["embedding", "noise-level"])
def test_the_untrained_student_is_the_teacher_to_the_bit(tiny_pipeline, conditioning):
    pipeline = load_pipeline(tiny_pipeline)
    student = make_student(pipeline.unet, conditioning).eval()
    x, t, embeds = (
        torch.randn(2, 4, 16, 16),
        torch.tensor([999, 19]),
        pipeline.encode(["a doughnut on a red background", ""]),
    )
    phi = torch.zeros(2, 256) if conditioning == "embedding" else None
    with torch.no_grad():
        told = student(x, t, **embeds, timestep_cond=phi).sample
        assert torch.equal(told, pipeline.unet(x, t, **embeds).sample)


@pytest.mark.parametrize("copied", [True, False])
def test_a_config_that_never_heard_of_gamma(tiny_pipeline, tmp_path, copied):
    """Stable Diffusion 1.5's own config.json is older than time_cond_proj_dim."""
    shutil.copytree(tiny_pipeline, tmp_path / "old")
    file = tmp_path / "old" / "unet" / "config.json"
    settings = json.loads(file.read_text())
    del settings["time_cond_proj_dim"]
    file.write_text(json.dumps(settings))
    pipeline = load_pipeline(tmp_path / "old")
    if copied:
        student = make_student(pipeline.unet, "embedding")
    else:
        arguments = ["--teacher", "embedded", "--lora", "--lora-rank", "2", "--gamma-conditioning", "embedding"]
        student = LoraNetworks(pipeline, parse(arguments)).student
    assert student.time_embedding.cond_proj.weight.shape == (32, 256)


def test_random_numbers_belong_to_the_sample_index():
    noise, u_t, u_gamma = draws(5, range(10, 14), (4, 2, 2))
    alone = draws(5, range(12, 13), (4, 2, 2))
    assert torch.equal(noise[2:3], alone[0]) and torch.equal(u_t[2:3], alone[1]) and torch.equal(u_gamma[2:3], alone[2])
    assert not torch.equal(noise, draws(6, range(10, 14), (4, 2, 2))[0])


@pytest.mark.parametrize(
    ("method", "conditioning"),
    [("splam", "embedding"), ("splam", "noise-level"), ("lcm", "noise-level"), ("dl", "embedding")],
)
def test_every_method_ends_in_a_folder_and_a_single_file(small, tiny_pipeline, tmp_path, method, conditioning):
    out = tmp_path / "run"
    small(tiny_pipeline, out, 2, "--method", method, "--gamma-conditioning", conditioning, "--export-dtype", "fp32")
    assert len(losses(out)) == 2 and all(0 < loss < 100 for loss in losses(out))
    single = load_file(out / "student.splam.safetensors")
    assert not [key for key in single if "cond_proj" in key]
    unet, vae, text_encoder = ldm_to_diffusers(single)
    for part, file in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        saved = load_file(out / "pipeline" / part / f"{file}.safetensors")
        converted = {"unet": unet, "vae": vae, "text_encoder": text_encoder}[part]
        assert saved.keys() == converted.keys() and all(torch.equal(saved[key], converted[key]) for key in saved)
    pipeline = load_pipeline(out)
    assert generate(pipeline, ["a doughnut on a red background"], [1], steps=2).isfinite().all()
    assert str(tiny_pipeline) not in (out / "pipeline" / "unet" / "config.json").read_text()
    before = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == unet.keys() and any(not torch.equal(before[key], unet[key]) for key in before)


def test_a_resumed_run_is_the_same_run_to_the_bit(small, tiny_pipeline, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    small(tiny_pipeline, whole, 6, "--checkpointing-steps", 2, "--checkpoints-total-limit", 9)
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    (cut / "log.jsonl").write_text(
        "".join((whole / "log.jsonl").read_text().splitlines(True)[:3]) + '{"st'
    )  # died at step 4
    small(tiny_pipeline, cut, 6, "--resume-from-checkpoint", "latest")
    assert losses(cut) == losses(whole)
    results = [
        load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors") for folder in (whole, cut)
    ]
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_a_checkpoint_of_another_run_is_refused(small, tiny_pipeline, tmp_path):
    small(tiny_pipeline, tmp_path, 1, "--gamma-conditioning", "embedding")
    with pytest.raises(ValueError, match="does not fit this run"):
        small(tiny_pipeline, tmp_path, 2, "--gamma-conditioning", "noise-level", "--resume-from-checkpoint", "latest")


def test_a_missing_teacher_is_one_clear_error(tmp_path):
    result = distill("--teacher", tmp_path / "nothing")
    assert result.returncode == 1 and "holds no model: expected" in result.stderr and "Traceback" not in result.stderr


def test_flags_take_dashes_and_underscores_and_are_checked(capsys):
    assert parse(["--teacher", "embedded", "--max_train_steps", "7"]).max_train_steps == 7
    assert parse(["--teacher", "embedded", "--max-train-steps", "7"]).max_train_steps == 7
    assert parse(["--teacher", "embedded"]).unet_forwards_per_sample == 10
    with pytest.raises(SystemExit):
        parse(["--teacher", "embedded", "--skip", "50", "--solver-skip", "20"])
    assert "--solver-skip must divide --skip" in capsys.readouterr().err


def test_timesteps_are_drawn_in_proportion_to_a_power_of_t():
    u = (torch.arange(200_000) + 0.5) / 200_000
    uniform = draw_timesteps(u, 1000, 0.0)
    assert uniform.unique(return_counts=True)[1].tolist() == [4000] * 50
    assert (uniform.min(), uniform.max()) == (19, 999)
    high = draw_timesteps(u, 1000, 0.5)
    assert (high.min(), high.max()) == (19, 999) and (high % 20 == 19).all()
    # The share above t = 499 of a density in proportion to sqrt(t): 1 - 0.5**1.5.
    assert (high > 499).double().mean() == pytest.approx(1 - 0.5**1.5, abs=1e-4)
    assert draw_timesteps(torch.tensor([1 - 2**-24]), 1000, 0.5) == 999
    with pytest.raises(ValueError, match="--timestep-power"):
        complete({"teacher": "embedded", "timestep_power": -0.5})


def diffusers_loss(folder, pipeline, w, latents, embeds, nothing, noise, t):
    """LCM's squared error at k = 20 (eq. 7), by diffusers' DDIM step and LCMScheduler's boundary scalings."""
    ddim = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", timestep_spacing="leading")
    ddim.set_timesteps(50)
    lcm = LCMScheduler.from_config(ddim.config)
    levels = ddim.alphas_cumprod

    def consistency(x, t):
        output = pipeline.unet(x, t, encoder_hidden_states=embeds).sample
        alpha, sigma = levels[t] ** 0.5, (1 - levels[t]) ** 0.5
        v = ddim.config.prediction_type == "v_prediction"
        x0 = alpha * x - sigma * output if v else (x - sigma * output) / alpha
        c_skip, c_out = lcm.get_scalings_for_boundary_condition_discrete(t)
        return c_skip * x + c_out * x0

    x_t = ddim.add_noise(latents, noise, t)
    cond, uncond = (pipeline.unet(x_t, t, encoder_hidden_states=one).sample for one in (embeds, nothing))
    x_s = ddim.step(uncond + w * (cond - uncond), t, x_t).prev_sample
    return (consistency(x_t, t) - consistency(x_s, max(0, t - 20))).square().mean()


@torch.no_grad()
@pytest.mark.parametrize("teacher", ["tiny_pipeline", "tiny_v"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_loss_of_epsilon_and_v_teachers_is_diffusers(request, tmp_path, teacher, lora):
    folder = request.getfixturevalue(teacher)
    config = parse([
        "--teacher", str(folder), "--recipe", "paper", "--method", "lcm", "--skip", "20", "--guidance-scale", "4",
        "--loss-type", "l2",
        "--teacher-dtype", "fp32", "--data", "embedded", "--num-scenes", "32", "--no-cache-latents", "--seed", "3",
        "--cache-dtype", "fp32", "--lora" if lora else "--no-lora",
    ])  # fmt: skip
    run = Distillation(config, load_pipeline(folder), Accelerator(cpu=True))
    pipeline = load_pipeline(folder)
    assert pipeline.prediction_type == ("v_prediction" if teacher == "tiny_v" else "epsilon")
    for index in range(3):
        latents, conditioning = run.data.batch(range(index, index + 1))
        noise, u, _ = draws(3, range(index, index + 1), latents.shape[1:])
        t, nothing = 20 * (int(u * 50) + 1) - 1, pipeline.encode([""])["encoder_hidden_states"]
        embeds = conditioning["encoder_hidden_states"]
        expected = diffusers_loss(folder, pipeline, 4.0, latents, embeds, nothing, noise, torch.tensor(t))
        ((role, loss),) = run.losses(range(index, index + 1))
        assert role == "student" and loss.item() == pytest.approx(expected.item(), rel=2e-4)


def test_a_v_student_stays_one(small, tiny_v, tmp_path):
    small(tiny_v, tmp_path, 2, "--learning-rate", "1e-3", "--export-dtype", "fp32")
    assert all(0 < loss < 100 for loss in losses(tmp_path))
    assert load_pipeline(tmp_path).prediction_type == "v_prediction"
    assert read_metadata(tmp_path / "student.splam.safetensors")["modelspec.prediction_type"] == "v"
    before, after = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (tiny_v, tmp_path / "pipeline")
    )
    assert any(not torch.equal(before[key], after[key]) for key in before)


@torch.no_grad()
def test_sdxl_is_told_prompt_and_size_as_diffusers_tells_it(tiny_xl):
    pipeline, whole = load_pipeline(tiny_xl), StableDiffusionXLPipeline.from_pretrained(tiny_xl)
    embeds, _, pooled, _ = whole.encode_prompt("a red fox", do_classifier_free_guidance=False)
    ours = pipeline.encode(["a red fox"], size=(96, 160))
    assert torch.allclose(ours["encoder_hidden_states"], embeds, atol=1e-6)
    assert torch.allclose(ours["text_embeds"], pooled, atol=1e-6)
    ids = whole._get_add_time_ids((96, 160), (0, 0), (96, 160), torch.float32, text_encoder_projection_dim=32)
    assert torch.equal(ours["time_ids"], ids)
    nothing = pipeline.unconditional()
    assert not nothing["encoder_hidden_states"].any() and not nothing["text_embeds"].any()


@pytest.mark.parametrize("more", [(), ("--lora", "--lora-rank", 4)])
def test_sdxl_is_distilled(small, tiny_xl, tmp_path, more):
    small(tiny_xl, tmp_path, 2, "--export-dtype", "fp32", *more)
    assert all(0 < loss < 100 for loss in losses(tmp_path))
    pipeline = load_pipeline(tmp_path)
    assert pipeline.family == "sdxl"
    assert generate(pipeline, ["a doughnut on a red background"], [1], steps=2).isfinite().all()


def test_accumulated_batches_are_one_large_batch(small, tiny_pipeline, tmp_path):
    small(tiny_pipeline, tmp_path / "large", 3, "--train-batch-size", 4)
    small(tiny_pipeline, tmp_path / "parts", 3, "--train-batch-size", 2, "--gradient-accumulation-steps", 2)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "large"), rel=1e-4)


def test_a_missing_optimizer_package_is_named(small, tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="pip install prodigyopt"):
        small(tiny_pipeline, tmp_path, 1, "--optimizer", "prodigy")


def test_validations_paths_are_as_long_for_any_skip(small, tiny_pipeline, tmp_path, monkeypatch):
    """They were walked in steps of the skip's common divisor with 20, so that x_s was among their points."""
    asked, make = [], validation.teacher_function

    def counting(*arguments):
        teacher = make(*arguments)
        return lambda x, t: asked.append(int(t[0])) or teacher(x, t)

    monkeypatch.setattr(validation, "teacher_function", counting)
    small(tiny_pipeline, tmp_path, 1, "--sample-every", 1, "--validation-samples", 4, "--skip", 21, "--solver-skip", 21)
    assert asked[:52] == [999, 979, 978, *range(959, 0, -20), 759] and len(asked) == 51 + 39 + 26 + 14


def test_the_workflow_skips_what_training_skipped(tiny_pipeline, tmp_path):
    config = parse(["--teacher", str(tiny_pipeline), "--output-dir", str(tmp_path), "--clip-skip", "2"])
    file = save_workflow(config, read_model(tiny_pipeline), tmp_path, "a", None)
    graph = json.loads(file.read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = [(begin, end) for _, begin, _, end, _, kind in graph["links"] if kind == "CLIP"]
    ways = {(nodes[begin]["type"], nodes[end]["type"]) for begin, end in links}
    assert ways == {("SPLAMLoader", "CLIPSetLastLayer"), ("CLIPSetLastLayer", "CLIPTextEncode")}
    assert [node["widgets_values"] for node in nodes.values() if node["type"] == "CLIPSetLastLayer"] == [[-2]]


def test_what_a_person_sees(small, tiny_pipeline, tmp_path):
    """A sheet, curves, validation, a card and a workflow; target and release are both judged."""
    small(
        tiny_pipeline, tmp_path, 2, "--sample-every", 1, "--validation-samples", 4, "--report-to", "tensorboard",
        "--skip", 500, "--solver-skip", 500, "--name", "mine",
    )  # fmt: skip
    assert Image.open(tmp_path / "sheet-000002.png").width > 5 * 128
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"validation/target/loss", "validation/release/loss", "validation/target/delta_999"} <= lines[0].keys()
    assert list((tmp_path / "tensorboard").iterdir()) and (tmp_path / "best" / "student.safetensors").is_file()
    card = (tmp_path / "README.md").read_text()
    assert "mine.splam.safetensors" in card and "sheet-000002.png" in card and str(tiny_pipeline) not in card
    assert re.search(r"spread over seeds, pixels \| 0\.\d+ \(the teacher's 0\.\d+\)", card)
    assert "Less than the\nteacher's is less variety." in card
    graph = json.loads((tmp_path / "mine.workflow.json").read_text())
    loader = next(node for node in graph["nodes"] if node["type"] == "SPLAMLoader")
    assert loader["widgets_values"][0] == "mine.splam.safetensors"


def test_sheets_and_workflow_are_of_the_size_that_is_trained(small, tiny_pipeline, tmp_path):
    """Whoever lowers it for want of memory has no more for a sheet, and a student is judged where it learned."""
    (tmp_path / "prompts.txt").write_text("a red ring\n")
    sheets = ("--sample-every", 1, "--sample-prompts", tmp_path / "prompts.txt")
    small(tiny_pipeline, tmp_path / "run", 1, "--resolution", 64, *sheets)
    with Image.open(tmp_path / "run" / "sheet-000001.png") as sheet:
        assert sheet.width == 5 * (64 + 4) + 4
    graph = json.loads((tmp_path / "run" / "student.workflow.json").read_text())
    (latent,) = (node for node in graph["nodes"] if node["type"] == "EmptyLatentImage")
    assert latent["widgets_values"][:2] == [64, 64]


def test_a_card_says_nothing_of_the_machine(small, tiny_pipeline, tmp_path, monkeypatch):
    """Neither where the data and their cache lie, nor where the command's files do, however they were written."""
    prompts, out = tmp_path / "animals.txt", tmp_path / "run"
    prompts.write_text("a red fox\na grey cat\n")
    where = ("--cache-latents", "--cache-dir", tmp_path / "cache", "--prompt-steps", 1)
    monkeypatch.setattr("sys.argv", ["distill.py", f"--teacher={tiny_pipeline}", "--data", str(prompts), "--lora"])
    small(tiny_pipeline, out, 1, "--data", prompts, *where)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"distill.py --teacher={tiny_pipeline.name} --data animals.txt --lora" in card
    assert "Data: animals.txt: 1 samples, 1 held out" in card
    assert str(tmp_path) not in card and str(tiny_pipeline.parent) not in card


def test_data_objective_and_teacher_may_be_given(tiny_pipeline):
    """What is asked of a run's parts can be asked of others, without a replacement inside it."""
    config = parse(["--teacher", str(tiny_pipeline), "--data", "embedded", "--num-scenes", "32", "--no-cache-latents"])
    pipeline = load_pipeline(tiny_pipeline)
    run = Distillation(config, pipeline, Accelerator(cpu=True))
    asked = []

    class Teacher:
        dtype = torch.float32

        def __call__(self, *inputs, **arguments):
            asked.append(len(inputs[0]))
            return pipeline.unet(*inputs, **arguments)

    class Twice(type(run.stage.objective)):
        def __call__(self, *arguments):
            return 2 * super().__call__(*arguments)

    objective = Twice(**vars(run.stage.objective))
    other = Distillation(config, load_pipeline(tiny_pipeline), Accelerator(cpu=True), run.data, objective, Teacher())
    pipeline.unet.float()
    ((_, once),), ((_, twice),) = run.losses(range(2)), other.losses(range(2))
    assert other.data is run.data and asked == [4] * 3  # both prompts of two samples in each of three steps
    assert twice.item() == pytest.approx(2 * once.item(), rel=1e-6)


def test_gamma_is_embedded_from_frequencies_made_once(tiny_pipeline, monkeypatch):
    """Sending them from the CPU at every call would be waited for."""
    config = parse(
        ["--teacher", str(tiny_pipeline), "--gamma-conditioning", "embedding", "--no-gradient-checkpointing"]
    )
    pipeline = load_pipeline(tiny_pipeline)
    networks = FullNetworks(pipeline, config)
    x, t, gamma = torch.randn(2, 4, 16, 16), torch.tensor([999, 19]), torch.tensor([0.25, 1.0])
    conditioning = pipeline.encode(["a doughnut on a red background", ""])
    with torch.no_grad():
        networks.student.time_embedding.cond_proj.weight.normal_()
        phi = gamma_embedding(gamma, 256, config.gamma_bandwidth)
        expected = networks.student(x, t, **conditioning, timestep_cond=phi).sample
        monkeypatch.setattr(splam_core.gamma, "sinusoid_frequencies", lambda *_: pytest.fail("made again"))
        assert torch.equal(networks.net("student", conditioning)(x, t, gamma), expected)


@pytest.mark.parametrize(("own", "precision"), [(True, "bf16"), (False, "fp16")])
def test_emulated_bf16_is_not_taken(monkeypatch, own, precision):
    """As torch answers on a T4: bf16 is supported, if emulation counts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: own or including_emulation)
    config = complete({"teacher": "sd15"})
    assert (config.mixed_precision, config.teacher_dtype) == (precision, precision)


def test_fp16_makes_the_teacher_fp16_unless_it_is_said_otherwise():
    assert complete({"teacher": "sd15", "mixed_precision": "fp16"}).teacher_dtype == "fp16"
    assert complete({"teacher": "sd15", "mixed_precision": "bf16"}).teacher_dtype == "bf16"
    both = {"teacher": "sd15", "mixed_precision": "fp16", "teacher_dtype": "fp32"}
    assert complete(both).teacher_dtype == "fp32"


def test_float64_is_computed_on_the_cpu_where_a_device_has_none():
    """Fake tensors of Apple's device have its place and no values."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            made = function(*arguments, **(keywords or {}))
            for one in tree_leaves(made):
                if isinstance(one, torch.Tensor) and one.device.type == "mps" and one.dtype == torch.float64:
                    raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return made

    with FakeTensorMode(), NoFloat64():
        x = torch.empty(2, 4, 8, 8, device="mps")
        with pytest.raises(TypeError, match="float64"):
            x.double()
        assert mean_squares(x).dtype == torch.float64 and mean_squares(x).shape == (2,)
        folded = fold(*(torch.empty(shape, device="mps") for shape in ((8, 4), (4, 6), (6,))))
        assert folded.dtype == torch.float64 and folded.device.type == "cpu"
