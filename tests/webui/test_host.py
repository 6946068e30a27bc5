"""Registration, the script in the page, info texts, and what must lie (or not lie) at the repository's top level."""

import ast
import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from .reference import ROOT

pytestmark = pytest.mark.webui


def names(host):
    return [sampler.name for sampler in host.sd_samplers.all_samplers]


def test_it_is_offered_everywhere(host):
    samplers = host.sd_samplers
    assert "SPLAM" in samplers.visible_sampler_names()  # the dropdowns
    assert "SPLAM" in [sampler.name for sampler in samplers.samplers_for_img2img]  # hires fix
    assert samplers.find_sampler_config("SPLAM").name == "SPLAM"  # the API
    assert samplers.samplers_map["splam"] == "SPLAM"  # the X/Y/Z plot
    assert samplers.get_sampler_and_scheduler("SPLAM", None) == ("SPLAM", "Automatic")  # info texts


def test_reload_keeps_one(host):
    held = host.sd_samplers.all_samplers  # as other modules hold it
    before = held[-1]
    for _ in range(3):
        host.load()
    assert names(host).count("SPLAM") == 1
    assert held is host.sd_samplers.all_samplers
    assert held[-1] is host.sd_samplers.all_samplers_map["SPLAM"] is not before
    assert len(host.script_callbacks.ui_tabs) == 1
    samples, _ = host.run(host.request(steps=1))
    assert samples.shape == (1, 4, 8, 8)


def test_a_name_that_was_unknown_before_is_found_afterwards(host):
    """Where names are cached, an API call or a pasted picture may have asked before the extension was installed."""
    samplers = host.sd_samplers
    samplers.all_samplers[:] = [sampler for sampler in samplers.all_samplers if sampler.name != "SPLAM"]
    del samplers.all_samplers_map["SPLAM"]
    samplers.get_sampler_and_scheduler.__dict__.get("cache_clear", lambda: None)()
    assert samplers.get_sampler_and_scheduler("SPLAM", "Automatic")[0] == "Euler"
    host.load()
    assert samplers.get_sampler_and_scheduler("SPLAM", "Automatic")[0] == "SPLAM"


def test_a_hidden_sampler_stays_hidden(host):
    host.shared.opts.data["hide_samplers"] = ["SPLAM"]
    host.load()
    assert "SPLAM" not in host.sd_samplers.visible_sampler_names()


def test_other_samplers_are_left_alone(host):
    p = host.request(sampler_name="Euler")
    _, info = host.run(p)
    assert p.cfg_scale == 7
    assert "SPLAM" not in info
    if host.name != "a1111":
        assert p.hr_cfg == 7


def test_xyz_plot_cells_do_not_inherit_the_note(host):
    """Its cells are shallow copies of one request."""
    p = host.request(steps=1)
    infos = [host.run(copy.copy(p))[1]]
    p.sampler_name = "Euler"
    infos.append(host.run(copy.copy(p))[1])
    assert ["SPLAM guidance" in info for info in infos] == [True, False]
    assert "CFG scale: 7" in infos[1]


@pytest.mark.parametrize(
    ("first", "second", "hr_cfg", "expected"),
    [
        # passes, the hires guidance asked for, and (first, hires) afterwards; None: that host has no hires guidance
        ("SPLAM", None, 7.0, {"a1111": (1, None), "forge": (1, 1), "reforge": (1, 1)}),
        ("SPLAM", "Use same sampler", 7.0, {"a1111": (1, None), "forge": (1, 1), "reforge": (1, 1)}),
        ("Euler", "SPLAM", 7.0, {"a1111": (5, None), "forge": (5, 1), "reforge": (5, 1)}),
        ("SPLAM", "Euler", 7.0, {"a1111": (5, None), "forge": (1, 7), "reforge": (1, 7)}),
        ("SPLAM", "Euler", 0.0, {"a1111": (5, None), "forge": (1, 5), "reforge": (1, 5)}),
        ("Euler", "Euler", 0.0, {"a1111": (5, None), "forge": (5, 5), "reforge": (5, 5)}),
    ],
)
def test_passes_of_different_samplers_keep_their_guidance(host, first, second, hr_cfg, expected):
    p = host.request(sampler_name=first, hr_sampler_name=second, enable_hr=True, cfg_scale=5.0)
    if host.name != "a1111":
        p.hr_cfg = hr_cfg
    host.runner.before_process(p)
    assert (p.cfg_scale, getattr(p, "hr_cfg", None)) == expected[host.name]
    if second == "Use same sampler":
        return  # the host replaces it by None before it samples
    host.run(p)
    calls = host.shared.sd_model.calls
    evaluations = {"a1111": lambda forced: [1] if forced else [2], "forge": lambda forced: [1] if forced else [1, 1]}
    count = evaluations["a1111" if host.name == "a1111" else "forge"]
    both = [name == "SPLAM" for name in (first, second or first)]
    euler_steps = 3 + 1 if host.name == "a1111" else 4  # steps given: exactly these
    assert calls == count(both[0]) * 4 + count(both[1]) * euler_steps


