"""Every family of few-step models gives the latents of the diffusers scheduler that its publishers name."""

import json

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load, save_file
from transformers import CLIPTokenizer

from harness.graphs import custom, latent_to_image, save_latent, stock, text_to_image
from harness.reference import (
    FAMILIES,
    Reference,
    few_step,
    few_step_of_family,
    node_noises,
    relative_error,
    scheduler_of,
    write_pipeline,
)
from harness.server import ROOT, ServerError

pytestmark = pytest.mark.comfyui
PROMPT, SEED = "a yellow star above a doughnut", 1234


@pytest.fixture(scope="module")
def expected(comfyui, pipelines):
    tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")

    def run(family, name, steps, shape=(1, 4, 16, 16), **options):
        reference = pipelines.reference(name)
        embeds = reference.embed(tokenizer(PROMPT)["input_ids"])
        noise, fresh = node_noises(shape, SEED)
        config = reference.scheduler_config
        return few_step_of_family(family, reference.unet, config, embeds, noise, fresh, steps, **options)

    return run


@pytest.fixture
def run(server):
    def run(graph: dict) -> torch.Tensor:
        (file,) = server.files(server.run(save_latent(graph)))
        return load(file)["latent_tensor"] * 0.31

    return run


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_to_image(family, steps, expected, run):
    graph = text_to_image("diffusers/plain", PROMPT, seed=SEED, steps=steps, family=family)
    assert relative_error(run(graph), expected(family, "plain", steps)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_v_prediction_and_a_batch(family, expected, run):
    graph = text_to_image("diffusers/v", PROMPT, seed=SEED, steps=3, family=family, batch_size=2)
    assert relative_error(run(graph), expected(family, "v", 3, (2, 4, 16, 16))) < 1e-4


@pytest.fixture(scope="module")
def zero_snr(pipelines) -> Reference:
    """A v model whose schedule ends in noise alone, as NoobAI's and SD2.1's kinds, in the server's folder."""
    folder = write_pipeline(pipelines.folder / "zero-snr", prediction_type="v_prediction", seed=9)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    return Reference(folder)


@torch.no_grad()
def euler_in_float64(unet, scheduler_config, embeds, noise, steps):
    """diffusers' EulerDiscreteScheduler of v prediction on its own sigmas; in its float32, numbers of 4096 cancel."""
    scheduler = scheduler_of(EulerDiscreteScheduler, {**scheduler_config, "timestep_spacing": "trailing"})
    scheduler.set_timesteps(steps)
    sigmas, x = scheduler.sigmas.double(), noise.double() * float(scheduler.init_noise_sigma)
    for t, now, then in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True):
        n = (now**2 + 1) ** 0.5
        x0 = x / n**2 - now / n * unet((x / n).float(), t.long(), embeds).sample.double()
        x = x + (then - now) * (x - x0) / now
    return x.float()


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("family", ["splam", *FAMILIES])
def test_zero_terminal_snr_and_v(family, steps, zero_snr, comfyui, run):
    tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
    call = zero_snr.unet, zero_snr.scheduler_config, zero_snr.embed(tokenizer(PROMPT)["input_ids"])
    noises = node_noises((1, 4, 16, 16), SEED)
    if family == "splam":
        expected = few_step(*call, *noises, steps)
    elif family == "lightning":
        expected = euler_in_float64(*call, noises[0], steps)
    else:
        expected = few_step_of_family(family, *call, *noises, steps)
    graph = text_to_image("diffusers/zero-snr", PROMPT, seed=SEED, steps=steps, family=family)
    assert relative_error(run(graph), expected) < 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_eta(eta, expected, run):
    graph = text_to_image("diffusers/plain", PROMPT, seed=SEED, steps=3, family="tcd", eta=eta)
    assert relative_error(run(graph), expected("tcd", "plain", 3, eta=eta)) < 1e-4


@pytest.fixture(scope="module")
def picture(server):
    image = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    content = {"latent_tensor": image / 0.31, "latent_format_version_0": torch.tensor([])}
    save_file(content, server.folder / "input" / "families.latent")
    levels = torch.randint(0, 256, (16, 16), generator=torch.Generator().manual_seed(6))
    levels[:, 12:] = 0
    pixels = levels.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy().astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").save(server.folder / "input" / "families.png")
    return image, levels[None, None] / 255


