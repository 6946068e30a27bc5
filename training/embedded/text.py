"""The text encoder of emoji scenes, which learns to read what stands where before the UNet learns to draw it.

    python -m training.embedded.text --run-dir runs/emoji

A caption's relation decides which of its things goes to which side. Left to the denoising loss alone, a model of this
size draws every thing right and places them by chance: reading the relation and using it have to be learnt together
before either helps. So the encoder learns first that its padding tokens, which have seen the whole caption and which
cross-attention sees, tell for each side of the picture what stands there; a linear head checks it and is dropped.
What a caption says is here
one thing for each side of the picture, and the background's colour; of a person sex, trade and skin one by one, so that
those combinations can be read that are kept out of training. With all the things from the first step on, which
of two stands on which side was still a guess after 1,500 steps; of a few it is learnt in 400 steps, and then of all.
It needs no pictures and no autoencoder, resumes from its checkpoint, and ends in RUN_DIR/text_encoder.
"""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..models.teachers import EMBEDDED
from ..scenes.emoji import BACKGROUNDS, DIRECTIONS, VOCABULARY, Caption, draw_caption
from .loop import half_precision, train

WIDTH = 96
END = 49407  # CLIP's end token, which pads as well
SIDES = (None, *DIRECTIONS)  # of a single thing, and of the picture's four sides
OPPOSITE = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
PERSON = re.compile(r"a (?P<sex>woman|man) (?P<trade>.+) with (?P<skin>\w+) skin")


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


def parts_of(thing: str) -> tuple[str, str | None, str | None]:
    """What it is, and of a person sex and skin: a trade is what a person is."""
    person = PERSON.fullmatch(thing)
    return (person["trade"], person["sex"], person["skin"]) if person else (thing, None, None)


NAMES = tuple(
    list(dict.fromkeys(part for part in parts if part)) for parts in zip(*map(parts_of, VOCABULARY), strict=True)
)
GROUPS = (*(tuple(1 + len(names) for names in NAMES) * len(SIDES)), 1 + len(BACKGROUNDS))
READ_EVERY = 8  # padding tokens that are asked: all of them have seen the caption
FEW, FEW_STEPS = 8, 400  # things in the captions of the first steps
SHORT = 40  # tokens in three of four steps: the longest caption's and some padding


def layout(caption: Caption) -> list[int]:
    """For each side the parts of the thing there, and last the background: 0 for none, else 1 + its index."""
    sides = [[0] * len(NAMES) for _ in SIDES]
    for thing, side in zip(caption.things, (caption.relation, OPPOSITE.get(caption.relation)), strict=False):
        parts = zip(NAMES, parts_of(thing), strict=True)
        sides[SIDES.index(side)] = [1 + names.index(part) if part else 0 for names, part in parts]
    stands = [number for side in sides for number in side]
    return [*stands, 1 + list(BACKGROUNDS).index(caption.background) if caption.background else 0]


class LayoutHead(nn.Module):
    """What a token says of every side and of the background, linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, sum(GROUPS))

    def forward(self, hidden: Tensor, tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy over every READ_EVERY-th end and padding token, and the share that reads without a fault.

        hidden: [B, 77, WIDTH]; tokens: [B, 77]; target: [B, len(GROUPS)], see `layout`.
        """
        last = slice((tokens.shape[1] - 1) % READ_EVERY, None, READ_EVERY)  # up to the last token
        hidden, asked = hidden[:, last].float(), tokens[:, last] == END
        losses, right = [], torch.ones_like(asked)
        for index, logits in enumerate(self.linear(hidden[asked]).split(GROUPS, dim=-1)):
            wanted = target[:, None, index].expand(asked.shape)
            losses.append(nn.functional.cross_entropy(logits, wanted[asked]))
            right[asked] &= logits.argmax(-1) == wanted[asked]
        return torch.stack(losses).mean(), (right & asked).sum() / asked.sum()


def tokenize(tokenizer: CLIPTokenizer, captions: list[Caption], length: int = 77) -> Tensor:
    texts = [str(caption) for caption in captions]
    return tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids


def drawn(seed: int, step: int, steps: int) -> list[Caption]:
    """64 captions, three quarters of them pairs; pairs of FEW things in the first FEW_STEPS of `steps`."""
    rng = np.random.default_rng([seed, step])
    few = step < min(FEW_STEPS, steps)
    things = VOCABULARY[:: len(VOCABULARY) // FEW] if few else VOCABULARY
    return [draw_caption(rng, 1 + (few or number % 4 > 0), things=things) for number in range(64)]


@torch.no_grad()
def read_right(pair: nn.ModuleDict, tokenizer: CLIPTokenizer, captions: list[Caption]) -> float:
    """The share of tokens asked that read their caption without a fault."""
    tokens = tokenize(tokenizer, captions)
    hidden = pair["text_encoder"](tokens).last_hidden_state
    return pair["layout"](hidden, tokens, torch.tensor([layout(one) for one in captions]))[1].item()


def forget_unread(pair: nn.ModuleDict, tokenizer: CLIPTokenizer) -> None:
    """Zero the embeddings of tokens that no caption has: they are still what they began as, noise."""
    words = [*VOCABULARY, *BACKGROUNDS, *DIRECTIONS, "a on a background"]
    table = pair["text_encoder"].get_input_embeddings().weight.data
    unread = torch.ones(len(table), dtype=torch.bool)
    unread[tokenizer(words, padding=True, return_tensors="pt").input_ids] = False
    table[unread] = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--steps", type=int, default=4000, help="of 64 captions")
    parser.add_argument("--seed", type=int, default=202)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")  # CLIP's own, which is not trained
    pair = nn.ModuleDict({"text_encoder": build_text_encoder(WIDTH), "layout": LayoutHead()})

    def data_from(first: int):
        for step in range(first, args.steps):
            captions = drawn(args.seed, step, args.steps)
            tokens = tokenize(tokenizer, captions, SHORT if step % 4 else 77)
            yield tokens, torch.tensor([layout(one) for one in captions])

    def loss_at(_: int, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, target = batch
        with half_precision():
            hidden = pair["text_encoder"](tokens).last_hidden_state
        return pair["layout"](hidden, tokens, target)[0]

    ema = copy.deepcopy(pair).eval()
    for step in train(pair, loss_at, data_from, args.run_dir / "text.pt", args.steps, 1e-3, ema=ema, ema_decay=0.99):
        for kind, options in {
            "one thing": {"objects": 1},
            "pairs": {"objects": 2},
            "held-out pairs": {"objects": 2, "held_out": True},
        }.items():
            rng = np.random.default_rng([args.seed + 1, step])
            captions = [draw_caption(rng, **options) for _ in range(256)]
            print(f"read without a fault, {kind}: {read_right(ema, tokenizer, captions):.3f}", flush=True)
    forget_unread(ema, tokenizer)
    ema["text_encoder"].save_pretrained(args.run_dir / "text_encoder")


if __name__ == "__main__":
    main()
