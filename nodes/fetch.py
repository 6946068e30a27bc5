"""SPLAM Fetch: the published releases, downloaded from the Hugging Face hub when the node is run, and only then."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, BinaryIO, cast

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..splam_core.checkpoint import shortened
from .announce import show
from .catalogue import host_names, in_host_names
from .host import ProgressBar
from .options import search_aliases

RECORD = "splam-fetch.json"
KEPT = (".safetensors", ".json", ".txt")  # never a pickle
PIPELINE_PARTS = ("unet", "vae", "text_encoder")
MARGIN = 64 * 2**20  # bytes of disk space to leave free
BLOCK = 2**22

Record = dict[str, Any]  # of a release: repo, revision, licence, files: {name: Facts}
Facts = dict[str, Any]  # of a file: size in bytes, kind of hash ("sha256" or "git"), hash; mtime_ns once it is placed


@dataclass(frozen=True)
class Release:
    """A repository on the hub, and the folder of the host that it goes into under its own name."""

    repo: str
    models: str  # "diffusers" for a whole pipeline, "loras" for the one LoRA file

    @property
    def name(self) -> str:
        return self.repo.rpartition("/")[2]

    @property
    def is_lora(self) -> bool:
        return self.models == "loras"

    def target(self, base: Path) -> Path:
        return base / (f"{self.name}.safetensors" if self.is_lora else self.name)

    def record(self, base: Path) -> Path:
        return base / f"{self.name}.{RECORD}" if self.is_lora else base / self.name / RECORD

    def place(self, base: Path, file: str) -> Path:
        return self.target(base) if self.is_lora else self.target(base) / file


RELEASES = {
    release.repo: release
    for release in (
        Release("alimama-creative/slam-sd1.5", "diffusers"),
        Release("alimama-creative/slam-dreamshaper7", "diffusers"),
        Release("alimama-creative/slam-lora-sdxl", "loras"),
    )
}


class FetchError(ValueError):
    """One plain sentence for the node."""


class SPLAMFetch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLAMFetch",
            display_name="SPLAM Fetch",
            category="loaders/SPLAM",
            description=(
                "Downloads a published SPLAM release from the Hugging Face hub into the model folder it belongs in: "
                "safetensors and configuration files, with their hashes checked. Several GB. A cut download goes on "
                "where it stopped; what is complete is not asked for again."
            ),
            **search_aliases("download model", "hugging face", "LCM"),
            inputs=[
                io.Combo.Input(
                    "release",
                    options=list(RELEASES),
                    tooltip=(
                        "slam-sd1.5 and slam-dreamshaper7: whole pipelines, into models/diffusers. "
                        "slam-lora-sdxl: a LoRA for SDXL, into models/loras. Press R afterwards to see it in the lists."
                    ),
                )
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="The host's folder of the release and its name there.")
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, release: str) -> float:
        return float("nan")  # never from the host's cache: somebody may have deleted the files

    @classmethod
    def execute(cls, release: str) -> io.NodeOutput:
        if not isinstance(release, str) or release not in RELEASES:
            raise FetchError(f"SPLAM Fetch: there is no release {release!r:.80}. Choose one of {', '.join(RELEASES)}.")
        with host_names():
            path, text = fetch(RELEASES[release], Progress(cls.hidden.unique_id))
        # Whoever uses a shared server sees both.
        return io.NodeOutput(in_host_names(str(path)), ui=ui.PreviewText(in_host_names(text)))


class Progress:
    """Bytes to the node's bar and a line of text to its face; the place where a cancel is noticed."""

    def __init__(self, node_id: str | None):
        self.node_id, self.done, self.shown = node_id, 0, -1
        self.bar: ProgressBar = None  # from `start` on

    def say(self, text: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        show(text)

    def start(self, total: int, done: int) -> None:
        self.bar, self.done = comfy.utils.ProgressBar(total, node_id=self.node_id), done

    def advance(self, count: int, file: str) -> None:
        """Raises the host's interruption when the user has cancelled."""
        self.done += count
        percent = 100 * self.done // max(self.bar.total, 1)
        comfy.model_management.throw_exception_if_processing_interrupted()
        if percent != self.shown:
            self.shown = percent
            self.bar.update_absolute(self.done)
            self.say(f"{file}\n{gigabytes(self.done)} of {gigabytes(self.bar.total)}")


def fetch(release: Release, progress: Progress) -> tuple[Path, str]:
    """(where the release lies, what to tell the user). No network if it is complete.

    Raises FetchError with one plain sentence for everything that can go wrong on the way.
    """
    bases = [Path(base) for base in folder_paths.get_folder_paths(release.models)]
    for base in bases:
        if record := complete(release, base):
            return release.target(base), told(release, record, release.target(base), "already here")
    base = bases[0]
    staging = base / f"{release.name}.download"
    with plain_errors(release, base):
        known = read_record(staging / RECORD) or read_record(release.record(base))
        record = known or ask_hub(release, progress)  # once: what follows is that commit, whatever is published since
        staging.mkdir(parents=True, exist_ok=True)
        (staging / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        missing = {
            file: facts for file, facts in record["files"].items() if not is_there(release.place(base, file), facts)
        }
        check_space(release, base, staging, missing)
        total = sum(facts["size"] for facts in missing.values())
        progress.start(total, sum(staged_bytes(staging, file) for file in missing))
        for file, facts in missing.items():
            download(release, record["revision"], staging, file, facts, progress)
        for file in missing:
            place = release.place(base, file)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / file, place)
        for file, facts in record["files"].items():
            facts["mtime_ns"] = release.place(base, file).stat().st_mtime_ns
        release.record(base).write_text(json.dumps(record, indent=1), encoding="utf-8")
        shutil.rmtree(staging)
    return release.target(base), told(release, record, release.target(base), "downloaded and checked")


def told(release: Release, record: Record, target: Path, how: str) -> str:
    """What the node shows."""
    return (
        f"{release.repo}: {how}\nlicence: {record['licence'] or 'not stated, see the model card'}\n"
        f"revision: {record['revision']}\n{target}"
    )


def complete(release: Release, base: Path) -> Record | None:
    """The record of an earlier download all of whose files are still what it names. Raises FetchError if one is not."""
    record = read_record(release.record(base))
    if record is None or not all(release.place(base, file).is_file() for file in record["files"]):
        return None
    for file, facts in record["files"].items():
        place = release.place(base, file)
        if place.stat().st_mtime_ns != facts.get("mtime_ns") and not is_there(place, facts):
            return None
    return record


def is_there(place: Path, facts: Facts) -> bool:
    """Whether this file has been downloaded. Raises FetchError if another one is in its place, which stays."""
    if not place.is_file():
        return False
    if place.stat().st_size == facts["size"] and hash_of(place, facts) == facts["hash"]:
        return True
    raise FetchError(
        f"{place}: this file is not the release's ({facts['size']} bytes, {facts['kind']} {facts['hash']}): changed or "
        "damaged. Nothing is overwritten: move or delete it, then run SPLAM Fetch again."
    )


def ask_hub(release: Release, progress: Progress) -> Record:
    """What the hub says of the release now: the commit, the licence, each file's size and hash."""
    progress.say(f"asking the hub for {release.repo}")
    info = hub().HfApi().model_info(release.repo, files_metadata=True, token=False)
    files = {file.rfilename: file for file in info.siblings}
    card = getattr(info, "card_data", None) or getattr(info, "cardData", None) or {}
    licences = [tag.partition(":")[2] for tag in info.tags or [] if tag.startswith("license:")]
    return {
        "repo": release.repo,
        "revision": info.sha,
        "licence": one_line(card.get("license") or next(iter(licences), "")),
        "files": {name: facts_of(release, files[name]) for name in wanted(release, list(files))},
    }


def wanted(release: Release, names: list[str]) -> list[str]:
    """The files to download, a pipeline's model_index.json last. Raises FetchError for names that leave the folder."""
    for name in names:
        if not stays_inside(name):
            raise FetchError(f"SPLAM Fetch: the hub lists a file {name!r} in {release.repo}; nothing was downloaded.")
    kept = sorted(name for name in names if name.endswith(KEPT) and not name.startswith("."))
    weights = [name for name in kept if name.endswith(".safetensors")]
    if release.is_lora:
        top = [name for name in weights if "/" not in name]
        named = [name for name in top if name == "pytorch_lora_weights.safetensors"] or top
        if len(named) == 1:
            return named
        raise FetchError(
            f"SPLAM Fetch: expected one .safetensors file in {release.repo}, found {', '.join(top) or 'none'}."
        )
    for part in PIPELINE_PARTS:
        if not any(name.startswith(f"{part}/") for name in weights):
            raise FetchError(
                f"SPLAM Fetch: {release.repo} has no .safetensors file in {part}/. Pickles are not downloaded; "
                "convert the pipeline with diffusers (save_pretrained with safe_serialization=True)."
            )
    # A single-file copy beside the pipeline, and half-precision twins of weights that are there, are gigabytes more.
    variants = {name for name in weights if any(mark in name for mark in (".fp16.", ".non_ema."))}
    twins = {name for name in variants if name.replace(".fp16.", ".").replace(".non_ema.", ".") in weights}
    kept = [name for name in kept if name not in twins and ("/" in name or name not in weights)]
    return sorted(kept, key=lambda name: (name == "model_index.json", name))


def stays_inside(name: str) -> bool:
    """Whether a file's name, on any system, means a place inside the folder that it is put into."""
    parts = PurePosixPath(name).parts
    plain = name.isprintable() and not set(name) & set('\\:*?"<>|')
    return plain and bool(parts) and ".." not in parts and not name.startswith("/")


def facts_of(release: Release, file: Any) -> Facts:
    """Size and hash by the hub's listing: SHA-256 for what lies in LFS, Git's own hash of a blob for small files."""
    lfs = file.lfs or {}
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    if file.size is None or not (sha256 or file.blob_id):
        raise FetchError(
            f"SPLAM Fetch: the hub gives no size and hash for {file.rfilename} of {release.repo}, so a download could "
            "not be checked. Try again later, or without HF_ENDPOINT if it names a mirror."
        )
    kind, value = ("sha256", sha256) if sha256 else ("git", file.blob_id)
    return {"size": file.size, "kind": kind, "hash": value}


def hash_of(path: Path, facts: Facts, tick: Callable[[], None] = lambda: None) -> str:
    digest = hashlib.sha256() if facts["kind"] == "sha256" else hashlib.sha1(usedforsecurity=False)
    if facts["kind"] == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            tick()
    return digest.hexdigest()


def check_space(release: Release, base: Path, staging: Path, missing: dict[str, Facts]) -> None:
    """Raises FetchError if the disk cannot take what is still to come."""
    needed = sum(facts["size"] - staged_bytes(staging, file) for file, facts in missing.items())
    free = shutil.disk_usage(base).free
    if needed + MARGIN > free:
        raise FetchError(
            f"SPLAM Fetch: {release.repo} needs {gigabytes(needed)} more, and the disk of {base} has "
            f"{gigabytes(free)} free. Make room, or name a folder on another disk in extra_model_paths.yaml."
        )


def staged_bytes(staging: Path, file: str) -> int:
    """How much of a file an earlier run left."""
    return next((path.stat().st_size for path in (staging / file, partial(staging, file)) if path.is_file()), 0)


def partial(staging: Path, file: str) -> Path:
    return staging / f"{file}.part"


def download(release: Release, revision: str, staging: Path, file: str, facts: Facts, progress: Progress) -> None:
    """One file into the staging folder, from where an earlier run stopped; it gets its name once it is checked."""
    whole, part = staging / file, partial(staging, file)
    if whole.is_file():
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as stream:
        have = stream.tell()
        if have < facts["size"]:
            from huggingface_hub.file_download import http_get

            url = hub().hf_hub_url(release.repo, file, revision=revision)
            # The size is checked below: versions differ in what they compare it with when they resume.
            watched = cast(BinaryIO, Watched(stream, progress, file))  # as much of one as is used
            http_get(url, watched, resume_size=have, headers={"Accept-Encoding": "identity"})
    progress.say(f"checking {file}")
    found = part.stat().st_size
    check_cancel = comfy.model_management.throw_exception_if_processing_interrupted
    digest = hash_of(part, facts, check_cancel) if found == facts["size"] else f"none, having {found} bytes"
    if digest != facts["hash"]:
        kept = "What has arrived is kept"
        if found >= facts["size"]:
            part.unlink()
            kept = "It was not kept"
        raise FetchError(
            f"SPLAM Fetch: {file} of {release.repo} is damaged: expected {facts['size']} bytes with {facts['kind']} "
            f"{facts['hash']}, found {digest}. {kept}. Run the node again; if it stays so, the file on "
            "the hub or a proxy in between is broken."
        )
    os.replace(part, whole)


class Watched:
    """A file that huggingface_hub writes to: counts, and stops the download when the user cancels."""

    def __init__(self, stream: BinaryIO, progress: Progress, name: str):
        self.stream, self.progress, self.label = stream, progress, name
        self.name = stream.name  # hf_transfer, where it is switched on, opens the file by its name

    def write(self, block: bytes) -> int:
        written = self.stream.write(block)
        self.stream.flush()
        self.progress.advance(written, self.label)
        return written

    def seek(self, *position: int) -> int:
        return self.stream.seek(*position)

    def truncate(self, *size: int) -> int:
        # The server did not take up where it was asked to: what there was is written again.
        before, after = os.fstat(self.stream.fileno()).st_size, self.stream.truncate(*size)
        self.progress.done -= before - after
        return after

    def tell(self) -> int:
        return self.stream.tell()


def hub() -> ModuleType:
    """huggingface_hub, of which ComfyUI's transformers brings one. Raises FetchError if there is none."""
    try:
        import huggingface_hub
    except ImportError:
        raise FetchError(
            "SPLAM Fetch: ComfyUI's Python has no huggingface_hub. Install it there with pip, or download the "
            "release in a browser: web/docs/SPLAMFetch.md says where each file goes."
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def plain_errors(release: Release, base: Path) -> Iterator[None]:
    """The libraries' many errors as one sentence that says what to do. A cancel and our own pass as they are."""
    again = "What has arrived is kept: run SPLAM Fetch again and it goes on from there."
    try:
        yield
    except (FetchError, comfy.model_management.InterruptProcessingException):
        raise
    except Exception as error:
        # By name: huggingface_hub changed its HTTP library, and with it the classes.
        kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if "OfflineModeIsEnabled" in kinds:
            text = "HF_HUB_OFFLINE is set, so nothing may be downloaded. Unset it and restart ComfyUI."
        elif status in (401, 403, 404):
            text = (
                f"the hub does not give out this repository, or no longer the revision that was begun (HTTP {status}). "
                f"To begin anew, delete {base / release.name}.download."
            )
        elif status is not None:
            text = f"the hub answered HTTP {status}. Try again later. {again}"
        elif any(word in kinds for word in ("Connect", "Timeout", "Protocol", "Transport", "Chunked", "SSL")):
            text = f"the hub cannot be reached, or the connection broke off ({type(error).__name__}). {again}"
        elif isinstance(error, OSError) and error.errno == 28:
            text = f"the disk of {base} is full. Make room. {again}"
        elif isinstance(error, PermissionError):
            text = f"{base} cannot be written to ({error.strerror}). Make it writable, or name another model folder."
        else:
            text = f"{type(error).__name__}: {error}. {again}"
        raise FetchError(f"SPLAM Fetch: {release.repo}: {text}") from error


def read_record(file: Path) -> Record | None:
    """None for no record, or one that is none of ours."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        files = record["files"]
        ours = isinstance(record["revision"], str) and files and all(map(stays_inside, files))
        ours = ours and all(is_facts(facts) for facts in files.values())
        return {**record, "licence": one_line(record.get("licence"))} if ours else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_facts(facts: Any) -> bool:
    return facts["kind"] in ("sha256", "git") and isinstance(facts["size"], int) and isinstance(facts["hash"], str)


def one_line(text: Any) -> str | None:
    """What somebody else wrote, as a short word for the node's face."""
    return shortened(" ".join(str(text).split()), 100) if text else None


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
