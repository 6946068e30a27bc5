"""--teacher-lora: the teacher has LoRAs, and the LoRA that comes out holds speed alone or them too."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from splam_core.checkpoint import read_metadata
from training.distill import distill
from training.export import export, parser
from training.models.files import read_model
from training.models.load import load_pipeline
from training.models.lora import file_and_weight, joined, merged, with_loras
from training.models.sampling import generate
from training.run.config import parse
from training.run.plan import Phase, Plan, describe

pytestmark = pytest.mark.train
PROMPT = ["a doughnut on a red background"]


def random_lora(folder, file, modules, texts=(), rank=3, alpha=6.0, more=None):
    """A LoRA under kohya's names on modules of a pipeline folder, of random weights."""
    generator = torch.Generator().manual_seed(len(file.name))
    model = read_model(folder)
    lora = {}
    parts = [("lora_unet_", model.unet, modules)]
    for number, weights in enumerate(model.texts):
        start = f"lora_te{number + 1}_" if len(model.texts) > 1 else "lora_te_"
        parts.append((f"{start}text_model_", weights, texts))
    for start, weights, names in parts:
        for module in names:
            shape = weights[f"{module}.weight"].shape
            name = start + module.replace(".", "_")
            lora[f"{name}.lora_down.weight"] = 0.3 * torch.randn((rank, *shape[1:]), generator=generator)
            up = (shape[0], rank, *[1] * (len(shape) - 2))
            lora[f"{name}.lora_up.weight"] = 0.3 * torch.randn(up, generator=generator)
            lora[f"{name}.alpha"] = torch.tensor(alpha)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora | (more or {}), file)
    return file


MODULES = ("conv_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.time_emb_proj")
TEXTS = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc1")


@pytest.fixture(scope="module")
def style(tiny_pipeline, tmp_path_factory):
    """Of UNet and text encoder."""
    return random_lora(tiny_pipeline, tmp_path_factory.mktemp("style") / "style.safetensors", MODULES, TEXTS)


@pytest.fixture(scope="module")
def grain(tiny_pipeline, tmp_path_factory):
    """Of the UNet alone, with a whole difference and a bias."""
    more = {
        "lora_unet_conv_out.diff": 0.1 * torch.randn(4, 32, 3, 3, generator=torch.Generator().manual_seed(5)),
        "lora_unet_conv_in.diff_b": torch.full((32,), 0.1),
    }
    return random_lora(tiny_pipeline, tmp_path_factory.mktemp("grain") / "grain.safetensors", MODULES[:2], more=more)


def pictures(pipeline):
    return generate(pipeline, PROMPT, [1], steps=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a/b.safetensors:0.8", ("a/b.safetensors", 0.8)),
        ("b:-1", ("b", -1.0)),
        (r"C:\styles\a.safetensors", (r"C:\styles\a.safetensors", 1.0)),
        (r"C:\styles\a.safetensors:2", (r"C:\styles\a.safetensors", 2.0)),
    ],
)
def test_a_file_and_its_weight(text, expected):
    file, weight = file_and_weight(text)
    assert (str(file), weight) == (str(file.__class__(expected[0])), expected[1])


@torch.no_grad()
def by_hand(network, file, start, weight):
    """Add weight * alpha/rank * up @ down to a network's own layers; start: of the LoRA's keys, without the module."""
    lora = load_file(file)
    for name, module in network.named_modules():
        key = start + name.removeprefix("text_model.").replace(".", "_")
        if f"{key}.alpha" in lora:
            up, down = lora[f"{key}.lora_up.weight"], lora[f"{key}.lora_down.weight"]
            change = up.flatten(1) @ down.flatten(1) * (lora[f"{key}.alpha"] / len(down))
            module.weight += weight * change.reshape(module.weight.shape)


@torch.no_grad()
@pytest.mark.parametrize("xl", [False, True])
def test_the_teacher_has_the_lora_in_all_its_parts(tiny_pipeline, tiny_xl, tmp_path, xl):
    """At a weight of 0.7. diffusers' own loader is the UNet's reference; the text encoders' is the sum by hand, since
    diffusers leaves their part out with transformers 5."""
    folder = tiny_xl if xl else tiny_pipeline
    file = random_lora(folder, tmp_path / "style.safetensors", MODULES[1:], TEXTS)
    expected = load_pipeline(folder)
    expected.unet.load_lora_adapter(unet_part(file), prefix=None)
    expected.unet.fuse_lora(lora_scale=0.7)
    by_hand(expected.text_encoder, file, "lora_te1_text_model_" if xl else "lora_te_text_model_", 0.7)
    if xl:
        by_hand(expected.text_encoder_2, file, "lora_te2_text_model_", 0.7)
    plain, found = load_pipeline(folder), load_pipeline(folder, loras=[f"{file}:0.7"])
    for key, value in expected.encode(PROMPT).items():
        assert (found.encode(PROMPT)[key] - value).abs().max() < 1e-5
    assert (found.encode(PROMPT)["encoder_hidden_states"] - plain.encode(PROMPT)["encoder_hidden_states"]).std() > 1e-2
    assert (pictures(found) - pictures(expected)).abs().max() < 1e-4
    plain.text_encoder, plain.text_encoder_2 = found.text_encoder, found.text_encoder_2
    assert (pictures(found) - pictures(plain)).abs().max() > 1e-3


