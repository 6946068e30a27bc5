"""Gamma's embedding, patch and fold against diffusers' own guidance embedding and timestep_cond."""

import pytest
import torch

from splam_core import (
    authors_embedding,
    fold,
    fold_gamma,
    gamma_embedding,
    guidance_embedding,
    patch_time_embedding,
    sinusoid,
)

pytestmark = pytest.mark.core


def pipeline_embedding(w, dim=256):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, dim)


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, torch.tensor([999, 499, 19][:batch]), torch.randn(batch, 5, 32, generator=generator)


@pytest.mark.parametrize("dim", [256, 64, 7])
def test_guidance_embedding_equals_the_lcm_pipeline_to_the_bit(dim):
    w = torch.tensor([0.0, 1.0, 7.5, 13.25])
    assert torch.equal(guidance_embedding(w, dim), pipeline_embedding(w, dim))


def test_authors_embedding_is_lcm_at_ten_minus_ten_gamma():
    gamma = torch.tensor([0.0, 0.35, 1.0])
    assert torch.equal(authors_embedding(gamma), pipeline_embedding(10 - gamma * 10))
    assert torch.equal(authors_embedding(torch.ones(1))[0], torch.tensor([0.0] * 128 + [1.0] * 128))


def test_bandwidth_ten_thousand_is_the_authors_phase():
    gamma = torch.rand(20, dtype=torch.float64)
    found = gamma_embedding(gamma, bandwidth=10_000, zero_at_one=False)
    assert torch.allclose(found, authors_embedding(gamma), atol=1e-9)


@pytest.mark.parametrize("bandwidth", [10, 1000, 10_000])
def test_gamma_embedding_vanishes_at_one_and_only_there(bandwidth):
    gamma = torch.tensor([1.0, 0.999, 0.5, 0.0])
    phi = gamma_embedding(gamma, bandwidth=bandwidth)
    assert phi.shape == (4, 256)
    assert torch.equal(phi[0], torch.zeros(256))
    assert (phi[1:].norm(dim=1) > 0).all()


def test_neighbouring_gammas_look_unrelated_at_the_authors_bandwidth():
    """Why bandwidth is a parameter: at 10000 the embeddings of .999 and 1 have cosine .68, at 1000 they are close."""
    gamma = torch.tensor([0.999, 1.0], dtype=torch.float64)

    def cosine(bandwidth):
        return torch.cosine_similarity(*gamma_embedding(gamma, bandwidth=bandwidth, zero_at_one=False), dim=0).item()

    assert cosine(10_000) == pytest.approx(0.68, abs=0.005)
    assert cosine(1000) > 0.9


def test_too_small_an_embedding_is_refused():
    with pytest.raises(ValueError, match="4 or more"):
        sinusoid(torch.zeros(1), 3)


def test_fold_is_the_linear_layers_own_sum_in_float64():
    w1, cond_proj, phi, tau = torch.randn(8, 6), torch.randn(6, 16), torch.randn(16), torch.randn(6)
    bias = torch.randn(8).double()
    conditioned = w1.double() @ (tau.double() + cond_proj.double() @ phi.double()) + bias
    assert torch.allclose(w1.double() @ tau.double() + bias + fold(w1, cond_proj, phi), conditioned, atol=1e-12)


@pytest.mark.parametrize("embedded, w", [("splam", 0.0), (1.0, 0.0), (8.5, 7.5), (4, 3.0)])
@pytest.mark.parametrize("layout", ["diffusers", "ldm", "ldm-file"])
def test_folded_unet_equals_the_conditioned_one(make_unet, embedded, w, layout):
    conditioned, plain = make_unet(time_cond_proj_dim=256), make_unet()
    names = {
        "diffusers": ("", "time_embedding.linear_1", "time_embedding.cond_proj"),
        "ldm": ("", "time_embed.0", "time_embed.cond_proj"),
        "ldm-file": ("model.diffusion_model.", "time_embed.0", "time_embed.cond_proj"),
    }
    prefix, linear_1, cond_proj = names[layout]

    def there(key):
        return prefix + key.replace("time_embedding.linear_1", linear_1).replace("time_embedding.cond_proj", cond_proj)

    renamed = {there(key): value for key, value in conditioned.state_dict().items()}
    folded, was_folded = fold_gamma(renamed, embedded)
    assert was_folded and not any("cond_proj" in key for key in folded)
    plain.load_state_dict({key: folded[there(key)] for key in plain.state_dict()})
    x, t, prompt = inputs()
    with torch.no_grad():
        expected = conditioned(x, t, prompt, timestep_cond=pipeline_embedding(torch.full((3,), w))).sample
        assert (plain(x, t, prompt).sample - expected).abs().max() < 1e-5
        plain.load_state_dict({**plain.state_dict(), "time_embedding.linear_1.bias": renamed[there(linear_1_bias)]})
        assert (plain(x, t, prompt).sample - expected).abs().max() > 1e-3, "the constant must matter for this to test"


