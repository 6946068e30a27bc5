"""SPLAM Sampler at guidance 1 is KSampler `splam` at cfg 1 after every node of the host from MODEL to MODEL."""

import pytest
import torch
from safetensors.torch import load, save_file

from harness.graphs import save_latent
from harness.reference import relative_error
from harness.server import ServerError

from .routes import node, route

pytestmark = pytest.mark.comfyui

SOURCES = {
    "MODEL": ["model", 0],
    "CLIP": ["model", 1],
    "VAE": ["model", 2],
    "CONDITIONING": ["other", 0],
    "LATENT": ["latent", 0],
    "IMAGE": ["picture", 0],
    "MASK": ["mask", 0],
    "LATENT_OPERATION": ["operation", 0],
}
WIDGETS = {"INT", "FLOAT", "BOOLEAN", "STRING", "COMBO"}
# Left out, and what each would need; beside every node with another socket (a ControlNet's MODEL_PATCH, AUDIO, ...).
LEFT_OUT = {
    "FluxKVCache": "Flux",
    "HiDreamO1PatchSeamSmoothing": "a flow model",
    "HypernetworkLoader": "a file",
    "ModelNoiseScale": "a flow model",
    "TorchCompileModel": "a C++ compiler and minutes",
    "TrainLoraNode": "a training run",
    "TripoSplatSamplingPreview": "TripoSplat",
}
OTHER_ARCHITECTURES = "comfy_extras.nodes_model_merging_model_specific"  # merges that name Flux's blocks, WAN's, ...


def model_nodes(server) -> dict:
    """What /object_info says of each that can be tried, without this pack's and the tests' own."""

    def can_be_tried(kind: str, about: dict) -> bool:
        required = [spec[0] for spec in about["input"].get("required", {}).values()]
        sockets = {type_ for type_ in required if isinstance(type_, str)} - WIDGETS
        home = about["python_module"]
        return (
            "MODEL" in sockets
            and "MODEL" in about["output"]
            and sockets <= set(SOURCES)
            and kind not in LEFT_OUT
            and not home.startswith("custom_nodes.")
            and (kind == "ModelMergeSD1" or home != OTHER_ARCHITECTURES)
        )

    nodes = sorted(server.get("/object_info").items())
    return {kind: about for kind, about in nodes if can_be_tried(kind, about)}


def patched(kind: str, about: dict) -> dict:
    """The node, its required inputs filled: a socket from SOURCES, else the default."""
    inputs = {}
    for name, (type_, *options) in about["input"].get("required", {}).items():
        options = options[0] if options else {}
        choices = type_ if isinstance(type_, list) else options.get("options", [])
        default = options.get("default", choices[0] if choices else None)
        inputs[name] = SOURCES.get(type_, default) if isinstance(type_, str) else default
    return node(kind, **inputs)


@pytest.fixture(scope="module")
def lora(server):
    folder = server.folder / "models" / "loras"
    folder.mkdir(exist_ok=True)
    torch.manual_seed(7)
    module = "lora_unet_mid_block_attentions_0_proj_in"
    weights = {f"{module}.lora_down.weight": torch.randn(4, 128, 1, 1), f"{module}.alpha": torch.tensor(4.0)}
    save_file(weights | {f"{module}.lora_up.weight": torch.randn(128, 4, 1, 1)}, folder / "route.safetensors")


def sampled(name: str, extra: dict, place: int = 0) -> dict:
    """The graph of two steps on this route, with a negative connected, its latents saved."""
    graph = route(name, "plain", extra)
    graph["sampled"]["inputs"] |= {"steps": 2, "negative": ["other", 0]}
    if "patched" in extra:
        graph["sampled"]["inputs"]["model"] = ["patched", place]
    return save_latent(graph)


@pytest.fixture
def run(server):
    def run(graph: dict) -> list[torch.Tensor] | str:
        """What the graph saves, in the order of its nodes' names; or the error of the node that failed."""
        try:
            return [load(file)["latent_tensor"] * 0.31 for file in server.files(server.run(graph))]
        except ServerError as error:
            return str(error).partition(": ")[2]

    return run


def difference(ours: torch.Tensor, hosts: torch.Tensor) -> float:
    """relative_error, 0 where both are NaN throughout, as PerpNeg is at cfg 1."""
    return 0.0 if ours.isnan().all() and hosts.isnan().all() else relative_error(ours, hosts)


def test_both_samplers_agree_after_every_node(lora, server, run):
    extra = {
        "picture": node("EmptyImage", width=128, height=128, batch_size=1, color=0),
        "mask": node("SolidMask", value=1.0, width=128, height=128),
        "operation": node("LatentOperationSharpen", sharpen_radius=1, sigma=1.0, alpha=0.5),
    }
    tried, differing, refused = model_nodes(server), {}, []
    for kind, about in tried.items():
        ours, hosts = (
            sampled(name, extra | {"patched": patched(kind, about)}, about["output"].index("MODEL"))
            for name in ("splam", "ksampler")
        )
        hosts["saved by host"] = node("SaveLatent", samples=["sampled by host", 0], filename_prefix="splam")
        hosts["sampled by host"] = hosts.pop("sampled")
        found = run(hosts | ours)
        if not isinstance(found, str):
            if not difference(*found) < 1e-4:
                differing[kind] = difference(*found)
            continue
        del hosts["saved"]
        messages = run(ours), run(hosts)
        if messages[0] == messages[1] and messages[0].startswith("SPLAM"):
            refused.append(kind)
        else:
            differing[kind] = messages
    assert not differing
    assert len(tried) > 30, "the host has dozens of them"
    assert {"ModelSamplingSD3", "ModelSamplingStableCascade", "ModelSamplingContinuousEDM"} <= set(refused)


def test_a_negative_that_nobody_asks_for_is_not_evaluated(run):
    """Its width is wrong for this model, so that any evaluation would fail."""
    negative = {"other": node("TestConditioning", width=96, seed=0)}
    assert isinstance(run(sampled("splam", negative)), list)
    guidance = {"patched": node("SelfAttentionGuidance", model=["model", 0], scale=0.5, blur_sigma=2.0)}
    assert isinstance(run(sampled("splam", negative | guidance)), str)


def test_a_patch_that_needs_a_negative_says_so(server):
    graph = route(
        "splam", "plain", {"patched": node("SelfAttentionGuidance", model=["model", 0], scale=0.5, blur_sigma=2.0)}
    )
    with pytest.raises(ServerError, match=r"reads the negative conditioning also at guidance 1, and none is connected"):
        server.run(save_latent(graph))