def unet_part(file):
    """As diffusers' own names, which its UNets take: {module: A and B}, with alpha in them."""
    lora, result = load_file(file), {}
    for module in MODULES:
        key = "lora_unet_" + module.replace(".", "_")
        if f"{key}.alpha" in lora:
            down = lora[f"{key}.lora_down.weight"]
            result[f"{module}.lora_A.weight"] = down * (lora[f"{key}.alpha"] / len(down))
            result[f"{module}.lora_B.weight"] = lora[f"{key}.lora_up.weight"]
    return result


@torch.no_grad()
def test_one_lora_for_several_is_exact(tiny_pipeline, style, grain):
    """In float64 to rounding, where layers meet, where they do not, and where one is a whole difference."""
    plain = read_model(tiny_pipeline)
    loras = [f"{style}:0.8", f"{grain}:-0.5"]
    adapter = {
        "conv_in.lora_A.weight": torch.randn(5, 4, 3, 3),
        "conv_in.lora_B.weight": 0.1 * torch.randn(32, 5, 1, 1),
        "conv_out.lora_A.weight": torch.randn(5, 32, 3, 3),
        "conv_out.lora_B.weight": 0.1 * torch.randn(4, 5, 1, 1),
    }
    expected = merged(with_loras(plain, loras).unet, adapter, 0.5)
    one = joined(adapter, 0.5, loras, plain)
    assert one["lora_unet_conv_in.lora_down.weight"].shape[0] == 3 + 3 + 5
    assert "lora_unet_conv_out.diff" in one and "lora_unet_conv_out.lora_down.weight" not in one
    found = merged(plain.unet, {key: w for key, w in one.items() if key.startswith("lora_unet_")})
    assert found.keys() == expected.keys()
    assert max((found[key] - expected[key]).abs().max() for key in expected) < 2e-6
    assert sum(not torch.equal(found[key], plain.unet[key]) for key in expected) == 5


def run_of(command_line, folder, output, *more):
    distill(parse(command_line(folder, output, 2, more=("--learning-rate", "1e-2", "--export-dtype", "fp32", *more))))


@pytest.mark.parametrize("holds", ["speed", "both"])
def test_the_lora_holds_what_was_asked(command_line, tiny_pipeline, style, tmp_path, holds):
    """Summed by hand, "both" on the plain teacher, "speed" beside the style, are the finished pipeline."""
    out = tmp_path / "run"
    run_of(
        command_line, tiny_pipeline, out, "--lora", "--lora-rank", 4, "--lora-alpha", 2, "--teacher-lora",
        f"{style}:0.8", "--lora-holds", holds, "--checkpointing-steps", 2,
    )  # fmt: skip
    file = out / "student.splam-lora.safetensors"
    found, expected = load_pipeline(tiny_pipeline), load_pipeline(out)
    for one, weight in ((style, 0.8), (file, 1.0)) if holds == "speed" else ((file, 1.0),):
        by_hand(found.unet, one, "lora_unet_", weight)
        by_hand(found.text_encoder, one, "lora_te_text_model_", weight)
    assert (pictures(found) - pictures(expected)).abs().max() < 1e-4
    with_style = load_pipeline(tiny_pipeline, loras=[f"{style}:0.8"])
    assert (pictures(expected) - pictures(with_style)).abs().max() > 1e-3  # it has learned something
    assert expected.fingerprint() == with_style.fingerprint()
    metadata = read_metadata(file)
    assert metadata["splam.teacher_lora"] == "style.safetensors:0.8" and metadata["splam.lora_holds"] == holds
    assert metadata["ss_network_dim"] == {"speed": "4", "both": "7"}[holds]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "with `style.safetensors:0.8`" in card and str(style.parent) not in card
    assert f"| the LoRA holds | {'speed alone' if holds == 'speed' else 'speed and the teacher'}" in card
    nodes = {tuple(one["widgets_values"]) for one in workflow(out)["nodes"] if one["type"].startswith("LoraLoader")}
    speed, both = {(file.name, 1.0), (style.name, 0.8, 0.8)}, {(file.name, 1.0, 1.0)}
    assert nodes == {"speed": speed, "both": both}[holds]
    # A checkpoint's export is the same model, and the same LoRA.
    for to, name in (("lora", "again.safetensors"), ("diffusers", "again")):
        arguments = (out / "checkpoint-2", "--to", to, "--output", tmp_path / name, "--dtype", "fp32")
        export(parser().parse_args([str(one) for one in arguments]))
    one, other = load_file(tmp_path / "again.safetensors"), load_file(file)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (pictures(load_pipeline(tmp_path / "again")) - pictures(expected)).abs().max() < 1e-5


