"""What users' folders and archives hold: many kinds of files and marks, links, hidden files, tables of captions."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, features

from training.data import tars
from training.data.images import EXTENSIONS, crop, load_picture, picture_size
from training.data.latents import Made, read_index, read_sample, write_shard
from training.data.sources import Record, Skip, open_source
from training.run.config import parse
from training.run.report import sample_prompts
from training.scoring.embedded_scores import read_scene_captions
from training.scoring.protocols import read_captions

pytestmark = pytest.mark.train
GREY = np.linspace(0, 1, 64 * 64).reshape(64, 64)
LEVELS = np.repeat((GREY * 255).round().astype(np.uint8)[..., None], 3, axis=-1)


def picture(file, form=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(LEVELS).save(file, form)
    file.with_suffix(".txt").write_text(file.stem)
    return file


def captions(spec, *columns):
    """Captions by name, and the reason of a record that was skipped."""
    records = open_source(str(spec), *columns).records
    return {one.name: one.caption if isinstance(one, Record) else one for one in records}


def wide(kind):
    """A grey ramp in more than 8 bits: what it should look like is LEVELS."""
    top = {"uint16": 65535, "int32": 65535, "int32 of 8 bits": 255, "int32 of all bits": 2**31 - 1, "float": 1.0}
    top |= {"float of 8 bits": 255, "float of 16 bits": 65535, "float too bright": 1.05}
    dtype = {"u": np.uint16, "i": np.int32, "f": np.float32}[kind[0]]
    return Image.fromarray((GREY * top[kind]).astype(dtype))


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("uint16", "png"), ("uint16", "tiff"), ("int32", "tiff"), ("int32 of 8 bits", "tiff"),
        ("int32 of all bits", "tiff"), ("float", "tiff"), ("float of 8 bits", "tiff"), ("float of 16 bits", "tiff"),
        ("float too bright", "tiff"),
    ],
)  # fmt: skip
def test_more_than_8_bits_are_scaled_to_8(tmp_path, kind, form):
    wide(kind).save(tmp_path / f"a.{form}")
    found = np.asarray(load_picture(tmp_path / f"a.{form}")).astype(int)
    assert found.shape == LEVELS.shape and abs(found - LEVELS).max() <= (13 if kind == "float too bright" else 1)


def test_16_bits_that_stand_on_their_side_or_count_from_white_are_put_right(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.fromarray(LEVELS[:32]).transpose(Image.Transpose.ROTATE_270)
    for name, options in (("a.png", {}), ("a.tiff", {"compression": "tiff_lzw"})):
        Image.fromarray((GREY[:32] * 65535).astype(np.uint16)).save(tmp_path / name, exif=exif, **options)
        assert picture_size(tmp_path / name) == (64, 32)
        assert abs(np.asarray(load_picture(tmp_path / name)).astype(int) - np.asarray(upright)).max() <= 1, name
    Image.fromarray(((1 - GREY) * 65535).astype(np.uint16)).save(tmp_path / "b.tiff", tiffinfo={262: 0})
    assert abs(np.asarray(load_picture(tmp_path / "b.tiff")).astype(int) - LEVELS).max() <= 1


@pytest.mark.parametrize(
    "exif",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"II*\0", id="cut"),
        pytest.param(b"no such header", id="no header"),
    ],
)
def test_a_picture_whose_exif_is_damaged_is_taken_as_it_lies(tmp_path, exif):
    """Such are common on the web; one of them would end the reading of all."""
    Image.fromarray(LEVELS[:32]).save(tmp_path / "a.jpg", dpi=(72, 72), exif=b"Exif\0\0" + exif)
    assert picture_size(tmp_path / "a.jpg") == (32, 64)
    found = np.asarray(load_picture(tmp_path / "a.jpg")).astype(int)
    assert found.shape == (32, 64, 3) and abs(found - LEVELS[:32]).max() < 16


def test_a_strip_that_would_fill_the_memory_is_named():
    """1 x 20,000 px, a page's spacer, would be scaled to 512 x 10,240,000 px before it is cut."""
    with pytest.raises(ValueError, match=r"1 x 20000 px: .* it would have 512 x 10240000"):
        crop(Image.new("RGB", (1, 20_000)), (512, 512), "center", "a")
    assert crop(Image.new("RGB", (8, 800)), (512, 512), "center", "a").shape == (3, 512, 512)


