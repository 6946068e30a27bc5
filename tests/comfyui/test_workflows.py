"""The shipped workflows as files and over the HTTP API: sound, up to date, and right when the embedded model runs them.

`test_browser.py` opens the same files in ComfyUI's page.
"""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.server import PACK, ROOT, to_api
from harness.workflows import EMBEDDED, FOLDER, names, node_titled, read
from splam_core.checkpoint import diffusers_to_ldm, load_file, save_file
from training.scenes.emoji import parse_caption
from training.scenes.judge import load_judge

pytestmark = pytest.mark.comfyui
NOTES = ("Note", "MarkdownNote")
# Inputs that name a file of the user's: the machine need not have it, but a note must say where it goes.
MODEL_FILES = {"model_name", "ckpt_name", "lora_name", "control_net_name"}
TITLES = {"splam_steps_comparison": "All four"}  # of the picture that a workflow is for; else Result
EMBEDDED_UNET = ROOT / "assets" / "embedded" / "student" / "diffusion_pytorch_model.safetensors"
EMBEDDED_VAE = ROOT / "assets" / "embedded" / "vae" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def object_info(server) -> dict:
    return server.get("/object_info")


@pytest.fixture(scope="module")
def judge():
    return load_judge(ROOT / "assets" / "judge.safetensors")


@pytest.fixture(scope="module")
def results(server, object_info):
    """name -> {node id: its pictures}, each workflow of the embedded model run once."""
    done = {}

    def run(name: str) -> dict[str, list[Image.Image]]:
        if name not in done:
            done[name] = pictures(server, to_api(read(name), object_info))
        return done[name]

    return run


