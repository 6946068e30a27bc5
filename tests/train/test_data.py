"""Every kind of data gives the same samples for the same index; what is bad is named, counted and left out."""

import io
import json
import re
import tarfile
import threading
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from splam_core import decisions
from splam_core.order import Order
from training.data import DataOptions, at_resolution, default_spec, open_data, samples
from training.data.base import sift
from training.data.images import aspect_buckets, crop, load_picture, nearest_bucket, picture_size
from training.data.latents import Encoder, teacher_latents
from training.data.prompts import compose
from training.data.samples import PROMPTS
from training.data.sources import Record, Skip, Stream, open_source
from training.data.streams import StreamData
from training.data.tars import members
from training.models.load import load_pipeline
from training.prepare import Preparation

pytestmark = pytest.mark.train
CAPTIONS = [f"a picture of number {number}" for number in range(12)]


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    return load_pipeline(tiny_pipeline)


@pytest.fixture(scope="module")
def reference(tiny_pipeline):
    return StableDiffusionPipeline.from_pretrained(tiny_pipeline)


@pytest.fixture
def options(tmp_path):
    def make(**changes):
        return DataOptions(**{"cache_dir": tmp_path / "cache", "num_held_out": 0, "cache_dtype": "fp32"} | changes)

    return make


def noise_picture(number, size=(128, 128)):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, form="PNG"):
    content = io.BytesIO()
    image.save(content, form)
    return content.getvalue()


def make_folder(folder, sizes=None):
    folder.mkdir(exist_ok=True)
    for number, caption in enumerate(CAPTIONS):
        noise_picture(number, sizes[number % len(sizes)] if sizes else (128, 128)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption + "\n")
    return folder


def make_tars(folder, count=2, columns=None):
    """The same pictures in tars of webdataset's convention."""
    folder.mkdir(exist_ok=True)
    per_tar = len(CAPTIONS) // count
    for tar in range(count):
        with tarfile.open(folder / f"part-{tar:03d}.tar", "w") as archive:
            for number in range(tar * per_tar, (tar + 1) * per_tar):
                fields = {"png": encoded(noise_picture(number)), "txt": CAPTIONS[number].encode()}
                if columns:
                    fields["json"] = json.dumps(columns(number)).encode()
                for field, content in fields.items():
                    member = tarfile.TarInfo(f"{number:02d}.{field}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def make_parquet(file, bad=()):
    import datasets

    pictures = [b"no picture" if n in bad else encoded(noise_picture(n)) for n in range(len(CAPTIONS))]
    table = {"image": [{"bytes": one, "path": None} for one in pictures], "text": CAPTIONS}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(file))
    return file


