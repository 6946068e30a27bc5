"""SPLAM Fetch in a real ComfyUI, against a hub of our own on this machine that can misbehave."""

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import aiohttp
import pytest

from harness.server import ComfyServer, ServerError

pytestmark = pytest.mark.comfyui
COMMIT, NEWER = "1" * 40, "2" * 40
LORA, PIPELINE = "alimama-creative/slam-lora-sdxl", "alimama-creative/slam-sd1.5"
LARGE = bytes(range(256)) * (24 * 4096)  # 24 MB: more than the block that huggingface_hub reads at once
PARTS = ("unet", "vae", "text_encoder")


class Hub:
    """What the Hugging Face hub answers for model_info and for files, with faults to order."""

    def __init__(self):
        self.repos, self.commit, self.requests = {}, COMMIT, []
        self.cuts = 0  # how many answers to break off after `cut_after` bytes
        self.cut_after, self.delay, self.claimed = 15_000_000, 0.0, {}
        self.corrupt = b""  # written in place of the first bytes of a file
        self.card = {"license": "apache-2.0"}
        self.failing = 0  # how many requests to answer with HTTP 500
        self.server = None
        self.port = 0

    def start(self) -> None:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request) -> None:
        path = urlsplit(request.path).path
        self.requests.append((path, request.headers.get("Range")))
        if self.failing:
            self.failing -= 1
            return self.reply(request, 500, b"oops")
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/").partition("/revision/")[0]
            if repo not in self.repos:
                return self.reply(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return self.reply(request, 200, json.dumps(self.listing(repo)).encode())
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        content = self.repos.get(repo, {}).get(file)
        if content is None or revision != self.commit:
            return self.reply(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        content = self.corrupt + content[len(self.corrupt) :]
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        extra = {"ETag": '"x"', "X-Repo-Commit": revision}
        if start:
            extra["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(request, 206 if start else 200, content[start:], extra)

    def listing(self, repo: str) -> dict:
        siblings = []
        for name, content in self.repos[repo].items():
            size = self.claimed.get(name, len(content))
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"rfilename": name, "size": size, "blobId": blob}
            if name.endswith((".safetensors", ".bin")):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
            siblings.append(entry)
        facts = {"sha": self.commit, "siblings": siblings, "cardData": self.card, "tags": []}
        return {"id": repo, "modelId": repo, **facts}

    def reply(self, request, status: int, body: bytes, headers=()) -> None:
        request.send_response(status)
        for name, value in dict(headers).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Connection", "close")  # else a stopped hub would go on answering on open connections
        request.end_headers()
        if request.command == "HEAD":
            return
        if self.cuts and len(body) > self.cut_after:
            self.cuts -= 1
            request.wfile.write(body[: self.cut_after])
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(2)
            return
        for at in range(0, len(body), 2**20):
            try:
                request.wfile.write(body[at : at + 2**20])
            except OSError:  # the client has gone
                request.close_connection = True
                return
            time.sleep(self.delay)


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def host(comfyui, hub, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.port}")
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    patch.delenv("HF_HUB_OFFLINE", raising=False)
    try:
        with ComfyServer(comfyui, tmp_path_factory.mktemp("fetch")) as running:
            yield running
    finally:
        patch.undo()


@pytest.fixture
def fresh(hub, host):
    """No release on disk, and a hub without faults that has the three of them."""
    import shutil

    hub.repos = {
        LORA: {"pytorch_lora_weights.safetensors": LARGE, "README.md": b"# card", "extra.bin": b"pickle"},
        PIPELINE: {
            "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
            "whole.safetensors": b"a single-file copy",
            "tokenizer/merges.txt": b"a b\n",
            **{f"{part}/config.json": b'{"part": "%s"}' % part.encode() for part in PARTS},
            **{f"{part}/model.safetensors": part.encode() * 1000 for part in PARTS},
            "unet/model.fp16.safetensors": b"half",
            "unet/model.bin": b"pickle",
        },
    }
    hub.commit, hub.cuts, hub.delay, hub.claimed, hub.corrupt, hub.requests = COMMIT, 0, 0.0, {}, b"", []
    hub.failing, hub.card = 0, {"license": "apache-2.0"}
    for folder in ("loras", "diffusers"):
        shutil.rmtree(host.folder / "models" / folder, ignore_errors=True)
    return hub


def graph(release: str) -> dict:
    return {"1": {"class_type": "SPLAMFetch", "inputs": {"release": release}}}


def fetched(host, release: str) -> str:
    """What the node shows. However it ends, the server's own paths are not in it."""
    try:
        (text,) = host.run(graph(release), timeout=300)["outputs"]["1"]["text"]
    except ServerError as error:
        assert str(host.folder) not in str(error)
        raise
    return text


def lora(host):
    return host.folder / "models" / "loras" / "slam-lora-sdxl.safetensors"


def part_file(host):
    return host.folder / "models" / "loras" / "slam-lora-sdxl.download" / "pytorch_lora_weights.safetensors.part"


def test_what_it_does_is_told_to_the_page_that_queued_it_alone(fresh, host):
    async def listen() -> dict[str, list[bytes]]:
        told: dict[str, list[bytes]] = {"mine": [], "theirs": []}
        async with aiohttp.ClientSession(host.url) as session:
            pages = {name: await session.ws_connect("/ws", params={"clientId": name}) for name in told}
            await session.post("/prompt", json={"prompt": graph(LORA), "client_id": "mine"})
            while True:
                message = await pages["mine"].receive(timeout=300)
                if message.type is aiohttp.WSMsgType.BINARY:
                    told["mine"].append(message.data)
                elif message.json()["type"] == "execution_success":
                    break
            with contextlib.suppress(asyncio.TimeoutError):  # on Python 3.10 another class than the built-in
                while True:
                    message = await pages["theirs"].receive(timeout=1)
                    if message.type is aiohttp.WSMsgType.BINARY:
                        told["theirs"].append(message.data)
        return told

    told = asyncio.run(listen())
    assert any(b"slam-lora-sdxl" in message or b"licence" in message for message in told["mine"])
    assert not told["theirs"]


def test_a_lora_arrives_whole_and_is_not_asked_for_again(fresh, host):
    text = fetched(host, LORA)
    assert lora(host).read_bytes() == LARGE
    assert "licence: apache-2.0" in text and f"revision: {COMMIT}" in text
    assert "loras/slam-lora-sdxl.safetensors" in text and str(host.folder) not in text
    assert sorted(file.name for file in lora(host).parent.iterdir()) == [
        "slam-lora-sdxl.safetensors",
        "slam-lora-sdxl.splam-fetch.json",
    ]
    record = json.loads((lora(host).parent / "slam-lora-sdxl.splam-fetch.json").read_text())
    assert record["revision"] == COMMIT
    fresh.requests.clear()
    assert "already here" in fetched(host, LORA)
    assert fresh.requests == []


def test_of_a_pipeline_only_safetensors_and_its_small_files_come(fresh, host):
    fetched(host, PIPELINE)
    folder = host.folder / "models" / "diffusers" / "slam-sd1.5"
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    left_out = {"whole.safetensors", "unet/model.fp16.safetensors", "unet/model.bin"}
    assert found == set(fresh.repos[PIPELINE]) - left_out | {"splam-fetch.json"}
    for name in found - {"splam-fetch.json"}:
        assert (folder / name).read_bytes() == fresh.repos[PIPELINE][name]
    assert not folder.with_name("slam-sd1.5.download").exists()
    # A file that was lost comes again, from the commit that the rest is of.
    (folder / "vae" / "config.json").unlink()
    fresh.requests.clear()
    fetched(host, PIPELINE)
    assert [path for path, _ in fresh.requests] == [f"/{PIPELINE}/resolve/{COMMIT}/vae/config.json"]


def test_a_cut_connection_is_taken_up_where_it_broke(fresh, host):
    fresh.cuts = 1
    fetched(host, LORA)
    assert lora(host).read_bytes() == LARGE
    ranges = [wanted for path, wanted in fresh.requests if "/resolve/" in path]
    assert ranges[0] is None and ranges[1].startswith("bytes=") and int(ranges[1][6:-1]) > 10_000_000


def test_a_later_run_goes_on_at_the_same_commit(fresh, host):
    """The connection dies for good in mid-file; the next run asks for the rest, though something newer is out."""
    fresh.cuts, fresh.cut_after = 100, 11_000_000
    prompt = host.queue(graph(LORA))
    wait_until(lambda: part_file(host).is_file() and part_file(host).stat().st_size > 10_000_000)
    fresh.stop()
    try:
        with pytest.raises(ServerError, match=r"the hub cannot be reached.*run SPLAM Fetch again"):
            host.wait(prompt, timeout=120)
        kept = part_file(host).stat().st_size
        assert kept > 10_000_000 and not lora(host).exists()
    finally:
        fresh.cuts, fresh.cut_after = 0, 15_000_000
        fresh.start()
    fresh.requests.clear()
    fetched(host, LORA)
    assert lora(host).read_bytes() == LARGE
    assert fresh.requests == [(f"/{LORA}/resolve/{COMMIT}/pytorch_lora_weights.safetensors", f"bytes={kept}-")]


def test_a_wrong_hash_is_named_and_nothing_is_kept(fresh, host):
    fresh.corrupt = b"!"
    with pytest.raises(ServerError, match=r"pytorch_lora_weights\.safetensors of .* is damaged: expected .* sha256"):
        fetched(host, LORA)
    assert not lora(host).exists() and not part_file(host).exists()
    fresh.corrupt = b""
    fetched(host, LORA)
    assert lora(host).read_bytes() == LARGE


def test_what_came_of_a_file_that_ends_too_soon_is_kept(fresh, host):
    fresh.claimed = {"pytorch_lora_weights.safetensors": len(LARGE) + 5}
    with pytest.raises(ServerError, match=rf"found none, having {len(LARGE)} bytes\. What has arrived is kept"):
        fetched(host, LORA)
    assert part_file(host).read_bytes() == LARGE and not lora(host).exists()


def test_offline(fresh, host):
    fresh.stop()
    try:
        with pytest.raises(ServerError, match=r"SPLAM Fetch: .*the hub cannot be reached"):
            fetched(host, LORA)
    finally:
        fresh.start()


def test_a_release_that_is_gone(fresh, host):
    del fresh.repos[LORA]
    with pytest.raises(ServerError, match=r"does not give out this repository.*HTTP 404"):
        fetched(host, LORA)


def test_no_space(fresh, host):
    fresh.claimed = {"pytorch_lora_weights.safetensors": 10**16}
    with pytest.raises(ServerError, match=r"needs 10000000\.00 GB more, and the disk of .* has .* GB free"):
        fetched(host, LORA)
    assert [path for path, _ in fresh.requests if "/resolve/" in path] == []


def test_cancel_keeps_what_has_come(fresh, host):
    fresh.delay = 0.2
    prompt = host.queue(graph(LORA))
    wait_until(lambda: part_file(host).is_file() and part_file(host).stat().st_size > 0)
    host.post("/interrupt", {})
    with pytest.raises(ServerError, match="interrupted"):
        host.wait(prompt, timeout=30)
    kept = part_file(host).stat().st_size
    assert 0 < kept < len(LARGE) and not lora(host).exists()
    fresh.delay = 0.0
    fetched(host, LORA)
    assert lora(host).read_bytes() == LARGE
    assert fresh.requests[-1][1] == f"bytes={kept}-"


def test_a_file_of_the_users_is_never_overwritten(fresh, host):
    lora(host).parent.mkdir(parents=True)
    lora(host).write_bytes(b"mine")
    with pytest.raises(ServerError, match=r"slam-lora-sdxl\.safetensors: this file is not the release's"):
        fetched(host, LORA)
    assert lora(host).read_bytes() == b"mine"


def test_a_pipeline_of_pickles_is_refused_before_it_comes(fresh, host):
    files = fresh.repos[PIPELINE]
    fresh.repos[PIPELINE] = {name.replace("vae/model.safetensors", "vae/model.bin"): files[name] for name in files}
    with pytest.raises(ServerError, match=r"has no \.safetensors file in vae/"):
        fetched(host, PIPELINE)
    assert [path for path, _ in fresh.requests if "/resolve/" in path] == []


@pytest.mark.parametrize(
    "name", ["../../evil.json", "/etc/evil.json", "unet\\..\\evil.json", "C:evil.json", "a\0evil.json"]
)
def test_names_from_the_hub_stay_in_the_folder(fresh, host, name):
    fresh.repos[PIPELINE][name] = b"{}"
    with pytest.raises(ServerError, match="nothing was downloaded"):
        fetched(host, PIPELINE)
    assert not list(host.folder.rglob("evil.json"))


def test_a_record_that_names_places_outside_is_not_followed(fresh, host):
    """A model folder may be shared, and its small files written by others."""
    staging = host.folder / "models" / "diffusers" / "slam-sd1.5.download"
    staging.mkdir(parents=True)
    facts = {"size": 2, "kind": "sha256", "hash": hashlib.sha256(b"{}").hexdigest()}
    record = {"revision": COMMIT, "licence": None, "files": {"../../../evil.json": facts}}
    (staging / "splam-fetch.json").write_text(json.dumps(record))
    fetched(host, PIPELINE)
    assert not list(host.folder.rglob("evil.json")) and (staging.parent / "slam-sd1.5" / "model_index.json").is_file()


@pytest.mark.parametrize("record", [b"[", b"[1]", b'{"revision": 1, "files": {"a": 2}}', b"[" * 100_000])
def test_a_record_of_another_kind_is_none(fresh, host, record):
    lora(host).parent.mkdir(parents=True)
    lora(host).with_name("slam-lora-sdxl.splam-fetch.json").write_bytes(record)
    fetched(host, LORA)
    assert lora(host).read_bytes() == LARGE


def test_a_server_error_is_said_and_the_next_run_ends_well(fresh, host):
    fresh.failing = 1000
    with pytest.raises(ServerError, match=r"SPLAM Fetch: .*(HTTP 500|cannot be reached).*run SPLAM Fetch again"):
        fetched(host, LORA)
    fresh.failing = 0
    fetched(host, LORA)
    assert lora(host).read_bytes() == LARGE


def test_a_model_card_is_a_word_on_the_node(fresh, host):
    fresh.card = {"license": ["x" * 100_000, "\n\n"]}
    text = fetched(host, LORA)
    assert len(text) < 1000 and "licence: ['xxx" in text


def test_an_unknown_release_is_refused(fresh, host):
    with pytest.raises(ServerError, match=r"there is no release|Value not in list"):
        fetched(host, "someone/else")
    assert fresh.requests == []


def wait_until(true, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)
