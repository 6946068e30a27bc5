"""SPLAM's nodes beside bare UNet forwards and the host's own nodes: seconds, memory, and what the pack's import takes.

    python dev.py python -m benchmarks.sampling --json docs/results/performance.json [--full-size] [--only load-time]

- sampling-overhead: SPLAM Sampler's four steps over four forwards of the same UNet.
- sampling-vs-stock: the same over KSampler's `lcm` and `sgm_uniform`, on the same MODEL.
- load-time, load-memory: SPLAM Loader over Load Checkpoint on one single file; memory is the peak of a fresh process.
- import-time: the pack's modules over ComfyUI's own `nodes`, by `python -X importtime`.

What is compared runs in turn, in one process but for memory and imports. A spread is the quartiles of the ratios pair
by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .performance import paired_row, print_table, write_rows

# This process stays small, without torch: Linux counts its peak as that of the processes that it starts.
INSIDE = Path(__file__).with_name("inside_comfyui.py")
BENCHMARKS = ("sampling-overhead", "sampling-vs-stock", "load-time", "load-memory", "import-time")
NARROW, TRUE_SIZE = "sd15", "sd15-true-size"  # of benchmarks.parity
LINE = re.compile(r"import time:\s*(\d+) \|\s*(\d+) \| (\s*)(\S+)")


class Host:
    """Processes of a ComfyUI, with its models under `folder`."""

    def __init__(self, comfyui: Path, folder: Path) -> None:
        self.comfyui, self.folder = comfyui, folder
        for name in ("models/checkpoints", "custom_nodes", "input", "output"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def ask(self, job: str, *arguments: object, options: tuple[str, ...] = ()):
        """The result of a job of inside_comfyui.py in a process of its own. Raises RuntimeError with its last words."""
        return self.run(job, *arguments, options=options)[0]

    def run(self, job: str, *arguments: object, options: tuple[str, ...] = ()):
        """(result, stderr) of a job. options: of Python."""
        command = [sys.executable, *options, INSIDE, job, self.comfyui, self.folder, *arguments]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{job} {' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1]), done.stderr


def sampling_rows(host: Host, shape: str, model_name: str, size: int, repeats: int) -> list[dict]:
    """Raises RuntimeError where a step is not one evaluation of the UNet."""
    found = host.ask("sampling", model_name, size, repeats)
    if set(found["evaluations"].values()) != {4}:
        raise RuntimeError(f"{shape}: four steps are to be four evaluations of the UNet, found {found['evaluations']}")
    name = f"{shape}, {size}x{size} latents, 4 steps"
    return [
        paired_row("sampling-overhead", name, found["ours"], found["bare"], "s"),
        paired_row("sampling-vs-stock", name, found["ours"], found["stock"], "s"),
    ]


def load_time(host: Host, file: str, repeats: int) -> list[dict]:
    found = host.ask("loading", file, repeats)
    return [paired_row("load-time", file, found["ours"], found["stock"], "s")]


def load_memory(host: Host, file: str, repeats: int) -> list[dict]:
    ours, stock = [], []
    for _ in range(repeats):
        for kind, peaks in (("ours", ours), ("stock", stock)):
            peaks.append(host.ask("memory", file, kind))
    return [paired_row("load-memory", file, ours, stock, "MiB")]


def import_time(host: Host, repeats: int) -> list[dict]:
    """Raises RuntimeError where the pack imports a module of torch's that the host has not."""
    ours, peer = [], []
    for _ in range(repeats):
        found, log = host.run("imports", options=("-X", "importtime"))
        if found["torch"]:
            raise RuntimeError(f"The pack's import adds {', '.join(found['torch'])} to what ComfyUI imports of torch.")
        before, _, rest = log.partition("\nbegin\n")
        pack, _, _ = rest.partition("\nend\n")
        ours.append(microseconds(pack, lambda name: True))
        peer.append(microseconds(before, lambda name: name == "nodes"))
    return [paired_row("import-time", f"{found['nodes']} nodes", ours, peer, "us")]


def microseconds(log: str, chosen: Callable[[str], bool]) -> float:
    """The cumulative times of the outermost imports of these names in what `-X importtime` writes."""
    lines = [LINE.fullmatch(line.rstrip()) for line in log.splitlines()]
    return float(sum(int(m[2]) for m in lines if m and not m[3] and chosen(m[4])))


def measure(host: Host, only: list[str], full_size: bool, repeats: int) -> Iterator[list[dict]]:
    """The rows of the benchmarks in `only`, as they are found. repeats: of the quickest, the others take fewer."""
    samples, loads = {*BENCHMARKS[:2]} & {*only}, {"load-time", "load-memory"} & {*only}
    few = max(1, repeats // 10)
    if samples:
        yield sampling_rows(host, "embedded", "embedded-student", 16, repeats)
    if "import-time" in only:
        yield import_time(host, few)
    if loads:
        yield loading_rows(host, only, host.ask("write", NARROW), max(1, repeats // 3), few)
    if full_size and (samples or loads):
        file = host.ask("write", TRUE_SIZE)
        yield loading_rows(host, only, file, few, few)
        if samples:
            yield sampling_rows(host, TRUE_SIZE, file, 16, few)


def loading_rows(host: Host, only: list[str], file: str, repeats: int, processes: int) -> list[dict]:
    rows = load_time(host, file, repeats) if "load-time" in only else []
    return rows + (load_memory(host, file, processes) if "load-memory" in only else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, required=True, help="where the rows go; those of other benchmarks in it stay"
    )
    parser.add_argument("--full-size", action="store_true", help="also the true SD1.5, 860 M parameters")
    parser.add_argument("--repeats", type=int, default=100, help="pairs of the quick ones; the others take a tenth")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="BENCHMARK",
                        help="these alone: " + ", ".join(BENCHMARKS))  # fmt: skip
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats takes a number of 1 or more, found {options.repeats}.")
    if not os.environ.get("COMFYUI_PATH"):
        parser.error("COMFYUI_PATH names no ComfyUI; run this through `python dev.py python`.")
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(os.environ["COMFYUI_PATH"]), Path(folder))
        rows = []
        for found in measure(host, options.only, options.full_size, options.repeats):
            rows += [row for row in found if row["benchmark"] in options.only]
            print(f"{len(rows)} rows", flush=True)
    write_rows(options.json, rows)
    print_table(rows)


if __name__ == "__main__":
    main()
