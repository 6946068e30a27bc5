"""Every way by which the trainer's commands and the web UIs' tab read a file, each over a small corpus."""

import contextlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from harness.hostile import (
    Target,
    mutated_bytes,
    mutated_json,
    mutated_safetensors,
    mutated_tar,
    mutated_toml,
)
from harness.reference import write_pipeline
from splam_core import lora_to_kohya
from splam_webui.convert import convert
from training.data import open_data
from training.data.base import sift
from training.data.images import load_picture
from training.data.latents import GROUP
from training.data.options import DataOptions
from training.data.paths import PathData, PathPreparation, PathSettings
from training.data.samples import PreparedData
from training.data.sources import Skip, open_source
from training.export import export
from training.export import parser as export_parser
from training.models.files import read_model, write_single_file
from training.models.load import load_pipeline
from training.models.lora import merged, read_lora
from training.prepare import Preparation
from training.run.checkpoints import read_checkpoint, write_checkpoint
from training.run.config import parse
from training.scoring.perceptual import ReferenceSet
from training.scoring.protocols import read_captions
from training.scoring.report import read_results

UNET = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
STEM = "diffusion_pytorch_model"


class Corpus:
    """Small valid files of each kind below `folder`; `inside` is where what is made goes."""

    def __init__(self, folder: Path):
        self.folder, self.inside = folder, folder / "inside"
        self.inside.mkdir(parents=True)
        self.pipeline = write_pipeline(folder / "pipeline", cond_proj=True, **UNET)
        self.single = folder / "single.safetensors"
        self.model = read_model(self.pipeline)
        write_single_file(self.model.folded("splam"), self.single, "single")
        self.peft = self._peft()
        self.kohya = folder / "kohya.safetensors"
        save_file(lora_to_kohya(load_file(self.peft / "adapter_model.safetensors"), alpha=2), self.kohya)
        self.shards = self._shards()
        self.pickle = self.inside / "ran"  # where a pickle that is opened leaves its mark

    def _peft(self) -> Path:
        folder, rank = self.folder / "peft", 2
        folder.mkdir()
        lora = {}
        for key, weight in self.model.unet.items():
            if key.endswith(("to_q.weight", "conv1.weight", "to_out.0.weight")):
                module = f"base_model.model.{key.removesuffix('.weight')}"
                lora[f"{module}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:])
                lora[f"{module}.lora_B.weight"] = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2))
        save_file(lora, folder / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "alpha_pattern": {"to_q": 2}, "use_rslora": False}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def _shards(self) -> Path:
        folder = self.folder / "shards"
        folder.mkdir()
        weights = sorted(self.model.unet.items())
        names = [f"{STEM}-0000{number}-of-00002.safetensors" for number in (1, 2)]
        for name, part in zip(names, (weights[::2], weights[1::2]), strict=True):
            save_file(dict(part), folder / name)
        where = {key: names[number % 2] for number, (key, _) in enumerate(weights)}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (folder / "config.json").write_text((self.pipeline / "unet" / "config.json").read_text())
        return folder

    def parts(self) -> dict[Path, object]:
        """The pipeline's files."""
        files = dict.fromkeys(sorted(self.pipeline.rglob("*.safetensors")), mutated_safetensors)
        return files | dict.fromkeys(sorted(self.pipeline.rglob("*.json")), mutated_json)


