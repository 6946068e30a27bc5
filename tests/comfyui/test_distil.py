"""SPLAM Distil in a real server: the trainer's losses, a host left as it was, and ways to stop and go on."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from harness import graphs
from harness.graphs import save_latent, text_to_image
from harness.server import ComfyServer, ServerError
from splam_core.checkpoint import load_file, read_metadata

pytestmark = pytest.mark.comfyui
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = (
    "a yellow star above a doughnut",
    "a wrapped gift to the left of a soccer ball",
    "a slice of pizza above a red heart",
    "a doughnut to the right of a yellow star",
    "a soccer ball to the left of a wrapped gift",
)
SETTINGS = {"prompts": "\n".join(PROMPTS), "seed": 3}
LOADER = {"model": {"class_type": "SPLAMLoader", "inputs": {"model_name": "embedded-teacher"}}}


def distil(**settings) -> dict:
    """The graph of a run on the embedded teacher."""
    return graphs.distil("embedded-teacher", **{**SETTINGS, **settings})


def picture(model: list, more: dict) -> dict:
    """The graph that samples a MODEL of `more` in two steps."""
    graph = save_latent(text_to_image("embedded-teacher", PROMPTS[0], seed=5, steps=2))
    graph["sampled"]["inputs"]["model"] = model
    return graph | more


def latent(server, graph: dict) -> torch.Tensor:
    return load(server.files(server.run(graph))[-1])["latent_tensor"]


def states(server) -> list:
    return sorted(
        (server.folder / "output" / "splam").glob("*.state.safetensors"), key=lambda file: file.stat().st_mtime
    )


def losses(server) -> list[float]:
    """Of the run that was saved last."""
    return json.loads(read_metadata(states(server)[-1])["splam_state"])["losses"]


@pytest.fixture(scope="module")
def made(server):
    """A run: the control pictures before and after it, and the picture of its MODEL."""
    before = latent(server, picture(["model", 0], LOADER))
    graph = distil()
    with_lora = latent(server, picture(["distil", 0], graph))
    return before, with_lora, losses(server)


def trained(tmp_path, **more) -> list[dict]:
    """The log of training/distill.py with the settings of `distil()` and more flags."""
    from training.distill import distill
    from training.run.config import parse

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = {
        **{"teacher": "embedded", "data": tmp_path / "prompts.txt", "output-dir": tmp_path / "run", "seed": 3},
        **{"lora-rank": 4, "train-batch-size": 2, "max-train-steps": 4, "learning-rate": 3e-4, "lr-warmup-steps": 1},
        **{"guidance-scale": 3.0, "sample-every": 0, "validation-samples": 0, "report-to": "none"},
        **{"cache-dir": tmp_path / "cache", **more},
    }
    distill(parse(["--lora", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]))
    return [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]


def test_the_losses_are_those_of_the_trainer(made, tmp_path):
    expected = [line["loss"] for line in trained(tmp_path)]
    assert made[2] == pytest.approx(expected, rel=1e-3, abs=1e-5)  # of which 2e-4 was seen


def test_the_finish_has_the_losses_of_the_trainer(server, tmp_path):
    """Asked for once the method is done, whose LoRA stays beside it."""
    method = distil(steps=10, batch_size=1)
    server.run(method)
    before = len(states(server))
    graph = distil(steps=10, batch_size=1, finish_steps=3)
    server.run(graph)
    assert len(states(server)) == before + 1
    facts = json.loads(read_metadata(states(server)[-1])["splam_state"])
    rates = {"finish-learning-rate": 2e-5 * 3, "fake-learning-rate": 8e-5 * 3}
    log = trained(tmp_path, **{"train-batch-size": 1, "max-train-steps": 10, "finish-steps": 3, **rates},
                  **{"finish": "distribution-matching"})  # fmt: skip
    assert facts["losses"] == pytest.approx([line["loss"] for line in log], rel=1e-3, abs=1e-5)
    assert facts["fake_losses"] == pytest.approx([line["fake_loss"] for line in log[10:]], rel=1e-3)
    lora = states(server)[-1].with_name(states(server)[-1].name.replace(".state", ""))
    assert json.loads(read_metadata(lora)["splam_settings"])["finish"]["finish_steps"] == 3


def test_the_host_is_left_as_it_was(made, server):
    assert torch.equal(latent(server, picture(["model", 0], LOADER)), made[0])
    assert not torch.equal(made[0], made[1])


@pytest.mark.parametrize("loader", ["LoraLoaderModelOnly", "SPLAMLoraLoader"])
def test_the_saved_lora_gives_the_same_picture_by_any_loader(loader, made, server):
    name = sorted(file.name for file in (server.folder / "output" / "loras").glob("distilled_4*"))[-1]
    inputs = {"model": ["model", 0], "lora_name": name, "strength_model": 1.0}
    inputs |= {"strength_clip": 1.0} if loader == "SPLAMLoraLoader" else {}
    graph = {**LOADER, "loaded": {"class_type": loader, "inputs": inputs}}
    assert torch.equal(latent(server, picture(["loaded", 0], graph)), made[1])


@pytest.fixture(scope="module")
def style(server) -> str:
    """A LoRA of UNet and text encoder: matrices with an alpha, a convolution's, a DoRA's layer, a bias: its name."""
    draw = torch.Generator().manual_seed(0)
    weights = {
        part: load_file(ROOT / "assets" / "embedded" / part / f"{file}.safetensors")
        for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model"))
    }
    lora = {}
    for part, module, kind in (
        ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", ""),
        ("unet", "mid_block.resnets.0.conv1", ""),
        ("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "dora"),
        ("unet", "conv_out", "bias"),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj", ""),
    ):
        weight = weights[part][f"{module}.weight"]
        name = ("lora_unet_" if part == "unet" else "lora_te_") + module.replace(".", "_")
        rank = 2
        lora[f"{name}.lora_down.weight"] = 0.3 * torch.randn(rank, *weight.shape[1:], generator=draw)
        up = 0.3 * torch.randn(len(weight), rank, generator=draw)
        lora[f"{name}.lora_up.weight"] = up.reshape(len(weight), rank, *[1] * (weight.ndim - 2))
        lora[f"{name}.alpha"] = torch.tensor(1.0)
        if kind == "dora":
            lora[f"{name}.dora_scale"] = 1.1 * weight.float().norm(dim=1, keepdim=True)
        if kind == "bias":
            lora[f"{name}.diff_b"] = 0.1 * torch.randn(len(weight), generator=draw)
    folder = server.folder / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora, folder / "a_style.safetensors")
    return "a_style.safetensors"


def with_pefts_dora(folder: Path, style: str) -> str:
    """The same file with a DoRA of peft's beside the rest, which doubles a convolution and hardly turns it."""
    module, draw = "up_blocks.0.resnets.0.conv2", torch.Generator().manual_seed(1)
    unet = load_file(ROOT / "assets" / "embedded" / "unet" / "diffusion_pytorch_model.safetensors")
    weight = unet[f"{module}.weight"].float()
    dora = {
        "lora_A.weight": 0.01 * torch.randn(2, *weight.shape[1:], generator=draw),
        "lora_B.weight": 0.01 * torch.randn(len(weight), 2, 1, 1, generator=draw),
        "lora_magnitude_vector": 2 * weight.flatten(1).norm(dim=1),
    }
    dora = {f"unet.{module}.{part}": value for part, value in dora.items()}
    save_file(load_file(folder / style) | dora, folder / "a_style_of_pefts.safetensors")
    return "a_style_of_pefts.safetensors"