def workflow(out):
    """Whose links all lead from an output that names them to an input that does."""
    graph = json.loads((out / "student.workflow.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, source, output, target, place, kind in graph["links"]:
        assert link in nodes[source]["outputs"][output]["links"] and nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][place]["link"] == link
    return graph


def test_a_whole_student_begins_as_the_teacher_with_its_lora(command_line, tiny_pipeline, style, grain, tmp_path):
    run_of(
        command_line, tiny_pipeline, tmp_path, "--learning-rate", 0, "--teacher-lora", style, "--teacher-lora",
        f"{grain}:0.5",
    )  # fmt: skip
    expected = load_pipeline(tiny_pipeline, loras=[str(style), f"{grain}:0.5"])
    assert (pictures(load_pipeline(tmp_path)) - pictures(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("change", ["moved", "weight", "left away", "text encoder"])
def test_another_lora_or_weight_is_another_run(command_line, tiny_pipeline, style, tmp_path, change):
    out, moved = tmp_path / "run", tmp_path / "elsewhere" / "moved.safetensors"
    moved.parent.mkdir()
    shutil.copy(style, moved)
    run_of(command_line, tiny_pipeline, out, "--teacher-lora", f"{style}:0.8")
    if change == "text encoder":  # the UNet's part is the same
        weights = load_file(moved)
        save_file({key: 2 * w if key.startswith("lora_te_") else w for key, w in weights.items()}, moved)
    given = f"{style}:0.7" if change == "weight" else f"{moved}:0.8"
    more = ("--resume-from-checkpoint", "latest", *(() if change == "left away" else ("--teacher-lora", given)))
    if change == "moved":
        run_of(command_line, tiny_pipeline, out, *more)
        return
    with pytest.raises(ValueError, match="begun with other LoRAs on its teacher"):
        run_of(command_line, tiny_pipeline, out, *more)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (None, "holds no LoRA"),
        ({}, "it is empty"),
        ({"model.diffusion_model.out.0.weight": (2,)}, "expected keys ending in"),
        ({"lora_unet_transformer_x.lora_down.weight": (2, 2)}, "belongs to another model"),
        ({"lora_unet_conv_in.lora_down.weight": (2, 9), "lora_unet_conv_in.lora_up.weight": (7, 2)}, "another model"),
        ({"lora_unet_conv_in.hada_w1_a": (2, 2)}, "only low-rank changes"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (2, 2)}, "is of text encoder 2"),
        ({"lora_te_text_model_encoder_layers_7_mlp_fc1.lora_up.weight": (2, 2)}, "belongs to another model"),
        ("nan", "holds NaN"),
    ],
)
def test_a_wrong_file_is_one_error_that_names_it(tiny_pipeline, tmp_path, keys, message):
    file = tmp_path / "style.safetensors"
    if keys == "nan":
        save_file({"lora_unet_conv_in.diff_b": torch.full((32,), torch.nan)}, file)
    elif keys is not None:
        save_file({key: torch.ones(shape) for key, shape in keys.items()}, file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        load_pipeline(tiny_pipeline, loras=[str(file)])
    assert "style.safetensors" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lora", "--lora-holds", "both"], "--lora-holds both is of a --lora on a teacher with --teacher-lora"),
        (["--teacher-lora", "a.safetensors", "--lora-holds", "both"], "--lora-holds both is of a --lora"),
        (["--teacher-lora", "a.safetensors:nan"], "with a finite weight, got 'a.safetensors:nan'"),
    ],
)
def test_settings_that_do_not_go_together(arguments, said, capsys):
    with pytest.raises(SystemExit):
        parse(["--teacher", "embedded", *arguments])
    assert said in capsys.readouterr().err


def test_the_plan_and_a_file_of_settings_know_it(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'teacher = "embedded"\nlora = true\nlora-holds = "both"\nteacher-lora = ["a/x.safetensors:0.5", "y"]\n'
    )
    config = parse(["--config", str(file)])
    assert config.teacher_lora == ("a/x.safetensors:0.5", "y") and config.settings()["teacher_lora"][1] == "y"
    found = Plan(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, {"step": Phase({1: 0.0})}, 0.0)
    first = describe(config, found).splitlines()[0]
    assert "embedded with x.safetensors:0.5 with y: LoRA of rank 64 that holds the teacher's, too" in first
