"""Any form of a model becomes any other, to the bit where the form allows."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from splam_core.checkpoint import read_metadata
from training.export import export, parser
from training.models.files import read_model, write_single_file
from training.models.load import load_pipeline
from training.models.lora import extract_lora
from training.models.sampling import generate
from training.models.teachers import EMBEDDED
from training.run.config import complete

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
pytestmark = pytest.mark.train


def converted(source, to, output, *more):
    return export(parser().parse_args([str(one) for one in (source, "--to", to, "--output", output, *more)]))


def weights(folder):
    files = {part: list((folder / part).glob("*.safetensors")) for part in PARTS if (folder / part).is_dir()}
    # transformers 5 writes names without "text_model.", the exporter with it.
    return {
        part: {key.removeprefix("text_model."): weight for key, weight in load_file(found[0]).items()}
        for part, found in files.items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.mark.parametrize("teacher", ["tiny_pipeline", "tiny_xl"])
@pytest.mark.parametrize("dtype", [None, "fp16", "bf16"])
def test_round_trip_is_exact(request, tmp_path, teacher, dtype):
    folder = request.getfixturevalue(teacher)
    if dtype:
        folder = converted(folder, "diffusers", tmp_path / "cast", "--dtype", dtype)
    single = converted(folder, "single-file", tmp_path / "single.safetensors")
    back = converted(single, "diffusers", tmp_path / "back")
    before, after = weights(folder), weights(back)
    assert before.keys() == after.keys() and all(same(before[part], after[part]) for part in before)
    again = converted(back, "single-file", tmp_path / "again.safetensors")
    assert same(load_file(single), load_file(again))
    assert (read_metadata(single)["modelspec.architecture"] == "stable-diffusion-xl-v1-base") == (teacher == "tiny_xl")


@torch.no_grad()
@pytest.mark.parametrize("teacher", ["tiny_pipeline", "tiny_xl", "tiny_v"])
def test_a_single_file_is_loaded_as_the_folder_is(request, tmp_path, teacher):
    folder = request.getfixturevalue(teacher)
    file = converted(folder, "single-file", tmp_path / "single.safetensors")
    pictures = [
        generate(load_pipeline(place), ["a doughnut on a red background"], [1], steps=2) for place in (folder, file)
    ]
    assert torch.equal(*pictures)
    assert load_pipeline(file).prediction_type == load_pipeline(folder).prediction_type


def test_sdxls_second_text_encoder_has_openclips_names(tiny_xl, tmp_path):
    """diffusers' own conversion from a published file's names gives the weights back."""
    single = load_file(converted(tiny_xl, "single-file", tmp_path / "single.safetensors"))
    model = CLIPTextModelWithProjection.from_pretrained(tiny_xl, subfolder="text_encoder_2")
    expected = {key: weight.clone() for key, weight in model.state_dict().items()}
    # diffusers reads the width off the projection.
    found = convert_open_clip_checkpoint(model, single, prefix="conditioner.embedders.1.model.")
    assert {key for key in expected if "position_ids" not in key} <= found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected if "position_ids" not in key)


def test_stable_diffusion_2_drops_openclips_last_layer(tiny_pipeline, tmp_path):
    from dataclasses import replace

    model = replace(read_model(tiny_pipeline), family="sd2")
    file = tmp_path / "sd2.safetensors"
    write_single_file(model, file, "sd2")
    single, metadata = load_file(file), read_metadata(file)
    prefix = "cond_stage_model.model.transformer.resblocks."
    assert any(key.startswith(prefix + "0.attn.in_proj_weight") for key in single)
    more = {key.replace(prefix + "0.", prefix + "1."): w + 1 for key, w in single.items() if key.startswith(prefix)}
    save_file({**single, **more, "cond_stage_model.model.logit_scale": torch.zeros(())}, file, metadata)
    back = converted(file, "diffusers", tmp_path / "back")
    before, after = weights(tiny_pipeline), weights(back)
    assert all(same(before[part], after[part]) for part in before)
    assert read_metadata(file)["modelspec.architecture"] == "stable-diffusion-v2-512"


@torch.no_grad()
@pytest.mark.parametrize(("flags", "w"), [((), 0.0), (("--embedded-guidance", 8.5), 7.5)])
@pytest.mark.parametrize("alone", [False, True])
def test_released_unets_are_folded(tiny_pipeline, tmp_path, flags, w, alone):
    """The plain UNet gives what the embedded one gives with diffusers' own guidance embedding."""
    torch.manual_seed(1)
    config = UNet2DConditionModel.load_config(tiny_pipeline, subfolder="unet")
    unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 256}).eval()
    place = tmp_path / "released"
    unet.save_pretrained(place if alone else place / "unet")
    output = converted(place, "diffusers", tmp_path / "plain", "--base", tiny_pipeline, *flags)
    plain = UNet2DConditionModel.from_pretrained(output, subfolder="unet").eval()
    assert plain.config.time_cond_proj_dim is None
    phi = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([w]), 256)
    x, t, embeds = torch.randn(1, 4, 16, 16), torch.tensor([499]), torch.randn(1, 77, 32)
    expected = unet(x, t, embeds, timestep_cond=phi).sample
    assert (plain(x, t, embeds).sample - expected).abs().max() < 1e-5 * expected.abs().max()
    assert load_pipeline(output).scheduler_config["_class_name"] == "LCMScheduler"


