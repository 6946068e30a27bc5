"""What a UNet keeps for its backward pass, made less without a change of what it computes."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers import Transformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def keep_less(unet: UNet2DConditionModel, checkpointing: bool) -> None:
    """In place, after the adapters: norms keep their input's type, adapters copy no input, `checkpointing` is on.

    Weights, their names and the modules' classes as isinstance sees them stay.
    """
    if checkpointing:
        unet.enable_gradient_checkpointing()
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # an fp32 copy, of which autocast makes a 16-bit one again
        elif type(module) is nn.GroupNorm:
            module.__class__ = _GroupNorm
        elif type(module) is nn.LayerNorm:
            module.__class__ = _LayerNorm
        elif checkpointing and type(module) is Transformer2DModel and len(module.transformer_blocks) == 1:
            # Around its one block alone, the norm, both projections and the residual would be kept.
            module.gradient_checkpointing = False
            module.__class__ = _CheckpointedTransformer


class _GroupNorm(nn.GroupNorm):
    """Of 16-bit values in fp32, as under autocast, but with 16-bit values as the result and for the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(input)
        return _GroupNorm16.apply(input, self.weight, self.bias, self.num_groups, self.eps)


class _LayerNorm(nn.LayerNorm):
    """As `_GroupNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(input)
        return _LayerNorm16.apply(input, self.weight, self.bias, self.normalized_shape, self.eps)


class _GroupNorm16(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x = x.contiguous()
        sizes = (len(x), x.shape[1], x[0, 0].numel(), groups)
        y, mean, rstd = torch.native_group_norm(x.float(), weight.float(), bias.float(), *sizes, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.sizes = sizes
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight, mean, rstd = ctx.saved_tensors
        found = torch.ops.aten.native_group_norm_backward(
            gradient.float().contiguous(), x.float(), mean, rstd, weight.float(), *ctx.sizes, ctx.needs_input_grad[:3]
        )
        return (*_typed(found, x, weight), None, None)


class _LayerNorm16(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x.float(), shape, weight.float(), bias.float(), eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape = shape
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        found = torch.ops.aten.native_layer_norm_backward(
            gradient.float(),
            x.float(),
            ctx.shape,
            mean,
            rstd,
            weight.float(),
            bias.float(),
            ctx.needs_input_grad[:3],
        )
        return (*_typed(found, x, weight), None, None)


def _typed(gradients: tuple[Tensor | None, ...], x: Tensor, weight: Tensor) -> list[Tensor | None]:
    """Those of input, weight and bias in the types of what they are gradients of."""
    types = (x.dtype, weight.dtype, weight.dtype)
    return [one if one is None else one.to(dtype) for one, dtype in zip(gradients, types, strict=True)]


class _CheckpointedTransformer(Transformer2DModel):
    """Run again as a whole in the backward pass."""

    def forward(self, *inputs, **arguments):
        if torch.is_grad_enabled():
            return checkpoint(super().forward, *inputs, use_reentrant=False, **arguments)
        return super().forward(*inputs, **arguments)
