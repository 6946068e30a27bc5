"""The shipped workflows in ComfyUI's real page: no missing node, no lost link, the graph that the other tests queue."""

import json
import os
import shutil
import time

import pytest

from benchmarks.comfy_server import ROOT, to_api

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    """ComfyUI's page, open and idle."""
    if not BROWSER or not DRIVER:
        pytest.skip("needs Chromium and chromedriver on the PATH (Debian: apt install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("browser")
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *(f"user-data-dir={profile}", "window-size=1600,900"),
    ):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    try:
        server.post("/settings", {"Comfy.TutorialCompleted": True})
        driver.get(server.url)
        wait_for(
            driver,
            "return Boolean(window.app?.graph && app.canvas && window.LiteGraph?.registered_node_types?.SPLAMLoader)",
        )
        yield driver
    finally:
        driver.quit()


def wait_for(driver, script: str, timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while not driver.execute_script(script):
        assert time.monotonic() < end, f"still not true after {timeout:.0f} s: {script}"
        time.sleep(0.2)


def screenshot(driver, name: str) -> None:
    """Kept only where SPLAM_SCREENSHOTS names a folder."""
    if os.environ.get("SPLAM_SCREENSHOTS"):
        time.sleep(1)
        driver.save_screenshot(os.path.join(os.environ["SPLAM_SCREENSHOTS"], f"{name}.png"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_opens_whole(file, page, server):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    # Opening one takes the page to it; it answers when the graph stands.
    page.execute_async_script(
        "const [graph, done] = arguments; app.loadGraphData(graph).then(() => done(), done)", workflow
    )
    nodes = page.execute_script(
        "return app.graph.nodes.map(n => ({id: n.id, type: n.type, missing: !LiteGraph.registered_node_types[n.type],"
        " broken: Boolean(n.has_errors), links: (n.inputs || []).filter(i => i.link != null).length}))"
    )
    assert [node for node in nodes if node["missing"] or node["broken"]] == []
    assert {str(node["id"]): node["links"] for node in nodes} == {
        str(node["id"]): sum(i["link"] is not None for i in node["inputs"]) for node in workflow["nodes"]
    }
    screenshot(page, file.stem)
    found = page.execute_async_script(
        "const done = arguments[0]; app.graphToPrompt().then(p => done(p.output), e => done(String(e)))"
    )
    assert found == to_api(workflow, server.get("/object_info"))


def test_the_page_runs_the_workflow(page, server):
    """Queue pressed in the page: the picture arrives in its Save Image node."""
    workflow = json.loads((ROOT / "workflows" / "splam_txt2img.json").read_text(encoding="utf-8"))
    page.execute_async_script(
        "const [graph, done] = arguments; app.loadGraphData(graph).then(() => done(), done)", workflow
    )
    page.execute_async_script("const done = arguments[0]; app.queuePrompt(0).then(() => done(), done)")
    wait_for(page, "return Boolean(app.graph.nodes.find(n => n.type === 'SaveImage').imgs?.length)")
    screenshot(page, "splam_txt2img_done")