@pytest.mark.parametrize("loader", ["LoraLoader", "SPLAMLoraLoader"])
def test_one_lora_may_hold_the_style_too(loader, style, server):
    """On the plain checkpoint, UNet and text encoder, it gives the picture of the MODEL that it was learned on."""
    if loader == "SPLAMLoraLoader":
        style = with_pefts_dora(server.folder / "models" / "loras", style)
    styled = {
        "class_type": loader,
        "inputs": {
            **{"model": ["model", 0], "clip": ["model", 1]},
            **{"lora_name": style, "strength_model": 0.8, "strength_clip": 0.6},
        },
    }
    inputs = {"model": ["style", 0], "clip": ["style", 1], "steps": 2, "learning_rate": 3e-3, "seed": 21}
    pictures = {}
    for holds in ("both", "speed"):
        graph = distil(**inputs, lora_holds=holds) | {"style": styled}
        drawn = picture(["distil", 0], graph)
        drawn["positive"]["inputs"]["clip"] = ["style", 1]
        pictures["learned on"] = latent(server, drawn)
        files = (server.folder / "output" / "loras").glob("distilled_2*")
        name = max(files, key=lambda file: file.stat().st_mtime_ns).name
        inputs_of_it = {**styled["inputs"], "lora_name": name, "strength_model": 1.0, "strength_clip": 1.0}
        loaded = picture(["loaded", 0], {**LOADER, "loaded": {"class_type": "LoraLoader", "inputs": inputs_of_it}})
        loaded["positive"]["inputs"]["clip"] = ["loaded", 1]
        pictures[holds] = latent(server, loaded)
    scale = pictures["learned on"].std()
    assert (pictures["both"] - pictures["learned on"]).abs().max() < 0.02 * scale  # fp16
    assert (pictures["speed"] - pictures["learned on"]).abs().max() > 0.2 * scale


