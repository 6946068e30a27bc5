"""The text encoder of emoji scenes, which learns to read what stands where before the UNet learns to draw it.

Why, the shapes' `text.py` says: left to the denoising loss alone, relations are not learnt. What a caption says is here
one thing for each side of the picture, and the background's colour. With all the things from the first step on, which
of two stands on which side was still a guess after 1,500 steps; of a few it is learnt in 400 steps, and then of all.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ...scenes.emoji import BACKGROUNDS, DIRECTIONS, VOCABULARY, Caption, draw_caption
from ..loop import train
from ..text import END, OPPOSITE

WIDTH = 96
SIDES = (None, *DIRECTIONS)  # of a single thing, and of the picture's four sides
GROUPS = (*((1 + len(VOCABULARY),) * len(SIDES)), 1 + len(BACKGROUNDS))
READ_EVERY = 8  # padding tokens that are asked: all of them have seen the caption
FEW, FEW_STEPS = 8, 400  # things in the captions of the first steps
SHORT = 40  # tokens in three of four steps: the longest caption's and some padding


def layout(caption: Caption) -> list[int]:
    """For each side the thing there, and last the background: 0 for none, else 1 + its index."""
    sides = [0] * len(SIDES)
    for thing, side in zip(caption.things, (caption.relation, OPPOSITE.get(caption.relation)), strict=False):
        sides[SIDES.index(side)] = 1 + VOCABULARY.index(thing)
    return [*sides, 1 + list(BACKGROUNDS).index(caption.background) if caption.background else 0]


class LayoutHead(nn.Module):
    """What a token says of every side and of the background, linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, sum(GROUPS))

    def forward(self, hidden: Tensor, tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy over every READ_EVERY-th end and padding token, and the share that reads without a fault.

        hidden: [B, 77, WIDTH]; tokens: [B, 77]; target: [B, sides + 1], see `layout`.
        """
        last = slice((tokens.shape[1] - 1) % READ_EVERY, None, READ_EVERY)  # up to the last token
        hidden, asked = hidden[:, last].float(), tokens[:, last] == END
        losses, right = [], torch.ones_like(asked)
        for index, logits in enumerate(self.linear(hidden[asked]).split(GROUPS, dim=-1)):
            wanted = target[:, None, index].expand(asked.shape)
            losses.append(nn.functional.cross_entropy(logits, wanted[asked]))
            right[asked] &= logits.argmax(-1) == wanted[asked]
        return torch.stack(losses).mean(), (right & asked).sum() / asked.sum()


def pretrain(modules: nn.ModuleDict, tokenizer: CLIPTokenizer, steps: int, checkpoint: Path, seed: int) -> None:
    """Train "text_encoder" and "layout" of `modules` on captions alone: pairs of FEW things, then all, mostly pairs."""

    def data_from(first: int):
        for step in range(first, steps):
            rng = np.random.default_rng([seed, step])
            few = step < FEW_STEPS
            things = VOCABULARY[:: len(VOCABULARY) // FEW] if few else VOCABULARY
            captions = [draw_caption(rng, 1 + (few or number % 4 > 0), things=things) for number in range(64)]
            length = SHORT if step % 4 else 77
            texts = [str(one) for one in captions]
            tokens = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
            yield tokens.input_ids, torch.tensor([layout(one) for one in captions])

    def loss_at(step: int, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, target = batch
        with torch.autocast("cpu", torch.bfloat16):
            hidden = pair["text_encoder"](tokens).last_hidden_state
        loss, right = pair["layout"](hidden, tokens, target)
        if (step + 1) % 100 == 0:
            print(f"captions read without a fault: {right.item():.3f}", flush=True)
        return loss

    pair = nn.ModuleDict({name: modules[name] for name in ("text_encoder", "layout")})
    ema = copy.deepcopy(pair)
    for _ in train(pair, loss_at, data_from, checkpoint, steps, 1e-3, ema=ema, ema_decay=0.99):
        pass
    pair.load_state_dict(ema.state_dict())