def pictures(server, graph: dict) -> dict[str, list[Image.Image]]:
    """Node id -> the pictures it saved or showed."""
    outputs = server.run(graph)["outputs"]
    return {
        node: [Image.open(io.BytesIO(file)).convert("RGB") for file in server.files({"outputs": {node: outputs[node]}})]
        for node in outputs
        if "images" in outputs[node]
    }


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def is_widget(spec: list) -> bool:
    return isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def widgets(node: dict, object_info: dict) -> list[tuple[str, list, object]]:
    """(input, its definition, value) of a node's widgets; None stands for a control_after_generate."""
    definition, slots = object_info[node["type"]]["input"], []
    for group in ("required", "optional"):
        for name, spec in definition.get(group, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            if is_widget(spec):
                slots.append((name, spec))
                if options.get("control_after_generate"):
                    slots.append((None, [["fixed", "increment", "decrement", "randomize"]]))
    values = node.get("widgets_values", [])
    assert len(values) == len(slots), f"{node['type']}: {values} for {[name for name, _ in slots]}"
    return [(name, spec, value) for (name, spec), value in zip(slots, values, strict=True)]


def notes(workflow: dict) -> str:
    return "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES)


def model_files(workflow: dict, object_info: dict) -> set[str]:
    """The model files that a workflow needs beyond those of this repository."""
    return {
        value
        for node in workflow["nodes"]
        if node["type"] not in NOTES
        for name, _, value in widgets(node, object_info)
        if name in MODEL_FILES and not value.startswith("embedded-")
    }


def choices(spec: list) -> list:
    return spec[0] if isinstance(spec[0], list) else spec[1].get("options", [])


def fits(spec: list, value) -> bool:
    """Whether a widget of this definition may hold the value."""
    options = spec[1] if len(spec) > 1 else {}
    if isinstance(spec[0], list) or spec[0] == "COMBO":
        return value in choices(spec)
    kinds = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    if not isinstance(value, kinds[spec[0]]) or (spec[0] != "BOOLEAN" and isinstance(value, bool)):
        return False
    return spec[0] not in ("INT", "FLOAT") or options.get("min", value) <= value <= options.get("max", value)


def test_the_template_browser_offers_the_whole_set(server):
    real = {"splam_controlnet", "splam_dreamshaper7", "splam_sdxl_lora", "splam_distil_checkpoint", "splam_families"}
    assert set(names()) == {*EMBEDDED, "splam_distil", *real}
    assert sorted(server.get("/workflow_templates")[PACK]) == names()
    for name in names():
        assert server.get(f"/api/workflow_templates/{PACK}/{name}.json") == read(name)


@pytest.mark.parametrize("name", names())
def test_a_workflow_is_small_and_has_its_pictures(name):
    assert (FOLDER / f"{name}.json").stat().st_size < 40_000
    assert (FOLDER / f"{name}.jpg").stat().st_size < 40_000
    screenshot = ROOT / "docs" / "images" / f"workflow-{name.removeprefix('splam_')}.jpg"
    assert screenshot.stat().st_size < 160_000
    for file in (FOLDER / f"{name}.jpg", screenshot):
        Image.open(file).verify()


@pytest.mark.parametrize("name", names())
def test_links_and_sockets_agree(name, object_info):
    workflow = read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    ends = {(link[0], link[3], link[4]) for link in workflow["links"]}
    assert ends == {
        (socket["link"], node["id"], slot)
        for node in nodes.values()
        for slot, socket in enumerate(node["inputs"])
        if socket["link"] is not None
    }
    assert {(link[0], link[1], link[2]) for link in workflow["links"]} == {
        (link, node["id"], slot)
        for node in nodes.values()
        for slot, socket in enumerate(node["outputs"])
        for link in socket["links"] or []
    }
    for _, source, slot, target, end, kind in workflow["links"]:
        assert object_info[nodes[source]["type"]]["output"][slot] == kind
        socket = nodes[target]["inputs"][end]
        definition = object_info[nodes[target]["type"]]["input"]
        assert (definition["required"] | definition.get("optional", {}))[socket["name"]][0] == kind
    for node in nodes.values():
        if node["type"] not in NOTES:
            required = object_info[node["type"]]["input"]["required"]
            wanted = {name for name, spec in required.items() if not is_widget(spec)}
            linked = {socket["name"] for socket in node["inputs"] if socket["link"] is not None}
            assert wanted <= linked, f"node {node['id']} ({node['type']}) lacks {wanted - linked}"


@pytest.mark.parametrize("name", names())
def test_no_widget_is_stale(name, object_info):
    workflow = read(name)
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node["type"] in object_info, f"the server has no {node['type']}"
        for widget, spec, value in widgets(node, object_info):
            assert fits(spec, value) or (widget in MODEL_FILES and isinstance(value, str)), (
                node["type"],
                widget,
                value,
            )


WITHOUT_APP = {"splam_sampler_custom_advanced", "splam_vs_lcm"}  # of the graph itself: nothing to fill in


@pytest.mark.parametrize("name", sorted({*names()} - WITHOUT_APP))
def test_app_mode_shows_widgets_and_pictures_that_are_there(name, object_info):
    """`linearData`, as ComfyUI's page stores it: [node, widget] of the panel, nodes whose pictures it shows."""
    workflow = read(name)
    nodes, app = {str(node["id"]): node for node in workflow["nodes"]}, workflow["extra"]["linearData"]
    assert workflow["extra"]["linearMode"] is False  # opens as a graph
    assert app["inputs"] and app["outputs"] and len({*map(tuple, app["inputs"])}) == len(app["inputs"])
    for node, widget in app["inputs"]:
        assert widget in {one for one, _, _ in widgets(nodes[node], object_info)}
        assert widget not in {socket["name"] for socket in nodes[node]["inputs"] if socket["link"] is not None}
    assert all(object_info[nodes[node]["type"]]["output_node"] for node in app["outputs"])
    assert str(node_titled(workflow, TITLES.get(name, "Result"))["id"]) in app["outputs"]


@pytest.mark.parametrize("name", names())
def test_notes_say_where_every_file_goes(name, object_info):
    text, page = notes(read(name)), (ROOT / "docs" / "workflows.md").read_text(encoding="utf-8")
    assert text.startswith("## ") and "models/" in text and "**" in text
    needed = model_files(read(name), object_info)
    assert bool(needed) == (name not in {*EMBEDDED, "splam_distil"})
    for file in needed:
        assert file in text and file in page
    assert f"images/workflow-{name.removeprefix('splam_')}.jpg" in page and f"{name}.json" in page


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_the_pictures_show_their_captions(name, results, judge):
    workflow, found = read(name), results(name)
    images, captions = [], []
    for title, caption in EMBEDDED[name].captions.items():
        (image,) = found[str(node_titled(workflow, title)["id"])]
        images.append(torch.from_numpy(pixels(image.resize((128, 128), Image.Resampling.LANCZOS))) / 127.5 - 1)
        captions.append(parse_caption(caption))
    assert judge.right(torch.stack(images).permute(0, 3, 1, 2), captions).all()
    prompts = {n["widgets_values"][0] for n in workflow["nodes"] if n["type"] == "CLIPTextEncode"}
    assert set(EMBEDDED[name].captions.values()) <= prompts


def test_inpaint_changes_what_the_mask_covers_and_nothing_above(results):
    workflow, found = read("splam_inpaint"), results("splam_inpaint")
    before, after, mask = (
        pixels(found[str(node_titled(workflow, title)["id"])][0]) for title in ("Input picture", "Result", "Mask")
    )
    assert mask[:64].max() == 0 and mask[-32:].min() == 255
    kept = np.abs(after - before)[:48].mean()  # the autoencoder's way there and back
    assert kept < 6 < 20 < np.abs(after - before)[72:].max()


def test_hires_fix_enlarges(results):
    hires = results("splam_hires_fix")[str(node_titled(read("splam_hires_fix"), "Result")["id"])][0]
    assert hires.size == (192, 192)


def test_custom_sampling_is_the_sampler_node(results, server, object_info):
    plain = to_api(read("splam_txt2img"), object_info)
    (seed,) = (
        node["inputs"]["noise_seed"] for node in api("splam_sampler_custom_advanced", object_info, "RandomNoise")
    )
    (prompt,) = (node["inputs"]["text"] for node in api("splam_sampler_custom_advanced", object_info, "CLIPTextEncode"))
    for node in plain.values():
        if node["class_type"] == "SPLAMSampler":
            node["inputs"]["seed"] = seed
        elif node["class_type"] == "CLIPTextEncode":
            node["inputs"]["text"] = prompt
    ((custom,),) = results("splam_sampler_custom_advanced").values()
    ((expected,),) = pictures(server, plain).values()
    assert custom.tobytes() == expected.tobytes()


def test_the_negative_prompt_takes_its_background_away(results, judge):
    workflow, found = read("splam_negative_prompt"), results("splam_negative_prompt")
    (image,) = found[str(node_titled(workflow, "Result")["id"])]
    (((placed,), background),) = judge.detect((torch.from_numpy(pixels(image)) / 127.5 - 1).permute(2, 0, 1)[None])
    assert placed.thing == "a yellow star" and background != "red"


def test_steps_comparison_is_one_strip_in_order(results):
    workflow, found = read("splam_steps_comparison"), results("splam_steps_comparison")
    titles = ("1 step", "2 steps", "4 steps", "8 steps")
    parts = [pixels(found[str(node_titled(workflow, title)["id"])][0]) for title in titles]
    strip = pixels(found[str(node_titled(workflow, "All four")["id"])][0])
    assert strip.shape == (128, 4 * 128 + 3 * 4, 3)
    for number, part in enumerate(parts):
        assert np.abs(strip[:, number * 132 : number * 132 + 128] - part).max() <= 1


def api(name: str, object_info: dict, kind: str) -> list[dict]:
    return [node for node in to_api(read(name), object_info).values() if node["class_type"] == kind]


# The others need files that are nowhere here: the embedded model, a random LoRA and a random ControlNet stand in.


def stand_ins(graph: dict) -> dict:
    """The graph with the embedded student as its model, at 128x128."""
    replaced = {}
    for key, node in graph.items():
        inputs = dict(node["inputs"])
        if node["class_type"] in ("SPLAMLoader", "CheckpointLoaderSimple"):
            node, inputs = {"class_type": "SPLAMLoader"}, {"model_name": "embedded-student"}
        if node["class_type"] == "EmptyLatentImage":
            inputs |= {"width": 128, "height": 128}
        inputs |= {"lora_name": "stand-in.safetensors"} if "lora_name" in inputs else {}
        inputs |= {"control_net_name": "stand-in.safetensors"} if "control_net_name" in inputs else {}
        replaced[key] = {"class_type": node["class_type"], "inputs": inputs}
    return replaced


def write_lora(path: Path) -> None:
    """A random LoRA of the embedded UNet, under diffusers' names."""
    generator, weights = torch.Generator().manual_seed(0), load_file(EMBEDDED_UNET)
    lora = {}
    for key, weight in weights.items():
        if key.endswith(("to_q.weight", "to_v.weight")):
            module = f"unet.{key.removesuffix('.weight')}"
            lora[f"{module}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.1
            lora[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.1
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora, path)


def write_controlnet(path: Path) -> None:
    """A ControlNet of the embedded UNet's widths: its own encoder, with random hint and output layers."""
    generator = torch.Generator().manual_seed(0)
    prefix = "model.diffusion_model."
    unet = {
        key.removeprefix(prefix): weight.float()
        for key, weight in diffusers_to_ldm(load_file(EMBEDDED_UNET), load_file(EMBEDDED_VAE)).items()
        if key.startswith(prefix)
    }
    weights = {key: w for key, w in unet.items() if key.startswith(("time_embed.", "input_blocks.", "middle_block."))}

    def convolution(name: str, inside: int, outside: int, kernel: int) -> None:
        scale = 0.5 / (inside * kernel * kernel) ** 0.5
        weights[f"{name}.weight"] = torch.randn(outside, inside, kernel, kernel, generator=generator) * scale
        weights[f"{name}.bias"] = torch.zeros(outside)

    channels = (3, 16, 16, 32, 32, 96, 96, 256, unet["input_blocks.0.0.weight"].shape[0])
    for layer, (inside, outside) in enumerate(itertools.pairwise(channels)):
        convolution(f"input_hint_block.{2 * layer}", inside, outside, 3)
    outputs = [output_width(unet, number) for number in range(count_blocks(unet))]
    for number, width in enumerate(outputs):
        convolution(f"zero_convs.{number}.0", width, width, 1)
    convolution("middle_block_out.0", outputs[-1], outputs[-1], 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)


def count_blocks(unet: dict) -> int:
    return len({key.split(".")[1] for key in unet if key.startswith("input_blocks.")})


def output_width(unet: dict, number: int) -> int:
    """Channels that an input block hands on: of its first convolution, its downsampler or its residual block."""
    for layer in ("0", "0.op", "0.out_layers.3"):
        if (key := f"input_blocks.{number}.{layer}.weight") in unet:
            return unet[key].shape[0]
    raise KeyError(number)


@pytest.mark.parametrize("name", [name for name in names() if name.startswith("splam_distil")])
def test_distilling_workflows_run_when_cut_short(name, server, object_info):
    graph = stand_ins(to_api(read(name), object_info))
    for node in graph.values():
        if node["class_type"] == "SPLAMDistil":
            node["inputs"] |= {"steps": 1, "batch_size": 1, "gradient_accumulation": 1, "resolution": 128, "rank": 4}
            node["inputs"] |= {
                "pictures_per_prompt": 1,
                "preview_every": 0,
                "prompts": "a doughnut on a red background\na yellow star on a blue background",
            }
        if node["class_type"] == "SPLAMDistilReport":
            node["inputs"] |= {
                "rows": 1,
                "resolution": 128,
                "teacher_steps": 4,
                "prompts": "a doughnut on a red background",
            }
    (image,) = pictures(server, graph)[str(node_titled(read(name), "Result")["id"])]
    assert pixels(image).std() > 1


@pytest.mark.parametrize(
    "name", sorted(one for one in set(names()) - set(EMBEDDED) if not one.startswith("splam_distil"))
)
def test_a_workflow_for_real_checkpoints_runs_on_stand_ins(name, server, object_info):
    write_lora(server.folder / "models" / "loras" / "stand-in.safetensors")
    write_controlnet(server.folder / "models" / "controlnet" / "stand-in.safetensors")
    graph = stand_ins(to_api(read(name), object_info))
    result = str(node_titled(read(name), "Result")["id"])
    (image,) = pictures(server, graph)[result]
    assert image.size == (128, 128) and pixels(image).std() > 1
    # What the workflow is about acts on its picture.
    for kind, strength in (("SPLAMLoraLoader", "strength_model"), ("ControlNetApplyAdvanced", "strength")):
        for node in graph.values():
            if node["class_type"] == kind:
                node["inputs"][strength] = 0.0
                (without,) = pictures(server, graph)[result]
                assert np.abs(pixels(image) - pixels(without)).max() > 2
