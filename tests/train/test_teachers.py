"""A teacher is found where it lies, never fetched unasked, and fetched whole from a server that cuts connections."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from training.models.hub import command, lacking, weights_of
from training.models.teachers import EMBEDDED, TEACHERS, list_teachers, resolve

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.train
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 65536
HOME, MIRROR = "someone/tiny", "someone-else/tiny"


@contextmanager
def hub(repositories, cuts=0, suffix=".safetensors"):
    """A Hugging Face hub of {id: folder}; the first `cuts` transfers of unet weights end in the middle.

    Yields (address, log of (method, path, Range header)).
    """
    log, remaining = [], Counter({"cuts": cuts})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _answer(self, status, body=b"", **headers):
            self.send_response(status)
            for key, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            log.append((self.command, path, self.headers.get("Range")))
            for repo, folder in repositories.items():
                files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
                names = {file.relative_to(folder).as_posix(): file for file in files}
                if path.startswith(f"/api/models/{repo}/tree/"):
                    rows = [
                        {"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file)}
                        for name, file in names.items()
                    ]
                    return self._answer(200, json.dumps(rows).encode(), Content_Type="application/json")
                if path == f"/api/models/{repo}" or path.startswith(f"/api/models/{repo}/revision/"):
                    info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                    return self._answer(200, json.dumps(info).encode(), Content_Type="application/json")
                _, _, name = path.removeprefix(f"/{repo}/resolve/").partition("/")
                if path.startswith(f"/{repo}/resolve/") and name in names:
                    return self._file(names[name], name)
            return self._answer(404, b"{}", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def _file(self, file, name):
            content, start = file.read_bytes(), 0
            if wanted := self.headers.get("Range"):
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            body = content[start:]
            cut = self.command == "GET" and name.startswith("unet/") and name.endswith(suffix) and remaining["cuts"] > 0
            self.send_response(206 if start else 200)
            for key, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "HEAD":
                return
            if cut:
                remaining["cuts"] -= 1
                body, self.close_connection = body[: len(body) // 2], True
            self.wfile.write(body)
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        server.server_close()


def _oid(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


# teachers.py takes only names from pipeline.py, whose libraries are slow to import.
LIGHT = """
import sys, types
sys.modules["training.models.pipeline"] = types.SimpleNamespace(NAMED={})
"""


def in_another_process(code, cache, address="http://127.0.0.1:9", light=True):
    """Run `code` with the Hugging Face cache at `cache` and the hub at `address`, both read when it is imported."""
    code = LIGHT * light + code
    environment = os.environ | {
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    for name in [name for name in environment if name.lower().endswith("_proxy")]:
        environment.pop(name)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", env=environment
    )


# The hub's client writes to disk a chunk at a time: 10 MB, more than the whole of this pipeline.
FETCH = f"""
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}
from training import teachers
print(teachers.resolve({HOME!r}, download=True))
"""
PRESET = f"""
from dataclasses import replace
from training import teachers
teachers.TEACHERS["tiny"] = replace(teachers.TEACHERS["sd15"], repo={HOME!r}, mirror={MIRROR!r}, formerly=None)
"""


def test_names_files_and_folders_resolve_without_a_hub(tiny_pipeline, tmp_path):
    assert resolve("embedded") == EMBEDDED and resolve(str(tiny_pipeline)) == tiny_pipeline
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    assert resolve(str(single)) == single
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.ckpt is a pickle.*expected a \.safetensors"):
        resolve(str(tmp_path / "model.ckpt"))
    with pytest.raises(FileNotFoundError, match="holds no model: expected"):
        resolve(str(tmp_path / "nothing" / "here"))


def test_missing_presets_name_command_size_home_and_mirror_and_ask_no_server(tmp_path):
    names = [name for name in TEACHERS if name != "embedded"]
    code = f"""
from training.models.teachers import resolve
for name in {names!r}:
    try:
        resolve(name)
    except FileNotFoundError as error:
        print(error, end="\\0")
