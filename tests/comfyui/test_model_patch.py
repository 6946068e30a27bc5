"""SPLAM Model Patch: refinements are splam_core's on the same UNet; at all other evaluations nothing changes."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load
from transformers import CLIPTokenizer

from harness.graphs import custom, save_latent, stock, text_to_image
from harness.reference import node_noises, relative_error
from harness.server import ROOT, ServerError
from splam_core import Denoiser, NoiseSchedule, authors_embedding, few_step_timesteps
from splam_core import sample as core_sample

pytestmark = pytest.mark.comfyui
PROMPT, SEED = "a yellow star above a doughnut", 31


@pytest.fixture(scope="module")
def embed(comfyui, pipelines):
    tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
    return lambda name: pipelines.reference(name).embed(tokenizer(PROMPT)["input_ids"])


@pytest.fixture
def run(server):
    def run(graph: dict) -> torch.Tensor:
        (file,) = server.files(server.run(save_latent(graph)))
        return load(file)["latent_tensor"] * 0.31

    return run


def patched(graph: dict, conditioning: str, *users: str) -> dict:
    """The graph with SPLAM Model Patch between its loader and the nodes that use the MODEL."""
    graph["patch"] = {
        "class_type": "SPLAMModelPatch",
        "inputs": {"model": ["model", 0], "gamma_conditioning": conditioning},
    }
    for node in users or ("sampled",):
        graph[node]["inputs"]["model"] = ["patch", 0]
    return graph


def splam(model: str, refinements: int = 0, steps: int = 3, **options) -> dict:
    return text_to_image(f"diffusers/{model}", PROMPT, seed=SEED, steps=steps, refinements=refinements, **options)


@torch.no_grad()
def expected(reference, embeds, conditioning: str, refinements: int, steps: int = 3) -> torch.Tensor:
    """splam_core's sampler and denoiser on diffusers' UNet, told gamma by its own timestep_cond."""
    schedule = NoiseSchedule.from_config(reference.scheduler_config)
    denoiser = Denoiser(schedule, reference.scheduler_config["prediction_type"], conditioning)
    unet = reference.unet

    def net(x, t, gamma):
        phi = None
        if unet.config.time_cond_proj_dim:
            phi = authors_embedding(torch.ones(len(x)) if gamma is None else gamma)
        return unet(x, t, embeds.expand(len(x), -1, -1), timestep_cond=phi).sample

    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    return core_sample(
        lambda x, t: denoiser(net, x, None, None, t),
        noise,
        few_step_timesteps(steps),
        schedule,
        fresh,
        refinements=refinements,
        denoise_gamma=lambda x, gamma, s, t: denoiser(net, x, gamma, s, t),
    )


@pytest.mark.parametrize("refinements", [1, 2])
@pytest.mark.parametrize(
    "name, conditioning",
    [("plain", "noise-level"), ("v", "noise-level"), ("gamma", "noise-level"), ("gamma", "embedding")],
)
def test_refinements_are_splam_cores(name, conditioning, refinements, pipelines, embed, run):
    found = run(patched(splam(name, refinements), conditioning))
    reference = expected(pipelines.reference(name), embed(name), conditioning, refinements)
    assert relative_error(found, reference) < 1e-4
    without = expected(pipelines.reference(name), embed(name), conditioning, 0)
    assert relative_error(without, reference) > 1e-3, "refinements must matter for this to test"


def test_the_two_conditionings_differ(run):
    told, noised = (run(patched(splam("gamma", 1), conditioning)) for conditioning in ("embedding", "noise-level"))
    assert relative_error(told, noised) > 1e-4


@pytest.mark.parametrize("name, conditioning", [("plain", "none"), ("v", "noise-level"), ("gamma", "embedding")])
def test_without_refinements_every_route_is_as_before_to_the_bit(name, conditioning, run):
    assert run(patched(splam(name), conditioning)).equal(run(splam(name)))
    options = {"seed": SEED, "steps": 3, "cfg": 1.0, "sampler": "splam", "scheduler": "splam"}
    ksampler = stock(f"diffusers/{name}", PROMPT, **options)
    assert relative_error(run(patched(ksampler, conditioning)), run(splam(name))) < 1e-5


def test_the_model_that_came_in_stays_as_it_was(run):
    """Patched and unpatched in turn on one loaded model; patching twice is patching once."""
    before = run(splam("gamma"))
    refined = run(patched(splam("gamma", 1), "embedding"))
    twice = patched(splam("gamma", 1), "embedding", "sampled")
    twice["again"] = {
        "class_type": "SPLAMModelPatch",
        "inputs": {"model": ["patch", 0], "gamma_conditioning": "embedding"},
    }
    twice["sampled"]["inputs"]["model"] = ["again", 0]
    assert run(twice).equal(refined)
    graph = splam("gamma")
    graph["sampled"]["inputs"]["refinements"] = 0
    graph["saved_again"] = {"class_type": "PreviewAny", "inputs": {"source": ["sampled", 0]}}
    assert run(graph).equal(before)


def test_unloading_in_between_changes_nothing(server, run):
    first = patched(splam("gamma", 1), "embedding")
    first["sampled"]["inputs"]["seed"] = 32
    before = run(first)
    server.post("/free", {"unload_models": True, "free_memory": True})
    run(splam("plain"))
    assert run(first | {"note": {"class_type": "PreviewAny", "inputs": {"source": ["sampled", 0]}}}).equal(before)


def test_refinements_on_the_custom_route(run):
    graph = patched(custom("diffusers/gamma", PROMPT, seed=SEED, steps=3), "embedding", "sampled", "sigmas")
    graph["sampler"]["inputs"]["refinements"] = 2
    assert relative_error(run(graph), run(patched(splam("gamma", 2), "embedding"))) < 1e-5


def test_refinements_go_through_guidance(run):
    """Both conditionings are asked about the point, in one batch."""
    graph = patched(splam("gamma", 1, guidance=2.0), "embedding")
    graph["negative"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "a ring", "clip": ["model", 1]}}
    graph["sampled"]["inputs"]["negative"] = ["negative", 0]
    guided = run(graph)
    assert torch.isfinite(guided).all()
    assert relative_error(guided, run(patched(splam("gamma", 1), "embedding"))) > 1e-3


@pytest.mark.parametrize("conditioning", ["noise-level", "embedding"])
def test_a_point_leaves_nothing_behind_for_a_controlnet(conditioning, run):
    """Between the network's evaluations the host's ControlNets ask the MODEL for timesteps (see helper_nodes)."""
    graph = patched(splam("gamma", 1), conditioning)
    graph["control"] = {"class_type": "TestControlNet", "inputs": {}}
    graph["hint"] = {"class_type": "EmptyImage", "inputs": {"width": 128, "height": 128, "batch_size": 1, "color": 0}}
    inputs = {"conditioning": ["positive", 0], "control_net": ["control", 0], "image": ["hint", 0], "strength": 0.7}
    graph["controlled"] = {"class_type": "ControlNetApply", "inputs": inputs}
    graph["sampled"]["inputs"]["positive"] = ["controlled", 0]
    assert relative_error(run(graph), run(patched(splam("gamma", 1), conditioning))) > 1e-3


def test_refinements_without_the_patch_are_an_error(run):
    for graph in (splam("gamma", 2), patched(splam("gamma", 2), "none")):
        with pytest.raises(
            ServerError, match=r"refinements = 2 needs a MODEL that is told gamma\. Put SPLAM Model Patch"
        ):
            run(graph)


def test_embedding_without_weights_is_an_error(run):
    with pytest.raises(ServerError, match=r"'embedding' needs a checkpoint with the weight time_embedding\.cond_proj"):
        run(patched(splam("plain", 1), "embedding"))
    graph = patched(splam("gamma", 1), "embedding")
    graph["model"]["inputs"]["embedded_guidance"] = 8.5  # LCM's embedding is of guidance, not of gamma
    with pytest.raises(ServerError, match="loaded by SPLAM Loader with embedded_guidance 1"):
        run(graph)


@pytest.mark.parametrize("node, inputs", [("ModelSamplingSD3", {"shift": 3.0}), ("ModelSamplingFlux", None)])
def test_other_kinds_of_models_are_refused(node, inputs, run):
    """What Flux and SD3 sample as; their weights are not needed for it."""
    flux = {"max_shift": 1.15, "base_shift": 0.5, "width": 128, "height": 128}
    graph = patched(splam("plain"), "none")
    graph["other"] = {"class_type": node, "inputs": {"model": ["model", 0], **(inputs or flux)}}
    graph["patch"]["inputs"]["model"] = ["other", 0]
    with pytest.raises(ServerError, match=r"SPLAM needs a Stable Diffusion model that predicts noise or v"):
        run(graph)


ONCE = """
import importlib, sys, types
import comfy.options
comfy.options.enable_args_parsing()
import torch
for name, folder in (("pack", ROOT), ("pack.nodes", ROOT + "/nodes")):  # without the nodes, which need a server
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
gamma, parametrisation, schedule = (
    importlib.import_module(f"pack.{name}") for name in ("nodes.gamma", "nodes.parametrisation", "splam_core.schedule")
)
table = schedule.NoiseSchedule.scaled_linear()
sampling = parametrisation.SubPathEPS(table, "noise-level")
sampling.point = gamma.Point(0.5, 499)
counted = {"schedules": 0, "shifts": 0}

def count(owner, method, name):
    whole = getattr(owner, method)

    def counting(*arguments):
        counted[name] += 1
        return whole(*arguments)

    setattr(owner, method, counting)

count(schedule.NoiseSchedule, "__post_init__", "schedules")
count(gamma.GammaWeights, "shift", "shifts")
seen = {sampling.timestep(torch.full((2,), 1.5))[0].item() for _ in range(5)}
embedding = gamma._TimeEmbedding(lambda tau: tau, gamma.GammaWeights(torch.randn(8, 256)))
embedding.gamma = 0.5
shifted = [embedding.forward(torch.zeros(2, 8)) for _ in range(5)]
assert len(seen) == 1 and all(torch.equal(one, shifted[0]) for one in shifted) and shifted[0].std() > 0
print("COUNTED", counted)
"""


def test_a_refinement_prepares_nothing_twice(comfyui):
    """Each schedule made and each shift computed and sent would hold up an accelerator at every evaluation."""
    code = ONCE.replace("ROOT", repr(str(ROOT)))
    command = [sys.executable, "-c", code, "--cpu"]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, timeout=600)
    assert "COUNTED {'schedules': 0, 'shifts': 1}" in done.stdout, done.stdout + done.stderr
