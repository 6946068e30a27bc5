"""The shipped workflows in ComfyUI's real page: nothing missing, nothing lost, nothing overlapping, and Run gives the
pictures that the HTTP API gives."""

import io
import itertools
import json
import os

import pytest
from PIL import Image

from harness.graphs import save_image, text_to_image
from harness.page import ComfyPage, browser
from harness.server import ROOT, to_api
from harness.workflows import EMBEDDED, names, read

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]
PROMPT = "a yellow star above a doughnut"
LOADERS = {"SPLAMLoader", "SPLAMLoraLoader", "CheckpointLoaderSimple", "ControlNetLoader"}


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    """ComfyUI's page, open and idle; one browser for all tests."""
    if not browser():
        pytest.skip("needs Chromium and chromedriver on the PATH (Debian: apt install chromium chromium-driver)")
    with ComfyPage(server, tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture(scope="module")
def object_info(server) -> dict:
    return server.get("/object_info")


def overlap(a: list[float], b: list[float]) -> bool:
    """Whether boxes (x, y, width, height) share more than an edge."""
    return all(a[i] + 1 < b[i] + b[i + 2] and b[i] + 1 < a[i] + a[i + 2] for i in (0, 1))


def within(inner: list[float], outer: list[float]) -> bool:
    return all(outer[i] <= inner[i] and inner[i] + inner[i + 2] <= outer[i] + outer[i + 2] for i in (0, 1))


@pytest.mark.parametrize("name", names())
def test_a_workflow_opens_whole(name, page, object_info):
    workflow = read(name)
    page.open(workflow)
    nodes = page.nodes()
    assert [node for node in nodes if not node["known"]] == []
    # The newer page marks a node whose model file the machine lacks; nothing else may be marked.
    marked = {node["type"] for node in nodes if node["broken"]}
    assert marked <= (set() if name in EMBEDDED else LOADERS)
    assert {node["id"]: set(node["links"]) for node in nodes} == {
        node["id"]: {socket["name"] for socket in node["inputs"] if socket["link"] is not None}
        for node in workflow["nodes"]
    }
    found = page.to_api()
    assert found == to_api(workflow, object_info)
    # And it is the file's own widgets that the page shows, by name and value.
    for node in nodes:
        for widget, value in found.get(str(node["id"]), {"inputs": {}})["inputs"].items():
            assert isinstance(value, list) or node["widgets"][widget] == value


def test_the_blueprint_is_one_node_that_draws(page, server):
    """As it comes out of the page's node library, with a picture saved from its one output."""
    (file,) = (ROOT / "subgraphs").glob("*.json")
    listed = [entry["name"] for entry in server.get("/global_subgraphs").values()]
    assert file.stem in listed
    graph = json.loads(file.read_text(encoding="utf-8"))
    graph["nodes"].append({
        "id": 2, "type": "SaveImage", "pos": [500, 0], "size": [360, 400], "flags": {}, "order": 1, "mode": 0,
        "inputs": [{"name": "images", "type": "IMAGE", "link": 1}], "outputs": [], "widgets_values": ["blueprint"],
    })  # fmt: skip
    graph["nodes"][0]["outputs"][0]["links"], graph["links"] = [1], [[1, 1, 0, 2, 0, "IMAGE"]]
    page.open(graph)
    shown = page.nodes()[0]["widgets"]  # older pages put the inner node's number before a name
    names_shown = {name.rpartition(" ")[2] for name in shown}
    assert names_shown >= {"text", "model_name", "width", "height", "batch_size", "seed", "steps"}
    page.driver.execute_script(
        "app.graph.getNodeById(1).widgets.find(one => one.name.endsWith('text')).value = arguments[0]", PROMPT
    )
    asked = {node["class_type"]: node["inputs"] for node in page.to_api().values()}
    page.run()
    (found,) = page.pictures(2)
    sampling = {name: asked["SPLAMSampler"][name] for name in ("seed", "steps")}
    server.post("/free", {"unload_models": True, "free_memory": True})
    (file,) = server.files(server.run(save_image(text_to_image("embedded-student", PROMPT, **sampling))))
    expected = Image.open(io.BytesIO(file)).convert("RGB")
    assert asked["CLIPTextEncode"]["text"] == PROMPT and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", names())
def test_a_workflow_is_laid_out_for_reading(name, page):
    page.open(read(name))
    nodes, groups = page.nodes(), page.groups()
    small = [
        (n["type"], n["size"], n["least"]) for n in nodes if n["size"][1] + 1 < n["least"][1] or n["size"][0] < 180
    ]
    assert small == []
    boxes = [(f"{node['type']} {node['id']}", node["box"]) for node in nodes]
    assert [(a, b) for (a, box), (b, other) in itertools.combinations(boxes, 2) if overlap(box, other)] == []
    assert [(a["title"], b["title"]) for a, b in itertools.combinations(groups, 2) if overlap(a["box"], b["box"])] == []
    # A node is in one group, or stands clear of all.
    for node, box in boxes:
        touched = [group for group in groups if overlap(box, group["box"])]
        assert len(touched) <= 1 and all(within(box, group["box"]) for group in touched), node
    if os.environ.get("SPLAM_SCREENSHOTS"):
        page.screenshot().save(os.path.join(os.environ["SPLAM_SCREENSHOTS"], f"{name}.png"))


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_run_in_the_page_gives_the_pictures_of_the_api(name, page, server, object_info):
    """Run pressed in the page: every picture node shows, bit for bit, what a run over the API saves."""
    workflow = read(name)
    server.post("/free", {"unload_models": True, "free_memory": True})  # or the second run would be the cache's
    page.open(workflow)
    page.run()
    shown = {
        str(node["id"]): page.pictures(node["id"])
        for node in workflow["nodes"]
        if node["type"] in ("SaveImage", "PreviewImage", "MaskPreview")
    }
    server.post("/free", {"unload_models": True, "free_memory": True})
    outputs = server.run(to_api(workflow, object_info))["outputs"]
    assert set(shown) == set(outputs)
    for node, pictures in shown.items():
        expected = [Image.open(io.BytesIO(file)) for file in server.files({"outputs": {node: outputs[node]}})]
        assert [picture.tobytes() for picture in pictures] == [file.convert("RGB").tobytes() for file in expected]


def test_distilling_shows_the_student_as_it_learns(page):
    """The node's picture while it runs changes from preview to preview."""
    workflow = read("splam_distil")
    node = next(node for node in workflow["nodes"] if node["type"] == "SPLAMDistil")
    values = {"steps": 3, "rank": 4, "batch_size": 1, "pictures_per_prompt": 1, "preview_every": 1}
    page.open(workflow)
    page.driver.execute_script(
        """const [id, values] = arguments, node = app.graph.getNodeById(id);
        for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name];
        window.previews = new Set();
        const seen = event => previews.add((event.detail.blob ?? event.detail).size);
        app.api.addEventListener("b_preview", seen); app.api.addEventListener("b_preview_with_metadata", seen);""",
        node["id"],
        values | {"prompts": "a doughnut on a red background\na yellow star on a blue background"},
    )
    page.run()
    assert page.driver.execute_script("return previews.size") >= 3
