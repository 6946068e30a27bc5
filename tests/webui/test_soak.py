"""A web UI that works all day, on the stand-in of every host: mixed requests, interrupts, model switches, refusals."""

import gc
import random

import pytest
import torch

from .conftest import with_attention
from .reference import embedding

pytestmark = pytest.mark.webui
IMAGE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 0.7
REQUESTS, CONTROL_EVERY = 60, 6


def mixed(rng):
    """Settings of a request of one of the kinds that people make."""
    parts = [(embedding(1), rng.random()), (embedding(2), rng.random())]
    several = rng.randrange(1, 4)
    plain = {"seeds": [rng.randrange(2**32)], "steps": rng.randrange(1, 9), "cfg_scale": rng.choice([1.0, 7.0])}
    return plain | rng.choice((
        {},
        {"prompts": [embedding(1)] * several, "seeds": [rng.randrange(2**32) for _ in range(several)]},
        {"init_latent": IMAGE, "denoising_strength": rng.random()},
        {"prompts": [parts]},
        {"enable_hr": True, "hr_second_pass_steps": rng.randrange(3)},
        {"script_args": [False]},  # guidance as set
        {"script_args": [True, True, 4.0]},  # led away from the negative prompt
        {"sampler_name": "Euler"},
    ))  # fmt: skip


def tensors():
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def test_all_day(host):
    """No tensor stays behind, no setting is changed, and the control picture is the same to the bit."""
    use = with_attention(host)
    rng, state, settings, kept, ended = random.Random(0), host.shared.state, dict(host.shared.opts.data), [], set()

    def control():
        use()
        state.latents, state.on_latent = [], lambda: None
        return host.run(host.request(seeds=[4]))[0]

    first = control()
    for number in range(REQUESTS):
        kind, zero_snr = rng.choice([("eps", False), ("v", False), ("v", True), ("eps", True)])
        use(kind, zero_snr)
        flag, after = rng.choice(["interrupted", "skipped", None, None]), rng.randrange(1, 4)
        state.latents = []
        state.on_latent = lambda flag=flag, after=after: flag and setattr(state, flag, len(state.latents) >= after)
        try:
            found, _ = host.run(host.request(**mixed(rng)))
            assert found.isfinite().all() or zero_snr
            ended.add("interrupted" if state.interrupted or state.skipped else "done")
        except ValueError as error:
            assert "zero terminal SNR" in str(error), error
            ended.add("refused")
        state.interrupted = state.skipped = False
        if number % CONTROL_EVERY == 0:
            assert torch.equal(control(), first), number
            kept.append(tensors())
    assert ended == {"done", "interrupted", "refused"}
    half = len(kept) // 2
    assert max(kept[half:]) <= max(kept[:half]), kept
    assert host.shared.opts.data == settings
