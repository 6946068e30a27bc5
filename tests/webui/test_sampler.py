"""The sampler "SPLAM" on the stand-in of every host, against diffusers' LCMScheduler: same weights, same noises."""

import pytest
import torch

from .reference import assert_same, embedding, lcm, levels, noised, scheduler_of

pytestmark = pytest.mark.webui
IMAGE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 0.7


def context(p):
    return torch.stack(list(p.prompts))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_text_to_image(host, steps):
    p = host.request(steps=steps)
    found, _ = host.run(p)
    first, *fresh = p.rng.drawn
    assert len(fresh) == steps - 1
    assert_same(found, lcm(first, context(p), steps, fresh))


def test_v_prediction(host):
    host.use("v")
    p = host.request()
    found, _ = host.run(p)
    assert_same(found, lcm(p.rng.drawn[0], context(p), 4, p.rng.drawn[1:], prediction_type="v_prediction"))


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("steps", [1, 4])
def test_v_prediction_with_zero_terminal_snr(host, steps):
    host.use("v", zero_snr=True)
    p = host.request(steps=steps)
    found, _ = host.run(p)
    assert_same(found, lcm(p.rng.drawn[0], context(p), steps, p.rng.drawn[1:], **ZERO_SNR))


def test_noise_prediction_with_zero_terminal_snr_is_refused(host):
    """At the first timestep predicted noise says nothing about the picture, and the division is by 2.2e-4."""
    host.use("eps", zero_snr=True)
    with pytest.raises(ValueError, match=r'predicts noise.*zero terminal SNR.*"Noise schedule for sampling"'):
        host.run(host.request())
    assert not host.shared.sd_model.calls


@pytest.mark.parametrize("said", ["v", "v_prediction", "epsilon", "edm", None])
def test_a_checkpoint_of_v_prediction_that_is_taken_for_noise_prediction(host, said):
    """As Forge does with every one of SD 2.x that has no .yaml beside it."""
    for runs in ("eps", "v"):
        host.use(runs)
        host.shared.sd_model.sd_checkpoint_info.metadata = {"modelspec.prediction_type": said} if said else {}
        p = host.request(steps=1)
        host.run(p)
        hint = any("says that it predicts v" in comment and ".yaml" in comment for comment in p.comments)
        assert hint == (runs == "eps" and said in ("v", "v_prediction"))


def test_noise_prediction_with_zero_terminal_snr_from_an_image(host):
    """Below the first timestep nothing is divided by (nearly) 0."""
    host.use("eps", zero_snr=True)
    p = host.request(init_latent=IMAGE, denoising_strength=0.6)
    found, _ = host.run(p)
    config = {"rescale_betas_zero_snr": True}
    first, *fresh = p.rng.drawn
    assert_same(found, lcm(noised(IMAGE, first, 4, 0.6, **config), context(p), 4, fresh, 0.6, **config))


def test_batch_is_its_pictures_made_one_by_one(host):
    prompts, seeds = [embedding(1), embedding(2)], [7, 8]
    p = host.request(prompts=prompts, seeds=seeds, steps=2)
    both, _ = host.run(p)
    assert_same(both, lcm(p.rng.drawn[0], context(p), 2, p.rng.drawn[1:]))
    for i in range(2):
        alone, _ = host.run(host.request(prompts=prompts[i : i + 1], seeds=seeds[i : i + 1], steps=2))
        assert_same(both[i : i + 1], alone)


def test_variation_seed(host):
    p = host.request(subseeds=[99], subseed_strength=0.3)
    found, _ = host.run(p)
    plain, _ = host.run(host.request())
    assert_same(found, lcm(p.rng.drawn[0], context(p), 4, p.rng.drawn[1:]))
    assert (found - plain).abs().mean() > 0.01 * plain.std()


@pytest.mark.parametrize("fix_steps", [False, True])
@pytest.mark.parametrize(("strength", "steps"), [(0.3, 4), (0.6, 2), (0.6, 3), (1.0, 4)])
def test_image_to_image_runs_the_steps_asked_for_on_the_cut_grid(host, strength, steps, fix_steps):
    host.shared.opts.data["img2img_fix_steps"] = fix_steps
    p = host.request(init_latent=IMAGE, denoising_strength=strength, steps=steps)
    found, _ = host.run(p)
    first, *fresh = p.rng.drawn
    assert len(host.shared.sd_model.calls) == steps == host.shared.state.sampling_steps
    assert_same(found, lcm(noised(IMAGE, first, steps, strength), context(p), steps, fresh, strength))


