"""What this runs on: the tests of splam_core, a step of training and a picture in an environment of each kind.

    python dev.py python -m benchmarks.versions --json docs/results/versions.json [--only "Python 3.12" ...]
    python dev.py python -m benchmarks.versions --json docs/results/versions.json --comfyui FOLDER ...

For each Python that the pack claims, the newest packages that requirements-train.txt allows; and for the oldest Python
the oldest of each that it allows. An environment is made by uv, which is installed for the purpose, in a temporary
folder, and removed after its checks; nothing outside it is touched. The Pythons are looked for on the PATH and where
uv looks. --comfyui runs tests/comfyui/test_server.py on these ComfyUIs, in the environments that dev.py makes for them.

Writes a row an environment, dated, beside those that are there, and the table of docs/versions.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- made by benchmarks/versions.py -->\n", "<!-- end -->\n"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "safetensors")
CHECKS = {
    "core": "tests of splam_core",
    "training": "a step of training, whole weights and a LoRA",
    "sampling": "pictures of both",
    "host": "tests on the server",
}


@dataclass(frozen=True)
class Kind:
    python: str
    resolution: str = "highest"  # or "lowest-direct": the oldest of each package that is named


PYTHONS = ("3.10", "3.11", "3.12", "3.13")
KINDS = {f"Python {version}": Kind(version) for version in PYTHONS}
KINDS["oldest packages"] = Kind(PYTHONS[0], "lowest-direct")


class Failed(Exception):
    """A command that ended otherwise than it should; its output is the message."""


def call(command: list, **more: str) -> str:
    """What the command prints. Raises Failed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more
    run = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if run.returncode:
        raise Failed(run.stdout)
    return run.stdout


def passed(output: str) -> str:
    """pytest's own count, without warnings and the time that it took."""
    return re.sub(r"(, \d+ warnings?)? in [\d.]+s.*", "", output.strip().splitlines()[-1].strip("= "))


def checks_of(python: Path, folder: Path) -> dict[str, str]:
    """What each check of an environment says: pytest's count, "passed" or "failed"."""
    train = (python, "training/distill.py", "--teacher", "embedded", "--max-train-steps", 1, "--train-batch-size", 2)
    train += ("--num-scenes", 32, "--num-held-out", 8, "--no-cache-latents", "--sample-every", 0, "--report-to", "none")
    train += ("--validation-samples", 4, "--output-dir")
    # A share is drawn and not scored, which takes minutes.
    draw = (python, "training/evaluate.py", "--num-images", 2, "--steps", 4, "--shard", "0/1", "--output-dir")
    lora = folder / "lora" / "student.splam-lora.safetensors"
    options = ("-q", "-p", "no:cacheprovider", "--ignore", "tests/core/test_types.py")
    commands = {
        "core": [(python, "-m", "pytest", "tests/core", *options)],
        "training": [(*train, folder / "full"), (*train, folder / "lora", "--lora", "--lora-rank", 4)],
        "sampling": [
            (*draw, folder / "first", "--model", folder / "full" / "pipeline"),
            (*draw, folder / "second", "--model", "embedded-teacher", "--lora", lora),
        ],
    }
    found = {}
    for name, todo in commands.items():
        try:
            outputs = [call(one, SPLAM_CACHE=str(folder / "cache")) for one in todo]
            found[name] = passed(outputs[0]) if name == "core" else "passed"
        except Failed as error:
            found[name] = "failed"
            print(f"--- {name}\n{error}"[-6000:], flush=True)
        print(f"  {name}: {found[name]}", flush=True)
    return found


def packages_of(python: Path) -> dict[str, str]:
    """Python's version and those of PACKAGES, as the environment itself says."""
    code = f"""
import importlib.metadata as m, json, platform
versions = {{name: m.version(name) for name in {PACKAGES}}}
print(json.dumps({{"python": platform.python_version(), **versions}}))
"""
    return json.loads(call([python, "-c", code]).splitlines()[-1])


def measure(kind: Kind, uv: Path) -> dict:
    """The row of a kind. Raises Failed where its environment cannot be made."""
    with tempfile.TemporaryDirectory(prefix="splam-versions-") as place:
        folder = Path(place)
        python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        call([uv, "venv", "--quiet", "--python", kind.python, folder / "env"])
        install = (uv, "pip", "install", "--quiet", "--python", python, "--resolution", kind.resolution)
        call([*install, "-r", "requirements-train.txt", "pytest>=8", "pytest-timeout>=2.3"])
        return {**packages_of(python), **checks_of(python, folder)}


def measure_host(comfyui: Path) -> tuple[str, dict]:
    """(name, row) of a ComfyUI: the server's own tests, in the environment that dev.py has for it."""
    text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    name = f"ComfyUI {re.search(r'__version__ = .([0-9.]+)', text)[1]}"
    dev = (sys.executable, "dev.py")
    executable = call([*dev, "python", "-c", "import sys; print(sys.executable)"], COMFYUI_PATH=str(comfyui))
    row = packages_of(Path(executable.strip().splitlines()[-1]))
    try:
        output = call([*dev, "test", "tests/comfyui/test_server.py", "-q"], COMFYUI_PATH=str(comfyui))
        row["host"] = passed(output)
    except Failed as error:
        print(error)
        row["host"] = "failed"
    return name, row


def table(rows: Mapping[str, dict]) -> str:
    """Markdown: a line an environment."""
    columns = ("date", "python", *PACKAGES, *CHECKS)
    lines = ["| " + " | ".join(("", *(CHECKS.get(name, name) for name in columns))) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    lines += [f"| {name} | {' | '.join(row.get(column, '') for column in columns)} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the rows go, beside those that are there")
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--comfyui", nargs="+", type=Path, default=[], metavar="FOLDER", help="ComfyUIs, alone")
    options = parser.parse_args()
    rows = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    found: dict[str, dict] = {}

    def keep(name: str, row: dict) -> None:
        rows[name] = found[name] = {"date": datetime.date.today().isoformat(), **row}
        order = [*KINDS, *sorted(rows.keys() - KINDS.keys())]
        kept = {one: rows[one] for one in order if one in rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(kept) + END + rest.partition(END)[2], encoding="utf-8")

    for comfyui in options.comfyui:
        keep(*measure_host(comfyui.resolve()))
    kinds = options.only or ([] if options.comfyui else KINDS)
    if kinds:
        with tempfile.TemporaryDirectory(prefix="splam-uv-") as place:
            venv.create(place, with_pip=True)
            tools = Path(place) / ("Scripts" if os.name == "nt" else "bin")
            call([tools / "python", "-m", "pip", "install", "--quiet", "uv"])
            for name in kinds:
                print(name, flush=True)
                keep(name, measure(KINDS[name], tools / "uv"))
    return int(any("failed" in str(row.get(check)) for row in found.values() for check in CHECKS))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(str(error)[-6000:])
