"""A teacher is found where it lies, never fetched unasked, and fetched whole from a server that cuts connections."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from splam_core import fold_gamma, multiple_estimation, predict_epsilon, read_metadata
from training.models.architectures import ARCHITECTURES
from training.models.files import read_model, write_folder, write_single_file
from training.models.hub import command, lacking, weights_of
from training.models.load import load_pipeline
from training.models.sampling import generate
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


def in_another_process(code, cache, address="http://127.0.0.1:9"):
    """Run `code` with the Hugging Face cache at `cache` and the hub at `address`, both read when it is imported."""
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
from training.models import teachers
print(teachers.resolve({HOME!r}, download=True))
"""
PRESET = f"""
from dataclasses import replace
from training.models import teachers
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
    code = f"from training.models.load import load_pipeline; print(load_pipeline({HOME!r}).latent_shape)"
    result = in_another_process(code, tmp_path)
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


@pytest.mark.parametrize("content", [b'{"weight_map": {', b"\xff\xfe\x00", b"[]"])
def test_a_damaged_index_is_lacking(tiny_pipeline, tmp_path, content):
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, folder)
    (folder / "model_index.json").write_bytes(content)
    assert lacking(folder) == ["model_index.json"]
    shutil.copy(tiny_pipeline / "model_index.json", folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_bytes(content)
    assert lacking(folder) == ["unet/diffusion_pytorch_model.safetensors.index.json"]


def test_presets_are_the_papers_and_are_printed():
    sd15, sd21 = TEACHERS["sd15"], TEACHERS["sd21-base"]
    assert (sd15.skip, sd15.solver_skip, sd15.guidance_scale, sd15.loss_type) == (100, 20, 3.0, "huber")
    assert (sd21.skip, sd21.solver_skip, sd21.guidance_scale, sd21.loss_type) == (20, 20, 8.0, "l2")
    table = list_teachers()
    assert all(row.repo in table for row in TEACHERS.values())


def test_a_text_encoder_that_lacks_weights_is_refused(tiny_pipeline, tmp_path):
    """Never at random: what transformers warns of makes every picture wrong."""
    folder, name = tmp_path / "model", "text_encoder/model.safetensors"
    shutil.copytree(tiny_pipeline, folder)
    weights = load_file(folder / name)
    lacking = {key: weight for key, weight in weights.items() if "fc1" not in key}
    for names in (lacking, {f"encoder.{key}": weight for key, weight in weights.items()}):
        save_file(names, folder / name)
        with pytest.raises(ValueError, match=r"text_encoder lacks \d+ weights .*encoder\.layers\.0\.|embeddings"):
            load_pipeline(folder)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_of_both_transformers_are_read(tiny_pipeline, tmp_path, prefix):
    folder, name = tmp_path / "model", "text_encoder/model.safetensors"
    shutil.copytree(tiny_pipeline, folder)
    weights = {prefix + key.removeprefix("text_model."): w for key, w in load_file(folder / name).items()}
    save_file({**weights, f"{prefix}embeddings.position_ids": torch.arange(77)[None]}, folder / name)
    hashes = [load_pipeline(place).fingerprint() for place in (folder, tiny_pipeline)]
    assert hashes[0] == hashes[1]


def test_old_names_of_a_vaes_attention_are_read(tiny_pipeline, tmp_path):
    """diffusers before 0.15 wrote them, and Stable Diffusion 1.5's folder has them."""
    folder, name = tmp_path / "model", "vae/diffusion_pytorch_model.safetensors"
    shutil.copytree(tiny_pipeline, folder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, weight in load_file(folder / name).items():
        new = next((one for one in old if f".{one}." in key), None)
        renamed[key.replace(f".{new}.", f".{old[new]}.") if new else key] = weight
    assert any(".proj_attn." in key for key in renamed)
    save_file(renamed, folder / name)
    hashes = [load_pipeline(place).fingerprint() for place in (folder, tiny_pipeline)]
    assert hashes[0] == hashes[1]


# --- Prediction types and schedules ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zero_snr(tiny_v, tmp_path_factory):
    """A folder that predicts v on the schedule with zero terminal SNR."""
    folder = tmp_path_factory.mktemp("zero-snr") / "pipeline"
    shutil.copytree(tiny_v, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return folder


@pytest.fixture
def marked(tiny_pipeline, tmp_path):
    """marked(*keys, scheduler): a single file that says what it predicts by these keys alone, as NoobAI's do."""

    def write(*keys, **settings):
        write_single_file(read_model(tiny_pipeline), tmp_path / "plain.safetensors", "plain")
        weights, metadata = load_file(tmp_path / "plain.safetensors"), read_metadata(tmp_path / "plain.safetensors")
        kept = {key: value for key, value in metadata.items() if key.startswith("splam.")} | settings
        if not settings:
            kept.pop("splam.scheduler")
        file = tmp_path / "marked.safetensors"
        save_file(weights | {key: torch.zeros(0) for key in keys}, file, kept)
        return file

    return write


def test_zero_terminal_snr_is_read_from_keys_and_from_folders(zero_snr, marked):
    expected = DDIMScheduler.from_pretrained(zero_snr, subfolder="scheduler").alphas_cumprod
    for place in (zero_snr, marked("v_pred", "ztsnr")):
        pipeline = load_pipeline(place)
        assert pipeline.prediction_type == "v_prediction" and pipeline.scheduler_config["rescale_betas_zero_snr"]
        assert torch.allclose(pipeline.schedule.alphas_cumprod, expected, atol=1e-6)
    assert load_pipeline(marked("v_pred")).schedule.alphas_cumprod[-1] > 1e-3


def test_zero_terminal_snr_survives_every_form(zero_snr, marked, tmp_path):
    for place in (zero_snr, marked("v_pred", "ztsnr")):
        write_folder(read_model(place), tmp_path / "folder")
        write_single_file(read_model(tmp_path / "folder"), tmp_path / "file.safetensors", "file")
        assert {"v_pred", "ztsnr"} < load_file(tmp_path / "file.safetensors").keys()
        for form in (tmp_path / "folder", tmp_path / "file.safetensors"):
            pipeline = load_pipeline(form)
            assert pipeline.prediction_type == "v_prediction" and pipeline.schedule.has_zero_terminal_snr


@torch.no_grad()
def test_zero_terminal_snr_is_sampled_and_solved_as_diffusers_does(zero_snr):
    pipeline = load_pipeline(zero_snr)
    ddim = DDIMScheduler.from_pretrained(zero_snr, subfolder="scheduler")
    ddim.set_timesteps(10)
    embeds = pipeline.encode(["a doughnut on a red background"])["encoder_hidden_states"]
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([999])

    def v(x, t):
        return pipeline.unet(x, t, embeds).sample

    expected = ddim.step(v(x, t), 999, x).prev_sample

    def teacher(x, t):
        alpha, sigma = pipeline.schedule.alpha(t), pipeline.schedule.sigma(t)
        return predict_epsilon(v(x, t), x, alpha, sigma, "v_prediction")

    found = multiple_estimation(teacher, x, t, 100, 100, pipeline.schedule)
    assert (found - expected).abs().max() < 1e-3
    second = multiple_estimation(teacher, x, t, 100, 50, pipeline.schedule, solver="dpm-solver++")
    assert second.isfinite().all() and (second - found).abs().max() < 1
    few = [
        generate(pipeline, ["a doughnut on a red background"], [1], sampler, steps=2) for sampler in ("splam", "lcm")
    ]
    assert (few[0] - few[1]).abs().max() < 5e-3 * few[1].std()
    assert (
        generate(pipeline, ["a doughnut on a red background"], [1], "ddim", steps=5, guidance_scale=3.0)
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("more", [(), ("--lora", "--lora-rank", 2, "--recipe", "paper")])
def test_zero_terminal_snr_is_trained_judged_and_exported(small, zero_snr, tmp_path, more):
    small(zero_snr, tmp_path, 2, "--validation-samples", 4, *more)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 100 for line in lines)
    scores = json.loads((tmp_path / "validation.jsonl").read_text().splitlines()[-1])
    assert 0 < scores["validation/target/endpoint_error_999"] < 100
    student = load_pipeline(tmp_path)
    assert student.prediction_type == "v_prediction" and student.schedule.has_zero_terminal_snr
    if not more:
        assert {"v_pred", "ztsnr"} < load_file(tmp_path / "student.splam.safetensors").keys()


@pytest.mark.parametrize(
    ("keys", "settings", "message"),
    [
        (("edm_mean", "edm_std"), {}, "continuous noise levels"),
        (("edm_vpred.sigma_max",), {}, "continuous noise levels"),
        ((), {"splam.scheduler": json.dumps({"_class_name": "EDMEulerScheduler"})}, "continuous noise levels"),
        (("ztsnr",), {}, "zero terminal SNR"),
        ((), {"splam.scheduler": json.dumps({"prediction_type": "sample"})}, "predicts 'sample'"),
    ],
)
def test_other_parametrisations_are_refused(marked, keys, settings, message):
    with pytest.raises(ValueError, match=rf"marked\.safetensors: .*{message}"):
        load_pipeline(marked(*keys, **settings))


def test_a_file_that_contradicts_itself_warns_and_says_which_is_believed(marked):
    with pytest.warns(UserWarning, match=r"marked\.safetensors: the key 'v_pred' says v_prediction, .* is believed"):
        pipeline = load_pipeline(marked("v_pred", **{"splam.scheduler": json.dumps(ARCHITECTURES["sd1"].scheduler)}))
    assert pipeline.prediction_type == "v_prediction"


def test_a_projection_in_a_single_file_is_told_what_is_asked(tiny_pipeline, tmp_path):
    model = read_model(tiny_pipeline)
    projection = 0.2 * torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    write_single_file(
        replace(model, unet={**model.unet, "time_embedding.cond_proj.weight": projection}),
        tmp_path / "lcm.safetensors", "lcm",
    )  # fmt: skip
    name = "time_embedding.linear_1.bias"
    biases = [
        load_pipeline(tmp_path / "lcm.safetensors", embedded=one).unet.state_dict()[name] for one in (8.5, "zero")
    ]
    expected = fold_gamma({**model.unet, "time_embedding.cond_proj.weight": projection}, 8.5)[0][name]
    assert torch.equal(biases[0], expected) and torch.equal(biases[1], model.unet[name])


# --- What is no teacher ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "kind"), [(9, "inpainting"), (8, "InstructPix2Pix")])
def test_a_unet_that_reads_more_than_latents_is_refused(tiny_pipeline, tmp_path, channels, kind):
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline, folder)
    config, name = folder / "unet" / "config.json", "unet/diffusion_pytorch_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": channels}))
    weights = load_file(folder / name)
    weights["conv_in.weight"] = torch.randn(32, channels, 3, 3)
    save_file(weights, folder / name)
    with pytest.raises(ValueError, match=rf"its UNet reads {channels} channels.*{kind}"):
        load_pipeline(folder)
    write_single_file(read_model(folder), tmp_path / "file.safetensors", "file")
    with pytest.raises(ValueError, match=rf"its UNet reads {channels} channels.*{kind}"):
        load_pipeline(tmp_path / "file.safetensors")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "mid_block.resnets.0.conv1.weight", float("nan")),
        ("unet", "conv_out.bias", float("-inf")),
        ("vae", "decoder.conv_in.bias", float("nan")),
        ("text_encoder", "final_layer", float("inf")),
    ],
)
def test_a_nan_is_named_before_training(tiny_pipeline, tmp_path, part, key, value):
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline, folder)
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    key = next(name for name in weights if key in name)
    weights[key].view(-1)[3] = value
    save_file(weights, file)
    with pytest.raises(ValueError, match=rf"{part}: .*{re.escape(key.removeprefix('text_model.'))} holds NaN"):
        load_pipeline(folder)


def test_old_single_files_have_no_text_model_in_clips_keys(tiny_pipeline, tmp_path):
    write_single_file(read_model(tiny_pipeline), tmp_path / "new.safetensors", "new")
    weights, metadata = load_file(tmp_path / "new.safetensors"), read_metadata(tmp_path / "new.safetensors")
    prefix = "cond_stage_model.transformer."
    old = {key.replace(f"{prefix}text_model.", prefix): weight for key, weight in weights.items()}
    save_file(old, tmp_path / "old.safetensors", metadata)
    hashes = [load_pipeline(tmp_path / name).fingerprint() for name in ("old.safetensors", "new.safetensors")]
    assert hashes[0] == hashes[1]


def test_a_pipeline_without_a_scheduler_is_refused(tiny_pipeline, tmp_path):
    shutil.copytree(tiny_pipeline, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"expected scheduler/scheduler_config\.json"):
        load_pipeline(tmp_path / "model")
