"""A good guest: what importing changes in ComfyUI, any folder name, nothing written, translations, registry files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from harness.graphs import save_latent, text_to_image
from harness.server import ROOT, ComfyServer

pytestmark = pytest.mark.comfyui
LANGUAGES = ("zh", "ja", "ko", "de", "fr", "es")
ODD_NAME = "SPLAM (copy) ünïcode 亚路径 #1"
PROMPT = "a yellow star above a doughnut"

# Loads the pack as ComfyUI does, into a process that has ComfyUI's own modules, and says what is new.
PROBE = """
import asyncio, importlib.util, json, logging, os, sys, warnings
import comfy.options; comfy.options.enable_args_parsing()
import utils.extra_config, torch, server, nodes, execution, folder_paths, latent_preview
import comfy.samplers, comfy.sample, comfy.sd, comfy.utils, comfy.lora, comfy.ldm.modules.diffusionmodules.openaimodel
import comfy_api.latest, safetensors.torch, tqdm.auto

def ours(name):
    return name == "pack" or name.startswith("pack.")

def facts(value):
    return sorted(map(repr, value)) if isinstance(value, (list, dict, set)) else None

def state():
    found = {}
    for name, module in list(sys.modules.items()):
        if module is None or name in ("__main__", "__mp_main__") or ours(name):
            continue
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if key in ("__warningregistry__", "__builtins__"):
                continue
            found[f"{name}.{key}"] = id(value)
            if name.partition(".")[0] in ("comfy", "nodes", "folder_paths", "server", "execution", "latent_preview"):
                try:
                    found[f"{name}.{key}()"] = facts(value)
                except Exception:
                    pass
                if isinstance(value, type):
                    found |= {f"{name}.{key}.{slot}": id(part) for slot, part in vars(value).items()
                              if not slot.startswith("_abc")}
    found |= {"path": list(sys.path), "environ": dict(os.environ), "cwd": os.getcwd(), "hooks": len(sys.meta_path)}
    found |= {"rng": torch.get_rng_state().sum().item(), "grad": torch.is_grad_enabled(),
              "dtype": str(torch.get_default_dtype()), "threads": torch.get_num_threads(),
              "filters": len(warnings.filters), "handlers": len(logging.getLogger().handlers),
              "level": logging.getLogger().level}
    return found

folder = os.environ["PACK"]
asyncio.run(asyncio.sleep(0))  # makes the loop policy that a running server has
modules, before = set(sys.modules), state()
spec = importlib.util.spec_from_file_location("pack", os.path.join(folder, "__init__.py"),
                                              submodule_search_locations=[folder])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
extension = asyncio.run(pack.comfy_entrypoint())
nodes_of_pack = asyncio.run(extension.get_node_list())
for node in nodes_of_pack:
    node.GET_SCHEMA()
new = sorted(name for name in set(sys.modules) - modules if not ours(name))
after = state()
fresh = {key for key in after if key.rpartition(".")[0] in new or any(key.startswith(f"{n}.") for n in new)}
changed = sorted(key for key in set(before) | set(after)
                 if before.get(key) != after.get(key) and key not in fresh
                 and not any(key.rstrip("()").endswith("." + n.rpartition(".")[2]) for n in new))
