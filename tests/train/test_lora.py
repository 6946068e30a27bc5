"""One UNet with its adapters switched is teacher, target and student, and what leaves it is a LoRA for every host."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from splam_core.checkpoint import read_metadata
from training.export import export, parser
from training.models.load import load_pipeline
from training.models.lora import merged, read_lora
from training.models.sampling import generate
from training.run.adapters import LoraNetworks
from training.run.config import parse
from training.run.distillation import Distillation
from training.run.loop import backward
from training.run.networks import update_averages
from training.run.whole import FullNetworks

pytestmark = pytest.mark.train


def networks_of(folder, *more):
    pipeline = load_pipeline(folder)
    config = parse(["--teacher", str(folder), "--lora", "--lora-rank", "4", *more])
    return pipeline, LoraNetworks(pipeline, config)


def output(unet, pipeline, gamma=None):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    conditioning = pipeline.encode(["a doughnut on a red background", ""])
    return unet(x, torch.tensor([999, 19]), **conditioning, timestep_cond=gamma).sample


@torch.no_grad()
def test_each_role_is_itself(tiny_pipeline):
    plain = output(load_pipeline(tiny_pipeline).unet, load_pipeline(tiny_pipeline))
    pipeline, networks = networks_of(tiny_pipeline)
    for role in ("teacher", "target", "student", "release"):
        with networks.use(role) as unet:
            assert torch.equal(output(unet, pipeline), plain)  # up starts at zero
    for weight in networks.weights("student").values():
        weight.add_(0.05)
    update_averages(networks, 10, 0.75, 0.999)
    outputs = {}
    for role in ("teacher", "target", "student", "release"):
        with networks.use(role) as unet:
            outputs[role] = output(unet, pipeline)
    assert torch.equal(outputs["teacher"], plain)
    assert len({round(one.double().sum().item(), 6) for one in outputs.values()}) == 4
    for key, weight in networks.weights("target").items():  # a quarter of the way from where both began
        begun = networks.weights("student")[key] - 0.05
        assert torch.allclose(weight, begun + 0.0125, atol=1e-6)
    with networks.use("target") as unet:  # back and forth changes nothing
        assert torch.equal(output(unet, pipeline), outputs["target"])
    # Whoever asks the pipeline, asks the teacher: what is drawn or validated by it is never the student's.
    assert torch.equal(output(pipeline.unet, pipeline), plain)
    begun = load_pipeline(tiny_pipeline).unet.state_dict()
    found = pipeline.unet.state_dict()
    assert found.keys() == begun.keys() and all(torch.equal(found[key], begun[key].to(found[key])) for key in begun)


def test_names_of_layers_may_have_spaces_and_must_be_there(tiny_pipeline):
    """peft passes over what it does not find."""
    layers = [networks_of(tiny_pipeline, "--lora-target-modules", names)[1].layers for names in ("to_q, to_k", "to_q")]
    assert len(layers[0]) == 2 * len(layers[1])
    with pytest.raises(ValueError, match="this UNet has no layer 'to_qq'; expected names such as to_q"):
        networks_of(tiny_pipeline, "--lora-target-modules", "to_k,to_qq")


@torch.no_grad()
def test_the_pipelines_pictures_are_the_teachers(tiny_pipeline):
    prompts, seeds = ["a doughnut on a red background"], [1]
    expected = generate(load_pipeline(tiny_pipeline), prompts, seeds, "ddim", 4, 3.0)
    for kind, more in ((FullNetworks, []), (LoraNetworks, ["--lora", "--lora-rank", "4"])):
        pipeline = load_pipeline(tiny_pipeline)
        networks = kind(pipeline, parse(["--teacher", str(tiny_pipeline), "--teacher-dtype", "fp32", *more]))
        for weight in networks.weights("student").values():
            weight.add_(0.05)
        with networks.use("student"), networks.use("target"):
            assert torch.equal(generate(pipeline, prompts, seeds, "ddim", 4, 3.0), expected)


def test_only_the_students_adapter_and_gamma_are_trained(tiny_pipeline):
    pipeline, networks = networks_of(tiny_pipeline, "--gamma-conditioning", "embedding")
    trained = {name for name, parameter in networks.unet.named_parameters() if parameter.requires_grad}
    assert "time_embedding.cond_proj.weight" in trained
    assert all(".student." in name or "cond_proj" in name for name in trained)
    assert any("conv1.lora_A" in name for name in trained) and any("to_q.lora_B" in name for name in trained)
    loss = output(networks.student, pipeline, torch.randn(2, 256)).square().mean()
    with torch.no_grad():
        output(pipeline.unet, pipeline)
    loss.backward()
    assert networks.unet.time_embedding.cond_proj.weight.grad.any()
    assert all(p.grad is None for name, p in networks.unet.named_parameters() if name not in trained)


def test_a_checkpointed_backward_pass_has_the_same_gradient(tiny_pipeline):
    def gradient(*more):
        pipeline = load_pipeline(tiny_pipeline)
        config = parse([
            "--teacher", str(tiny_pipeline), "--data", "embedded", "--num-scenes", "32", "--no-cache-latents",
            "--lora", "--lora-rank", "4", *more,
        ])  # fmt: skip
        run = Distillation(config, pipeline, Accelerator(cpu=True))
        next(backward(run))
        return {name: p.grad for name, p in run.networks.unet.named_parameters() if p.grad is not None}

    plain, checkpointed = gradient("--no-gradient-checkpointing"), gradient("--gradient-checkpointing")
    assert plain.keys() == checkpointed.keys() and len(plain) > 20
    assert all(torch.allclose(plain[key], checkpointed[key], atol=1e-7) for key in plain)


def test_the_exported_lora_is_the_target(small, tiny_pipeline, tmp_path):
    """diffusers loads the file onto the teacher and gives what the merged pipeline folder gives."""
    from diffusers import StableDiffusionPipeline

    small(
        tiny_pipeline, tmp_path, 3, "--lora", "--lora-rank", 4, "--lora-alpha", 2, "--learning-rate", "1e-2",
        "--export-dtype", "fp32",
    )  # fmt: skip
    file = tmp_path / "student.splam-lora.safetensors"
    lora, metadata = load_file(file), read_metadata(file)
    assert all(key.startswith("lora_unet_") for key in lora) and not any("cond_proj" in key for key in lora)
    assert metadata["ss_network_dim"] == "4" and metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert all(weight == 2 for key, weight in lora.items() if key.endswith(".alpha"))
    student, teacher = load_pipeline(tmp_path), load_pipeline(tiny_pipeline)
    merged = generate(student, ["a doughnut on a red background"], [1], steps=2)
    assert (merged - generate(teacher, ["a doughnut on a red background"], [1], steps=2)).abs().max() > 1e-3
    host = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    host.load_lora_weights(str(tmp_path), weight_name=file.name)
    teacher.unet = host.unet
    assert (generate(teacher, ["a doughnut on a red background"], [1], steps=2) - merged).abs().max() < 1e-4


def test_a_lora_run_resumes_to_the_bit(small, tiny_pipeline, tmp_path):
    options = ("--lora", "--lora-rank", 4, "--checkpointing-steps", 2, "--checkpoints-total-limit", 9)
    small(tiny_pipeline, tmp_path / "whole", 4, *options)
    cut = ("--resume-from-checkpoint", tmp_path / "whole" / "checkpoint-2")
    small(tiny_pipeline, tmp_path / "cut", 4, *options, *cut)
    one, other = (load_file(tmp_path / name / "student.splam-lora.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@torch.no_grad()
def test_the_sum_is_pefts(tiny_pipeline):
    """In float64, to 1e-12, whatever the rank of a weight; peft's own merge is the reference."""
    base = load_pipeline(tiny_pipeline).unet.double()
    plain = {key: weight.clone() for key, weight in base.state_dict().items()}
    base.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "conv1", "proj_in", "linear_1"]))
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, weight in base.named_parameters():
        if ".lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            lora[name.replace(".default.", ".")] = weight.data
    for layer in base.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    result = merged(plain, lora, 5 / 3)
    expected = {
        key.replace(".base_layer", ""): weight for key, weight in base.state_dict().items() if "lora_" not in key
    }
    assert result.keys() == expected.keys()
    assert max((result[key] - expected[key]).abs().max() for key in expected) < 1e-12
    assert sum(not torch.equal(result[key], plain[key]) for key in plain) == len(lora) / 2 > 8
    half = merged({key: weight.half() for key, weight in plain.items()}, lora, 5 / 3)
    assert all(weight.dtype == torch.float16 for weight in half.values())


