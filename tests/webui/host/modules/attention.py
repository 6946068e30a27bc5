"""A network's cross-attention as the hosts have it: Automatic1111's modules, Forge's and reForge's patched blocks."""

from types import SimpleNamespace

import torch

from . import HOST


def attend(q, k, v, heads):
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class CrossAttention(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.heads = layers.to_q, layers.to_k, layers.to_v, layers.heads
        self.to_out = torch.nn.Sequential(*layers.to_out)
        self.runs = 0

    def forward(self, x, context=None, mask=None):
        """One optimisation calls the whole output projection, another its layers by themselves."""
        self.runs += 1
        z = attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        return self.to_out(z) if self.runs % 2 else self.to_out[1](self.to_out[0](z))


class Block(torch.nn.Module):
    """A transformer block of the hosts' as far as its cross-attention, in the place of diffusers' own `attn2`."""

    def __init__(self, layers, number, options):
        super().__init__()
        self.attn2, self.number, self.options = CrossAttention(layers), number, options

    def forward(self, x, encoder_hidden_states=None, **_):
        if HOST == "a1111":
            return self.attn2(x, context=encoder_hidden_states)
        given = self.options().get("transformer_options", {})
        replacements, block = given.get("patches_replace", {}).get("attn2", {}), ("input", self.number)
        key = (*block, 0) if (*block, 0) in replacements else block
        if key not in replacements:
            return self.attn2(x, context=encoder_hidden_states)
        extra = {"block": block, "n_heads": self.attn2.heads}
        if HOST == "reforge":
            extra["attn_precision"] = None
        q, k, v = self.attn2.to_q(x), self.attn2.to_k(encoder_hidden_states), self.attn2.to_v(encoder_hidden_states)
        return self.attn2.to_out(replacements[key](q, k, v, extra))


def rebuilt(unet, options):
    """A diffusers UNet with these blocks for its cross-attention, and the hosts' lists of blocks beside its own.

    options(): the unet patcher's.
    """
    blocks = []
    for owner in list(unet.modules()):
        if hasattr(owner, "attn2") and not isinstance(owner, Block):
            owner.attn2 = Block(owner.attn2, len(blocks), options)
            blocks.append(owner.attn2)
    unet.input_blocks = [[SimpleNamespace(transformer_blocks=[block])] for block in blocks]
    unet.middle_block, unet.output_blocks = [], []
    return unet
