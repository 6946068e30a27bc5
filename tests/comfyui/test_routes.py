"""Equal seeds give equal latents on every route at denoise 1, whatever the graph adds; and what it adds is right."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file
from transformers import CLIPTokenizer

from harness.graphs import save_latent
from harness.reference import few_step, node_noises, relative_error
from harness.server import ServerError

from .routes import OTHER, PROMPT, ROUTES, SEED, STEPS, node, route

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def embed(comfyui, pipelines):
    tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
    return lambda name, text=PROMPT: pipelines.reference(name).embed(tokenizer(text)["input_ids"])


@pytest.fixture
def run(server):
    def run(graph: dict) -> torch.Tensor:
        (file,) = server.files(server.run(save_latent(graph)))
        return load(file)["latent_tensor"] * 0.31

    return run


@pytest.fixture(scope="module")
def files(server):
    """A latent, a mask and a LoRA in the server's folders."""
    image = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    content = {"latent_tensor": image / 0.31, "latent_format_version_0": torch.tensor([])}
    save_file(content, server.folder / "input" / "route.latent")
    mask = np.zeros((128, 128, 3), np.uint8)
    mask[:, :64] = 255
    Image.fromarray(mask).save(server.folder / "input" / "route.png")
    (server.folder / "models" / "loras").mkdir(exist_ok=True)
    torch.manual_seed(7)
    module = "lora_unet_mid_block_attentions_0_proj_in"
    lora = {f"{module}.lora_down.weight": torch.randn(4, 128, 1, 1), f"{module}.alpha": torch.tensor(4.0)}
    lora[f"{module}.lora_up.weight"] = torch.randn(128, 4, 1, 1)
    save_file(lora, server.folder / "models" / "loras" / "route.safetensors")