def test_another_lora_on_the_model_is_another_run(style, server):
    """Though it changes the same layers at the same strength: nothing learned on the first may be handed on."""
    folder = server.folder / "models" / "loras"
    other = {key: -w if "lora_up" in key else w for key, w in load_file(folder / style).items()}
    save_file(other, folder / "another_style.safetensors")
    runs = []
    for name in (style, "another_style.safetensors", style):
        inputs = {"model": ["model", 0], "lora_name": name, "strength_model": 0.5}
        graph = distil(model=["style", 0], steps=1, batch_size=1, seed=23, preview_every=0)
        del graph["curve"]
        server.run(graph | {"style": {"class_type": "LoraLoaderModelOnly", "inputs": inputs}})
        runs.append(states(server)[-1].name)
    assert runs[0] != runs[1]
    assert runs[0] == runs[2]  # and the first is taken up again


def test_another_patch_of_the_unet_is_another_run(server):
    """What was learned with other numbers of FreeU was handed on as what these would give."""
    runs = []
    for b1 in (1.1, 1.3, 1.1):
        freeu = {"class_type": "FreeU", "inputs": {"model": ["model", 0], "b1": b1, "b2": 1.2, "s1": 0.9, "s2": 0.2}}
        graph = distil(model=["freeu", 0], steps=1, batch_size=1, seed=24, preview_every=0)
        del graph["curve"]
        server.run(graph | {"freeu": freeu})
        runs.append(states(server)[-1].name)
    assert runs[0] != runs[1] and runs[0] == runs[2]


def test_patches_are_told_which_half_has_no_prompt(server):
    """Some treat the two apart; the teacher's guided batch was one of prompts to them."""
    graph = distil(model=["parts", 0], steps=1, seed=25) | {
        "parts": {"class_type": "TestParts", "inputs": {"model": ["model", 0]}}
    }
    del graph["curve"]
    logged = server.listen()
    server.run(graph)
    assert "parts [0, 1] of 4" in logged() and "parts [0] of 2" in logged()


def test_errors_name_files_without_the_servers_paths(server):
    """Whoever queues a graph on a shared server reads them."""
    (server.folder / "models" / "loras" / "damaged.safetensors").write_bytes(b"no LoRA")
    graph = distil(steps=1, batch_size=1, seed=24)
    del graph["curve"]
    said = []
    with pytest.raises(ServerError, match=r"existing_lora damaged\.safetensors cannot be read: loras/") as error:
        server.run({**graph, "distil": {**graph["distil"], "inputs": graph["distil"]["inputs"] | {
            "existing_lora": "damaged.safetensors"}}})  # fmt: skip
    said.append(str(error.value))
    server.run(graph)
    states(server)[-1].write_bytes(b"no state")
    graph["distil"]["inputs"]["preview_every"] = 1000  # else the host has the result still
    with pytest.raises(ServerError, match=r"state\.safetensors cannot be gone on from") as error:
        server.run(graph)
    said.append(str(error.value))
    states(server)[-1].unlink()
    assert not [one for one in said if str(server.folder) in one]