def test_lora_from_a_difference(tiny_pipeline, tmp_path):
    """At full rank it gives the tuned UNet back, biases and norms included; at rank r the best of that rank."""
    torch.manual_seed(2)
    tuned = tmp_path / "tuned"
    converted(tiny_pipeline, "diffusers", tuned)
    file = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    base = load_file(file)
    save_file({key: weight + 0.1 * torch.randn_like(weight) for key, weight in base.items()}, file)
    full = converted(tuned, "lora", tmp_path / "full.safetensors", "--base", tiny_pipeline, "--rank", 999,
                     "--dtype", "fp32")  # fmt: skip
    keys = load_file(full).keys()
    assert all(key.startswith("lora_unet_") for key in keys)
    assert "lora_unet_time_embedding_linear_1.diff_b" in keys and "lora_unet_conv_in.lora_down.weight" in keys
    back = weights(converted(full, "diffusers", tmp_path / "back", "--base", tiny_pipeline))["unet"]
    wanted = load_file(file)
    assert all((back[key] - wanted[key]).abs().max() < 2e-5 for key in wanted)
    for rank in (1, 4):
        lora = extract_lora(wanted, base, rank)
        for key in ("mid_block.resnets.0.conv1", "time_embedding.linear_1"):
            difference = (wanted[f"{key}.weight"] - base[f"{key}.weight"]).flatten(1)
            up, down = lora[f"{key}.lora_B.weight"].flatten(1), lora[f"{key}.lora_A.weight"].flatten(1)
            tail = torch.linalg.svdvals(difference)[rank:].square().sum().sqrt()
            assert (difference - up @ down).norm() == pytest.approx(tail.item(), rel=1e-3)


@pytest.mark.parametrize("mode", [(), ("--lora", "--lora-rank", 4, "--lora-alpha", 8)])
def test_a_checkpoint_is_exported_as_the_run_itself_does(small, tiny_pipeline, tmp_path, mode):
    small(tiny_pipeline, tmp_path / "run", 2, "--export-dtype", "fp32", "--learning-rate", "1e-2", *mode)
    folder = tmp_path / "run" / "checkpoint-2"
    ours, theirs = weights(converted(folder, "diffusers", tmp_path / "out")), weights(tmp_path / "run" / "pipeline")
    assert all(same(ours[part], theirs[part]) for part in theirs)
    if mode:
        lora = converted(folder, "lora", tmp_path / "lora.safetensors", "--dtype", "fp32")
        assert same(load_file(lora), load_file(tmp_path / "run" / "student.splam-lora.safetensors"))


def test_an_exported_checkpoint_says_what_the_run_itself_does(small, tiny_pipeline, tmp_path):
    """Without the folders in which its files lay."""
    style = converted(tiny_pipeline, "lora", tmp_path / "style.safetensors", "--base", tilted(tiny_pipeline, tmp_path))
    run = tmp_path / "run"
    small(tiny_pipeline, run, 1, "--lora", "--lora-rank", 2, "--teacher-lora", f"{style}:0.5")
    small(tiny_pipeline, tmp_path / "plain", 1)
    made = (
        (run, "lora", run / "student.splam-lora.safetensors"),
        (tmp_path / "plain", "single-file", tmp_path / "plain" / "student.splam.safetensors"),
    )
    for number, (folder, form, own) in enumerate(made):
        file = converted(folder / "checkpoint-1", form, tmp_path / f"{number}.safetensors")
        theirs, ours = ({k: v for k, v in read_metadata(one).items() if "splam." in k} for one in (own, file))
        theirs.pop("splam.teacher_hash")  # which is not in a checkpoint's settings
        assert ours == theirs


