"""Beside other packs, beside a copy of itself, and on a host that has moved what it needs."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load

from harness.graphs import save_latent, stock, text_to_image
from harness.server import ROOT, ComfyServer

pytestmark = pytest.mark.comfyui
PROMPT = "a yellow star above a doughnut"

# What packs do that change samplers, schedulers, the sampling function or the UNet's forward for everybody.
NEIGHBOUR = """
import comfy.ldm.modules.diffusionmodules.openaimodel as unet
import comfy.samplers, comfy.sample, comfy.k_diffusion.sampling as sampling

CALLS = []

def counted(owner, name):
    before = getattr(owner, name)
    def after(*arguments, **named):
        CALLS.append(name)
        return before(*arguments, **named)
    setattr(owner, name, after)

def patch():
    counted(comfy.samplers, "sampling_function")
    counted(comfy.samplers, "calculate_sigmas")
    counted(comfy.samplers.CFGGuider, "sample")
    counted(comfy.sample, "prepare_noise")
    counted(unet.UNetModel, "forward")
    def sample_theirs(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return sampling.sample_euler(model, x, sigmas, extra_args, callback, disable)
    sampling.sample_theirs = sample_theirs
    # Both ways in which packs add a name: to the list, and with a list of their own in its place.
    comfy.samplers.KSampler.SAMPLERS = comfy.samplers.KSampler.SAMPLERS + ["theirs"]
    comfy.samplers.SAMPLER_NAMES.append("theirs")
    comfy.samplers.KSAMPLER_NAMES.append("theirs")
    comfy.samplers.SCHEDULER_HANDLERS["theirs"] = comfy.samplers.SchedulerHandler(
        lambda sampling, steps: comfy.samplers.normal_scheduler(sampling, steps))
    comfy.samplers.SCHEDULER_NAMES.append("theirs")

class Calls:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "test", True
    INPUT_TYPES = classmethod(lambda cls: {"required": {"samples": ("LATENT",)}})
    IS_CHANGED = classmethod(lambda cls, **_: float("nan"))
    def run(self, samples):
        return {"ui": {"text": sorted(set(CALLS))}}

NODE_CLASS_MAPPINGS = {"CallsOf<pack>": Calls}
patch()
"""


@pytest.fixture(scope="module")
def crowded(comfyui, pipelines, tmp_path_factory):
    """A server with two such packs, whichever of them the system lists first, and this pack twice."""
    folder = tmp_path_factory.mktemp("crowded")
    server = ComfyServer(comfyui, folder)
    (folder / "models" / "diffusers").symlink_to(pipelines.folder, target_is_directory=True)
    packs = folder / "custom_nodes"
    (packs / "AnotherSPLAM").symlink_to(ROOT, target_is_directory=True)
    for name in ("0Neighbour", "zNeighbour"):
        (packs / name).mkdir()
        (packs / name / "__init__.py").write_text(NEIGHBOUR.replace("<pack>", name))
    with server:
        yield server


def test_neighbours_keep_what_is_theirs_and_change_nothing_of_ours(crowded, server):
    def latents(host, graph):
        (file,) = host.files(host.run(graph))
        return load(file)["latent_tensor"]

    ours = save_latent(text_to_image("diffusers/plain", PROMPT, seed=6, steps=2))
    calls = {"calls": {"class_type": "CallsOf0Neighbour", "inputs": {"samples": ["sampled", 0]}}}
    entry = crowded.run(ours | calls)
    (file,) = crowded.files(entry)
    assert load(file)["latent_tensor"].equal(latents(server, ours))
    assert {"sampling_function", "sample", "prepare_noise", "forward"} <= set(entry["outputs"]["calls"]["text"])
    options = {"seed": 3, "steps": 2, "cfg": 1.0}
    for name in ("splam", "euler"):
        graph = save_latent(stock("diffusers/plain", PROMPT, **options, sampler=name, scheduler="simple"))
        assert latents(crowded, graph).equal(latents(server, graph))
    theirs = save_latent(stock("diffusers/plain", PROMPT, **options, sampler="theirs", scheduler="theirs"))
    assert latents(crowded, theirs).isfinite().all()


def test_two_copies_say_so_once_and_do_not_fight(crowded):
    log = crowded.log.read_text(errors="replace")
    assert (
        log.count("there are two copies in custom_nodes") == 1
        and "Cannot import" not in log
        and "Error while" not in log
    )
    assert "AnotherSPLAM" in log and "remove one, and restart" in log
    names = crowded.get("/object_info/KSampler")["KSampler"]["input"]["required"]["sampler_name"]
    options = names[1].get("options") if isinstance(names[0], str) else names[0]
    assert options.count("splam") == 1


# Loads the pack as ComfyUI does, after names of the host have gone.
PROBE = """
import asyncio, importlib.util, json, logging, os, sys
import comfy.options; comfy.options.enable_args_parsing()
import utils.extra_config, server, nodes, comfy.samplers, comfy.sd, comfy.lora, comfy.weight_adapter
import comfy.model_sampling, comfy_api.latest, comfy.patcher_extension, comfy_execution.utils

said = []
Handler = type("Handler", (logging.Handler,), {"emit": lambda self, record: said.append(record.getMessage())})
logging.getLogger().addHandler(Handler())
for gone in os.environ["GONE"].split():
    module, _, name = gone.rpartition(".")
    delattr(sys.modules[module], name)
spec = importlib.util.spec_from_file_location("pack", os.path.join(os.environ["PACK"], "__init__.py"),
                                              submodule_search_locations=[os.environ["PACK"]])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
extension = asyncio.run(pack.comfy_entrypoint())
found = asyncio.run(extension.get_node_list()) if extension is not None else None
said = [one for one in said if "SPLAM" in one]
print("RESULT" + json.dumps({"nodes": found and [node.GET_SCHEMA().node_id for node in found], "said": said}))
"""
ALL = {
    *("SPLAMFetch", "SPLAMLoader", "SPLAMLoraLoader", "SPLAMModelPatch", "SPLAMSampler", "SPLAMSamplerSelect"),
    "SPLAMScheduler",
}


def without(gone: str, comfyui) -> dict:
    """The nodes that the pack has, and what it says, in a host that lacks this name."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, "--cpu"],
        cwd=comfyui,
        env={**os.environ, "PYTHONPATH": str(comfyui), "PACK": str(ROOT), "GONE": gone},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr[-3000:]
    return json.loads(run.stdout.rpartition("RESULT")[2])


@pytest.mark.parametrize(
    ("gone", "lost"),
    [
        ("comfy.weight_adapter.LoRAAdapter", {"SPLAMLoraLoader"}),
        ("comfy_api.latest.ui", {"SPLAMFetch"}),
        ("comfy.model_sampling.ModelSamplingDiscrete", ALL - {"SPLAMFetch"}),
        ("comfy.samplers.SCHEDULER_HANDLERS", set()),
        ("comfy_api.latest.ComfyExtension", None),
    ],
)
def test_a_host_whose_names_have_moved_gets_a_sentence_and_the_rest(comfyui, gone, lost):
    found = without(gone, comfyui)
    (sentence,) = found["said"]
    assert gone.rpartition(".")[2] in sentence and "Update" in sentence
    if lost is None:
        assert found["nodes"] is None
        return
    assert set(found["nodes"]) & ALL == ALL - lost
    assert all(name in sentence for name in lost)


def test_a_host_that_shows_no_text_on_a_node_loses_nothing(comfyui):
    found = without("server.PromptServer", comfyui)
    assert set(found["nodes"]) >= ALL and not found["said"]