def test_there_must_be_a_style_to_hold(style, server):
    with pytest.raises(ServerError, match="lora_holds is 'both', and neither MODEL nor CLIP has a LoRA on it"):
        server.run(distil(lora_holds="both", seed=22))
    bypass = "LoraLoaderBypassModelOnly"
    if bypass in server.get("/object_info"):  # not in ComfyUI 0.3.75
        inputs = {"model": ["model", 0], "lora_name": style, "strength_model": 1.0}
        graph = {"style": {"class_type": bypass, "inputs": inputs}}
        with pytest.raises(ServerError, match="a LoRA was loaded in bypass mode"):
            server.run(distil(model=["style", 0], lora_holds="both", seed=22) | graph)


def test_the_autosave_is_the_lora_with_the_graph_that_made_it(made, server):
    files = [state.with_name(state.name.replace(".state", "")) for state in states(server)]  # others' runs too
    found = {file: read_metadata(file) for file in files}
    graphs = {file: json.loads(one["prompt"]).get("distil", {"inputs": {}}) for file, one in found.items()}
    file = next(file for file, node in graphs.items() if node["inputs"].get("steps") == 4)
    metadata = found[file]
    assert graphs[file]["class_type"] == "SPLAMDistil"
    assert metadata["ss_network_dim"] == "4" and metadata["splam_steps"] == "4"
    assert all(key.startswith("lora_unet_") for key in load_file(file))


def test_cancelling_keeps_what_was_learned_and_going_on_is_the_same_run(server):
    whole = distil(steps=10, batch_size=1, seed=11)
    server.run(whole)
    expected = losses(server)
    for file in (server.folder / "output" / "splam").glob(f"{states(server)[-1].name.split('.')[0]}*"):
        file.unlink()
    kept = len(states(server))
    again = {**whole, "distil": {**whole["distil"], "inputs": {**whole["distil"]["inputs"], "preview_every": 1000}}}
    job = server.queue(again)
    end = time.monotonic() + 300
    while len(states(server)) == kept and time.monotonic() < end:
        time.sleep(0.02)
    server.post("/interrupt", {})
    with pytest.raises(ServerError, match="interrupted"):
        server.wait(job)
    assert losses(server) == expected[: len(losses(server))]
    assert 1 <= len(losses(server)) < 10
    logged = server.listen()
    server.run(again)
    assert losses(server) == expected
    assert "could not be written" not in logged()


def test_cancelling_a_finish_and_going_on_is_the_same_run(server):
    def facts() -> dict:
        return json.loads(read_metadata(states(server)[-1])["splam_state"])

    graph = distil(steps=2, batch_size=1, finish_steps=6, seed=15, gradient_checkpointing=True)
    server.run(graph)
    expected = facts()
    states(server)[-1].unlink()
    kept = len(states(server))
    graph["distil"]["inputs"]["preview_every"] = 1000
    job = server.queue(graph)
    end = time.monotonic() + 300
    while len(states(server)) == kept and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.1)  # into a step
    server.post("/interrupt", {})
    with pytest.raises(ServerError, match="interrupted"):
        server.wait(job)
    assert 2 < facts()["step"] < 8
    server.run(graph)
    assert (facts()["losses"], facts()["fake_losses"]) == (expected["losses"], expected["fake_losses"])


def test_a_run_goes_on_without_a_place_for_its_autosave(server):
    """As on a full disk: one sentence in the log, and the outputs are there."""
    graph = distil(steps=1, batch_size=1, seed=12, preview_every=0)
    del graph["curve"]
    server.run(graph)
    file = states(server)[-1]
    file.unlink()
    (file / "in the way").mkdir(parents=True)
    graph["distil"]["inputs"]["preview_every"] = 1000
    logged = server.listen()
    try:
        server.run(graph)
    finally:
        (file / "in the way").rmdir()
        file.rmdir()
    assert "the autosave of step 1 could not be written" in logged()


