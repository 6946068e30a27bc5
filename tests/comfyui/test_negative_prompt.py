"""Negative prompts at guidance 1: diffusers' UNet with the paper's formula in its attention gives the same latents."""

import copy

import pytest
import torch
from safetensors.torch import load
from transformers import CLIPTokenizer

from harness.graphs import save_latent
from harness.reference import few_step, node_noises, relative_error
from harness.server import ServerError

from .routes import OTHER, PROMPT, ROUTES, SEED, STEPS, node, route

pytestmark = pytest.mark.comfyui
SHAPE = (1, 4, 16, 16)


class NagProcessor:
    """diffusers' attention, softmax written out, with normalised attention guidance before its output projection.

    weights(tokens): of each negative prompt, a number or [tokens, 1]; one that is not there at all guides nowhere.
    """

    def __init__(self, negatives, scale, tau, alpha, weights=None, tokens=lambda k, v: (k, v)):
        self.negatives, self.numbers, self.tokens = negatives, (scale, tau, alpha), tokens
        self.weights = weights or (lambda tokens: [1.0] * len(negatives))

    def attend(self, attn, x, context):
        k, v = self.tokens(context, context)
        q, k, v = (
            projection(part).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection, part in ((attn.to_q, x), (attn.to_k, k), (attn.to_v, v))
        )
        return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        scale, tau, alpha = self.numbers
        z = self.attend(attn, hidden_states, encoder_hidden_states)
        weights = self.weights(z.shape[1])
        towards = [self.attend(attn, hidden_states, negative.expand(len(z), -1, -1)) - z for negative in self.negatives]
        whole = sum(torch.as_tensor(weight) for weight in weights).clamp(min=1)
        z_negative = z + sum(weight * part for weight, part in zip(weights, towards, strict=True)) / whole
        guided = z + (scale - 1) * (z - z_negative)
        ratio = guided.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True)
        guided = guided * ratio.clamp(max=tau) / ratio
        return attn.to_out[0](alpha * guided + (1 - alpha) * z)