def paste(host, info):
    """What the page does with the parameters of a picture: components and their new values, None for no change."""
    values = dict(pair.split(": ", 1) for pair in info.split(", "))
    script = host.runner.alwayson[0]
    return [values.get(field) if isinstance(field, str) else field(values) for _, field in script.infotext_fields]


def test_pasting_parameters_restores_how_guidance_was(host):
    forced = host.run(host.request(steps=1))[1]
    kept = host.run(host.request(steps=1, script_args=[False]))[1]
    other = host.run(host.request(steps=1, sampler_name="Euler"))[1]
    guided = f"{forced}, SPLAM NAG scale: 3.5"
    pasted = [paste(host, info) for info in (forced, kept, other, guided)]
    assert pasted == [[True, False, None], [False, False, None], [None, None, None], [True, True, "3.5"]]
    assert "Sampler: SPLAM, CFG scale: 1" in forced


def test_scripts_holds_only_scripts_and_the_top_level_nothing_that_hosts_read():
    assert [file.name for file in (ROOT / "scripts").iterdir() if file.name != "__pycache__"] == ["splam.py"]
    for name in ("javascript", "style.css", "preload.py", "localizations", "metadata.ini", "html"):
        assert not (ROOT / name).exists(), name


def test_the_hosts_own_package_is_imported_only_where_hosts_load_us():
    importing = []
    for file in ROOT.rglob("*.py"):
        if "tests" in file.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) and node.level == 0 else None
            if (module or "").partition(".")[0] == "modules":
                importing.append(file.relative_to(ROOT).parts[0])
    assert set(importing) == {"scripts", "splam_webui"}


def test_splam_webui_imports_only_the_core_and_the_host():
    allowed = {"splam_core", "modules", "gradio", "torch", "backend", "ldm_patched"} | set(sys.stdlib_module_names)
    for file in (ROOT / "splam_webui").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.partition(".")[0] in allowed, file
            elif isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, file


@pytest.fixture
def installer(tmp_path):
    """Runs install.py as the hosts do, with packages that would betray a look at them or at the network."""
    fakes = tmp_path / "fakes"
    for name in ("torch", "launch", "pip", "requests", "urllib3"):
        (fakes / name).mkdir(parents=True)
        (fakes / name / "__init__.py").write_text("raise SystemExit('install.py imported ' + __name__)")
    (fakes / "safetensors").mkdir()
    (fakes / "safetensors" / "__init__.py").write_text("")
    command = [sys.executable, str(ROOT / "install.py")]

    def install(path=fakes, isolated=False):
        environment = os.environ | {"PYTHONPATH": str(path), "http_proxy": "http://127.0.0.1:9"}
        flags = ["-S", "-B"] if isolated else ["-B"]
        return subprocess.run(
            [command[0], *flags, command[1]], env=environment, capture_output=True, text=True, cwd=tmp_path
        )

    return SimpleNamespace(run=install, fakes=fakes)


def test_install_is_silent_offline_and_repeatable(installer):
    for _ in range(2):
        done = installer.run()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_install_says_what_a_python_lacks(installer, tmp_path):
    done = installer.run(path=tmp_path / "nothing", isolated=True)
    assert done.returncode != 0
    assert "has no torch and no safetensors" in done.stderr
    assert "Python of" in done.stderr


def test_importing_install_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import install; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "False"
