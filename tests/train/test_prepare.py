"""Prepared sets: the same samples as on the way, whoever made them and however often it was interrupted."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load

from training import distill, evaluate
from training import prepare as prepare_command
from training.data import DataOptions, at_resolution, open_data
from training.data.latents import Encoder
from training.models.load import load_pipeline
from training.prepare import Preparation, parse, share
from training.prepare import prepare as prepare_as_told

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.train
COUNT = 14


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    return load_pipeline(tiny_pipeline)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(COUNT):
        size = (128, 128) if number % 3 else (80, 160)
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture number {number}")
    return folder


def prepare(folder, pictures, pipeline, rank=0, world=1, shard_size=4, **options):
    options = at_resolution(DataOptions(num_held_out=2, **options), pipeline)
    work = Preparation(str(pictures), pipeline, options, folder, shard_size, rank, world)
    list(work.run())
    return work


def command(teacher, pictures, folder, *more):
    words = ["--teacher", teacher, "--data", pictures, "--output-dir", folder, "--shard-size", "2", *more]
    return [sys.executable, str(ROOT / "training" / "prepare.py"), *map(str, words)]


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_shares_of_several_processes_are_the_whole(pipeline, pictures, tmp_path):
    options = {"flip": True, "buckets": True}
    assert prepare(tmp_path / "one", pictures, pipeline, **options).missing() == 0
    first = prepare(tmp_path / "two", pictures, pipeline, 1, 2, **options)
    assert first.missing() == 2
    with pytest.raises(ValueError, match="is not finished: 2 of 4 parts are missing"):
        open_data(str(tmp_path / "two"), pipeline, DataOptions(), 2, 0)
    prepare(tmp_path / "two", pictures, pipeline, 0, 2, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_training_on_a_prepared_set_calls_no_encoder(pipeline, pictures, tmp_path, monkeypatch):
    prepare(tmp_path / "set", pictures, pipeline, cache_dtype="fp32")
    wanted = open_data(str(pictures), pipeline, DataOptions(cache_dir=tmp_path / "c", cache_dtype="fp32"), 4, 0)
    expected = wanted.batch(range(12))
    data = open_data(str(tmp_path / "set"), pipeline, DataOptions(num_held_out=2, caption_drop=0.2), 4, 0)
    assert not data.needs_encoders and wanted.needs_encoders
    for name in ("encode", "latents", "unconditional"):
        monkeypatch.setattr(type(pipeline), name, lambda *_: pytest.fail("encoded"))
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded"))
    latents, conditioning = data.batch(range(12))
    assert latents.shape == (12, 4, 16, 16) and conditioning["encoder_hidden_states"].shape == (12, 77, 32)
    distances = (latents[:, None] - expected[0][None]).abs().amax((2, 3, 4))  # the same samples in another order
    assert (distances.amin(1) < 1e-5).sum() >= 10
    assert f"{COUNT - 2} samples, 2 held out" in data.describe()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_set_made_in_half_precision_is_of_the_same_teacher(tiny_pipeline, pipeline, pictures, tmp_path, dtype):
    arguments = command(tiny_pipeline, pictures, tmp_path / "set", "--dtype", dtype, "--device", "cpu")[2:]
    prepare_as_told(*parse(arguments))
    latents, conditioning = open_data(str(tmp_path / "set"), pipeline, DataOptions(), 4, 0).batch(range(12))
    wanted = open_data(str(pictures), pipeline, DataOptions(cache_dir=tmp_path / "cache"), 4, 0).batch(range(12))
    for one in latents:
        assert (wanted[0] - one).abs().amax((1, 2, 3)).min() < 0.1 * one.std()
    assert latents.isfinite().all() and conditioning["encoder_hidden_states"].isfinite().all()


def test_kill_9_keeps_what_was_finished(tiny_pipeline, pipeline, pictures, tmp_path):
    folder, whole = tmp_path / "set", tmp_path / "whole"
    # Slow pictures, so that there is a middle to be killed in.
    slow = "import time, runpy, sys, training.data.latents as l; load = l.load_picture\n"
    slow += "l.load_picture = lambda p: (time.sleep(0.2), load(p))[1]\n"
    slow += (
        f"sys.argv = {command(tiny_pipeline, pictures, folder)[1:]!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], cwd=ROOT, start_new_session=True)
    try:
        deadline = time.time() + 600
        while len(list(folder.glob("*.shards.json"))) < 2 and process.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "it finished before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    parts = {file.name.partition(".")[0] for file in folder.glob("*.shards.json")}
    finished = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.tar") if f.name.partition("-")[0] in parts}
    assert 2 <= len(finished) < COUNT // 2
    result = subprocess.run(
        command(tiny_pipeline, pictures, folder), capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert f"finished: {COUNT} samples" in result.stdout
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    prepare(whole, pictures, pipeline, shard_size=2)
    made = {name: content for name, content in contents(folder).items() if not name.endswith(".partial")}
    assert made == contents(whole)


def test_a_part_of_several_shards_goes_on_after_the_last_whole_one(pipeline, pictures, tmp_path):
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:  # compressed: read from the front, as a URL is
        for file in sorted(pictures.iterdir()):
            archive.add(file, file.name)
    options = at_resolution(DataOptions(), pipeline)

    def work(folder):
        return Preparation(str(tmp_path / "all.tar.gz"), pipeline, options, folder, 4)

    begun = work(tmp_path / "set").run()
    shards = [next(begun), next(begun)]
    begun.close()
    before = {shard: (tmp_path / "set" / f"{shard}.tar").stat().st_mtime_ns for shard in shards}
    again = work(tmp_path / "set")
    assert again.missing() == 1 and len(list(again.run())) == 4 and again.missing() == 0
    assert again.made == COUNT - 8 and again.kept == COUNT
    assert {shard: (tmp_path / "set" / f"{shard}.tar").stat().st_mtime_ns for shard in shards} == before
    list(work(tmp_path / "whole").run())
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_half_written_shards_count_for_nothing(pipeline, pictures, tmp_path):
    folder = tmp_path / "set"
    prepare(folder, pictures, pipeline)
    expected = contents(folder)
    (folder / "000001.shards.json").unlink()
    (folder / "000001-00000.json").unlink()
    (folder / "000001-00000.tar").write_bytes(b"half")
    (folder / "000002-00000.tar.1.partial").write_bytes(b"half")
    prepare(folder, pictures, pipeline)
    (folder / "000002-00000.tar.1.partial").unlink()
    assert contents(folder) == expected


def test_shards_are_webdatasets(pipeline, pictures, tmp_path):
    prepare(tmp_path / "set", pictures, pipeline)
    tars = [str(file) for file in sorted((tmp_path / "set").glob("*.tar"))]
    rows = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(rows) == COUNT
    for row in rows:
        said, sample = json.loads(row["json"]), load(row["safetensors"])
        assert said["caption"] == f"picture number {int(said['name'][:2])}"
        told = pipeline.encode([said["caption"]])["encoder_hidden_states"][0]
        assert sample["latents"].shape == (1, 4, 16, 16)
        assert torch.allclose(sample["encoder_hidden_states"].float(), told, atol=5e-3)


def test_what_does_not_belong_together_is_refused(tiny_pipeline, pipeline, pictures, tmp_path):
    folder = tmp_path / "set"
    prepare(folder, pictures, pipeline)
    with pytest.raises(ValueError, match=r"begun with other settings or data: .*crop center \(now random\)"):
        prepare(folder, pictures, pipeline, crop="random")
    (pictures / "00.txt").write_text("another caption")
    with pytest.raises(ValueError, match="begun with other settings or data: source"):
        prepare(folder, pictures, pipeline)
    other = load_pipeline(tiny_pipeline)
    with torch.no_grad():
        other.text_encoder.get_input_embeddings().weight.add_(0.1)
    with pytest.raises(ValueError, match="prepared with another VAE or text encoder"):
        open_data(str(folder), other, DataOptions(), 2, 0)
    (folder / "000001-00000.tar").unlink()
    with pytest.raises(ValueError, match=r"000001-00000\.tar or \.json is gone"):
        open_data(str(folder), pipeline, DataOptions(), 2, 0)


def test_bad_pictures_are_in_the_report_and_too_many_stop_it(tiny_pipeline, pipeline, pictures, tmp_path):
    (pictures / "03.png").write_bytes((pictures / "03.png").read_bytes()[:3000])
    (pictures / "05.txt").unlink()
    run = [*command(tiny_pipeline, pictures, tmp_path / "set"), "--max_skipped_share", "0.1"]
    result = subprocess.run(run, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error:" in result.stderr and "2 of 14 records are bad" in result.stderr
    assert "03.png: damaged picture" in result.stderr and "05.png: no caption" in result.stderr
    again = prepare(tmp_path / "set", pictures, pipeline, shard_size=2)  # the share is no part of the cache's key
    assert (again.made, again.kept, len(again.skipped)) == (0, 12, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="its file systems take any name")
def test_a_name_that_is_no_utf_8_is_reported(tiny_pipeline, pictures, tmp_path):
    """The set was whole, and the command ended in an error of encoding instead of saying so."""
    Path(os.fsdecode(bytes(pictures) + b"/broken\xff.png")).write_bytes(b"nonsense")
    # In a process of its own: pytest cannot hand such a name on, which it would keep of the log.
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(
        command(tiny_pipeline, pictures, tmp_path / "set"), capture_output=True, text=True, env=strict
    )
    assert result.returncode == 0, result.stderr
    assert "skipped broken\\udcff.png: no caption" in result.stdout and "finished: " in result.stdout


def test_prompts_and_scenes_are_prepared_too(pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"picture {number}" for number in range(6)))
    for spec, count in ((tmp_path / "prompts.txt", 12), ("embedded", 8)):
        folder = tmp_path / f"set {count}"
        prepare(folder, spec, pipeline, images_per_prompt=2, num_scenes=6, prompt_steps=2)
        data = open_data(str(folder), pipeline, DataOptions(num_held_out=2), 4, 0)
        latents, _ = data.batch(range(8))
        assert latents.isfinite().all() and f"{count - 2} samples" in data.describe()


def test_flags_are_checked_and_take_underscores(monkeypatch, capsys):
    given, options = parse(["--teacher", "t", "--output_dir", "o", "--min_size", "64", "--flip", "--shard", "1/4"])
    assert (given.rank, given.world, options.min_size, options.flip) == (1, 4, 64, True)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert share(None) == (2, 8)
    for wrong in (["--shard", "4/4"], ["--shard-size", "0"], ["--caption-drop", "2"], ["--crop", "left"]):
        with pytest.raises(SystemExit):
            parse(["--teacher", "t", "--output-dir", "o", *wrong])
    assert "--shard must be i/n" in capsys.readouterr().err


def test_max_samples_are_spread_over_the_data_and_no_more(pipeline, pictures, tmp_path):
    """Of a folder sorted by subject the first would be of one; of many tars one each would be more."""
    work = prepare(tmp_path / "set", pictures, pipeline, max_samples=5)
    names = [row["name"] for index in map(json.loads, texts(tmp_path / "set")) for row in index["samples"]]
    data = open_data(str(pictures), pipeline, DataOptions(max_samples=5, cache_latents=False), 2, 0)
    wanted = sorted(data.source[number].name for number, _ in data._kept)
    assert work.kept == 5 and sorted(names) == wanted != [f"{number:02d}.png" for number in range(5)]
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar.gz", "w:gz") as archive:
            for file in sorted(pictures.iterdir())[8 * number : 8 * number + 8]:
                archive.add(file, file.name)
    stream = prepare(tmp_path / "streamed", tmp_path / "{0..2}.tar.gz", pipeline, max_samples=2)
    assert stream.kept == 2 and stream.missing() == 0


def texts(folder):
    return [file.read_text() for file in sorted(folder.glob("*-*.json"))]


def test_what_ends_a_command_is_said_in_a_sentence(monkeypatch, tmp_path, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "log.jsonl")
    for command, name, arguments in (
        (distill, "distill", ["--teacher", "embedded", "--output-dir", str(tmp_path)]),
        (evaluate, "evaluate", ["--model", "embedded-student"]),
        (prepare_command, "prepare", ["--teacher", "embedded", "--output-dir", str(tmp_path)]),
    ):
        for error, status, said in ((full, 1, "error: .*No space left"), (KeyboardInterrupt(), 130, "interrupted")):

            def ended(*_, error=error):
                raise error

            monkeypatch.setattr(command, name, ended)
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
            assert command.main() == status
            told = capsys.readouterr().err
            assert re.search(said, told) and ("kept" in told or name == "distill")