@pytest.fixture(scope="module")
def embed(comfyui, pipelines):
    tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
    return lambda name, text: pipelines.reference(name).embed(tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def expected(pipelines, embed):
    def run(name, negatives=(OTHER,), numbers=(5.0, 2.5, 0.25), shape=SHAPE, **options):
        reference = pipelines.reference(name)
        unet = copy.deepcopy(reference.unet)
        processor = NagProcessor([embed(name, text) for text in negatives], *numbers, **options)
        unet.set_attn_processor(
            {key: processor if ".attn2." in key else kept for key, kept in unet.attn_processors.items()}
        )
        return few_step(unet, reference.scheduler_config, embed(name, PROMPT), *node_noises(shape, SEED), STEPS)

    return run


@pytest.fixture
def run(server):
    def run(graph: dict) -> torch.Tensor:
        (file,) = server.files(server.run(save_latent(graph)))
        return load(file)["latent_tensor"] * 0.31

    return run


def negative_prompt(negative="other", model="model", **numbers) -> dict:
    numbers = {"nag_scale": 5.0, "nag_tau": 2.5, "nag_alpha": 0.25} | numbers
    return node("SPLAMNegativePrompt", model=[model, 0], negative=[negative, 0], **numbers)


def on_the_sampler(graph: dict, negative="other", **inputs) -> dict:
    graph["sampled"]["inputs"] |= {"negative": [negative, 0], "nag_scale": 5.0} | inputs
    return graph


@pytest.mark.parametrize("name", ["plain", "v", "sd15-like", "deep"])
def test_the_samplers_input(name, expected, run):
    found = run(on_the_sampler(route("splam", name)))
    assert relative_error(found, expected(name)) < 1e-4
    assert relative_error(found, run(route("splam", name))) > 1e-3, "the guidance must matter for this to test"


@pytest.mark.parametrize("kind", ROUTES)
def test_the_node_under_every_sampler(kind, expected, run):
    numbers = {"nag_scale": 3.0, "nag_tau": 1.2, "nag_alpha": 0.8}
    found = run(route(kind, "plain", {"patched": negative_prompt(**numbers)}))
    assert relative_error(found, expected("plain", numbers=tuple(numbers.values()))) < 1e-4


def test_a_batch_and_other_sizes(expected, run):
    graph = on_the_sampler(route("splam", "plain", batch=3))
    graph["latent"]["inputs"]["width"] = 192
    assert relative_error(run(graph), expected("plain", shape=(3, 4, 16, 24))) < 1e-4


@pytest.mark.parametrize("off", [{"nag_scale": 1.0}, {"nag_alpha": 0.0}])
def test_off_is_identical_to_the_bit(off, run):
    assert run(route("ksampler", "plain", {"patched": negative_prompt(**off)})).equal(run(route("ksampler", "plain")))
    if "nag_scale" in off:
        assert run(on_the_sampler(route("splam", "plain"), **off)).equal(run(route("splam", "plain")))


def test_the_model_that_came_in_stays_as_it_was(run):
    before = run(route("splam", "plain"))
    guided = run(on_the_sampler(route("splam", "plain")))
    again = route(
        "splam", "plain", {"one": negative_prompt(negative="positive"), "patched": negative_prompt(model="one")}
    )
    assert run(again).equal(guided), "a second one takes the place of the first"
    fresh = route("splam", "plain")
    fresh["shown"] = node("PreviewAny", source=["sampled", 0])
    assert run(fresh).equal(before)


def test_two_negative_prompts_are_averaged(expected, run):
    third = "a red heart on a yellow background"
    extra = {
        "third": node("CLIPTextEncode", text=third, clip=["model", 1]),
        "both": node("ConditioningCombine", conditioning_1=["other", 0], conditioning_2=["third", 0]),
    }
    found = run(on_the_sampler(route("splam", "plain", extra), "both"))
    assert relative_error(found, expected("plain", (OTHER, third))) < 1e-4


def test_a_negative_prompt_for_an_area(expected, run):
    """The left half; the attention's tokens there alone are guided."""

    def left(tokens):
        side = round(tokens**0.5)
        weights = torch.zeros(side, side)
        weights[:, : side // 2] = 1
        return [weights.reshape(-1, 1)]

    area = {"width": 64, "height": 128, "x": 0, "y": 0, "strength": 1.0}
    extra = {"half": node("ConditioningSetArea", conditioning=["other", 0], **area)}
    found = run(on_the_sampler(route("splam", "plain", extra), "half"))
    assert relative_error(found, expected("plain", weights=left)) < 1e-4
    mask = {
        "black": node("SolidMask", value=0.0, width=128, height=128),
        "white": node("SolidMask", value=1.0, width=64, height=128),
        "mask": node("MaskComposite", destination=["black", 0], source=["white", 0], x=0, y=0, operation="add"),
        "half": node(
            "ConditioningSetMask",
            conditioning=["other", 0],
            mask=["mask", 0],
            strength=1.0,
            set_cond_area="default",
        ),
    }
    assert relative_error(run(on_the_sampler(route("splam", "plain", mask), "half")), found) < 1e-5


def test_strength_weakens(expected, run):
    area = {"width": 1.0, "height": 1.0, "x": 0.0, "y": 0.0, "strength": 0.5}
    extra = {"weak": node("ConditioningSetAreaPercentage", conditioning=["other", 0], **area)}
    found = run(on_the_sampler(route("splam", "plain", extra), "weak"))
    assert relative_error(found, expected("plain", weights=lambda tokens: [0.5])) < 1e-4


def test_a_range_of_steps(run):
    """The first step alone: the others are those of the sampler without."""
    extra = {"early": node("ConditioningSetTimestepRange", conditioning=["other", 0], start=0.0, end=0.1)}
    early = run(on_the_sampler(route("splam", "plain", extra), "early"))
    whole, none = run(on_the_sampler(route("splam", "plain"))), run(route("splam", "plain"))
    assert min(relative_error(early, other) for other in (whole, none)) > 1e-3
    never = {"never": node("ConditioningSetTimestepRange", conditioning=["other", 0], start=1.0, end=1.0)}
    assert run(on_the_sampler(route("splam", "plain", never), "never")).equal(none)


def test_other_patches_of_the_attention_see_both_prompts(expected, run):
    """As IPAdapter's: more tokens, here the prompt's own at half strength."""
    extra = {
        "more": node("TestAttentionPatch", model=["model", 0], strength=0.5),
        "patched": negative_prompt(model="more"),
    }
    found = run(route("splam", "plain", extra))

    def tokens(k, v):
        return torch.cat([k, k * 0.5], dim=1), torch.cat([v, v * 0.5], dim=1)

    assert relative_error(found, expected("plain", tokens=tokens)) < 1e-4
    after = {"one": negative_prompt(), "patched": node("TestAttentionPatch", model=["one", 0], strength=0.5)}
    assert run(route("splam", "plain", after)).equal(found), "in whatever order the nodes stand"


def test_other_replacements_of_the_attention_stay(run):
    """A replacement that is the host's own attention changes nothing; one that scales z scales z+ and z- alike."""

    def graph(strength):
        extra = {"other_pack": node("TestAttentionReplace", model=["model", 0], strength=strength)}
        return route("splam", "plain", extra | {"patched": negative_prompt(model="other_pack")})

    guided = run(on_the_sampler(route("splam", "plain")))
    assert relative_error(run(graph(1.0)), guided) < 1e-5
    assert relative_error(run(graph(0.5)), guided) > 1e-3


def test_with_a_controlnet_and_guidance_above_1(run):
    """The positive prompt's rows alone are guided."""
    controlled = {
        "net": node("TestControlNet"),
        "hint": node("EmptyImage", width=128, height=128, batch_size=1, color=0),
        "conditioned": node(
            "ControlNetApply", conditioning=["positive", 0], control_net=["net", 0], image=["hint", 0], strength=0.3
        ),
    }
    plain, guided = route("splam", "plain", controlled), on_the_sampler(route("splam", "plain", controlled))
    assert relative_error(run(guided), run(plain)) > 1e-3
    both = on_the_sampler(route("splam", "plain"), guidance=2.0)
    only = on_the_sampler(route("splam", "plain"), guidance=2.0, nag_scale=1.0)
    assert relative_error(run(both), run(only)) > 1e-3


def test_a_positive_prompt_in_areas(run, server):
    area = {"width": 64, "height": 128, "x": 0, "y": 0, "strength": 1.0}
    extra = {
        "here": node("ConditioningSetArea", conditioning=["positive", 0], **area),
        "conditioned": node("ConditioningCombine", conditioning_1=["positive", 0], conditioning_2=["here", 0]),
    }
    assert (
        relative_error(run(on_the_sampler(route("splam", "plain", extra))), run(route("splam", "plain", extra))) > 1e-3
    )
    extra["half"] = node("ConditioningSetArea", conditioning=["other", 0], **area)
    with pytest.raises(ServerError, match=r"SPLAM Sampler: the negative .* area or a mask, and the positive .* masks"):
        server.run(save_latent(on_the_sampler(route("splam", "plain", extra), "half")))


def test_bad_input(server):
    def fails(graph, match):
        with pytest.raises(ServerError, match=match):
            server.run(save_latent(graph))

    graph = route("splam", "plain")
    graph["sampled"]["inputs"]["nag_scale"] = 5.0
    fails(graph, r"SPLAM Sampler: nag_scale 5 needs a negative conditioning, and none is connected")
    wide = {"wide": node("TestConditioning", width=768, seed=0)}
    fails(
        route("splam", "plain", wide | {"patched": negative_prompt("wide")}),
        r"SPLAM Negative Prompt: this MODEL's prompts are 64 wide, the negative conditioning is 768. Encode it",
    )