"""
    with hub({}) as (address, log):
        result = in_another_process(code, tmp_path, address)
    messages = result.stdout.split("\0")[:-1]
    assert len(messages) == len(names), result.stderr
    for name, message in zip(names, messages, strict=True):
        row = TEACHERS[name]
        assert f"{row.gigabytes:g} GB" in message and "--download-teacher" in message
        for home in filter(None, (row.repo, row.mirror)):
            assert f"hf download {home} " in message
    assert log == []


def test_a_cut_connection_is_resumed_where_it_broke(tiny_pipeline, tmp_path):
    (tiny_pipeline / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    try:
        with hub({HOME: tiny_pipeline}, cuts=2) as (address, log):
            result = in_another_process(FETCH, tmp_path, address)
    finally:
        (tiny_pipeline / "unet" / "diffusion_pytorch_model.bin").unlink()
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip().splitlines()[-1])
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (tiny_pipeline / weights).read_bytes()
    ranges = [wanted for method, path, wanted in log if method == "GET" and path.endswith(weights)]
    kept = (tiny_pipeline / weights).stat().st_size // 2 // CHUNK * CHUNK
    assert kept > 0 and ranges[0] is None and ranges[1] == f"bytes={kept}-" and len(ranges) == 3
    assert not [path for _, path, _ in log if path.endswith(".bin")] and not list(folder.rglob("*.bin"))
    # Now it is here: without a server, and without being asked to download.
    code = f"from training.models.pipeline import load_pipeline; print(load_pipeline({HOME!r}).latent_shape)"
    result = in_another_process(code, tmp_path, light=False)
    assert "(4, 16, 16)" in result.stdout, result.stderr


def test_a_part_that_is_missing_is_named_and_fetched_by_the_second_call(tiny_pipeline, tmp_path):
    with hub({HOME: tiny_pipeline}, cuts=10**6) as (address, _):
        impatient = "import time; time.sleep = lambda _: None\n" + FETCH.replace(f"= {CHUNK}", "= 10**7")
        broken = in_another_process(impatient, tmp_path, address)
    assert broken.returncode == 1 and "could not be fetched" in broken.stderr
    asked = in_another_process(f"from training.models.teachers import resolve; resolve({HOME!r})", tmp_path)
    assert "lies in the local cache without unet/diffusion_pytorch_model.safetensors" in asked.stderr
    with hub({HOME: tiny_pipeline}) as (address, log):
        assert in_another_process(FETCH, tmp_path, address).returncode == 0
    fetched = {path.rpartition("/")[2] for method, path, _ in log if method == "GET" and "/resolve/" in path}
    assert "diffusion_pytorch_model.safetensors" in fetched


def test_the_mirror_serves_when_the_home_is_gone(tiny_pipeline, tmp_path):
    with hub({MIRROR: tiny_pipeline}) as (address, _):
        result = in_another_process(PRESET + "print(teachers.resolve('tiny', download=True))", tmp_path, address)
    assert result.returncode == 0, result.stderr
    assert "someone-else--tiny" in result.stdout
    with hub({}) as (address, _):
        code = PRESET + "teachers.resolve('tiny', download=True)"
        result = in_another_process(code, tmp_path / "other", address)
    assert HOME in result.stderr and MIRROR in result.stderr and "ConnectionError" in result.stderr


def test_the_command_in_the_message_does_fetch_it(tiny_pipeline, tmp_path):
    words = command(HOME).split()[1:]
    code = "import sys; from huggingface_hub.cli.hf import main; sys.argv = ['hf', *{!r}]; main()"
    with hub({HOME: tiny_pipeline}) as (address, _):
        result = in_another_process(code.format([word.strip("'") for word in words]), tmp_path, address)
    assert result.returncode == 0, result.stderr
    found = in_another_process(f"from training.models.teachers import resolve; print(resolve({HOME!r}))", tmp_path)
    assert found.returncode == 0, found.stderr


def test_whole_weights_are_preferred_to_shards_and_to_fp16():
    stem = "unet/diffusion_pytorch_model"
    shards = [f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors"]
    files = {f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.json", *shards}
    assert weights_of("unet", files) == [f"{stem}.safetensors"]
    assert weights_of("unet", files - {f"{stem}.safetensors"}) == [f"{stem}.safetensors.index.json", *shards]
    assert weights_of("unet", {f"{stem}.fp16.safetensors", f"{stem}.bin"}) == [f"{stem}.fp16.safetensors"]
    assert weights_of("unet", {f"{stem}.bin", f"{stem}.ckpt"}) == []


def test_a_whole_pipeline_lacks_nothing(tiny_pipeline):
    assert lacking(tiny_pipeline) == [] == lacking(EMBEDDED)


def test_presets_are_the_papers_and_are_printed():
    sd15, sd21 = TEACHERS["sd15"], TEACHERS["sd21-base"]
    assert (sd15.skip, sd15.solver_skip, sd15.guidance_scale, sd15.loss_type) == (100, 20, 3.0, "huber")
    assert (sd21.skip, sd21.solver_skip, sd21.guidance_scale, sd21.loss_type) == (20, 20, 8.0, "l2")
    table = list_teachers()
    assert all(row.repo in table for row in TEACHERS.values())
