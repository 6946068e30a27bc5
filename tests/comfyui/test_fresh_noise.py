"""A picture's fresh noise hangs on seed, timestep and number in the batch alone, on every route of a real server."""

import pytest
import torch
from safetensors.torch import load

from harness.graphs import save_latent
from harness.reference import relative_error

from .routes import ROUTES, SEED, STEPS, node, route

pytestmark = pytest.mark.comfyui
MODELS = ["plain", "gamma"]  # without and with SPLAM's parametrisation in the host's hands
BATCH = 3


@pytest.fixture
def run(server):
    def run(graph: dict) -> torch.Tensor:
        (file,) = server.files(server.run(save_latent(graph)))
        return load(file)["latent_tensor"] * 0.31

    return run


def taken_out(number: int) -> dict:
    """What route() must add for this picture of the batch alone."""
    return {
        "batch": node("EmptyLatentImage", width=128, height=128, batch_size=BATCH),
        "latent": node("LatentFromBatch", samples=["batch", 0], batch_index=number, length=1),
    }


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("model", MODELS)
def test_a_batch_is_its_pictures_one_by_one(model, name, run):
    batch = run(route(name, model, batch=BATCH))
    assert len(batch) == BATCH
    assert relative_error(batch[0], batch[1]) > 0.1
    assert relative_error(run(route(name, model)), batch[:1]) < 1e-5, "the first is the seed's picture alone"
    for number in (1, 2):
        assert relative_error(run(route(name, model, taken_out(number))), batch[number : number + 1]) < 1e-5


@pytest.mark.parametrize("name", ROUTES)
def test_a_fixed_seed_behaviour_gives_equal_pictures(name, run):
    extra = {
        "batch": node("EmptyLatentImage", width=128, height=128, batch_size=BATCH),
        "latent": node("LatentBatchSeedBehavior", samples=["batch", 0], seed_behavior="fixed"),
    }
    found = run(route(name, "plain", extra))
    assert len(found) == BATCH
    assert relative_error(found, run(route(name, "plain")).expand_as(found)) < 1e-5


def in_pieces(graph: dict, cuts: list[int], steps: int) -> dict:
    """A KSampler's graph as KSamplerAdvanced nodes from cut to cut, all with its seed."""
    graph = dict(graph)
    common = {key: value for key, value in graph["sampled"]["inputs"].items() if key not in ("seed", "denoise")}
    latent = common.pop("latent_image")
    for start, end in zip([0, *cuts], [*cuts, steps], strict=True):
        name = "sampled" if end == steps else f"until {end}"
        graph[name] = node(
            "KSamplerAdvanced",
            **common | {"steps": steps, "noise_seed": SEED, "latent_image": latent},
            add_noise="disable" if start else "enable",
            start_at_step=start,
            end_at_step=end,
            return_with_leftover_noise="disable" if end == steps else "enable",
        )
        latent = [name, 0]
    return graph


def with_steps(graph: dict, steps: int) -> dict:
    graph["sampled"]["inputs"]["steps"] = steps
    return graph


@pytest.mark.parametrize("cuts", [[2], [1, 2, 3]])
@pytest.mark.parametrize("model", MODELS)
def test_a_chain_of_one_seed_is_the_whole_run(model, cuts, run):
    whole = with_steps(route("ksampler", model, batch=2), 4)
    assert relative_error(run(in_pieces(whole, cuts, 4)), run(whole)) < 1e-5


def test_one_picture_of_a_batch_can_be_drawn_again_in_a_chain(run):
    batch = run(with_steps(route("ksampler", "plain", batch=BATCH), 4))
    again = in_pieces(with_steps(route("ksampler", "plain", taken_out(2)), 4), [2], 4)
    assert relative_error(run(again), batch[2:]) < 1e-5


@pytest.mark.parametrize("name, seed", [("custom", SEED), ("advanced", 0)])
def test_a_chain_of_custom_samplers_is_the_whole_run(name, seed, run):
    """DisableNoise has no seed: the second node then takes 0."""
    whole = route(name, "plain", batch=2)
    whole["noise" if name == "advanced" else "sampled"]["inputs"]["noise_seed"] = seed
    expected = run(whole)
    split = dict(whole) | {"split": node("SplitSigmas", sigmas=["sigmas", 0], step=STEPS - 1)}
    inputs = whole["sampled"]["inputs"]
    kind = whole["sampled"]["class_type"]
    split["first"] = node(kind, **inputs | {"sigmas": ["split", 0]})
    off = {"add_noise": False} if name == "custom" else {"noise": ["off", 0]}
    split["off"] = node("DisableNoise")
    split["sampled"] = node(kind, **inputs | off | {"sigmas": ["split", 1], "latent_image": ["first", 0]})
    assert relative_error(run(split), expected) < 1e-5