@pytest.mark.parametrize("name", ["v", "deep"])
def test_other_shapes_and_predictions(name, server):
    graph = graphs.distil(f"diffusers/{name}", prompts=PROMPTS[0], steps=2, gradient_checkpointing=True)
    server.run(graph)
    assert len(losses(server)) == 2 and all(0 < loss < 1e3 for loss in losses(server))


def test_a_prepared_set(server):
    """Conditionings and latents in place of prompts, as the host's own training node takes them."""
    nodes = {
        **distil(prompts="", positive=["text", 0], latents=["latent", 0], steps=1, clip=None, vae=None),
        "text": {"class_type": "CLIPTextEncode", "inputs": {"text": PROMPTS[0], "clip": ["model", 1]}},
        "image": {"class_type": "EmptyImage", "inputs": {"width": 128, "height": 64, "batch_size": 3, "color": 255}},
        "latent": {"class_type": "VAEEncode", "inputs": {"pixels": ["image", 0], "vae": ["model", 2]}},
    }
    del nodes["curve"]  # which divides by zero for a single loss
    server.run(nodes)
    assert len(losses(server)) == 1


def test_prompts_of_an_editor_that_begins_with_a_mark(server):
    text = "\n".join(PROMPTS[:2])
    (server.folder / "input" / "marked.txt").write_text(text, encoding="utf-8-sig")
    server.run(distil(prompts=text, steps=2, seed=23))
    expected = losses(server)
    server.run(distil(prompts="marked.txt", steps=2, seed=23))
    assert losses(server) == expected


def test_files_that_changed_under_their_names_are_read_again(server):
    """By the same graph, in the same server."""
    file, lora = server.folder / "input" / "edited.txt", server.folder / "models" / "loras" / "begun.safetensors"
    file.write_text(PROMPTS[0])
    lora.parent.mkdir(exist_ok=True)
    graph = distil(prompts="edited.txt", steps=1, batch_size=1, seed=25, resolution=64)
    del graph["curve"]
    server.run(graph)
    before = len(states(server))
    server.run(graph)
    assert len(states(server)) == before
    file.write_text(PROMPTS[1])
    server.run(graph)
    assert len(states(server)) == before + 1
    made = states(server)[-1].with_name(states(server)[-1].name.replace(".state", ""))
    lora.write_bytes(made.read_bytes())
    server.get("/object_info/SPLAMDistil")
    graph["distil"]["inputs"]["existing_lora"] = lora.name
    server.run(graph)
    save_file({key: w + 0.01 if "lora_up" in key else w for key, w in load_file(lora).items()}, lora)
    server.run(graph)
    assert len(states(server)) == before + 3


def test_a_prompt_is_read_once_for_all_its_pictures(server):
    loud = {"loud": {"class_type": "TestLoudClip", "inputs": {"clip": ["model", 1]}}}
    graph = distil(
        clip=["loud", 0], prompts="\n".join(PROMPTS[:2]), pictures_per_prompt=8, steps=1, seed=27, resolution=64
    )
    del graph["curve"]
    logged = server.listen()
    server.run(graph | loud)
    assert 1 < logged().count("TestLoudClip reads a prompt") <= 3  # and what guidance takes for none


def test_what_the_host_wrote_on_its_weights_is_there_in_training(server):
    notes = {"noted": {"class_type": "TestNotes", "inputs": {"model": ["model", 0]}}}
    graph = distil(model=["noted", 0], steps=1, batch_size=1, seed=26, resolution=64)
    del graph["curve"]
    server.run(graph | notes)