def tilted(teacher, folder):
    """The teacher with one weight moved."""
    shutil.copytree(teacher, folder / "tilted")
    file = folder / "tilted" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["mid_block.resnets.0.conv1.weight"] += 0.01
    save_file(weights, file)
    return folder / "tilted"


def test_a_checkpoints_teacher_is_of_its_own_revision(small, tiny_pipeline, tmp_path, monkeypatch):
    small(tiny_pipeline, tmp_path / "run", 1, "--revision", "fp16")
    asked = []

    def resolved(name, revision=None, download=False):
        asked.append((name, revision))
        return tiny_pipeline

    monkeypatch.setattr("training.export.resolve", resolved)
    for more in ((), ("--base", "another")):
        converted(tmp_path / "run" / "checkpoint-1", "single-file", tmp_path / "a.safetensors", *more)
    assert asked == [(str(tiny_pipeline), "fp16"), ("another", None)]


def test_a_role_that_a_checkpoint_lacks_is_named(small, tiny_pipeline, tmp_path):
    """It was the student that came in place of a release average."""
    small(tiny_pipeline, tmp_path / "run", 1, "--release-decay", 0, "--validation-samples", 2)
    with pytest.raises(ValueError, match=r"expected release\.safetensors, found .*student"):
        converted(tmp_path / "run" / "checkpoint-1", "single-file", tmp_path / "a.safetensors", "--role", "release")
    assert converted(tmp_path / "run" / "best", "single-file", tmp_path / "a.safetensors").is_file()


@pytest.mark.parametrize(("mark", "side"), [("v_pred", 768), (None, 512)])
def test_a_single_file_of_stable_diffusion_2_says_its_size_by_what_it_predicts(tiny_pipeline, tmp_path, mark, side):
    from dataclasses import replace

    file = tmp_path / "sd2.safetensors"
    write_single_file(replace(read_model(tiny_pipeline), family="sd2"), file, "sd2")
    save_file(load_file(file) | ({mark: torch.zeros(0)} if mark else {}), file)
    model = read_model(file)
    assert (model.family, model.resolution) == ("sd2", side)


