"""The embedded text encoder, and what it is taught before and beside the UNet: to read what stands where.

A caption's relation decides which of its things goes to which side. Left to the denoising loss alone a model of this
size drew every object right and placed them by chance, since reading the relation and using it have to be learnt
together before either helps. So the encoder's padding tokens, which have seen the whole caption and which
cross-attention sees, learn to tell for each side of the picture what stands there; a linear head checks it and is
dropped afterwards.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..scenes.shapes import COLOURS, DIRECTIONS, SHAPES, SIZES, Caption, draw_caption
from .loop import train

WIDTH = 64
END = 49407  # CLIP's end token, which pads as well
SIDES = (None, *DIRECTIONS)  # of a single thing, and of the picture's four sides
OPPOSITE = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
NAMES = (list(SIZES), list(COLOURS), list(SHAPES))


def build_text_encoder(width: int = WIDTH) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=49406,
            eos_token_id=END,
            pad_token_id=1,
        )
    )


def layout(caption: Caption) -> list[list[int]]:
    """[side][size, colour, shape]: 0 for nothing there, else 1 + the index of the name."""
    sides = [[0, 0, 0] for _ in SIDES]
    where = [caption.relation, OPPOSITE.get(caption.relation)]
    for thing, side in zip(caption.things, where, strict=False):
        values = (thing.size, thing.colour, thing.shape)
        sides[SIDES.index(side)] = [1 + names.index(value) for names, value in zip(NAMES, values, strict=True)]
    return sides


class LayoutHead(nn.Module):
    """What a token says of every side, linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, len(SIDES) * sum(1 + len(names) for names in NAMES))

    def forward(self, hidden: Tensor, tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy over the end and padding tokens, and the share of captions that they read without a fault.

        hidden: [B, 77, WIDTH]; tokens: [B, 77]; target: [B, sides, 3], see `layout`.
        """
        padding = tokens == END
        logits = self.linear(hidden.float()).unflatten(-1, (len(SIDES), -1))
        losses, right = [], torch.ones_like(padding)
        for index, part in enumerate(logits.split([1 + len(names) for names in NAMES], dim=-1)):
            wanted = target[:, None, :, index].expand(part.shape[:-1])
            losses.append(nn.functional.cross_entropy(part[padding].flatten(0, 1), wanted[padding].flatten()))
            right &= (part.argmax(-1) == wanted).all(-1)
        return torch.stack(losses).mean(), (right & padding).sum() / padding.sum()


def pretrain(modules: nn.ModuleDict, tokenizer: CLIPTokenizer, steps: int, checkpoint: Path, seed: int) -> None:
    """Train "text_encoder" and "layout" of `modules` on captions alone."""

    def data_from(first: int):
        for step in range(first, steps):
            rng = np.random.default_rng([seed, step])
            captions = [draw_caption(rng) for _ in range(64)]
            tokens = tokenizer([str(one) for one in captions], padding="max_length", max_length=77, return_tensors="pt")
            yield tokens.input_ids, torch.tensor([layout(one) for one in captions])

    def loss_at(step: int, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, target = batch
        loss, right = pair["layout"](pair["text_encoder"](tokens).last_hidden_state, tokens, target)
        if (step + 1) % 250 == 0:
            print(f"captions read without a fault: {right.item():.3f}", flush=True)
        return loss

    pair = nn.ModuleDict({name: modules[name] for name in ("text_encoder", "layout")})
    ema = copy.deepcopy(pair)
    for _ in train(pair, loss_at, data_from, checkpoint, steps, 2e-3, ema=ema, ema_decay=0.99):
        pass
    pair.load_state_dict(ema.state_dict())