class Served:
    """A folder over HTTP on a free port; the first `cuts` answers end in the middle."""

    def __init__(self, folder, cuts=0):
        outer = self
        self.folder, self.cuts, self.ranges, self.busy = folder, cuts, [], 0

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                file = outer.folder / self.path.strip("/")
                if not file.is_file():
                    return self.send_error(404)
                wanted = self.headers.get("Range")
                outer.ranges.append(wanted)
                if outer.busy:
                    outer.busy -= 1
                    return self.send_error(429)
                first, _, last = (wanted or "bytes=0-")[6:].partition("-")
                content = file.read_bytes()[int(first) : int(last) + 1 if last else None]
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                cut, outer.cuts = outer.cuts > 0, outer.cuts - 1
                self.wfile.write(content[: len(content) // 2] if cut else content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def of_captions(pipeline, captions):
    return pipeline.encode(list(captions))["encoder_hidden_states"]


def drawn(data, count):
    """The caption numbers of the first samples, by their embeddings."""
    return data.batch(range(count))[1]["encoder_hidden_states"]


def identify(embeds, table):
    return [int((table - one).abs().amax((1, 2)).argmin()) for one in embeds]


# What every kind of data is, against diffusers.


def test_a_sample_is_what_diffusers_encodes(pipeline, reference, options, tmp_path):
    folder = make_folder(tmp_path / "pictures")
    latents, conditioning = open_data(str(folder), pipeline, options(), 12, 0).batch(range(12))
    table, _ = reference.encode_prompt(CAPTIONS, "cpu", 1, False)
    numbers = identify(conditioning["encoder_hidden_states"], table)
    assert sorted(numbers) == list(range(12))
    assert torch.allclose(conditioning["encoder_hidden_states"], table[numbers], atol=1e-5)
    vae: AutoencoderKL = reference.vae
    for latent, number in zip(latents, numbers, strict=True):
        pixels = reference.image_processor.preprocess(noise_picture(number))
        with torch.no_grad():
            wanted = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        assert torch.allclose(latent, wanted[0], atol=1e-4)


def test_all_kinds_of_one_set_give_the_same_records(tmp_path):
    folder, tars = make_folder(tmp_path / "pictures"), make_tars(tmp_path / "tars")
    table = make_parquet(tmp_path / "table.parquet")
    with Served(tars) as server:
        specs = [
            folder,
            tars,
            tars / "part-{000..001}.tar",
            tars / "*.tar",
            table,
            server.address + "/part-{000..001}.tar",
        ]
        for spec in map(str, specs):
            source = open_source(spec)
            records = (
                list(source) if hasattr(source, "records") else [r for p in range(source.parts) for r in source.read(p)]
            )
            assert sorted(record.caption for record in records) == sorted(CAPTIONS), spec
            for record in records:
                number = CAPTIONS.index(record.caption)
                assert np.array_equal(load_picture(record.picture()), noise_picture(number)), spec


def test_a_stream_that_is_left_hangs_up(tmp_path, monkeypatch):
    answers, urlopen = [], urllib.request.urlopen
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *of, **more: answers.append(urlopen(*of, **more)) or answers[-1]
    )
    with Served(make_tars(tmp_path / "tars", count=1)) as server:
        files = members(server.address + "/part-000.tar")
        next(files)
        files.close()
    assert len(answers) == 1 and answers[0].closed


def test_a_streamed_dataset_of_picture_files_is_read(tmp_path, monkeypatch):
    """A folder of pictures on the Hub: its stream has their addresses alone."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    folder = make_folder(tmp_path / "pictures")
    with Served(folder) as server:
        places = [f"{server.address}/00.png", f"{server.address}/99.png"]
        places += [str(folder / "01.png"), f"file://{folder}/02.png"]
        rows = [{"image": place, "text": f"picture {number}"} for number, place in enumerate(places)]
        table = datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
        good, gone, *others = open_source("owner/name").read(0)
        assert np.array_equal(np.asarray(load_picture(good.picture())), np.asarray(noise_picture(0)))
        asked = len(server.ranges)
        assert good.picture().read() and len(server.ranges) == asked  # fetched once
        with pytest.raises(OSError):
            gone.picture()
    assert all(isinstance(one, Skip) and "is no file of the dataset" in one.reason for one in others)


def test_a_dataset_streams_as_it_reads(tmp_path):
    from training.data.sources import dataset

    file = make_parquet(tmp_path / "table.parquet", bad=[3])
    still, stream = (dataset("t", [str(file)], streaming=streaming) for streaming in (False, True))
    streamed = [record for part in range(stream.parts) for record in stream.read(part)]
    assert [record.caption for record in streamed] == [record.caption for record in still] == CAPTIONS
    assert isinstance(sift(streamed[3], DataOptions(resolution=128)), Skip)
    assert sift(streamed[4], DataOptions(resolution=128)) == (128, 128)


@pytest.mark.parametrize("w", [1.0, 5.0])
def test_the_teachers_pictures_are_diffusers_dpm_solver_plus_plus(pipeline, reference, w):
    scheduler = {**reference.scheduler.config, "timestep_spacing": "trailing"}
    reference.scheduler = DPMSolverMultistepScheduler.from_config(scheduler, algorithm_type="dpmsolver++")
    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(5))
    wanted = reference(
        "a lighthouse", latents=noise[None], guidance_scale=w, num_inference_steps=6, output_type="latent"
    ).images
    ours = teacher_latents(pipeline, ["a lighthouse"], [5], (128, 128), 6, w)
    assert (ours - wanted).abs().max() < 1e-4 * wanted.std()


def test_pictures_of_one_prompt_differ_by_their_own_noise(pipeline, options, tmp_path):
    (tmp_path / "prompts.txt").write_text("a lighthouse\nan old boat\n")
    wanted = options(images_per_prompt=2, prompt_steps=3, prompt_guidance_scale=2.0)
    latents, _ = open_data(str(tmp_path / "prompts.txt"), pipeline, wanted, 4, 0).batch(range(4))
    prompts = ["a lighthouse", "an old boat"] * 2
    assert torch.allclose(latents, teacher_latents(pipeline, prompts, [1, 2, 3, 4], (128, 128), 3, 2.0), atol=1e-4)
    assert (latents[:2] - latents[2:]).abs().amax((1, 2, 3)).min() > 0.1


def test_metadata_jsonl_captions_a_folder(tmp_path):
    for number in range(3):
        noise_picture(number).save(tmp_path / f"{number}.png")
    lines = [{"file_name": "0.png", "text": "first"}, {"file_name": "1.png", "title": "second"}, {"file_name": "9.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    found = {one.name: one for one in open_source(str(tmp_path)).records}
    assert found["0.png"].caption == "first"
    assert {name: one.reason for name, one in found.items() if isinstance(one, Skip)}.keys() == {
        "1.png", "2.png", "9.png", "metadata.jsonl:4"
    }  # fmt: skip
    assert next(r for r in open_source(str(tmp_path), "title").records if r.name == "1.png").caption == "second"


# Same index, same sample.


KINDS = ("folder", "tars", "stream", "prompts", "embedded")


@pytest.fixture
def spec_of(tmp_path):
    servers = []

    def make(kind):
        if kind == "folder":
            return str(make_folder(tmp_path / "pictures", sizes=[(128, 128), (96, 192), (128, 128), (200, 110)]))
        if kind == "prompts":
            (tmp_path / "prompts.txt").write_text("# mine\n\n" + "\n".join(CAPTIONS))
            return str(tmp_path / "prompts.txt")
        if kind == "embedded":
            return "embedded"
        tars = make_tars(tmp_path / "tars")
        if kind == "tars":
            return str(tars)
        servers.append(Served(tars))
        return servers[-1].address + "/part-{000..001}.tar"

    yield make
    for server in servers:
        server.__exit__()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_depend_on_neither_processes_nor_resume(kind, spec_of, pipeline, options, tmp_path):
    changes = {"buckets": kind == "folder", "flip": kind != "prompts", "caption_drop": 0.3, "num_scenes": 12}
    changes |= {"prompt_steps": 2, "num_held_out": 2}
    spec = spec_of(kind)

    def opened(cache):
        return open_data(spec, pipeline, options(cache_dir=tmp_path / cache, **changes), 4, 7)

    whole = opened("a")
    batches = [whole.batch(range(4 * n, 4 * n + 4)) for n in range(9)]  # three epochs and more
    for n in (8, 3, 4):  # resumed elsewhere, in another process, each of two processes taking half of a batch
        halves = [opened(cache).batch(range(4 * n + at, 4 * n + at + 2)) for cache, at in (("b", 2), ("c", 0))][::-1]
        assert torch.equal(torch.cat([half[0] for half in halves]), batches[n][0])
        for key, value in batches[n][1].items():
            assert torch.equal(torch.cat([half[1][key] for half in halves]), value)
    again = opened("a")  # from the cache, where there is one
    assert all(torch.equal(again.batch(range(4 * n, 4 * n + 4))[0], batches[n][0]) for n in range(9))
    held, embeds = whole.held_out(2)
    assert held.shape[0] == embeds["encoder_hidden_states"].shape[0] >= 1
    trained = torch.stack([one for latents, _ in batches for one in latents if one.shape == held.shape[1:]])
    assert all((trained - one).abs().amax((1, 2, 3)).min() > 1e-3 for one in held)


@pytest.mark.parametrize(("counts", "batch_size"), [([10], 4), ([7, 30, 2], 4), ([3], 8), ([1, 1], 16)])
def test_an_epoch_shows_every_sample_equally_often_and_batches_are_of_one_bucket(counts, batch_size):
    order, seen = Order(counts, batch_size, 3), Counter()
    epochs = 2 * batch_size
    total = epochs * sum(counts)
    for index in range(total):
        place = order.place(index)
        assert place[0] == order.place(index - index % batch_size)[0]
        seen[place] += 1
    assert len(seen) == sum(counts) and set(seen.values()) == {epochs}
    assert [order.place(index) for index in range(50)] == [Order(counts, batch_size, 3).place(i) for i in range(50)]


def test_a_second_round_comes_in_another_order():
    order = Order([64], 4, 0)
    rounds = [[order.place(64 * turn + at)[1] for at in range(64)] for turn in range(3)]
    assert rounds[0] == list(range(64)) and rounds[1] != rounds[0] and rounds[1] != rounds[2]


def test_flips_and_dropped_captions_come_at_their_rates_and_leave_the_rest(pipeline, options, tmp_path):
    draws = torch.tensor([decisions(3, index) for index in range(2000)])
    assert (draws.mean(0) - 0.5).abs().max() < 0.03 and (draws < 0.1).float().mean(0).sub(0.1).abs().max() < 0.02
    folder = str(make_folder(tmp_path / "pictures"))
    plain = open_data(folder, pipeline, options(), 4, 1)
    changed = open_data(folder, pipeline, options(flip=True, caption_drop=0.5), 4, 1)
    nothing = of_captions(pipeline, [""])[0]
    kinds = Counter()
    for index in range(48):
        (a, told), (b, changed_told) = plain.batch(range(index, index + 1)), changed.batch(range(index, index + 1))
        mirror, drop = decisions(1, index)
        wanted = nothing if drop < 0.5 else told["encoder_hidden_states"][0]
        assert torch.allclose(changed_told["encoder_hidden_states"][0], wanted, atol=1e-5)
        assert torch.allclose(a, b, atol=1e-5) == (mirror >= 0.5)
        kinds[mirror < 0.5, drop < 0.5] += 1
    assert len(kinds) == 4


# Pictures.


@pytest.mark.parametrize("resolution", [128, 512, 768, 1024])
def test_buckets_keep_the_area_and_the_aspect(resolution):
    buckets = aspect_buckets(resolution)
    step = 64 if resolution >= 256 else 16
    assert (resolution, resolution) in buckets and len(buckets) >= 5
    for height, width in buckets:
        assert height % step == width % step == 0 and (width, height) in buckets
        assert 0.75 * resolution**2 <= height * width <= resolution**2 and max(height, width) <= 2 * min(height, width)
    assert nearest_bucket((300, 300), buckets) == (resolution, resolution)
    assert nearest_bucket((5000, 100), buckets) == max(buckets, key=lambda size: size[0] / size[1])


def test_a_crop_covers_its_size_without_distortion_and_where_it_should():
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, :100], wide[:, 100:200] = 255, 128
    middle = crop(Image.fromarray(wide), (50, 50), "center", "x")
    assert middle.shape == (3, 50, 50) and torch.allclose(middle[:, :, 5:-5], torch.tensor(128 / 127.5 - 1), atol=1e-6)
    places = [crop(Image.fromarray(wide), (50, 50), "random", f"{n}.png").mean().item() for n in range(40)]
    assert min(places) < -0.8 and max(places) > 0.8  # the black and the white third
    assert crop(Image.fromarray(wide), (50, 50), "random", "3.png").mean().item() == places[3]


def test_pictures_stand_upright_and_transparency_is_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    noise_picture(0, (40, 80)).save(tmp_path / "a.jpg", exif=exif)
    assert picture_size(tmp_path / "a.jpg") == (80, 40) and load_picture(tmp_path / "a.jpg").size == (40, 80)
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "b.png")
    assert load_picture(tmp_path / "b.png").getpixel((0, 0)) == (255, 255, 255)


def test_filters_leave_out_and_count(pipeline, options, tmp_path):
    tars = make_tars(tmp_path / "t", columns=lambda n: {"aesthetic": n, "pwatermark": n / 12} if n else {"width": 9})
    wanted = options(min_aesthetic=3, max_watermark=0.75)
    data = open_data(str(tars), pipeline, wanted, 2, 0)
    assert data.filtered == {"aesthetic score too low": 2, "watermarked": 2}
    assert [skip.name for skip in data.skipped] == ["part-000.tar/00"] and "aesthetic" in data.skipped[0].reason
    table = of_captions(pipeline, CAPTIONS)
    assert set(identify(drawn(data, 14), table)) == set(range(3, 10))
    folder = make_folder(tmp_path / "p", sizes=[(128, 128), (60, 300)])
    small = open_data(str(folder), pipeline, options(min_size=100), 2, 0)
    assert small.filtered == {"under 100 px": 6}
    with pytest.raises(ValueError, match="nothing to train on, 12 under 1000 px"):
        open_data(str(folder), pipeline, options(min_size=1000), 2, 0)


# What is bad.


def spoil(folder):
    """One picture cut short, one that is none, one without a caption."""
    content = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(content[: len(content) // 2])
    (folder / "05.png").write_text("<html>not found</html>")
    (folder / "07.txt").unlink()


def test_bad_pictures_and_missing_captions_are_named_and_replaced(pipeline, options, tmp_path, caplog):
    folder = make_folder(tmp_path / "pictures")
    spoil(folder)
    data = open_data(str(folder), pipeline, options(), 4, 0)
    numbers = identify(drawn(data, 24), of_captions(pipeline, CAPTIONS))
    assert set(numbers) == set(range(12)) - {3, 5, 7}
    assert {skip.name for skip in data.skipped} == {"03.png", "05.png", "07.png"}
    assert all(f"skipped {number}.png" in caplog.text for number in ("03", "05", "07"))
    assert "3 skipped" in data.describe()
    again = open_data(str(folder), pipeline, options(), 4, 0)  # what the cache holds is named again
    again.batch(range(24))
    assert {skip.name for skip in again.skipped} == {"03.png", "05.png", "07.png"}


def test_too_many_bad_ones_stop_with_the_list(pipeline, options, tmp_path):
    folder = make_folder(tmp_path / "pictures")
    spoil(folder)
    with pytest.raises(ValueError, match=r"(?s)2 of 12 records are bad.*max-skipped-share 0\.1.*05\.png.*07\.png"):
        open_data(str(folder), pipeline, options(max_skipped_share=0.1), 4, 0)
    late = open_data(str(folder), pipeline, options(max_skipped_share=0.2), 4, 0)
    with pytest.raises(ValueError, match=r"(?s)3 of 12 records are bad.*03\.png"):
        late.batch(range(12))


@pytest.mark.parametrize("damage", ["cut", "header", "no end"])
@pytest.mark.parametrize("local", [True, False])
def test_a_corrupt_tar_is_named_and_what_comes_before_it_is_used(damage, local, tmp_path):
    tars = make_tars(tmp_path / "tars")
    file = tars / "part-000.tar"
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as archive:
        members = archive.getmembers()
    if damage == "cut":
        content = content[: members[6].offset_data + 100]
    elif damage == "header":
        content[members[6].offset : members[6].offset + 512] = b"x" * 512
    else:
        content = content[: members[8].offset]
    file.write_bytes(content)
    with Served(tars) as server:
        source = open_source(str(tars) if local else server.address + "/part-{000..001}.tar")
        records = list(source) if local else [record for part in range(2) for record in source.read(part)]
    bad = [one for one in records if isinstance(one, Skip)]
    before = 4 if damage == "no end" else 3
    assert [one.name for one in bad] == ["part-000.tar"] and f"broken after {2 * before} files" in bad[0].reason
    assert [one.caption for one in records if isinstance(one, Record)] == CAPTIONS[:before] + CAPTIONS[6:]


def test_a_cut_url_is_read_on_from_where_it_broke(tmp_path):
    tars = make_tars(tmp_path / "tars")
    with Served(tars, cuts=2) as server:
        records = list(open_source(server.address + "/part-000.tar").read(0))
        assert [record.caption for record in records] == CAPTIONS[:6]
        assert server.ranges[0] is None and all(wanted.startswith("bytes=") for wanted in server.ranges[1:3])
        gone = list(open_source(server.address + "/part-009.tar").read(0))
    assert len(gone) == 1 and isinstance(gone[0], Skip) and "404" in gone[0].reason


def test_a_part_whose_connection_is_lost_is_left_for_the_next_run(pipeline, tmp_path, monkeypatch):
    """It is not broken, and a set that lacks the rest of it is not finished."""
    monkeypatch.setattr("training.data.tars.PAUSE", 0.0)
    options = at_resolution(DataOptions(num_held_out=0), pipeline)
    with Served(make_tars(tmp_path / "tars"), cuts=1) as server:
        spec = server.address + "/part-{000..001}.tar"
        work = Preparation(spec, pipeline, options, tmp_path / "set", 2)
        shards = work.run()
        next(shards)
        server.busy = 6
        list(shards)
        assert work.missing() == 1 and len(work.lost) == 1 and "part-000.tar: broken after" in str(work.lost[0])
        with pytest.raises(ValueError, match="is not finished: 1 of 2 parts are missing"):
            open_data(str(tmp_path / "set"), pipeline, DataOptions(), 2, 0)
        again = Preparation(spec, pipeline, options, tmp_path / "set", 2)
        list(again.run())
        assert again.missing() == 0 and again.kept == len(CAPTIONS) and not again.skipped
        server.cuts = 1  # training itself goes on with the other parts
        data = open_data(spec, pipeline, options, 2, 0)
        server.busy = 6
        data.batch(range(8))
        assert ["part-000.tar: broken after" in skip.reason for skip in data.skipped] == [True]


def test_training_ends_when_a_server_is_gone(pipeline, tmp_path, monkeypatch):
    """It asked for all of the other parts in vain, and then said that there is nothing to train on."""
    monkeypatch.setattr("training.data.tars.PAUSE", 0.0)
    options = at_resolution(DataOptions(num_held_out=0), pipeline)
    with Served(make_tars(tmp_path / "tars"), cuts=1) as server:
        data = open_data(server.address + "/part-{000..001}.tar", pipeline, options, 2, 0)
        server.busy = 100
        with pytest.raises(ConnectionError, match=r"part-001\.tar: .*429"):
            data.batch(range(24))
        assert ["part-000.tar: broken after" in skip.reason for skip in data.skipped] == [True]


def test_a_server_that_is_not_there_is_said_at_once(pipeline, tmp_path, monkeypatch):
    """Not after each of a thousand parts has been asked for in vain."""
    monkeypatch.setattr("training.data.tars.PAUSE", 0.0)
    with Served(tmp_path) as server:
        spec = server.address + "/part-{000..009}.tar"
    options = at_resolution(DataOptions(), pipeline)
    with pytest.raises(ConnectionError, match=r"part-000\.tar: .*refused"):
        open_data(spec, pipeline, options, 2, 0)
    with pytest.raises(ConnectionError, match=r"part-000\.tar: .*refused"):
        list(Preparation(spec, pipeline, options, tmp_path / "set", 2).run())


def test_a_busy_server_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.tars.PAUSE", 0.0)
    with Served(make_tars(tmp_path / "tars")) as server:
        server.busy = 2
        records = list(open_source(server.address + "/part-000.tar").read(0))
        assert [record.caption for record in records] == CAPTIONS[:6] and len(server.ranges) == 3


def test_a_stream_is_not_read_to_its_end_for_held_out_samples(pipeline, options):
    read = []

    def records(part):
        for number in range(200):
            read.append(number)
            yield Record(str(number), f"picture {number}", lambda: np.zeros((128, 128, 3), np.uint8))

    data = StreamData(Stream(1, records, "x"), "x", pipeline, at_resolution(options(num_held_out=2), pipeline), 2, 0)
    read.clear()
    data.held_out(5)
    assert len(read) < 40


def test_a_stream_skips_and_stops_too(pipeline, options, tmp_path):
    folder = make_tars(tmp_path / "tars")
    (folder / "part-001.tar").write_bytes(b"x" * 2048)
    with Served(folder) as server:
        spec = server.address + "/part-{000..001}.tar"
        data = open_data(spec, pipeline, options(), 2, 0)
        assert set(identify(drawn(data, 12), of_captions(pipeline, CAPTIONS))) == set(range(6))
        assert [skip.name for skip in data.skipped] == ["part-001.tar"]
        with pytest.raises(ValueError, match=r"(?s)1 of 7 records are bad.*part-001\.tar"):
            open_data(spec, pipeline, options(max_skipped_share=0.1), 8, 0).batch(range(8))


def test_no_sample_at_all_is_one_clear_error(pipeline, options, tmp_path):
    make_tars(tmp_path, 1)
    folder, tars = str(make_folder(tmp_path / "pictures")), str(tmp_path / "*.tar")
    for spec in (folder, tars):
        with pytest.raises(ValueError, match=rf"{re.escape(spec)}: expected one sample or more, found none.* too few"):
            open_data(spec, pipeline, options(), 4, 0).batch(range(0))


def test_latents_that_are_not_finite_are_skipped(pipeline):
    broken = SimpleNamespace(
        encode=pipeline.encode, latents=lambda images: torch.full((len(images), 4, 16, 16), float("nan"))
    )
    record = Record("a", "b", lambda: np.zeros((128, 128, 3), np.uint8))
    [skip] = Encoder(broken)([record], [(128, 128)])
    assert isinstance(skip, Skip) and "latents not finite" in skip.reason


def test_latents_without_variance_are_skipped(pipeline):
    """No picture's are: a grey one's differ by channel and at its edge. Its VAE has failed."""
    broken = SimpleNamespace(encode=pipeline.encode, latents=lambda images: torch.zeros(len(images), 4, 16, 16))
    grey = np.full((128, 128, 3), 128, np.uint8)
    record = Record("a", "b", lambda: grey)
    [skip] = Encoder(broken)([record], [(128, 128)])
    assert isinstance(skip, Skip) and "latents are 0 everywhere" in skip.reason
    [sample] = Encoder(pipeline)([record], [(128, 128)])
    assert not isinstance(sample, Skip)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere/at/all", "expected a folder"),
        ("a-{0..3}.tar", "of 4 tars 4 are not there"),
        ("nowhere/at-all", "no folder or file of that name is here, and the Hugging Face dataset"),
    ],
)
def test_data_that_is_not_there_is_one_clear_error(spec, message, pipeline, options, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=message):
        open_data(spec, pipeline, options(), 2, 0)


def test_sdxl_keeps_its_pooled_embedding_and_sizes(tiny_xl, options, tmp_path):
    pipeline = load_pipeline(tiny_xl)
    folder = make_folder(tmp_path / "pictures", sizes=[(128, 128), (100, 200)])
    data = open_data(str(folder), pipeline, options(buckets=True, caption_drop=0.5, cache_dtype="fp16"), 2, 0)
    nothing = pipeline.unconditional()
    for index in range(0, 24, 2):
        latents, conditioning = data.batch(range(index, index + 2))
        size = [8 * side for side in latents.shape[-2:]]
        assert conditioning["time_ids"].tolist() == [[*size, 0, 0, *size]] * 2
        for row in range(2):
            dropped = decisions(0, index + row)[1] < 0.5
            for key in ("encoder_hidden_states", "text_embeds"):
                assert torch.allclose(conditioning[key][row], nothing[key][0], atol=1e-3) == dropped


# The cache on the way.


def test_a_second_run_encodes_nothing(pipeline, options, tmp_path, monkeypatch):
    folder = str(make_folder(tmp_path / "pictures"))
    first = open_data(folder, pipeline, options(), 4, 0).batch(range(12))
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded again"))
    second = open_data(folder, pipeline, options(), 4, 0).batch(range(12))
    assert torch.equal(first[0], second[0])
    with pytest.raises(pytest.fail.Exception, match="encoded again"):  # another crop is another cache
        open_data(folder, pipeline, options(crop="random"), 4, 0).batch(range(4))


def test_other_weights_are_another_cache(tiny_pipeline, options, tmp_path):
    folder, made = str(make_folder(tmp_path / "pictures")), []
    for change in (0.0, 0.1):
        pipeline = load_pipeline(tiny_pipeline)
        with torch.no_grad():
            pipeline.vae.quant_conv.bias += change
        made.append(open_data(folder, pipeline, options(), 4, 0).batch(range(4))[0])
    assert not torch.allclose(*made, atol=1e-3)


def test_another_columns_scores_are_another_cache(pipeline, options, tmp_path):
    """A limit on another column leaves other pictures."""
    folder = make_folder(tmp_path / "pictures")
    rows = [{"file_name": f"{n:02d}.png", "text": CAPTIONS[n], "aesthetic": n, "other": 11 - n} for n in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = of_captions(pipeline, CAPTIONS)
    for column, kept in ((None, {8, 9, 10, 11}), ("other", {0, 1, 2, 3})):
        data = open_data(str(folder), pipeline, options(min_aesthetic=8, aesthetic_column=column), 4, 0)
        assert set(identify(drawn(data, 4), table)) == kept


def test_what_does_not_fit_is_not_cached(pipeline, options, tmp_path, monkeypatch):
    monkeypatch.setattr(samples.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    data = open_data(str(make_folder(tmp_path / "pictures")), pipeline, options(), 4, 0)
    data.batch(range(4))
    assert data.folder is None and not list((tmp_path / "cache").iterdir())


# Prompts.


def test_without_data_the_shipped_prompts_serve_all_but_the_embedded_teacher(pipeline, options):
    assert default_spec(pipeline) == str(PROMPTS)
    assert default_spec(SimpleNamespace(source="embedded")) == "embedded"
    said = open_data(None, pipeline, options(), 4, 0).describe()
    assert "shipped prompts" in said and "the paper trains on real ones" in said


def test_the_shipped_prompts_are_varied_and_what_the_script_composes():
    lines = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert lines == compose() and 2000 <= len(lines) == len(set(lines))
    words = Counter(word for line in lines for word in set(line.split()))
    assert len(words) > 1000 and all(3 <= len(line.split()) <= 40 for line in lines)


# One item in twenty is broken; and there are some that look odd and are not.


def odd_items(count=120):
    """(name -> (its files by ending, in order), the names of the broken ones): `count` pictures with captions."""
    small = noise_picture(0, (32, 32))
    items = {f"{number:03d}": [("png", encoded(small)), ("txt", b"a fox")] for number in range(count)}
    wide, deep = Image.new("RGB", (20_000, 64), "red"), Image.fromarray(np.full((32, 32), 40_000, np.uint16))
    moving = io.BytesIO()
    small.save(moving, "GIF", save_all=True, append_images=[noise_picture(1, (32, 32))])
    items["010"][0] = ("jpg", encoded(small.convert("CMYK"), "JPEG"))
    items["020"][0] = ("png", encoded(deep))
    items["030"][0] = ("gif", moving.getvalue())
    items["040"][0] = ("png", encoded(wide))
    jpeg = encoded(small, "JPEG")
    items["011"][0] = ("jpg", jpeg[: len(jpeg) // 2])
    items["022"][0] = ("png", b"")
    items["033"] = items["033"][:1]
    items["044"][1] = ("txt", b"y" * 5_000_000)
    items["055"][1] = ("txt", b"\x89PNG\xff\xfe" * 9)
    items["066"].insert(1, ("png", encoded(noise_picture(2, (32, 32)))))
    return items, {"011", "022", "033", "044", "055", "066"}


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_one_broken_item_in_twenty_is_named_and_counted_and_training_goes_on(
    kind, pipeline, options, small, tiny_pipeline, tmp_path, capfd
):
    items, broken = odd_items()
    data = tmp_path / "data"
    data.mkdir()
    if kind == "folder":
        broken = broken - {"066"}  # a folder holds a name once
        for name, files in items.items():
            for ending, content in files:
                (data / f"{name}.{ending}").write_bytes(content)
    else:
        names = list(items)
        for number, part in enumerate((names[:50], names[50:])):
            with tarfile.open(data / f"{number}.tar", "w") as archive:
                for name in part:
                    for ending, content in items[name]:
                        member = tarfile.TarInfo(f"{name}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    found = open_data(str(data), pipeline, options(resolution=64), 4, 0)
    found.batch(range(len(items)))
    assert {skip.name.rpartition("/")[2].partition(".")[0] for skip in found.skipped} == broken
    assert f"{len(broken)} skipped" in found.describe() and all(skip.reason for skip in found.skipped)
    small(tiny_pipeline, tmp_path / "run", 2, "--data", data, "--resolution", 64)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    assert "skipped" in "".join(capfd.readouterr())