TARGETS = ["to_q", "conv1", "proj_in", "linear_1"]


def peft_folder(folder, path, **settings):
    """What peft's save_pretrained leaves of an adapter of random weights, and the UNet's output with it merged."""
    torch.manual_seed(0)
    pipeline = load_pipeline(folder)
    adapted = get_peft_model(
        pipeline.unet, LoraConfig(target_modules=TARGETS, **{"r": 4, "lora_alpha": 16, **settings})
    )
    for name, weight in adapted.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            weight.data = 0.05 * torch.randn(weight.shape)
        elif "magnitude" in name:
            weight.data *= 1 + 0.3 * torch.randn(weight.shape)
    adapted.save_pretrained(path)
    expected = adapted.merge_and_unload()
    return {key: weight.detach().clone() for key, weight in expected.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"conv1": 3}, "rank_pattern": {"proj_in": 2}},
    ],
)
@pytest.mark.parametrize("form", ["folder", "file", "diffusers"])
def test_pefts_alpha_is_honoured(tiny_pipeline, tmp_path, settings, form):
    """From adapter_config.json, or from the metadata that diffusers writes; peft's own merge is the reference."""
    expected = peft_folder(tiny_pipeline, tmp_path / "adapter", **settings)
    place = tmp_path / "adapter"
    if form == "file":
        place /= "adapter_model.safetensors"
    elif form == "diffusers":
        weights = load_file(place / "adapter_model.safetensors")
        config = json.loads((place / "adapter_config.json").read_text())
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
        place = tmp_path / "pytorch_lora_weights.safetensors"
        save_file({key.replace("base_model.model.", "unet."): w for key, w in weights.items()}, place, metadata)
    plain = load_pipeline(tiny_pipeline).unet.state_dict()
    found = merged(plain, read_lora(place))
    assert all((found[key] - expected[key]).abs().max() < 2e-6 for key in expected)
    assert sum(not torch.equal(found[key], plain[key]) for key in plain) > 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "LOHA"}, "peft's LOHA, expected LORA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
    ],
)
def test_adapters_that_cannot_be_merged_exactly_are_refused(tiny_pipeline, tmp_path, settings, message):
    peft_folder(tiny_pipeline, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: .*{message}"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["hada_w1_a", "hada_w1_b"], "only low-rank changes of a UNet"),
        (["lora_down.weight", "lora_up.weight", "dora_scale"], "readers do not agree"),
        (["lora_down.weight", "lora_mid.weight", "lora_up.weight"], "only low-rank changes of a UNet"),
    ],
)
def test_kinds_of_kohyas_that_cannot_be_merged_exactly_are_refused(tmp_path, keys, message):
    file = tmp_path / "other.safetensors"
    save_file({f"lora_unet_time_embedding_linear_1.{key}": torch.ones(2, 2) for key in keys}, file)
    with pytest.raises(ValueError, match=rf"other\.safetensors: .*{message}"):
        read_lora(file)


def test_a_peft_folder_is_exported(tiny_pipeline, tmp_path):
    expected = peft_folder(tiny_pipeline, tmp_path / "adapter")
    arguments = (tmp_path / "adapter", "--to", "diffusers", "--output", tmp_path / "out", "--base", tiny_pipeline)
    export(parser().parse_args([str(one) for one in arguments]))
    found = load_pipeline(tmp_path / "out").unet.state_dict()
    assert all((found[key] - expected[key]).abs().max() < 2e-6 for key in expected)


def test_a_pipeline_with_a_lora_beside_it_is_a_pipeline(tiny_pipeline, tmp_path):
    shutil.copytree(tiny_pipeline, tmp_path / "model")
    save_file({"x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "model" / "pytorch_lora_weights.safetensors")
    arguments = (tmp_path / "model", "--to", "single-file", "--output", tmp_path / "out.safetensors")
    export(parser().parse_args([str(one) for one in arguments]))
    assert load_pipeline(tmp_path / "out.safetensors").fingerprint() == load_pipeline(tiny_pipeline).fingerprint()