def test_half_a_character_in_a_caption_is_named(tmp_path):
    """JSON that was cut within an emoji: no tokenizer takes it, and none of its neighbours' captions with it."""
    picture(tmp_path / "a.png").with_suffix(".txt").unlink()
    picture(tmp_path / "b.png").with_suffix(".txt").unlink()
    rows = ['{"file_name": "a.png", "text": "a fox \\ud83e"}', '{"file_name": "b.png", "text": "a fox \\ud83e\\udd8a"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    found = captions(tmp_path)
    assert "half of a character" in found["a.png"].reason and found["b.png"] == "a fox \U0001f98a"


def test_floats_of_no_clear_range_are_named(tmp_path):
    for name, top, message in (("a", 4.0, "up to 4: expected 0 to 1, to 255"), ("b", np.nan, "not finite")):
        Image.fromarray((GREY * top).astype(np.float32)).save(tmp_path / f"{name}.tiff")
        with pytest.raises(ValueError, match=message):
            load_picture(tmp_path / f"{name}.tiff")


@pytest.mark.parametrize("ending", [".JPG", ".jpe", ".jfif", ".gif", ".avif", ".heic", ".jxl"])
def test_kinds_of_files_are_read_or_named(tmp_path, ending):
    form = {".gif": "GIF", ".avif": "AVIF"}.get(ending, "JPEG")
    if ending == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    file = tmp_path / f"a{ending}"
    picture(tmp_path / "a.png")
    if ending in (".heic", ".jxl"):
        file.write_bytes(b"something that Pillow does not know")
    else:
        Image.fromarray(LEVELS).save(file, form)
    (tmp_path / "a.png").unlink()
    [record] = open_source(str(tmp_path)).records
    assert record.name == file.name and file.suffix.lower() in EXTENSIONS
    if ending in (".heic", ".jxl"):
        with pytest.raises(ValueError, match="no picture"):
            load_picture(record.picture())
    else:
        assert load_picture(record.picture()).size == (64, 64)


def test_a_byte_order_mark_is_no_part_of_captions_prompts_and_tables(tmp_path):
    picture(tmp_path / "p" / "a.png").with_suffix(".txt").write_text("a fox", encoding="utf-8-sig")
    assert captions(tmp_path / "p") == {"a.png": "a fox"}
    for name, text in (
        ("metadata.jsonl", '{"file_name": "b.png", "text": "an owl"}'),
        ("metadata.csv", "file_name,text\nb.png,an owl\n"),
    ):
        Image.fromarray(LEVELS).save(tmp_path / "p" / "b.png")
        (tmp_path / "p" / name).write_text(text, encoding="utf-8-sig")
        assert captions(tmp_path / "p") == {"a.png": "a fox", "b.png": "an owl"}
        (tmp_path / "p" / name).unlink()
    (tmp_path / "prompts.txt").write_text("# comment\na fox\n", encoding="utf-8-sig")
    assert [one.caption for one in open_source(str(tmp_path / "prompts.txt"))] == ["a fox"]
    archive(tmp_path / "a.tar", {"a.png": png(), "a.txt": "\ufeffa fox".encode(), "b.png": png()})
    archive(tmp_path / "b.tar", {"b.png": png(), "b.json": '\ufeff{"text": "an owl"}'.encode()})
    assert captions(tmp_path / "a.tar")["a.tar/a"] == "a fox"
    assert captions(tmp_path / "b.tar") == {"b.tar/b": "an owl"}


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".caption", ".text"])
def test_captions_lie_beside_their_pictures_as_in_archives(tmp_path, ending):
    """Kohya's scripts write .caption. Of several the .txt is taken."""
    picture(tmp_path / "a.png").with_suffix(".txt").unlink()
    (tmp_path / f"a{ending}").write_text("a fox")
    assert captions(tmp_path) == {"a.png": "a fox"}
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("a fox")
    (tmp_path / "a.caption").write_text("an owl")
    assert captions(tmp_path) == {"a.png": "a fox"}


