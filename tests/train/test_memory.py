"""What lowers a step's memory, and that it changes nothing else."""

import copy

import pytest
import torch
from diffusers.models.transformers import Transformer2DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from training.models.load import load_pipeline
from training.run import report
from training.run.adapters import LoraNetworks
from training.run.config import complete
from training.run.memory import keep_less
from training.run.optimizers import build_optimizer
from training.run.sharding import OptimizerState

pytestmark = pytest.mark.train


class Kept:
    """Storages that autograd keeps for the backward pass of what runs inside."""

    def __enter__(self):
        self.tensors = []
        self.hooks = saved_tensors_hooks(lambda one: (self.tensors.append(one), one)[1], lambda one: one)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def bytes(self, but=()):
        weights = {one.untyped_storage().data_ptr() for one in but}
        found = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in self.tensors}
        return sum(size for place, size in found.items() if place not in weights)


def adapted(folder, *, checkpointing=False, precision="bf16"):
    config = complete(
        {"teacher": str(folder), "lora": True, "lora_rank": 4, "mixed_precision": precision, "release_decay": 0.0,
         "gradient_checkpointing": checkpointing, "gamma_conditioning": "noise-level"}
    )  # fmt: skip
    networks = LoraNetworks(load_pipeline(folder), config)
    torch.manual_seed(1)
    for name, parameter in networks.student.named_parameters():
        if ".student." in name:
            parameter.data.normal_(std=0.05)
    return networks.student


def stepped(unet):
    """Output and gradients of a forward and backward pass in mixed precision, and what was kept between them."""
    torch.manual_seed(0)
    x, prompt = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 32)
    unet.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), Kept() as kept:
        output = unet(x, torch.tensor([5, 700]), prompt).sample
        output.float().square().mean().backward()
    return output, [one.grad.clone() for one in unet.parameters() if one.grad is not None], kept


@pytest.mark.parametrize("kind", ["group", "layer"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_norms_of_16_bits_are_computed_in_fp32_and_keep_16_bits(kind, weights):
    torch.manual_seed(0)
    norm = (nn.GroupNorm(8, 32) if kind == "group" else nn.LayerNorm(32)).to(weights)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    x = (3 * torch.randn(2, 32, 32, 32) + 5).bfloat16()
    exact, plain = copy.deepcopy(norm).double(), x.double().requires_grad_()
    expected = exact(plain)
    slope = torch.randn_like(x)
    expected.backward(slope.double())
    keep_less(wrapped := nn.ModuleList([norm]), False)
    x.requires_grad_()
    with Kept() as kept:
        output = wrapped[0](x)
    assert output.dtype == torch.bfloat16
    assert kept.bytes(but=norm.parameters()) < 1.2 * x.nbytes  # means and deviations beside it
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-5)  # one rounding
    output.backward(slope)
    torch.testing.assert_close(x.grad.double(), plain.grad, rtol=2**-7, atol=1e-3)
    for own, true in zip(norm.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), true.grad, rtol=2**-7, atol=1e-2)


def test_norms_of_32_bits_are_torchs_own():
    norm, x = nn.GroupNorm(8, 32), torch.randn(2, 32, 8, 8)
    expected = norm(x)
    keep_less(wrapped := nn.ModuleList([norm]), False)
    assert torch.equal(wrapped[0](x), expected)


def test_adapters_copy_no_input_and_compute_the_same_bits(tiny_pipeline):
    unet = adapted(tiny_pipeline)
    output, gradients, kept = stepped(unet)
    layers = [module for module in unet.modules() if hasattr(module, "cast_input_dtype_enabled")]
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    before, gradients_before, kept_before = stepped(unet)
    assert torch.equal(output, before) and all(map(torch.equal, gradients, gradients_before))
    assert kept.bytes() < 0.9 * kept_before.bytes()


def test_mixed_precision_keeps_no_large_fp32_activation(tiny_pipeline):
    unet = adapted(tiny_pipeline)
    _, _, kept = stepped(unet)
    weights = {one.untyped_storage().data_ptr() for one in unet.parameters()}
    large = [
        tuple(one.shape)
        for one in kept.tensors
        if one.dtype == torch.float32 and one.numel() >= 2 * 32 * 64 and one.untyped_storage().data_ptr() not in weights
    ]
    assert not large


def test_a_transformer_of_one_block_keeps_its_input_alone(tiny_pipeline):
    plain, checkpointed = (
        adapted(tiny_pipeline, precision="no"),
        adapted(tiny_pipeline, precision="no", checkpointing=True),
    )
    transformer = next(one for one in checkpointed.modules() if isinstance(one, Transformer2DModel))
    x, prompt = torch.randn(2, 32, 8, 8, requires_grad=True), torch.randn(2, 77, 32)
    with Kept() as kept:
        transformer(x, prompt)
    assert kept.bytes(but=transformer.parameters()) == x.nbytes + prompt.nbytes
    found = []
    for unet in (plain, checkpointed):
        unet.zero_grad()
        output = unet(torch.ones(2, 4, 16, 16), torch.tensor([5, 700]), prompt).sample
        output.square().mean().backward()
        found.append([output, *(one.grad for one in unet.parameters() if one.grad is not None)])
    assert all(map(torch.equal, *found))


def test_adamw_on_a_gpu_is_the_one_that_copies_no_weights():
    with FakeTensorMode():
        weights = [nn.Parameter(torch.ones(3, device="cuda"))]
        fused = build_optimizer("adamw", weights, 1e-3, 0.0)
        saved = build_optimizer("adamw", [nn.Parameter(torch.ones(3))], 1e-3, 0.0)
        assert fused.param_groups[0]["fused"] and not saved.param_groups[0]["fused"]
        saved.state[saved.param_groups[0]["params"][0]] = {
            "step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)
        }  # fmt: skip
        # A run that began on a CPU: a fused step waits for nothing if its count lies with the weights.
        OptimizerState(fused, weights, sharded=False).load_state_dict(saved.state_dict())
        assert fused.param_groups[0]["fused"] and fused.state[weights[0]]["step"].device.type == "cuda"


def test_a_sheet_needs_the_vae_after_the_unet_and_the_text_encoders_where_they_are(tiny_pipeline, monkeypatch):
    """Where parts go, as a machine would see it whose device is another than its main memory."""
    pipeline = load_pipeline(tiny_pipeline)
    seen = []
    monkeypatch.setattr(pipeline.text_encoder, "to", lambda place: seen.append(("text", str(place))))
    monkeypatch.setattr(pipeline.vae, "to", lambda place: seen.append(("vae", str(place))))
    monkeypatch.setattr(report, "generate", lambda *_: (seen.append("unet"), torch.zeros(2, 4, 16, 16))[1])
    decode, one_by_one = pipeline.vae.decode, []
    monkeypatch.setattr(pipeline.vae, "decode", lambda part: (one_by_one.append(part), decode(part))[1])
    config = complete({"teacher": str(tiny_pipeline), "lora": True, "lora_rank": 4, "mixed_precision": "no"})
    networks = LoraNetworks(pipeline, config)
    with torch.autocast("cpu", torch.bfloat16):
        sheets = report.Sheets(config, pipeline, networks)
    assert seen == ["unet", ("vae", "cpu"), ("vae", "cpu")] and len(sheets.teacher) == 2
    assert all(part.dtype == torch.float32 for part in one_by_one)