print("RESULT" + json.dumps({"new": new, "changed": changed, "nodes": [n.GET_SCHEMA().node_id for n in nodes_of_pack]}))
"""


def ours() -> list[str]:
    """The repository's files, relative, as Git would take them; all of them where this is no checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if run.returncode:
        return [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return [name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def imported(comfyui):
    """What the probe saw."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, "--cpu"],
        cwd=comfyui,
        env={**os.environ, "PYTHONPATH": str(comfyui), "PACK": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.rpartition("RESULT")[2])


def test_importing_loads_nothing_but_the_pack_and_the_standard_library(imported):
    third_party = {name.partition(".")[0] for name in imported["new"]} - set(sys.stdlib_module_names)
    # ComfyUI's own modules are there already in a running server, whichever of them the probe did not name.
    assert third_party <= {"comfy", "comfy_api", "comfy_extras", "utils"}


def test_importing_changes_nothing_in_the_host_but_the_registered_names(imported):
    allowed = re.compile(
        r"comfy\.(samplers\.(KSAMPLER_NAMES|SAMPLER_NAMES|SCHEDULER_NAMES|SCHEDULER_HANDLERS|KSampler\.\w+)(\(\))?"
        r"|k_diffusion\.sampling\.sample_splam(\(\))?)"
        # A cache of the host's own listing of model files, which the loaders' lists ask for.
        r"|folder_paths\.(filename_list_cache|cache_helper)(\(\))?"
    )
    assert [name for name in imported["changed"] if not allowed.fullmatch(name)] == []
    assert "comfy.k_diffusion.sampling.sample_splam" in imported["changed"]


@pytest.fixture(scope="module")
def guest(comfyui, tmp_path_factory):
    """A ComfyUI in which the pack lies under an odd name, not to be written to, beside one with our top-level names."""
    folder = tmp_path_factory.mktemp("guest")
    server = ComfyServer(comfyui, folder)
    packs = folder / "custom_nodes"
    for link in list(packs.iterdir()):
        link.unlink()
    pack = packs / ODD_NAME
    for name in ours():
        if not name.startswith(("tests/", "benchmarks/", "docs/", "harness/", "training/")):
            (pack / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, pack / name)
    server.written = snapshot(pack)
    for path in [pack, *pack.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    other = packs / "0-another pack"
    for module in ("nodes", "training", "splam_core", "scripts"):
        (other / module).mkdir(parents=True)
        (other / module / "__init__.py").write_text("WHOSE = 'theirs'\n")
    (other / "__init__.py").write_text(
        "import sys, pathlib\n"
        "sys.path.insert(0, str(pathlib.Path(__file__).parent))\n"
        "import splam_core, training\n"
        "assert splam_core.WHOSE == training.WHOSE == 'theirs'\n"
        "class TheirNode:\n"
        "    RETURN_TYPES, FUNCTION, CATEGORY = (), 'run', 'x'\n"
        "    INPUT_TYPES = classmethod(lambda cls: {'required': {}})\n"
        "    def run(self): return ()\n"
        "NODE_CLASS_MAPPINGS = {'TheirNode': TheirNode}\n"
    )
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # Python itself skips its caches where it may not write
    server.pack = pack
    try:
        with server as running:
            yield running
    finally:
        patch.undo()
        for path in [pack, *pack.rglob("*")]:
            path.chmod(0o755)


def snapshot(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_works_under_any_name_beside_any_pack_and_writes_nothing_to_its_folder(guest):
    info = guest.get("/object_info")
    assert "TheirNode" in info and "SPLAMSampler" in info
    assert "splam" in info["KSampler"]["input"]["required"]["sampler_name"][0]
    graph = save_latent(text_to_image("embedded-student", PROMPT, steps=1))
    assert guest.files(guest.run(graph))
    assert ODD_NAME in guest.get("/workflow_templates")
    assert any(ODD_NAME in extension for extension in guest.get("/extensions")) or not list(ROOT.glob("web/**/*.js"))
    assert snapshot(guest.pack) == guest.written


def test_every_word_of_every_node_is_translated(guest):
    """The page reads /api/i18n: node id -> display_name, description, inputs by name, outputs by number."""
    served = guest.get("/i18n")
    nodes = {name: node for name, node in guest.get("/object_info").items() if name.startswith("SPLAM")}
    for language in LANGUAGES:
        found = served[language]["nodeDefs"]
        assert set(found) == set(nodes), language
        for name, node in nodes.items():
            mine = found[name]
            where = (language, name)
            assert mine["display_name"].strip(), where
            assert mine["description"].strip() and mine["description"] != node["description"], where
            inputs = {
                key: spec[1] for group in ("required", "optional") for key, spec in node["input"].get(group, {}).items()
            }
            assert set(mine.get("inputs", {})) == set(inputs), where
            for key, options in inputs.items():
                assert mine["inputs"][key]["name"].strip(), (*where, key)
                if options.get("tooltip"):
                    assert mine["inputs"][key]["tooltip"].strip(), (*where, key)
                    assert mine["inputs"][key]["tooltip"] != options["tooltip"], (*where, key)
            assert set(mine["outputs"]) == {str(index) for index in range(len(node["output"]))}, where
            for index, tooltip in enumerate(node.get("output_tooltips") or []):
                said = mine["outputs"][str(index)].get("tooltip")
                assert bool(said) == bool(tooltip) and (not tooltip or said != tooltip), (*where, index)


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_hold_no_signs_that_the_page_reads_as_commands(language):
    """vue-i18n takes braces for values, | for a plural and @ for a reference."""

    def texts(value):
        return [text for item in value.values() for text in texts(item)] if isinstance(value, dict) else [value]

    definitions = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert [text for text in texts(definitions) if re.search(r"[{}|@$]", text)] == []


def test_file_names_are_allowed_on_windows():
    names, reserved = ours(), re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    for name in names:
        assert len(name) <= 120, name  # 260 with the folder of a ComfyUI
        for part in PurePosixPath(name).parts:
            assert not reserved.fullmatch(part) and not re.search(r'[<>:"\\|?*\x00-\x1f]|[ .]$', part), name
    everything = [*names, *folders]
    assert len({name.casefold() for name in everything}) == len(everything)


def test_the_registry_file():
    tomllib = pytest.importorskip("tomllib")
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = content["project"], content["tool"]["comfy"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert re.fullmatch(r"[a-z0-9-]+", project["name"]) and project["description"]
    assert (ROOT / project["license"]["file"]).is_file()
    assert re.fullmatch(r"[a-z0-9-]+", comfy["PublisherId"]) and comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    for address in [comfy["Icon"], comfy.get("Banner", ""), *project["urls"].values()]:
        assert address == "" or address.startswith("https://"), address
        assert "example" not in address and "your" not in address.lower()
    # Those of `pip install .`, the library: every host has them, so that the pack asks for nothing.
    assert {re.match(r"\w+", requirement)[0] for requirement in project["dependencies"]} == {"torch", "safetensors"}


def test_the_registry_gets_all_that_the_pack_needs():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs a Git checkout, whose rules .comfyignore follows")
    command = ["git", "-c", f"core.excludesFile={ROOT / '.comfyignore'}", "check-ignore", "--no-index", "--stdin", "-z"]
    run = subprocess.run(command, cwd=ROOT, input="\0".join(ours()), capture_output=True, text=True)
    left_out = set(filter(None, run.stdout.split("\0")))
    needed = (
        "nodes/",
        "splam_core/",
        "assets/",
        "workflows/",
        "subgraphs/",
        "web/",
        "locales/",
        "scripts/",
        "training/",
    )
    files = ("__init__.py", "install.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md")
    assert [name for name in left_out if name.startswith(needed) or name in files] == []
    assert [name for name in ours() if name.startswith("tests/") and name not in left_out] == []