def test_what_acts_on_sampling_is_named_and_left_out(made, server):
    """A negative prompt of the MODEL was in the teacher by half, and CFG's rescaling not at all, in silence."""
    more = {
        "rescaled": {"class_type": "RescaleCFG", "inputs": {"model": ["model", 0], "multiplier": 0.7}},
        "blue": {"class_type": "CLIPTextEncode", "inputs": {"text": "blue", "clip": ["model", 1]}},
        "negated": {
            "class_type": "SPLAMNegativePrompt",
            "inputs": {
                "model": ["rescaled", 0],
                "negative": ["blue", 0],
                "nag_scale": 5.0,
                "nag_tau": 2.5,
                "nag_alpha": 0.25,
            },
        },
    }
    logged = server.listen()
    # The same run as that of the plain MODEL but for its length.
    server.run(distil(model=["negated", 0], steps=2, seed=21) | more)
    said = logged()
    assert "sampler_cfg_function, splam_nag on the MODEL acts on sampling and is left out" in said
    found = losses(server)
    for file in states(server)[-1:]:
        file.unlink()
    server.run(distil(steps=2, seed=21))
    assert losses(server) == pytest.approx(found, rel=1e-4)


def test_a_lora_is_gone_on_from(made, server):
    name = sorted(file.name for file in (server.folder / "output" / "loras").glob("distilled_4*"))[-1]
    graph = distil(existing_lora=name, steps=2)
    server.run(graph)
    with pytest.raises(ServerError, match="has rank 4, the input rank is 2"):
        server.run(distil(existing_lora=name, rank=2))


def test_out_of_memory_says_what_to_lower_and_keeps_what_was_learned(server):
    short = {"short": {"class_type": "TestOutOfMemory", "inputs": {"model": ["model", 0]}}}
    graph = distil(model=["short", 0], seed=14) | short
    said = r"out of memory at step 2 .*Lower batch_size \(it is 2; .*, then resolution, then rank \(it is 4\)"
    with pytest.raises(ServerError, match=said):
        server.run(graph)
    assert len(losses(server)) == 1