@pytest.mark.parametrize(("steps", "denoise"), [(2, 0.4), (3, 0.75), (4, 1.0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_image_to_image(family, steps, denoise, picture, expected, run):
    """At every strength from add_noise of the picture."""
    options = {"seed": SEED, "steps": steps, "denoise": denoise, "family": family}
    found = run(latent_to_image("diffusers/plain", PROMPT, "families.latent", **options))
    assert relative_error(found, expected(family, "plain", steps, strength=denoise, image=picture[0])) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_inpaint(family, picture, expected, run):
    image, mask = picture
    options = {"seed": SEED, "steps": 3, "denoise": 0.75, "family": family}
    found = run(latent_to_image("diffusers/plain", PROMPT, "families.latent", mask="families.png", **options))
    assert relative_error(found, expected(family, "plain", 3, strength=0.75, image=image, mask=mask)) < 1e-4
    assert torch.allclose(found[..., 12:], image[..., 12:], atol=1e-5)


@pytest.mark.parametrize("model", ["plain", "gamma"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_give_the_sampler_nodes_latents(family, model, run):
    """`plain` reaches SamplerCustom without SPLAM's parametrisation, `gamma` with it."""
    whole = run(text_to_image(f"diffusers/{model}", PROMPT, seed=SEED, steps=2, family=family))
    parts = custom(f"diffusers/{model}", PROMPT, seed=SEED, steps=2)
    for node in ("sampler", "sigmas"):
        parts[node]["inputs"]["family"] = family
    assert relative_error(run(parts), whole) < 1e-4


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "dmd2"])
def test_a_schedule_that_ends_at_timestep_0(family, run):
    """As Karras'. There a MODEL with SPLAM's parametrisation gives back what it is asked about."""
    pictures = []
    for patched in (False, True):
        graph = custom("diffusers/plain", PROMPT, seed=SEED, steps=4)
        karras = {"model": ["model", 0], "scheduler": "karras", "steps": 4, "denoise": 1.0}
        graph["sigmas"] = {"class_type": "BasicScheduler", "inputs": karras}
        graph["sampler"]["inputs"]["family"] = family
        if patched:
            inputs = {"model": ["model", 0], "gamma_conditioning": "none"}
            graph["patched"] = {"class_type": "SPLAMModelPatch", "inputs": inputs}
            graph["sampled"]["inputs"]["model"] = ["patched", 0]
        pictures.append(run(graph))
    assert relative_error(pictures[1], pictures[0]) < 0.1


def test_the_default_is_as_before_to_the_bit(run):
    before = run(stock("diffusers/plain", PROMPT, seed=SEED, steps=3, cfg=1.0, sampler="splam", scheduler="splam"))
    graph = custom("diffusers/plain", PROMPT, seed=SEED, steps=3)
    assert run(graph).equal(before)
    for node in ("sampler", "sigmas"):
        graph[node]["inputs"]["family"] = "splam"
    assert run(graph).equal(before)


def test_auto_takes_what_the_files_tell_and_says_so(server, run):
    """A LoRA that changes nothing, under the names of publishers."""
    loras = server.folder / "models" / "loras"
    loras.mkdir(exist_ok=True)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0"
    weights = {f"{key}.lora_down.weight": torch.zeros(1, 128), f"{key}.lora_up.weight": torch.zeros(128, 1)}
    save_file(weights, loras / "dmd2_4step.safetensors")
    save_file(weights, loras / "unnamed.safetensors", {"modelspec.title": "SDXL Lightning, 4 steps"})
    server.get("/object_info/SPLAMLoraLoader")
    for name, family in (("dmd2_4step", "dmd2"), ("unnamed", "lightning")):

        def graph(family, name=name):
            nodes = text_to_image("diffusers/plain", PROMPT, seed=SEED, steps=2, family=family)
            lora = {"model": ["model", 0], "lora_name": f"{name}.safetensors"}
            nodes["lora"] = {
                "class_type": "SPLAMLoraLoader",
                "inputs": lora | {"strength_model": 1, "strength_clip": 1},
            }
            nodes["sampled"]["inputs"]["model"] = ["lora", 0]
            return nodes

        logged = server.listen()
        assert run(graph("auto")).equal(run(graph(family)))
        assert f"family 'auto' took '{family}'" in logged()
    logged = server.listen()
    untold = run(text_to_image("diffusers/plain", PROMPT, seed=SEED, steps=2, family="auto"))
    assert untold.equal(run(text_to_image("diffusers/plain", PROMPT, seed=SEED, steps=2)))
    assert "nothing in the MODEL's files tells" in logged()


def test_bad_input(server):
    def fails(match, **options):
        with pytest.raises(ServerError, match=match):
            server.run(save_latent(text_to_image("diffusers/plain", PROMPT, **options)))

    fails(r"refinements are SPLAM's, and the family is 'tcd'. Set refinements to 0", family="tcd", refinements=1)
    fails(r"SPLAM Sampler: 4 steps do not fit: denoise must be above 0", family="ddim", denoise=0.0)
    fails(r"SPLAM Sampler: 8 steps do not fit denoise 0.1", family="hyper", steps=8, denoise=0.1)


def test_the_published_errors_are_within_their_limit():
    published = json.loads((ROOT / "docs" / "results" / "reach.json").read_text(encoding="utf-8"))["families"]
    assert set(published) == {"splam", *FAMILIES} and max(published.values()) < 1e-4