def test_prompts_and_captions_of_runs_and_scores_are_read_alike(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa doughnut\r\na yellow\x85star\r\n".encode())
    config = parse(["--teacher", "t", "--output-dir", "o", "--sample-prompts", str(file)])
    assert [line.split() for line in sample_prompts(config)] == [["a", "doughnut"], ["a", "yellow", "star"]]
    assert read_captions(file) == ["a doughnut", "a yellow star"]
    assert [str(caption) for caption in read_scene_captions(file)] == ["a doughnut", "a yellow star"]
    (tmp_path / "captions.json").write_text('["a fox"]', encoding="utf-8-sig")
    assert read_captions(tmp_path / "captions.json") == ["a fox"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_only_line_ends_end_lines(tmp_path, mark):
    picture(tmp_path / "p" / "a.png").with_suffix(".txt").unlink()
    row = json.dumps({"file_name": "a.png", "text": f"a fox{mark}in snow"}, ensure_ascii=False)
    (tmp_path / "p" / "metadata.jsonl").write_text(row, encoding="utf-8")
    wanted = {"a.png": "a fox in snow"}
    if mark in "\u2028\u2029\x85":  # JSON has the others escaped
        assert mark in row
    assert captions(tmp_path / "p") == wanted
    (tmp_path / "prompts.txt").write_bytes(f"a fox{mark}in snow\r\nan owl\r\n".encode())
    assert [one.caption.split() for one in open_source(str(tmp_path / "prompts.txt"))] == [
        ["a", "fox", "in", "snow"], ["an", "owl"]
    ]  # fmt: skip


def test_links_are_followed_once_and_hidden_files_are_none(tmp_path):
    folder = tmp_path / "pictures"
    picture(folder / "here" / "a.png")
    picture(tmp_path / "elsewhere" / "b.png")
    picture(folder / ".ipynb_checkpoints" / "a-checkpoint.png")
    picture(folder / "here" / "._a.png")
    picture(folder / "__MACOSX" / "a.png")
    try:
        os.symlink(tmp_path / "elsewhere", folder / "linked", target_is_directory=True)
        os.symlink(folder, folder / "here" / "around", target_is_directory=True)
        os.symlink(folder / "here", folder / "again", target_is_directory=True)
        os.symlink(tmp_path / "nowhere", folder / "broken")
    except OSError:
        pytest.skip("this system makes no links")
    assert captions(folder) == {"here/a.png": "a", "linked/b.png": "b"}
    hidden = tmp_path / ".cache" / "set"  # named by the user
    picture(hidden / "c.png")
    assert captions(hidden) == {"c.png": "c"}


def png():
    content = io.BytesIO()
    Image.fromarray(LEVELS).save(content, "PNG")
    return content.getvalue()


def archive(file, members, form="w"):
    """A tar of name -> content; a content that is a string is a hard link, one that begins with @ a symbolic one."""
    with tarfile.open(file, form) as opened:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type = tarfile.SYMTYPE if content.startswith("@") else tarfile.LNKTYPE
                member.linkname = content.removeprefix("@")
                opened.addfile(member)
            else:
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))
    return file


def read(file):
    source = open_source(str(file))
    return list(source) if hasattr(source, "records") else [one for p in range(source.parts) for one in source.read(p)]


@pytest.mark.parametrize(("name", "form"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_hidden_members_are_none_and_links_are_what_they_point_at(tmp_path, name, form):
    members = {
        "./x/0.png": png(), "./x/._0.png": b"Finder", "./x/0.txt": b"first", "./x/.DS_Store": b"Finder",
        "x/1.png": "x/0.png", "x/1.txt": b"second", "x/2.png": "@../x/0.png", "x/2.txt": b"third",
        "x/3.png": "x/9.png", "x/3.txt": b"fourth",
    }  # fmt: skip
    records = read(archive(tmp_path / name, members, form))
    assert [record.caption for record in records] == ["first", "second", "third", "fourth"]
    for record in records[:3]:
        assert np.array_equal(np.asarray(load_picture(record.picture())), LEVELS), record.name
    with pytest.raises(OSError, match=r"a link to x/9\.png, which the archive lacks"):
        records[3].picture()


def test_names_with_brackets_are_names(tmp_path):
    folder = tmp_path / "set[1]"
    folder.mkdir()
    archive(folder / "part[1].tar", {"0.png": png(), "0.txt": b"a fox"})
    archive(folder / "part1.tar", {"0.png": png(), "0.txt": b"an owl"})
    assert [record.caption for record in read(folder / "part[1].tar")] == ["a fox"]
    (folder / "part[1].tar").rename(folder / "part{1}.tar")
    assert [record.caption for record in read(folder / "part{1}.tar")] == ["a fox"]
    assert len(read(folder)) == 2 and len(read(str(tmp_path / "set?1?" / "part[1].tar"))) == 1


def test_parquet_files_with_brackets_are_names(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"image": {"bytes": png(), "path": None}, "text": "a fox"}])
    (tmp_path / "set[1]").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "set[1]" / "part[1].parquet")
    for spec in (tmp_path / "set[1]", tmp_path / "set[1]" / "part[1].parquet"):
        assert [record.caption for record in read(spec)] == ["a fox"]