def test_what_a_restarted_server_has(comfyui, tmp_path):
    """After a kill all but the steps since the last autosave; and of a saved LoRA the same picture by every loader."""
    graph = distil(steps=6, batch_size=1, seed=13)
    del graph["curve"]
    short = distil(steps=2, batch_size=1, learning_rate=3e-3)
    loaders = {"LoraLoaderModelOnly": {}, "SPLAMLoraLoader": {"strength_clip": 1.0}}
    with ComfyServer(comfyui, tmp_path) as running:
        expected = latent(running, picture(["distil", 0], short))
        name = next((tmp_path / "output" / "loras").glob("distilled_2*")).name
        kept = len(states(running))
        running.queue(graph)
        end = time.monotonic() + 300
        while len(states(running)) == kept and time.monotonic() < end:
            time.sleep(0.02)
        running.process.kill()
        running.process.wait()
    before = losses(running)
    assert before
    with ComfyServer(comfyui, tmp_path) as running:
        assert not torch.equal(latent(running, picture(["model", 0], LOADER)), expected)
        for loader, more in loaders.items():
            inputs = {"model": ["model", 0], "lora_name": name, "strength_model": 1.0, **more}
            loaded = {**LOADER, "loaded": {"class_type": loader, "inputs": inputs}}
            assert torch.equal(latent(running, picture(["loaded", 0], loaded)), expected), loader
        inputs = {"model": ["model", 0], "lora": ["distil", 1], "strength_model": 1.0}
        known = running.get("/object_info/LoraModelLoader")["LoraModelLoader"]["input"]["required"]
        inputs |= {"bypass": False} if "bypass" in known else {}
        loaded = {**short, "loaded": {"class_type": "LoraModelLoader", "inputs": inputs}}
        assert torch.equal(latent(running, picture(["loaded", 0], loaded)), expected)
        running.run(graph)
        assert losses(running)[: len(before)] == before and len(losses(running)) == 6
    assert not list((tmp_path / "output" / "splam").glob("*.part"))


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_weights_of_16_bits(kind, made, comfyui, tmp_path):
    """Three steps and two of a finish: finite, and near the losses of fp32 weights."""
    graph = distil(steps=3, finish_steps=2, gradient_checkpointing=True)
    with ComfyServer(comfyui, tmp_path, arguments=(f"--{kind}-unet",)) as running:
        running.run(graph)
        facts = json.loads(read_metadata(states(running)[-1])["splam_state"])
        said = running.log.read_text(errors="replace")
    assert f"model weight dtype torch.{'bfloat16' if kind == 'bf16' else 'float16'}" in said
    # The rates of three steps differ from those of four; the first step's loss does not know them.
    assert facts["losses"][0] == pytest.approx(made[2][0], rel=0.1)
    assert len(facts["losses"]) == 5 and all(0 < loss < 1e2 for loss in [*facts["losses"], *facts["fake_losses"]])
    for file in (tmp_path / "output").rglob("*.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(file).values())


SD3 = {"other": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["model", 0], "shift": 3.0}}}
SHIFTS = {"max_shift": 1.15, "base_shift": 0.5, "width": 128, "height": 128}
FLUX = {"other": {"class_type": "ModelSamplingFlux", "inputs": {"model": ["model", 0], **SHIFTS}}}
TEXT = {"text": {"class_type": "CLIPTextEncode", "inputs": {"text": "x", "clip": ["model", 1]}}}
EMPTY = {"empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}}
TWICE = {
    "image": {"class_type": "EmptyImage", "inputs": {"width": 128, "height": 128, "batch_size": 3, "color": 255}},
    "a": {"class_type": "VAEEncode", "inputs": {"pixels": ["image", 0], "vae": ["model", 2]}},
    "both": {
        "class_type": "ConditioningCombine",
        "inputs": {"conditioning_1": ["text", 0], "conditioning_2": ["text", 0]},
    },
}


@pytest.mark.parametrize(
    ("settings", "more", "said"),
    [
        ({"clip": None}, {}, "no CLIP is connected"),
        ({"resolution": 132}, {}, "multiple of 8, got 132. Use 128 or 136"),
        ({"prompts": "not there.txt"}, {}, "there is no file 'not there.txt'"),
        ({"prompts": "../models/x.txt"}, {}, "there is no file"),
        ({"prompts": "empty.txt"}, {}, "empty.txt holds no prompts"),
        ({"prompts": "wide.txt"}, {}, "wide.txt is not text in UTF-8"),
        ({"model": ["other", 0]}, SD3, "needs a Stable Diffusion model that predicts noise or v"),
        ({"model": ["other", 0]}, FLUX, "needs a Stable Diffusion model that predicts noise or v"),
        ({"existing_lora": "../secret.safetensors"}, {}, "there is no LoRA|not in list"),
        ({"positive": ["both", 0], "latents": ["a", 0]}, TEXT | TWICE, "3 latents and 2 conditionings do not go"),
        ({"latents": ["empty", 0]}, EMPTY, "latent 1 of 1 is 0 everywhere, which no picture's is"),
        ({"rank": 0}, {}, "smaller than min"),
        ({"steps": 0}, {}, "steps and finish_steps are both 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(settings, more, said, server):
    (server.folder / "input" / "empty.txt").write_text("\n# nothing but this\n")
    (server.folder / "input" / "wide.txt").write_text(PROMPTS[0], encoding="utf-16")
    with pytest.raises(ServerError, match=said.replace("(", r"\(")):
        server.run(distil(**settings) | more)


def test_the_report(server):
    inputs = {
        **{"teacher": ["model", 0], "student": ["model", 0], "clip": ["model", 1], "vae": ["model", 2]},
        **{"prompts": PROMPTS[0], "rows": 1, "resolution": 128, "teacher_steps": 4, "guidance": 3.0},
    }
    graph = {
        **LOADER,
        "report": {"class_type": "SPLAMDistilReport", "inputs": inputs},
        "saved": {"class_type": "SaveImage", "inputs": {"images": ["report", 0], "filename_prefix": "report"}},
    }
    assert server.files(server.run(graph))[0].startswith(b"\x89PNG")
    inputs["prompts"] = "not there.txt"
    with pytest.raises(ServerError, match="SPLAM Distil Report: there is no file"):
        server.run(graph)
