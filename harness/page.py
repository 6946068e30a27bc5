"""ComfyUI's own page in headless Chromium: opens workflows, presses Run, takes pictures of the graph."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path

from PIL import Image

from .server import ComfyServer

READY = """return Boolean(window.app?.graph && app.canvas && app.extensionManager
    && window.LiteGraph?.registered_node_types?.SPLAMLoader)"""
# The JavaScript objects' class; selenium hands over plain values only.
NODES = """return app.graph.nodes.map(node => ({
    id: Number(node.id), type: node.type, title: node.title, box: [...node.getBounding()], size: [...node.size],
    least: [...node.computeSize()], known: Boolean(LiteGraph.registered_node_types[node.type]),
    broken: Boolean(node.has_errors),
    links: (node.inputs || []).filter(input => input.link != null).map(input => input.name),
    widgets: Object.fromEntries((node.widgets || []).map(widget => [widget.name, widget.value ?? null])),
    pictures: (node.imgs || []).map(image => image.src)}))"""
GROUPS = "return app.graph.groups.map(group => ({title: group.title, box: [...group._bounding]}))"
# The page's menus and messages lie over the edges of the graph; a screenshot leaves these pixels to them.
BARS = {"left": 100, "top": 260, "right": 40, "bottom": 160}
PATIENCE = 300  # seconds for one thing to come true
GAP = 16  # pixels around the graph


def browser() -> tuple[str, str] | None:
    """(Chromium, chromedriver) on the PATH, or None."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (found, driver) if found and driver else None


class ComfyPage:
    """The page of a running server. Raises TimeoutError where something that was waited for does not come true.

    with ComfyPage(server, profile_folder) as page:
        page.open(workflow)
    """

    def __init__(self, server: ComfyServer, profile: Path):
        self.server, self.profile = server, Path(profile)
        self.driver = None

    def __enter__(self) -> ComfyPage:
        from selenium import webdriver

        binary, driver = browser()
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in (
            *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage"),
            *("disable-background-networking", "disable-component-update", "disable-sync"),
            *(f"user-data-dir={self.profile}", "window-size=1600,900"),
        ):
            options.add_argument(f"--{flag}")
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            # On a busy machine opening a graph can take minutes; the connection's own limit is two.
            self.driver.command_executor.client_config.timeout = 2 * PATIENCE
            self.driver.set_script_timeout(PATIENCE)
            self.server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
            self.driver.get(self.server.url)
            self.wait(READY)
        except BaseException:
            self.driver.quit()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.driver.quit()

    def wait(self, script: str, timeout: float = PATIENCE) -> None:
        """Until the script returns true."""
        end = time.monotonic() + timeout
        while not self.driver.execute_script(script):
            if time.monotonic() > end:
                raise TimeoutError(f"the page: still not true after {timeout:.0f} s: {script}")
            time.sleep(0.1)

    def open(self, workflow: dict) -> None:
        """Opens a UI-format graph in place of the one before."""
        failed = self.driver.execute_async_script(
            "const [graph, done] = arguments; app.loadGraphData(graph).then(() => done(''), e => done(String(e)))",
            workflow,
        )
        if failed:
            raise RuntimeError(f"the page does not open the workflow: {failed}")

    def nodes(self) -> list[dict]:
        """What the page made of each node: type, box, least size, links, widgets by name, pictures' addresses."""
        return self.driver.execute_script(NODES)

    def groups(self) -> list[dict]:
        return self.driver.execute_script(GROUPS)

    def to_api(self) -> dict:
        """The API form of the open graph, by the page's own conversion."""
        return self.driver.execute_async_script(
            "const done = arguments[0]; app.graphToPrompt().then(p => done(p.output), e => done(String(e)))"
        )

    def run(self, timeout: float = PATIENCE) -> None:
        """Presses Run and waits until the server has done everything. Raises RuntimeError where it did not."""
        before = set(self.server.get("/history"))
        self.driver.execute_async_script("const done = arguments[0]; app.queuePrompt(0).then(() => done(), done)")
        end = time.monotonic() + timeout
        while not (new := set(self.server.get("/history")) - before):
            if not any(self.server.get("/queue").values()) and set(self.server.get("/history")) == before:
                errors = self.driver.execute_script("return JSON.stringify(app.lastNodeErrors)")
                raise RuntimeError(f"the server refused the graph: {errors}")
            if time.monotonic() > end:
                raise TimeoutError(f"the server did not finish within {timeout:.0f} s")
            time.sleep(0.1)
        status = self.server.get("/history")[new.pop()]["status"]
        if status["status_str"] != "success":
            raise RuntimeError(f"the graph failed: {status['messages'][-1]}")

    def pictures(self, node_id: int) -> list[Image.Image]:
        """The pictures that a node shows, fetched from where it shows them; waits for the first."""
        self.wait(f"return Boolean(app.graph.getNodeById({int(node_id)}).imgs?.length)", timeout=60)
        (node,) = (node for node in self.nodes() if node["id"] == node_id)
        paths = [address.removeprefix(self.server.url) for address in node["pictures"]]
        return [Image.open(io.BytesIO(self.server._request(path))).convert("RGB") for path in paths]

    def screenshot(self, scale: float = 1.0) -> Image.Image:
        """The whole graph, `scale` screen pixels a unit, cut out of the page's bars."""
        left, top, right, bottom = bounds([item["box"] for item in self.nodes() + self.groups()])
        width, height = round((right - left) * scale) + 2 * GAP, round((bottom - top) * scale) + 2 * GAP
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {
                "width": width + BARS["left"] + BARS["right"],
                "height": height + BARS["top"] + BARS["bottom"],
                "deviceScaleFactor": 1,
                "mobile": False,
            },
        )
        time.sleep(1)  # the page lays itself out anew
        self.driver.execute_script(
            """const [scale, x, y] = arguments, canvas = app.canvas, at = canvas.canvas.getBoundingClientRect();
            canvas.deselectAll?.();
            canvas.ds.scale = scale;
            canvas.ds.offset[0] = (x - at.left) / scale; canvas.ds.offset[1] = (y - at.top) / scale;
            canvas.setDirty(true, true);""",
            scale,
            BARS["left"] + GAP - left * scale,
            BARS["top"] + GAP - top * scale,
        )
        time.sleep(1)  # and draws when it likes
        page = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        return page.crop((BARS["left"], BARS["top"], BARS["left"] + width, BARS["top"] + height))


def bounds(boxes: list[list[float]]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) around boxes of (x, y, width, height)."""
    return (
        min(x for x, *_ in boxes),
        min(y for _, y, *_ in boxes),
        max(x + width for x, _, width, _ in boxes),
        max(y + height for _, y, _, height in boxes),
    )
