"""What a user meets: the nodes, the shipped workflow, cancelling, single files, and files that are no models."""

import io
import json
import re
import time

import pytest
from PIL import Image
from safetensors.torch import load, load_file

from harness.graphs import save_image, save_latent, text_to_image
from harness.server import ROOT, ServerError, to_api
from splam_core.checkpoint import diffusers_to_ldm, save_file

pytestmark = pytest.mark.comfyui
PROMPT = "a yellow star above a doughnut"
WORKFLOW = json.loads((ROOT / "workflows" / "splam_txt2img.json").read_text(encoding="utf-8"))


def picture(server, graph) -> bytes:
    (file,) = server.files(server.run(graph))
    return file


def test_every_input_has_a_tooltip_and_every_node_a_help_page(server):
    nodes = {name: info for name, info in server.get("/object_info").items() if name.startswith("SPLAM")}
    ours = ("Loader", "LoraLoader", "ModelPatch", "Sampler", "SamplerSelect", "Scheduler")
    assert set(nodes) >= {f"SPLAM{name}" for name in ours}
    for name, info in nodes.items():
        assert info["description"] and (ROOT / "web" / "docs" / f"{name}.md").is_file()
        for group in ("required", "optional"):
            for socket, spec in info["input"].get(group, {}).items():
                assert spec[1].get("tooltip"), (name, socket)


def test_every_node_has_other_names_for_the_pages_search(server):
    """Which ComfyUI 0.3.75 does not know: there the source alone says it."""
    info = server.get("/object_info")
    for file in (ROOT / "nodes").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert text.count("**search_aliases(") == text.count("return io.Schema("), file.name
    if any(node.get("search_aliases") for name, node in info.items() if not name.startswith("SPLAM")):
        assert all(node["search_aliases"] for name, node in info.items() if name.startswith("SPLAM"))


def test_help_pages_are_served(server):
    extensions = server.get("/extensions")
    assert isinstance(extensions, list)
    page = server._request("/extensions/ComfyUI-SPLAM/docs/SPLAMSampler.md").decode()
    assert page.startswith("# SPLAM Sampler")


def test_the_shipped_workflow_gives_its_picture_twice(server):
    graph = to_api(WORKFLOW, server.get("/object_info"))
    first = picture(server, graph)
    assert Image.open(io.BytesIO(first)).size == (128, 128)
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)
    graph["7"]["inputs"]["filename_prefix"] = "again"  # else the answer comes from the cache
    second = picture(server, graph)
    assert Image.open(io.BytesIO(first)).tobytes() == Image.open(io.BytesIO(second)).tobytes()


def test_a_seed_changes_the_picture(server):
    one, other = (picture(server, save_image(text_to_image("diffusers/plain", PROMPT, seed=seed))) for seed in (1, 2))
    assert Image.open(io.BytesIO(one)).tobytes() != Image.open(io.BytesIO(other)).tobytes()


def test_a_single_file_of_any_width_is_its_folder(server, pipelines):
    folder = pipelines.folder / "gamma"
    weights = [
        load_file(folder / part / f"{name}.safetensors")
        for part, name in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
        )
    ]
    files = {
        "unet": "config.json",
        "vae": "config.json",
        "text_encoder": "config.json",
        "scheduler": "scheduler_config.json",
    }
    metadata = {f"splam.{part}": (folder / part / file).read_text() for part, file in files.items()}
    (server.folder / "models" / "checkpoints").mkdir(exist_ok=True)
    save_file(diffusers_to_ldm(*weights), server.folder / "models" / "checkpoints" / "narrow.safetensors", metadata)
    from_folder, from_file = (
        load(picture(server, save_latent(text_to_image(name, PROMPT, seed=3))))["latent_tensor"]
        for name in ("diffusers/gamma", "narrow.safetensors")
    )
    assert from_folder.equal(from_file)


def test_steps_that_do_not_fit_denoise_are_refused_by_one_sentence(server):
    with pytest.raises(
        ServerError, match=r"SPLAMSampler: SPLAM Sampler: 8 steps do not fit denoise 0\.1, which leaves 5 "
    ):
        server.run(save_latent(text_to_image("diffusers/plain", PROMPT, steps=8, denoise=0.1)))


@pytest.mark.parametrize("name", ["diffusers/../../plain", "/etc/passwd", "diffusers/absent"])
def test_names_reach_nothing_but_listed_models(server, name):
    with pytest.raises(ServerError, match=r"there is no model|Value not in list"):
        server.run(save_latent(text_to_image(name, PROMPT)))


def broken_models(checkpoints, diffusers):
    """Files that are no models: name in the loader -> what its error must say."""
    checkpoints.mkdir(exist_ok=True)
    (checkpoints / "page.safetensors").write_text("<!DOCTYPE html><html>404</html>" * 40)
    whole = (diffusers / "plain" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    (checkpoints / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (checkpoints / "vae.safetensors").write_bytes(whole)
    no_unet = diffusers / "no-weights"
    (no_unet / "unet").mkdir(parents=True)
    (no_unet / "model_index.json").write_text("{}")
    (no_unet / "unet" / "config.json").write_text("{}")
    (no_unet / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    return {
        "page.safetensors": r"page\.safetensors: expected a safetensors file",
        "cut.safetensors": r"cut\.safetensors: expected a safetensors file",
        "vae.safetensors": r"vae\.safetensors: expected a Stable Diffusion UNet .*found a VAE",
        "diffusers/no-weights": r"no-weights.unet: expected diffusion_pytorch_model\.safetensors, found .*\.bin",
    }


def test_files_that_are_no_models_are_refused_and_the_server_lives(server, pipelines):
    good = save_latent(text_to_image("diffusers/plain", PROMPT, seed=9))
    before = picture(server, good)
    for name, message in broken_models(server.folder / "models" / "checkpoints", pipelines.folder).items():
        with pytest.raises(ServerError, match=message):
            server.run(save_latent(text_to_image(name, PROMPT)))
    good["saved"]["inputs"]["filename_prefix"] = "after"
    assert load(picture(server, good))["latent_tensor"].equal(load(before)["latent_tensor"])


def test_cancel_in_mid_step(server):
    logged = server.listen()
    prompt_id = server.queue(
        save_latent(text_to_image("diffusers/plain", PROMPT, steps=8, size=256, batch_size=16, seed=77))
    )
    end = time.monotonic() + 120
    while not re.search(r"\b[1-7]/8 \[", logged()):
        assert time.monotonic() < end, server.log_tail()
        time.sleep(0.05)
    server.post("/interrupt", {})
    with pytest.raises(ServerError, match="interrupted"):
        server.wait(prompt_id, timeout=60)
    assert picture(server, save_image(text_to_image("diffusers/plain", PROMPT, steps=1, seed=78)))