def test_tables_of_three_kinds_caption_a_folder(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"file_name": "0.png", "text": "a fox, asleep", "aesthetic": 6.5}, {"file_name": "sub/1.png"}]
    lines = {
        "metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "metadata.csv": 'text,aesthetic,file_name\n"a fox, asleep",6.5,0.png\n,,./sub/1.png\nlost,1,9.png\n,,\n',
    }
    for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        folder = tmp_path / name.partition(".")[2]
        picture(folder / "0.png").with_suffix(".txt").write_text("an owl")
        picture(folder / "sub" / "1.png").with_suffix(".txt").write_text("beside it")
        if name in lines:
            (folder / name).write_text(lines[name])
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
        found = {one.name: one for one in read(folder)}
        assert found["0.png"].caption == "a fox, asleep" and float(found["0.png"].columns["aesthetic"]) == 6.5
        assert found["sub/1.png"].caption == "beside it"
        if name == "metadata.csv":
            assert isinstance(found["9.png"], Skip) and "expected file_name" in found["metadata.csv:5"].reason
    (folder / "metadata.parquet").write_bytes(b"broken")
    assert "cannot be read" in captions(folder)["metadata.parquet"].reason
    (tmp_path / "csv" / "metadata.csv").write_text("file_name;text\n0.png;a fox\n")
    assert "found file_name;text" in captions(tmp_path / "csv")["metadata.csv:2"].reason


@pytest.mark.parametrize("form", ["tar", "tar.gz"])
def test_names_in_an_archive_are_names_and_lead_nowhere(tmp_path, form):
    """Nothing is unpacked, so that a name with .. or a link to the system's files is a word like any other."""
    (tmp_path / "secret.png").write_bytes(png())
    members = {
        "../../evil/0.png": png(), "../../evil/0.txt": b"first", "/etc/evil.png": png(), "/etc/evil.txt": b"second",
        "x/2.png": "@../../secret.png", "x/2.txt": b"third", "x/3.png": f"@{tmp_path}/secret.png", "x/3.txt": b"fourth",
    }  # fmt: skip
    (tmp_path / "set").mkdir()
    archive(tmp_path / "set" / f"a.{form}", members, "w:gz" if form == "tar.gz" else "w")
    before = sorted(tmp_path.rglob("*"))
    records = read(tmp_path / "set" / f"a.{form}")
    assert [record.caption for record in records] == ["first", "second", "third", "fourth"]
    for record in records[2:]:
        with pytest.raises(OSError, match=r"a link to .*secret\.png, which the archive lacks"):
            record.picture()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_that_unpacks_to_more_than_memory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "LARGEST", 10_000)
    archive(tmp_path / "a.tar.gz", {"0.png": bytes(10_001), "0.txt": b"a bomb", "1.png": png(), "1.txt": b"a"}, "w:gz")
    bomb, good = read(tmp_path / "a.tar.gz")
    with pytest.raises(OSError, match="10001 bytes, more than the 10000"):
        bomb.picture()
    assert good.picture().read() == png()


def test_a_table_names_no_files_of_this_machine(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "set" / "in").mkdir(parents=True)
    (tmp_path / "set" / "in" / "0.png").write_bytes(png())
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    paths = ["in/0.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "/dev/zero"]
    rows = [{"image": {"bytes": None, "path": path}, "text": "a fox"} for path in paths]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set" / "a.parquet")
    good, *others = read(tmp_path / "set" / "a.parquet")
    assert good.picture().read_bytes() == png()
    assert all("is no file below the table's folder" in one.reason for one in others) and len(others) == 4


def test_a_caption_that_is_none_is_named(tmp_path):
    """Megabytes of text would keep a tokenizer for hours."""
    for name, content in (("huge", b"fox " * 10**6), ("long", b"fox " * 20_000), ("binary", bytes(range(256)))):
        picture(tmp_path / f"{name}.png").with_suffix(".txt").write_bytes(content)
    found = captions(tmp_path)
    assert "is 4000000 bytes long, expected a caption" in found["huge.png"].reason
    assert "a caption of 80000 characters" in found["long.png"].reason
    assert "is not UTF-8" in found["binary.png"].reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["latents", "prompt"])
def test_a_number_that_is_none_in_a_prepared_set_is_named_with_its_place(tmp_path, key, value):
    samples = [{"latents": torch.ones(1, 4, 2, 2), "prompt": torch.ones(3)} for _ in range(2)]
    samples[1][key].view(-1)[2] = value
    records = [Record(f"{number}.png", "a fox", None) for number in range(2)]
    write_shard(tmp_path, "a", Made([(n, records[n], sample) for n, sample in enumerate(samples)], [], 0))
    first, second = (row["at"] for row in read_index(tmp_path, "a")["samples"])
    assert read_sample(tmp_path, "a", first)["latents"].equal(samples[0]["latents"])
    with pytest.raises(ValueError, match=rf"a\.tar is damaged at byte {second[0]} \({key} holds NaN or infinite"):
        read_sample(tmp_path, "a", second)
