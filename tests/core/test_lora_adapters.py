"""Adapters switched on a network: each role is itself, what is attached goes again, and it is peft's arithmetic."""

import pytest
import torch
from torch import nn

from splam_core.lora import LoraAdapters, is_lora_target, lora_start

pytestmark = pytest.mark.core


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.linear = nn.Linear(5, 4)

    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3)))


@pytest.fixture
def made():
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    return net, LoraAdapters({"a.conv1": net.conv, "b.to_q": net.linear}, 2, seed=7), torch.randn(2, 3, 8, 8)


def test_roles(made):
    net, adapters, x = made
    plain = net(x)
    with adapters.attached():
        assert torch.equal(net(x), plain)  # up begins at zero
        with torch.no_grad():
            for weight in adapters.trainable():
                weight.add_(0.1)
        adapters.update_averages(10, 0.5, 0.9)
        found = {}
        for role in ("teacher", "student", "target", "release"):
            with adapters.use(role):
                found[role] = net(x)
        assert torch.equal(found["teacher"], plain)
        assert len({round(float(one.detach().sum()), 6) for one in found.values()}) == 4
        assert adapters.role == "student"
        found["student"].sum().backward()
    assert all(weight.grad is not None for weight in adapters.trainable())
    assert torch.equal(net(x), plain) and not net.conv._forward_hooks


def test_it_is_a_low_rank_change_of_the_weights(made):
    net, adapters, x = made
    weights = adapters.weights["student"]
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(key))))
    with adapters.attached():
        found = net(x).detach()
    merged = Net()
    merged.load_state_dict(net.state_dict())
    with torch.no_grad():
        for layer, name in ((merged.conv, "a.conv1"), (merged.linear, "b.to_q")):
            down, up = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
            layer.weight += (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
    assert torch.allclose(found, merged(x), atol=1e-4)


def test_the_start_is_a_function_of_seed_and_name():
    one = lora_start(3, "down_blocks.0.conv1", (4, 9, 3, 3))
    assert torch.equal(one, lora_start(3, "down_blocks.0.conv1", (4, 9, 3, 3)))
    assert not torch.equal(one, lora_start(4, "down_blocks.0.conv1", (4, 9, 3, 3)))
    assert not torch.equal(one, lora_start(3, "down_blocks.1.conv1", (4, 9, 3, 3)))
    assert one.abs().max() <= 1 / 9 and one.std() == pytest.approx(1 / 9 / 3**0.5, rel=0.1)


def test_targets_are_whole_names():
    assert is_lora_target("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q") and is_lora_target("to_q")
    assert not is_lora_target("time_embedding.linear_1") and not is_lora_target("x.not_to_q")


def test_weights_of_another_rank_are_refused(made):
    _, adapters, _ = made
    other = {key: weight[:1] for key, weight in adapters.weights["student"].items()}
    with pytest.raises(ValueError, match="differ, the first"):
        adapters.load("student", other)


def test_a_finish_goes_on_from_the_slower_average(made):
    net, adapters, x = made
    plain = net(x)
    with torch.no_grad():
        for weight in adapters.trainable():
            weight.add_(0.1)
    adapters.update_averages(10, 0.5, 0.9)
    release = {key: weight.clone() for key, weight in adapters.weights["release"].items()}
    adapters.begin_finish(release=True, anchored=True)
    assert set(adapters.weights) == {"student", "target", "fake", "start"}
    for role in ("student", "target", "start"):
        assert all(torch.equal(weight, release[key]) for key, weight in adapters.weights[role].items())
    with adapters.attached(), adapters.use("fake"):
        output = net(x)
        assert torch.equal(output, plain)
        output.sum().backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in adapters.trainable("fake"))
    assert all(weight.grad is None for weight in adapters.trainable())
