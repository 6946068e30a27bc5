"""The negative prompt at guidance 1 on the stand-in of every host, against the paper's formula in diffusers' UNet."""

import copy
from types import SimpleNamespace

import pytest
import torch

from . import reference
from .conftest import with_attention
from .reference import UNET, assert_same, embedding, lcm

pytestmark = pytest.mark.webui
NEGATIVE = embedding(9)
ON = [True, True, 4.0]  # the script's arguments


class Processor:
    """Cross-attention with normalised attention guidance, its softmax written out."""

    def __init__(self, negative, scale, tau=2.5, alpha=0.25):
        self.negative, self.scale, self.tau, self.alpha = negative, scale, tau, alpha

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        def attend(context):
            q, k, v = (
                part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for part in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
            )
            weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            return (weights @ v).transpose(1, 2).flatten(2)

        z, other = attend(encoder_hidden_states), attend(self.negative.expand(len(hidden_states), -1, -1))
        guided = z + (self.scale - 1) * (z - other)
        ratio = guided.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True)
        guided = guided * ratio.clamp(max=self.tau) / ratio
        return attn.to_out[0](self.alpha * guided + (1 - self.alpha) * z)


@pytest.fixture
def guided(host, monkeypatch):
    """The host with a UNet of its own kind; `expected(p, steps)`: the same pictures from diffusers'."""
    unet = with_attention(host)()

    def expected(p, steps=4, negative=NEGATIVE, scale=4.0):
        plain = copy.deepcopy(UNET)
        processor = Processor(negative, scale)
        plain.set_attn_processor(
            {key: processor if ".attn2." in key else kept for key, kept in plain.attn_processors.items()}
        )
        with monkeypatch.context() as patch:
            patch.setattr(reference, "UNET", plain)
            return lcm(p.rng.drawn[0], torch.stack(list(p.prompts)), steps, p.rng.drawn[1:])

    host.expected, host.unet = expected, unet
    return host


@pytest.mark.parametrize("steps", [1, 4])
def test_the_formula(guided, steps):
    p = guided.request(script_args=ON, steps=steps)
    found, info = guided.run(p)
    assert_same(found, guided.expected(p, steps))
    plain, _ = guided.run(guided.request(steps=steps))
    assert (found - plain).abs().max() > 1e-3 * plain.std()
    assert "SPLAM guidance: 1" in info and "SPLAM NAG scale: 4" in info
    assert guided.shared.sd_model.calls == [1] * 2 * steps, "one evaluation a step"


def test_off_is_identical_to_the_bit(guided):
    before, _ = guided.run(guided.request())
    for arguments in ([True, False, 4.0], [True, True, 1.0], [True]):
        found, info = guided.run(guided.request(script_args=arguments))
        assert torch.equal(found, before) and "NAG" not in info


def test_afterwards_all_is_as_it_was(guided):
    """Also after an error in the middle of sampling."""
    before, _ = guided.run(guided.request())
    guided.run(guided.request(script_args=ON))
    with pytest.raises(RuntimeError):
        guided.run(guided.request(negative=torch.zeros(5, 7), script_args=ON))
    assert not any(len(module._forward_pre_hooks) for module in guided.unet.modules())
    if guided.name != "a1111":
        assert not guided.shared.sd_model.forge_objects.unet.model_options
    assert torch.equal(guided.run(guided.request())[0], before)


def test_a_batch_has_each_pictures_negative_prompt(guided):
    prompts, seeds = [embedding(1), embedding(2)], [7, 8]
    p = guided.request(prompts=prompts, seeds=seeds, steps=2, script_args=ON)
    both, _ = guided.run(p)
    assert_same(both, guided.expected(p, 2))


def test_an_edited_negative_prompt(guided):
    """[a:b:2]: of two steps each."""
    p = guided.request(negative={1: NEGATIVE, 100: embedding(5)}, script_args=ON, steps=2)
    found, _ = guided.run(p)
    early = guided.request(negative=NEGATIVE, script_args=ON, steps=2)
    assert torch.equal(found, guided.run(early)[0]), "steps count from 0: both are the first's"
    p = guided.request(negative={0: NEGATIVE, 100: embedding(5)}, script_args=ON, steps=2)
    assert not torch.equal(guided.run(p)[0], found)


def test_prompts_marked_by_the_controlnet_extension(guided, monkeypatch):
    """In Automatic1111 it puts a token of 1024, or -1024, before each, and its UNet's forward takes it off again."""

    def marked(prompt, value):
        return torch.cat([torch.full_like(prompt[:1], value), prompt])

    forward = guided.unet.forward
    monkeypatch.setattr(guided.unet, "forward", lambda x, t, context: forward(x, t, context[:, 1:]))
    prompts = [marked(embedding(1), 1024.0)]
    p = guided.request(prompts=prompts, negative=marked(NEGATIVE, -1024.0), steps=2, script_args=ON)
    found, _ = guided.run(p)
    assert_same(found, guided.expected(SimpleNamespace(prompts=[embedding(1)], rng=p.rng), 2))


def test_attention_in_parts_is_refused(guided, monkeypatch):
    """As of Regional Prompter, which projects every region's attention by itself."""
    if guided.name != "a1111":
        pytest.skip("has no hooks")
    module = next(module for module in guided.unet.modules() if hasattr(module, "to_out") and hasattr(module, "runs"))
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **more: (forward(*args, **more) + forward(*args, **more)) / 2)
    with pytest.raises(ValueError, match="evaluates cross-attention in parts, as Regional Prompter"):
        guided.run(guided.request(script_args=ON))
    assert not any(len(part._forward_pre_hooks) for part in guided.unet.modules())


def test_hires_fix_and_composed_prompts(guided):
    p = guided.request(enable_hr=True, steps=2, script_args=ON)
    found, info = guided.run(p)
    assert found.isfinite().all() and "SPLAM NAG scale: 4" in info
    composed = [[(embedding(1), 1.0), (embedding(2), 0.5)]]
    found, plain = (guided.run(guided.request(prompts=composed, steps=2, script_args=a))[0] for a in (ON, [True]))
    assert (found - plain).abs().max() > 1e-3 * plain.std()


def test_another_packs_replacement_stays(guided):
    if guided.name == "a1111":
        pytest.skip("has none")
    from modules.attention import attend

    seen = []

    def other(q, k, v, extra):
        seen.append(len(k))
        return attend(q, k, v, extra["n_heads"])

    options = guided.shared.sd_model.forge_objects.unet.model_options
    options["transformer_options"] = {"patches_replace": {"attn2": {("input", 0): other}}}
    p = guided.request(script_args=ON, steps=1)
    found, _ = guided.run(p)
    assert_same(found, guided.expected(p, 1))
    assert seen == [1, 1]
    assert options["transformer_options"]["patches_replace"]["attn2"] == {("input", 0): other}


def test_a_scale_below_1(guided):
    with pytest.raises(ValueError, match="nag_scale must be 1 or more"):
        guided.run(guided.request(script_args=[True, True, 0.5]))