@pytest.mark.parametrize("second_steps", [0, 3])
def test_hires_fix(host, second_steps):
    p = host.request(enable_hr=True, steps=2, hr_second_pass_steps=second_steps, denoising_strength=0.5)
    found, info = host.run(p)
    one, two = (generator.drawn for generator in p.passes)
    small = lcm(one[0], context(p), 2, one[1:])
    steps = second_steps or 2
    z = noised(torch.nn.functional.interpolate(small, scale_factor=2), two[0], steps, 0.5)
    assert_same(found, lcm(z, context(p), steps, two[1:], 0.5))
    assert host.shared.sd_model.calls == [1] * (2 + steps)
    assert "SPLAM guidance: 1" in info


def test_inpaint(host):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1  # what is kept
    p = host.request(init_latent=IMAGE, denoising_strength=0.6, mask=mask, nmask=1 - mask)
    torch.manual_seed(11)  # Forge noises the kept part anew for every evaluation, from torch's own generator
    found, _ = host.run(p)
    assert torch.equal(found * mask, IMAGE * mask)
    scheduler = scheduler_of()

    def see(z, t):
        alpha, sigma = levels(scheduler, t)
        return z * (1 - mask) + (alpha * IMAGE + sigma * torch.randn_like(z)) * mask

    torch.manual_seed(11)
    first, *fresh = p.rng.drawn
    expected = lcm(
        noised(IMAGE, first, 4, 0.6),
        context(p),
        4,
        fresh,
        0.6,
        blend=lambda x0: x0 * (1 - mask) + IMAGE * mask,
        see=see if host.name == "forge" else None,
    )
    assert_same(found, expected * (1 - mask) + IMAGE * mask)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("sgm_noise_multiplier", True), ("always_discard_next_to_last_sigma", True), ("skip_early_cond", 0.2)],
)
def test_settings_of_other_samplers_do_not_reach_it(host, setting, value):
    expected, _ = host.run(host.request())
    host.shared.opts.data[setting] = value
    found, _ = host.run(host.request(scheduler="Karras"))
    assert_same(found, expected)
    assert host.shared.opts.data[setting] == value


@pytest.mark.parametrize("cfg_scale", [1.0, 7.0])
def test_one_evaluation_a_step_whatever_the_guidance(host, cfg_scale):
    p = host.request(prompts=[embedding(1), embedding(2)], seeds=[1, 2], cfg_scale=cfg_scale)
    found, info = host.run(p)
    assert host.shared.sd_model.calls == [2] * 4
    assert p.cfg_scale == 1
    assert "CFG scale: 1" in info
    assert "SPLAM guidance: 1" in info
    assert "Skip Early CFG" not in info
    assert_same(found, lcm(p.rng.drawn[0], context(p), 4, p.rng.drawn[1:]))


def test_without_the_script_the_sampler_forces_guidance_itself(host):
    p = host.request(scripts=None)
    found, _ = host.run(p)
    assert p.cfg_scale == 7  # put back
    assert host.shared.sd_model.calls == [1] * 4
    assert_same(found, lcm(p.rng.drawn[0], context(p), 4, p.rng.drawn[1:]))


def test_guidance_can_be_kept(host):
    p = host.request(cfg_scale=2.0, script_args=[False], steps=1)
    found, info = host.run(p)
    cond, without = (lcm(p.rng.drawn[0], e[None], 1, []) for e in (embedding(1), embedding(9)))
    assert_same(found, without + 2 * (cond - without))
    assert "SPLAM guidance: as set" in info