linear_1_bias = "time_embedding.linear_1.bias"


def test_zero_embeddings_are_only_dropped(make_unet):
    state = make_unet(time_cond_proj_dim=256).state_dict()
    folded, was_folded = fold_gamma(state, "zero")
    assert was_folded and torch.equal(folded[linear_1_bias], state[linear_1_bias])


def test_a_plain_unet_passes_through_the_fold(make_unet):
    state = make_unet().state_dict()
    folded, was_folded = fold_gamma(state)
    assert not was_folded and folded.keys() == state.keys()


def test_half_precision_bias_is_the_rounded_float64_one(make_unet):
    state = make_unet(time_cond_proj_dim=256).half().state_dict()
    delta = (
        state["time_embedding.linear_1.weight"].double()
        @ state["time_embedding.cond_proj.weight"].double()
        @ pipeline_embedding(torch.zeros(1))[0].double()
    )
    folded, _ = fold_gamma(state)
    assert torch.equal(folded[linear_1_bias], (state[linear_1_bias].double() + delta).half())


def test_fold_errors_name_the_key_and_the_choice(make_unet):
    state = dict(make_unet(time_cond_proj_dim=256).state_dict())
    with pytest.raises(ValueError, match="'lcm'"):
        fold_gamma(state, "lcm")
    del state[linear_1_bias]
    with pytest.raises(ValueError, match=r"cond_proj\.weight' without the layer it feeds, 'time_embedding\.linear_1'"):
        fold_gamma(state)


def test_patched_plain_unet_equals_timestep_cond_and_comes_off(make_unet):
    conditioned, plain = make_unet(time_cond_proj_dim=256), make_unet(seed=1)
    state = conditioned.state_dict()
    cond_proj = state.pop("time_embedding.cond_proj.weight")
    plain.load_state_dict(state)
    x, t, prompt = inputs()
    phi = authors_embedding(torch.tensor([0.1, 0.6, 1.0]))
    now = {"phi": phi}
    with torch.no_grad():
        before = plain(x, t, prompt).sample
        handle = patch_time_embedding(plain.time_embedding.linear_1, cond_proj, lambda: now["phi"])
        expected = conditioned(x, t, prompt, timestep_cond=phi).sample
        assert (plain(x, t, prompt).sample - expected).abs().max() < 1e-5
        now["phi"] = phi[2]
        shared = conditioned(x, t, prompt, timestep_cond=phi[2:].expand(3, -1)).sample
        assert (plain(x, t, prompt).sample - shared).abs().max() < 1e-5
        now["phi"] = None
        assert torch.equal(plain(x, t, prompt).sample, before)
        now["phi"] = phi
        handle.remove()
        assert torch.equal(plain(x, t, prompt).sample, before)


def test_gradients_reach_the_patch():
    linear_1 = torch.nn.Linear(6, 8)
    cond_proj = torch.nn.Parameter(torch.zeros(6, 256))
    gamma = torch.tensor([1.0, 0.3])
    patch_time_embedding(linear_1, cond_proj, lambda: gamma_embedding(gamma))
    tau = torch.randn(2, 6)
    assert torch.equal(linear_1(tau), torch.nn.functional.linear(tau, linear_1.weight, linear_1.bias))
    linear_1(tau)[0].sum().backward()
    assert cond_proj.grad.abs().max() == 0  # gamma = 1 teaches it nothing
    linear_1(tau)[1].sum().backward()
    assert cond_proj.grad.abs().max() > 0


def test_half_precision_unets_stay_half():
    linear_1 = torch.nn.Linear(6, 8).half()
    patch_time_embedding(linear_1, torch.randn(6, 256), lambda: gamma_embedding(torch.tensor([0.3])))
    assert linear_1(torch.randn(2, 6).half()).dtype == torch.float16


def test_gamma_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"must be \[6, dim\].*got \[7, 256\]"):
        patch_time_embedding(torch.nn.Linear(6, 8), torch.zeros(7, 256), lambda: None)