LEFT = node("ConditioningSetArea", conditioning=["positive", 0], width=64, height=128, x=0, y=0, strength=1.0)
RIGHT = node("ConditioningSetArea", conditioning=["other", 0], width=64, height=128, x=64, y=0, strength=1.0)
MASK = node("LoadImageMask", image="route.png", channel="red")
COMBINE = node("ConditioningCombine", conditioning_1=["left", 0], conditioning_2=["right", 0])
EXTRAS = {
    "nothing": {},
    "image": {"latent": node("LoadLatent", latent="route.latent")},
    "inpaint": {
        "image": node("LoadLatent", latent="route.latent"),
        "mask": MASK,
        "latent": node("SetLatentNoiseMask", samples=["image", 0], mask=["mask", 0]),
    },
    "areas": {"left": LEFT, "right": RIGHT, "conditioned": COMBINE},
    "masked prompt": {
        "mask": MASK,
        "left": node(
            "ConditioningSetMask",
            **{"conditioning": ["positive", 0], "mask": ["mask", 0], "strength": 1.0, "set_cond_area": "default"},
        ),
        "right": node("ConditioningSetTimestepRange", conditioning=["other", 0], start=0.0, end=1.0),
        "conditioned": COMBINE,
    },
    "timestep range": {
        "left": node("ConditioningSetTimestepRange", conditioning=["positive", 0], start=0.0, end=0.3),
        "right": node("ConditioningSetTimestepRange", conditioning=["other", 0], start=0.3, end=1.0),
        "conditioned": COMBINE,
    },
    "control": {
        "control": node("TestControlNet"),
        "hint": node("EmptyImage", width=128, height=128, batch_size=1, color=0),
        "conditioned": node(
            "ControlNetApply",
            **{"conditioning": ["positive", 0], "control_net": ["control", 0], "image": ["hint", 0], "strength": 0.7},
        ),
    },
    "attention patch": {"patched": node("TestAttentionPatch", model=["model", 0], strength=0.5)},
    "wrapper": {"patched": node("TestWrapper", model=["model", 0], out_of_memory=False)},
    "hook": {
        "hook": node("CreateHookLora", lora_name="route.safetensors", strength_model=1.0, strength_clip=0.0),
        "conditioned": node(
            "ConditioningSetProperties",
            **{"cond_NEW": ["positive", 0], "hooks": ["hook", 0], "strength": 1.0, "set_cond_area": "default"},
        ),
    },
    "lora": {
        "patched": node(
            "SPLAMLoraLoader",
            **{"model": ["model", 0], "lora_name": "route.safetensors", "strength_model": 1.0, "strength_clip": 1.0},
        )
    },
    "batch": {},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("model", ["plain", "gamma"])
def test_every_route_gives_the_same_latents(model, extra, files, run):
    """`plain` reaches the host's samplers without SPLAM's parametrisation, `gamma` with it."""
    batch = 3 if extra == "batch" else 1
    found = {name: run(route(name, model, EXTRAS[extra], batch)) for name in ROUTES}
    assert found["splam"].shape[0] == batch
    for name in ROUTES[1:]:
        assert relative_error(found[name], found["splam"]) < 1e-5, name
    if extra not in ("nothing", "batch", "wrapper"):
        assert relative_error(run(route("splam", model)), found["splam"]) > 1e-3, (
            f"{extra} must matter for this to test"
        )


def reference(pipelines, embeds, change=None, name="plain", batch=1, **options):
    """Diffusers' loop; change(x, t, embeds) -> the UNet's output, where it is not the UNet's plain call."""
    source = pipelines.reference(name)
    noise, fresh = node_noises((batch, 4, 16, 16), SEED)

    class Changed(torch.nn.Module):
        config = source.unet.config

        def forward(self, x, t, embeds, **_):
            return change(source.unet, x, t, embeds)

    unet = Changed() if change else source.unet
    return few_step(unet, source.scheduler_config, embeds, noise, fresh, STEPS, **options)


def test_image_to_image_at_denoise_one_is_diffusers_on_every_route(files, pipelines, embed, run):
    image = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    expected = reference(pipelines, embed("plain"), image=image)
    for name in ROUTES:
        assert relative_error(run(route(name, "plain", EXTRAS["image"])), expected) < 1e-4, name


def test_a_control_is_diffusers_residual(files, pipelines, embed, run):
    class Output:
        def __init__(self, sample):
            self.sample = sample

    def controlled(unet, x, t, embeds):
        down = unet_residual_shapes(unet, x, t, embeds)
        middle = torch.full((len(x), 128, 4, 4), 0.7)
        return unet(x, t, embeds, down_block_additional_residuals=down, mid_block_additional_residual=middle)

    def unet_residual_shapes(unet, x, t, embeds):
        """Zeros for the skips, which diffusers wants beside the middle block's."""
        shapes = []
        handles = [unet.conv_in.register_forward_hook(lambda _, __, out: shapes.append(out))]
        for block in unet.down_blocks:
            handles.append(block.register_forward_hook(lambda _, __, out: shapes.extend(out[1])))
        unet(x, t, embeds)
        for handle in handles:
            handle.remove()
        return tuple(torch.zeros_like(skip) for skip in shapes)

    expected = reference(pipelines, embed("plain"), controlled)
    assert relative_error(run(route("splam", "plain", EXTRAS["control"])), expected) < 1e-4


def test_areas_are_two_predictions_side_by_side(files, pipelines, embed, run):
    """Each half of the picture is denoised by the network that sees that half alone, with its own prompt."""
    halves = embed("plain"), embed("plain", OTHER)

    def regional(unet, x, t, _):
        parts = [unet(x[..., i * 8 : i * 8 + 8], t, embeds).sample for i, embeds in enumerate(halves)]
        return type("Output", (), {"sample": torch.cat(parts, dim=-1)})

    expected = reference(pipelines, halves[0], regional)
    assert relative_error(run(route("splam", "plain", EXTRAS["areas"])), expected) < 1e-4


def test_a_timestep_range_switches_the_prompt(files, pipelines, embed, run):
    """percent .3 is t = 699: of 999, 679, 339 the first step alone reads the first prompt."""

    def switching(unet, x, t, _):
        return unet(x, t, embed("plain") if t > 699 else embed("plain", OTHER))

    expected = reference(pipelines, embed("plain"), switching)
    assert relative_error(run(route("splam", "plain", EXTRAS["timestep range"])), expected) < 1e-4


def test_a_hook_is_its_lora(files, run):
    hooked, loaded = (run(route("splam", "gamma", EXTRAS[name])) for name in ("hook", "lora"))
    assert relative_error(hooked, loaded) < 1e-5
    assert relative_error(run(route("splam", "gamma")), loaded) > 1e-2


def test_guidance_is_the_stock_ksamplers_cfg(files, pipelines, embed, run):
    """w in w*positive + (1-w)*negative, against diffusers and against KSampler."""
    positive, negative = embed("plain"), embed("plain", OTHER)

    def guided(unet, x, t, _):
        output = unet(x, t, positive).sample * 2.5 + unet(x, t, negative).sample * (1 - 2.5)
        return type("Output", (), {"sample": output})

    expected = reference(pipelines, positive, guided)
    graph = route("splam", "plain")
    graph["sampled"]["inputs"] |= {"guidance": 2.5, "negative": ["other", 0]}
    assert relative_error(run(graph), expected) < 1e-4
    stock = route("ksampler", "gamma")
    stock["sampled"]["inputs"]["cfg"] = 2.5
    ours = route("splam", "gamma")
    ours["sampled"]["inputs"] |= {"guidance": 2.5, "negative": ["other", 0]}
    assert relative_error(run(ours), run(stock)) < 1e-5


def test_guidance_one_does_not_read_the_negative(run):
    graph = route("splam", "plain")
    graph["sampled"]["inputs"] |= {"guidance": 1.0, "negative": ["other", 0]}
    assert run(graph).equal(run(route("splam", "plain")))


def test_guidance_without_a_negative_is_an_error(run):
    graph = route("splam", "plain")
    graph["sampled"]["inputs"]["guidance"] = 2.0
    with pytest.raises(ServerError, match=r"guidance 2 needs a negative conditioning, and none is connected"):
        run(graph)


def test_a_graph_from_before_the_new_inputs_still_runs(run):
    """The optional inputs are absent from graphs that were saved earlier."""
    graph = route("splam", "plain")
    assert set(graph["sampled"]["inputs"]) == {"model", "positive", "latent_image", "seed", "steps", "denoise"}
    assert set(graph["model"]["inputs"]) == {"model_name"}
    run(graph)