class Payload:
    """A pickle that would run code."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def write_pickles(corpus: Corpus) -> list[Path]:
    """Pickles that would leave a mark, under the names that models have."""
    names = ("a.ckpt", "a.pt", "a.bin", "a.pth", "a.safetensors", "a.pkl")
    for name in names:
        (corpus.folder / name).write_bytes(pickle.dumps(Payload(corpus.pickle)))
    return [corpus.folder / name for name in names]


def training_targets(corpus: Corpus) -> list[Target]:
    unet = corpus.model.folded("splam").unet
    lora_files = {corpus.peft / "adapter_model.safetensors": mutated_safetensors}
    shards = dict.fromkeys(sorted(corpus.shards.glob("*.safetensors")), mutated_safetensors)
    shards |= dict.fromkeys(sorted(corpus.shards.glob("*.json")), mutated_json)

    def exported(source, to, *more):
        output = corpus.inside / ("out" if to == "diffusers" else "out.safetensors")
        arguments = (source, "--to", to, "--output", output, *more)
        export(export_parser().parse_args([str(one) for one in arguments]))

    return [
        Target("teacher folder", corpus.parts(), lambda: load_pipeline(corpus.pipeline)),
        Target("teacher file", {corpus.single: mutated_safetensors}, lambda: load_pipeline(corpus.single)),
        Target("teacher in shards", shards, lambda: load_pipeline(corpus.shards)),
        Target(
            "LoRA of peft",
            lora_files | {corpus.peft / "adapter_config.json": mutated_json},
            lambda: merged(unet, read_lora(corpus.peft), name=str(corpus.peft)),
        ),
        Target(
            "LoRA of kohya",
            {corpus.kohya: mutated_safetensors},
            lambda: merged(unet, read_lora(corpus.kohya), name=str(corpus.kohya)),
        ),
        Target("export of a file", {corpus.single: mutated_safetensors}, lambda: exported(corpus.single, "diffusers")),
        Target("export of a folder", corpus.parts(), lambda: exported(corpus.pipeline, "single-file")),
        Target(
            "export of a LoRA",
            {corpus.kohya: mutated_safetensors},
            lambda: exported(corpus.kohya, "single-file", "--base", corpus.single),
        ),
        _settings(corpus),
        _checkpoint(corpus),
        _results(corpus),
        _statistics(corpus),
        _captions(corpus),
    ]


def data_targets(corpus: Corpus) -> list[Target]:
    return [
        _pictures(corpus),
        _folder(corpus),
        _tars(corpus),
        _preparation(corpus),
        _prepared(corpus),
        _kept_paths(corpus),
    ]


def webui_targets(corpus: Corpus) -> list[Target]:
    def converted(source, base=None):
        convert(source, "made", corpus.inside, corpus.inside, base=base, overwrite=True)

    shards = dict.fromkeys(sorted(corpus.shards.glob("*.safetensors")), mutated_safetensors)
    shards |= dict.fromkeys(sorted(corpus.shards.glob("*.json")), mutated_json)
    return [
        Target("conversion of a folder", corpus.parts(), lambda: converted(corpus.pipeline)),
        Target("conversion of a file", {corpus.single: mutated_safetensors}, lambda: converted(corpus.single)),
        Target(
            "conversion of shards on a base",
            shards | {corpus.single: mutated_safetensors},
            lambda: converted(corpus.shards, corpus.single),
        ),
        Target("conversion of a LoRA", {corpus.kohya: mutated_safetensors}, lambda: converted(corpus.kohya)),
        Target(
            "conversion of peft's LoRA",
            {corpus.peft / "adapter_model.safetensors": mutated_safetensors},
            lambda: converted(corpus.peft / "adapter_model.safetensors"),
        ),
    ]


def _settings(corpus: Corpus) -> Target:
    file = corpus.folder / "settings.toml"
    file.write_text(
        f"teacher = {json.dumps(str(corpus.pipeline))}\noutput-dir = 'inside/run'\nlora = true\nlora-rank = 4\n"
        "learning-rate = 1e-5\nmax-train-steps = 10\ntrain-batch-size = 2\nskip = 100\nsolver-skip = 20\nseed = 3\n"
        "recipe = 'paper'\nmixed-precision = 'no'\nresolution = 128\ncaption-drop = 0.1\nmax-samples = 4\n"
    )

    def settings():
        with contextlib.redirect_stderr(io.StringIO()):  # a command line's error comes with pages of usage
            parse(["--config", str(file)])

    return Target("settings in TOML", {file: mutated_toml}, settings)


def _checkpoint(corpus: Corpus) -> Target:
    folder = corpus.folder / "checkpoint-1"
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([weight], 1e-3)
    weight.sum().backward()
    optimizer.step()
    states = {"student": {"weight": weight.detach()}, "optimizer": optimizer.state_dict()}
    write_checkpoint(folder, states, {"step": 1, "samples": 2, "config": {"lora": False}})
    files = {folder / "student.safetensors": mutated_safetensors, folder / "state.json": mutated_json}
    return Target("checkpoint", files | {folder / "optimizer.pt": mutated_bytes}, lambda: read_checkpoint(folder))


def _results(corpus: Corpus) -> Target:
    file = corpus.folder / "results.json"
    file.write_text(json.dumps({"a": {"model": "m", "steps": 4, "fid": 2.0}, "b": {"model": "n", "steps": 2}}))
    return Target("results", {file: mutated_json}, lambda: read_results([file]))


def _statistics(corpus: Corpus) -> Target:
    file = corpus.folder / "statistics.npz"
    np.savez(file, mu=np.zeros(4), sigma=np.eye(4), features=np.zeros((5, 4), np.float32))
    return Target("statistics", {file: mutated_bytes}, lambda: ReferenceSet.read(file))


def _captions(corpus: Corpus) -> Target:
    coco, plain = corpus.folder / "captions.json", corpus.folder / "captions.txt"
    coco.write_text(json.dumps({"annotations": [{"image_id": i, "id": i, "caption": f"a fox {i}"} for i in range(4)]}))
    plain.write_text("a fox\n\nan owl\n")
    files = {coco: mutated_json, plain: mutated_bytes}
    return Target("captions", files, lambda: [read_captions(file) for file in files])


def _write_pictures(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    levels = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    forms = {"jpg": {}, "png": {}, "webp": {}, "gif": {}, "tiff": {"compression": "tiff_lzw"}, "bmp": {}}
    for number, (form, options) in enumerate(forms.items()):
        Image.fromarray(levels).save(folder / f"{number}.{form}", **options)
    Image.fromarray(levels).convert("CMYK").save(folder / "6.jpg")
    Image.fromarray((np.ones((128, 128)) * 40_000).astype(np.uint16)).save(folder / "7.png")
    return sorted(folder.iterdir())


def _used(spec: Path, options: DataOptions) -> int:
    """How many good pictures a source holds, all read as training does. A bad record is a Skip with a reason."""
    source = open_source(str(spec))
    records = source.records if hasattr(source, "records") else [r for p in range(source.parts) for r in source.read(p)]
    good = 0
    for record in records:
        if isinstance(record, Skip) or isinstance(sift(record, options), (Skip, str)):
            continue
        try:
            load_picture(record.picture())
            good += 1
        except (ValueError, OSError):  # what `Encoder` makes a Skip of
            pass
    return good


def _pictures(corpus: Corpus) -> Target:
    files = dict.fromkeys(_write_pictures(corpus.folder / "pictures"), mutated_bytes)
    options = DataOptions(resolution=128)
    for file in list(files):
        file.with_suffix(".txt").write_text("a fox")
        files[file.with_suffix(".txt")] = mutated_bytes
    return Target("pictures", files, lambda: _used(corpus.folder / "pictures", options))


def _folder(corpus: Corpus) -> Target:
    folder, options = corpus.folder / "told", DataOptions(resolution=128)
    files = _write_pictures(folder)
    rows = [{"file_name": file.name, "text": "an owl", "aesthetic": 6.0} for file in files]
    table, lines = folder / "metadata.csv", folder / "metadata.jsonl"
    table.write_text("file_name,text\n" + "".join(f"{row['file_name']},owl\n" for row in rows))
    lines.write_text("\n".join(map(json.dumps, rows)))

    def changed_line(content, rng):
        parts = content.split(b"\n")
        at = rng.randrange(len(parts))
        parts[at] = mutated_json(parts[at], rng)
        return b"\n".join(parts)

    return Target("tables", {table: mutated_bytes, lines: changed_line}, lambda: _used(folder, options))


def _members() -> dict[str, bytes]:
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)).save(picture, "PNG")
    said = {"txt": b"a fox", "json": b'{"text": "an owl", "aesthetic": 6}'}
    fields = {"png": picture.getvalue(), **said}
    return {f"x/{number}.{form}": content for number in range(4) for form, content in fields.items()}


def _write_tar(file: Path, form: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, form, format=tarfile.USTAR_FORMAT) as opened:
        for name, content in _members().items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return file


def _tars(corpus: Corpus) -> Target:
    plain = _write_tar(corpus.folder / "tars" / "a.tar", "w")
    packed = _write_tar(corpus.folder / "tgz" / "a.tgz", "w:gz")
    files = {plain: mutated_tar, packed: mutated_bytes}
    options = DataOptions(resolution=128)
    return Target("tars", files, lambda: [_used(file, options) for file in files])


def _small_pipeline(corpus: Corpus):
    pipeline = load_pipeline(corpus.pipeline)
    pipeline.source = str(corpus.pipeline)
    return pipeline


def _preparation(corpus: Corpus) -> Target:
    pipeline, tar = _small_pipeline(corpus), _write_tar(corpus.folder / "prepare" / "a.tar", "w")
    options, count = DataOptions(resolution=128, max_skipped_share=0.9), iter(range(10**9))

    def prepare():
        work = Preparation(str(tar), pipeline, options, corpus.inside / f"set-{next(count)}", shard_size=2)
        list(work.run())

    return Target("preparation", {tar: mutated_tar}, prepare)


def _prepared(corpus: Corpus) -> Target:
    pipeline, folder = _small_pipeline(corpus), corpus.folder / "prepared"
    options = DataOptions(resolution=128, caption_drop=0.5)
    tar = _write_tar(corpus.folder / "source" / "a.tar", "w")
    list(Preparation(str(tar), pipeline, options, folder, shard_size=2).run())
    kinds = {".tar": mutated_tar, ".json": mutated_json, ".safetensors": mutated_safetensors}
    files = {file: kinds[file.suffix] for file in sorted(folder.iterdir())}

    def train():
        data = PreparedData(folder, pipeline, options, 2, 0)
        data.batch(range(2))
        data.held_out(2)

    return Target("prepared set", files, train)


def _kept_paths(corpus: Corpus) -> Target:
    pipeline, folder = _small_pipeline(corpus), corpus.folder / "paths"
    options = DataOptions(resolution=128, num_held_out=1, cache_latents=False)
    pictures = corpus.folder / "path-source"
    pictures.mkdir()
    for name in "abcd":
        Image.new("RGB", (128, 128), f"#{name}0{name}0{name}0").save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"picture {name}")
    data = open_data(str(pictures), pipeline, options, GROUP, 1)
    settings = PathSettings(paths=4, path_steps=2, guidance_scale=1.0)
    list(PathPreparation(data, pipeline, settings, folder).run())
    kinds = {".tar": mutated_tar, ".json": mutated_json}
    files = {file: kinds[file.suffix] for file in sorted(folder.iterdir())}

    def train():
        found = PathData(folder, pipeline, options, 2, 0)
        found.batch(range(2))
        found.held_out(2)
        found.describe()

    return Target("kept paths", files, train)