def test_parts_can_be_left_out(tiny_pipeline, tmp_path):
    file = converted(
        tiny_pipeline, "single-file", tmp_path / "unet.safetensors", "--without-vae", "--without-text-encoder",
        "--dtype", "bf16",
    )  # fmt: skip
    single = load_file(file)
    assert all(key.startswith("model.diffusion_model.") and w.dtype == torch.bfloat16 for key, w in single.items())
    assert "splam.vae" not in read_metadata(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--to", "diffusers", "--output", "x"], "holds no model"),
        (["TINY", "--to", "lora", "--output", "x.safetensors"], "--to lora needs --base"),
        (["TINY", "--to", "single_file", "--output", "x"], "invalid choice"),
        (["TINY", "--to", "single-file", "--output", "x.ckpt"], "expected the name of a .safetensors file"),
        (["TINY", "--to", "diffusers", "--output", "FULL"], "exists and is no diffusers folder"),
        (["TINY", "--to", "diffusers", "--output", "FULL/thesis.txt"], "is a file: expected a folder"),
        (["TINY", "--to", "diffusers", "--output", "FULL/thesis.txt/out"], "cannot be written"),
        (["TINY", "--to", "single-file", "--output", "FULL/a.safetensors"], "is a folder: expected the name of"),
    ],
)
def test_bad_input_is_one_clear_error(tiny_pipeline, tmp_path, arguments, message, capsys, monkeypatch):
    (tmp_path / "full" / "a.safetensors").mkdir(parents=True)
    (tmp_path / "full" / "thesis.txt").touch()
    places = {"TINY": str(tiny_pipeline)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["export.py", *(places.get(one, one.replace("FULL", str(tmp_path / "full"))) for one in arguments)]
    )
    from training.export import main

    try:
        assert main() == 1
    except SystemExit as error:
        assert error.code == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_it_runs_by_path(tiny_pipeline, tmp_path):
    command = [sys.executable, str(ROOT / "training" / "export.py"), str(tiny_pipeline), "--to", "single-file"]
    result = subprocess.run([*command, "--output", str(tmp_path / "a.safetensors")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.safetensors").is_file()


@pytest.mark.parametrize("teacher", ["tiny_pipeline", "tiny_xl"])
def test_text_encoders_have_the_names_that_every_transformers_reads(request, tmp_path, teacher):
    """Those of the published models: transformers 4 takes no others, and leaves weights that it misses at random."""
    output = converted(request.getfixturevalue(teacher), "diffusers", tmp_path / "out")
    for part in ("text_encoder", "text_encoder_2")[: 2 if teacher == "tiny_xl" else 1]:
        keys = load_file(output / part / "model.safetensors").keys()
        assert all(key.startswith("text_model.") for key in keys - {"text_projection.weight"}) and len(keys) > 10
    for tokenizer in output.glob("tokenizer*"):
        assert (tokenizer / "vocab.json").is_file() and (tokenizer / "merges.txt").is_file()


def test_a_tokenizer_of_transformers_5_is_written_for_4_too(tiny_pipeline, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline, folder)
    shutil.rmtree(folder / "tokenizer")
    CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer").save_pretrained(folder / "tokenizer")
    written = converted(folder, "diffusers", tmp_path / "out") / "tokenizer"
    assert json.loads((written / "vocab.json").read_text(encoding="utf-8")) == json.loads(
        (EMBEDDED / "tokenizer" / "vocab.json").read_text(encoding="utf-8")
    )
    lines = [
        file.read_text(encoding="utf-8").splitlines()
        for file in (written / "merges.txt", EMBEDDED / "tokenizer" / "merges.txt")
    ]
    assert [line for line in lines[0] if line[1:]] == [line for line in lines[1] if line[1:]]


def test_assets_have_those_names():
    assert all(key.startswith("text_model.") for key in load_file(EMBEDDED / "text_encoder" / "model.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(("--to", "diffusers"), "out"), (("--to", "single-file"), "out.safetensors")],
)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("os error 28")])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tiny_pipeline, tmp_path, arguments, name, error, capsys, monkeypatch
):
    def full(tensors, file, metadata=None):
        Path(file).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    command = ["export.py", str(tiny_pipeline), *arguments, "--output", str(tmp_path / name)]
    monkeypatch.setattr(sys, "argv", command)
    from training.export import main

    assert main() == 1
    assert re.search(r"^error: .*out.*: the disk is full \(\d+\.\d GB free\)", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [(), ("--lora", "--lora-rank", 2)])
def test_a_full_disk_at_the_end_of_a_run_leaves_the_checkpoint_alone(small, tiny_pipeline, tmp_path, mode, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        for name in ("write_single_file", "save_lora"):
            patch.setattr(f"training.run.publish.{name}", full)
        with pytest.raises(ValueError, match=r"the disk is full.*last good checkpoint is .*checkpoint-1.*resume"):
            small(tiny_pipeline, tmp_path, 1, *mode)
    left = {path.name for path in tmp_path.iterdir()}
    assert "checkpoint-1" in left and not left & {"pipeline", "pipeline.partial", "README.md", "curves.png"}
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.workflow.json"))
    small(tiny_pipeline, tmp_path, 1, *mode, "--resume-from-checkpoint", "latest")
    assert (tmp_path / "pipeline" / "model_index.json").is_file() and (tmp_path / "README.md").is_file()


@pytest.mark.parametrize("name", ["a/b", "..", "", "a\\b", "a:b"])
def test_a_name_that_is_no_files_is_refused_before_training(name):
    with pytest.raises(ValueError, match="--name must be a file's name without folders"):
        complete({"teacher": "embedded", "name": name})


def test_a_tilde_is_the_home_folder(tiny_pipeline, tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    shutil.copytree(tiny_pipeline, tmp_path / "model")
    made = converted("~/model", "single-file", "~/model.safetensors", "--base", "~/model")
    assert made == tmp_path / "model.safetensors" and made.is_file()
