"""A stand-in host for each of the three programs, with the extension loaded."""

import copy
import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .reference import ROOT, UNET, embedding, tiny_network

HOST = Path(__file__).parent / "host"
SCRIPT = ROOT / "scripts" / "splam.py"
HOSTS = ("a1111", "forge", "reforge")
OURS = ("modules", "gradio", "splam_webui", "backend", "ldm_patched")


@pytest.fixture(params=HOSTS)
def host(request, tmp_path, monkeypatch):
    with started(request.param, tmp_path, monkeypatch) as program:
        yield program


@contextmanager
def started(name, folder, monkeypatch):
    """The stand-in of one host, started with the extension; its modules are gone again afterwards."""

    def forget():
        for module in [m for m in sys.modules if m.partition(".")[0] in OURS]:
            del sys.modules[module]

    models = folder / "models"
    for sub in ("Stable-diffusion", "Lora"):
        (models / sub).mkdir(parents=True)
    monkeypatch.setenv("STAND_IN_HOST", name)
    monkeypatch.setenv("STAND_IN_MODELS", str(models))
    monkeypatch.syspath_prepend(str(HOST))
    # The extension finds itself by what the host puts on sys.path.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(ROOT)])
    forget()
    try:
        parts = ("shared", "sd_samplers", "processing", "scripts", "script_callbacks", "sd_models", "model", "rng")
        program = SimpleNamespace(
            name=name, models=models, **{p: importlib.import_module(f"modules.{p}") for p in parts}
        )

        def load(parameterization="eps"):
            """Start, or "Reload UI": the script is run again, the host's lists of samplers are not made anew."""
            program.script_callbacks.clear_callbacks()
            program.runner = program.scripts.ScriptRunner(program.scripts.load_script(SCRIPT))
            program.use(parameterization)

        def use(parameterization="eps", network=None, zero_snr=False):
            network = network or tiny_network
            program.shared.sd_model = program.model.Checkpoint(network, name, parameterization, zero_snr)

        program.load, program.use = load, use
        program.run = lambda p: run(program, p)
        program.request = lambda **settings: program.processing.Request(
            **{"prompts": [embedding(1)], "negative": embedding(9), "seeds": [7], "scripts": program.runner} | settings
        )
        load()
        yield program
    finally:
        forget()


def with_attention(program):
    """`use(parameterization, zero_snr)` of a UNet whose cross-attention is of the host's kind, as guidance asks for."""
    from modules.attention import rebuilt

    unet = rebuilt(copy.deepcopy(UNET), lambda: program.shared.sd_model.forge_objects.unet.model_options)

    def network(x, t, context):
        with torch.no_grad():
            return unet(x, t, context).sample

    def use(parameterization="eps", zero_snr=False):
        program.use(parameterization, network, zero_snr)
        checkpoint = program.shared.sd_model
        if program.name == "a1111":
            checkpoint.model = torch.nn.Module()
            checkpoint.model.diffusion_model = unet
        else:
            checkpoint.forge_objects.unet.model.diffusion_model = unet
        return unet

    return use


def run(program, p):
    return program.processing.process_images(p)