def failing_at(call, error):
    seen = []

    def network(x, t, context):
        seen.append(1)
        if len(seen) == call:
            raise error
        return torch.zeros_like(x)

    return network


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("setting", [None, 0.25])
def test_settings_are_put_back_after_an_error(host, error, setting):
    if setting is not None:
        host.shared.opts.data["skip_early_cond"] = setting
    before = dict(host.shared.opts.data)
    host.use(network=failing_at(2, error))
    p = host.request(scripts=None)
    with pytest.raises(type(error)):
        host.run(p)
    assert host.shared.opts.data == before
    assert p.cfg_scale == 7
    host.use()
    p = host.request(sampler_name="Euler")
    host.run(p)
    assert max(host.shared.sd_model.calls) == (2 if host.name == "a1111" else 1)
    without = 2 if setting else 0  # of the four steps, by the setting
    assert len(host.shared.sd_model.calls) == (4 if host.name == "a1111" else 8 - without)


@pytest.mark.parametrize("flag", ["interrupted", "skipped"])
def test_interrupt_and_skip_keep_the_last_prediction(host, flag):
    state, before = host.shared.state, dict(host.shared.opts.data)

    def after_second():
        if len(state.latents) == 2:
            setattr(state, flag, True)

    state.on_latent = after_second
    p = host.request()
    found, _ = host.run(p)
    assert len(host.shared.sd_model.calls) == 2
    assert torch.equal(found, state.latents[1])
    assert host.shared.opts.data == before


def test_preview_and_progress(host):
    state, seen = host.shared.state, []
    state.on_latent = lambda: seen.append(state.sampling_step)
    found, _ = host.run(host.request())
    assert len(state.latents) == 4
    assert (state.sampling_step, state.sampling_steps) == (3, 4)
    assert seen == [0, 0, 1, 2]  # the preview of a step comes before its callback
    assert_same(state.latents[-1], found)  # t = 259: c_skip is 4e-8


def test_stop_at(host):
    """Some scripts end a run after a step, by an attribute that the callback reads."""
    p = host.request()
    create = host.sd_samplers.create_sampler

    def create_stopping(name, model):
        sampler = create(name, model)
        sampler.stop_at = 1
        return sampler

    host.processing.sd_samplers.create_sampler = create_stopping
    found, _ = host.run(p)
    assert len(host.shared.sd_model.calls) == 3
    assert torch.equal(found, host.shared.state.latents[2])


@pytest.mark.parametrize("steps", [9, 30, 70])
def test_many_steps_get_one_hint(host, steps):
    p = host.request(steps=steps, enable_hr=True, denoising_strength=0.9)
    found, _ = host.run(p)
    assert len(p.comments) == 1
    assert "1 to 8 steps" in next(iter(p.comments))
    assert len(p.passes[0].drawn) == min(steps, 50)
    assert torch.isfinite(found).all()


def test_few_steps_get_no_hint(host):
    p = host.request(steps=8)
    host.run(p)
    assert not p.comments


def test_low_strength_runs_what_fits(host):
    p = host.request(init_latent=IMAGE, denoising_strength=0.05)
    found, _ = host.run(p)
    first, *fresh = p.rng.drawn
    assert len(p.comments) == 1
    assert_same(found, lcm(noised(IMAGE, first, 2, 0.05), context(p), 2, fresh, 0.05))


def test_strength_zero_gives_the_image(host):
    found, _ = host.run(host.request(init_latent=IMAGE, denoising_strength=0.0))
    assert torch.equal(found, IMAGE)


def test_another_kind_of_model_is_named(host):
    checkpoint = host.shared.sd_model
    checkpoint.alphas_cumprod = checkpoint.alphas_cumprod[:500]
    if hasattr(checkpoint, "forge_objects"):
        (predictor,) = vars(checkpoint.forge_objects.unet.model).values()
        predictor.sigmas = predictor.sigmas[:500]
    with pytest.raises(ValueError, match=r"expected a Stable Diffusion .* found a model with 500 noise levels"):
        host.run(host.request())


def test_half_precision_latents(host):
    """x may be of another precision than the schedule: the result has x's."""
    host.use(network=lambda x, t, c: torch.zeros_like(x))
    p = host.request(init_latent=IMAGE.half(), denoising_strength=0.5)
    p.new_rng = lambda size, original=p.new_rng: original(size).half()
    found, _ = host.run(p)
    assert found.dtype == torch.float16
