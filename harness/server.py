"""A ComfyUI started in a folder of its own, with this pack alone, and spoken to over its HTTP API."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = "ComfyUI-SPLAM"


class ServerError(RuntimeError):
    """The server died, refused a graph or failed in a node; the message says which and why."""


def exit_on_sigterm() -> None:
    """Have SIGTERM leave as Ctrl-C does, through every `with`: by default a server would outlive this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class ComfyServer:
    """A running ComfyUI. Models, custom nodes, input and output lie under `folder`; the user's own stay untouched.

    with ComfyServer(comfyui, folder) as server:
        history = server.run(graph)
    """

    def __init__(self, comfyui: Path, folder: Path, arguments: tuple[str, ...] = (), start_timeout: float = 300):
        self.folder = Path(folder)
        self.log = self.folder / "server.log"
        self.start_timeout = start_timeout
        self.url = f"http://127.0.0.1:{_free_port()}"
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _link(ROOT, self.folder / "custom_nodes" / PACK)
        self.command = [
            sys.executable,
            str(Path(comfyui) / "main.py"),
            *("--listen", "127.0.0.1", "--port", self.url.rpartition(":")[2]),
            *("--base-directory", str(self.folder), "--database-url", "sqlite:///:memory:"),
            "--disable-auto-launch",
            *device_arguments(),
            *arguments,
        ]
        self.process = None

    def __enter__(self) -> ComfyServer:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder)
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def get(self, path: str, **query: str):
        """The JSON at this path."""
        return json.loads(self._request(path + ("?" + urllib.parse.urlencode(query) if query else "")))

    def post(self, path: str, body: dict):
        """The JSON answer to this JSON body; None if the answer is empty."""
        answer = self._request(path, json.dumps(body).encode())
        return json.loads(answer) if answer.strip() else None

    def queue(self, graph: dict) -> str:
        """Puts an API-form graph into the queue; gives its id. Raises ServerError if it does not validate."""
        return self.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 900) -> dict:
        """The history entry of a finished graph. Raises ServerError with the node's own message if it failed."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                for kind, details in entry["status"]["messages"]:
                    if kind == "execution_error":
                        raise ServerError(f"{details['node_type']}: {details['exception_message'].strip()}")
                    if kind == "execution_interrupted":
                        raise ServerError("interrupted")
                return entry
            self._check_alive()
            time.sleep(0.05)
        raise ServerError(f"a graph did not finish within {timeout:.0f} s. End of {self.log}:\n{self.log_tail()}")

    def run(self, graph: dict, timeout: float = 900) -> dict:
        """Queues a graph and waits for its history entry."""
        return self.wait(self.queue(graph), timeout)

    def files(self, entry: dict) -> list[bytes]:
        """The contents of every file that a finished graph saved, in the order of its nodes' ids."""
        saved = []
        for node in sorted(entry["outputs"]):
            for kind in ("images", "latents"):
                for item in entry["outputs"][node].get(kind, []):
                    where = {key: item[key] for key in ("filename", "subfolder", "type")}
                    saved.append(self._request("/view?" + urllib.parse.urlencode(where)))
        return saved

    def listen(self) -> Callable[[], str]:
        """Gives what the server has logged since it was asked to: what stands before, other graphs may have said."""
        begin = self.log.stat().st_size
        return lambda: self.log.read_bytes()[begin:].decode(errors="replace")

    def log_tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with _OPENER.open(request, timeout=120) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: HTTP {error.code}\n{_reasons(error.read())}") from error
        except OSError as error:
            self._check_alive()
            raise ServerError(f"{self.url}{path}: {error}") from error

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            raise ServerError(
                f"ComfyUI ended with exit code {self.process.returncode}. End of {self.log}:\n{self.log_tail()}"
            )

    def _wait_until_up(self) -> None:
        end = time.monotonic() + self.start_timeout
        while time.monotonic() < end:
            self._check_alive()
            try:
                with _OPENER.open(self.url + "/system_stats", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise ServerError(f"ComfyUI was not up after {self.start_timeout:.0f} s. End of {self.log}:\n{self.log_tail()}")


def device_arguments() -> list[str]:
    """ComfyUI does not start on a machine without an accelerator unless it is told."""
    import torch

    backends = (torch.cuda, torch.backends.mps, getattr(torch, "xpu", None))
    return [] if any(backend is not None and backend.is_available() for backend in backends) else ["--cpu"]


# No proxy: the server is on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def to_api(workflow: dict, object_info: dict) -> dict:
    """The API form of a UI-format workflow, as the front end's `app.graphToPrompt()` makes it.

    Knows what this repository's workflows use: links and widgets. Notes and muted ends are left out, as the page does;
    other muted and bypassed nodes are refused.
    Raises ValueError for a node that the server does not have.
    """
    links = {link[0]: link for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        kind = node["type"]
        if kind in ("Note", "MarkdownNote"):
            continue
        if node.get("mode") == 2 and not any(output.get("links") for output in node.get("outputs", [])):
            continue  # muted, and nobody waits for it
        if kind not in object_info:
            raise ValueError(f"node {node['id']}: the server has no {kind!r}.")
        if node.get("mode", 0) != 0:
            raise ValueError(f"node {node['id']} ({kind}) is muted or bypassed, which this conversion does not know.")
        values = iter(node.get("widgets_values", []))
        inputs = {}
        for group in ("required", "optional"):
            for name, spec in object_info[kind]["input"].get(group, {}).items():
                options = spec[1] if len(spec) > 1 else {}
                if not _is_widget(spec[0], options):
                    continue
                # A graph saved before a widget was added lacks its value; the page then takes the default.
                inputs[name] = next(values, options.get("default"))
                if options.get("control_after_generate"):
                    next(values)  # "fixed", "randomize", ...: the page's business
                if options.get("image_upload"):
                    next(values, None)
        for socket_ in node.get("inputs", []):
            if socket_.get("link") is not None:
                _, source, slot, *_ = links[socket_["link"]]
                inputs[socket_["name"]] = [str(source), slot]
        title = node.get("title") or object_info[kind]["display_name"] or kind
        graph[str(node["id"])] = {"inputs": inputs, "class_type": kind, "_meta": {"title": title}}
    return graph


def _is_widget(kind, options: dict) -> bool:
    return (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")) and not options.get(
        "forceInput"
    )


def _reasons(body: bytes) -> str:
    """What ComfyUI says is wrong with a graph, a line each."""
    try:
        answer = json.loads(body)
    except ValueError:
        return body[:500].decode(errors="replace")
    lines = [answer.get("error", {}).get("message", "")] if isinstance(answer.get("error"), dict) else []
    for node, details in (answer.get("node_errors") or {}).items():
        lines += [
            f"node {node} ({details['class_type']}): {error['message']}: {error['details']}"
            for error in details["errors"]
        ]
    return "\n".join(lines) or body[:500].decode(errors="replace")


def _link(target: Path, link: Path) -> None:
    """A symbolic link, or a junction where Windows allows no links."""
    if link.exists():
        return
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        import _winapi

        _winapi.CreateJunction(str(target), str(link))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
