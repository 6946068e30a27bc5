"""`splam_core`'s normalised attention guidance in the host's UNet: the negative prompt at guidance 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from modules import prompt_parser, shared
from torch import Tensor

from splam_core.nag import Nag, normalized_attention

from . import hosts

UNLIKE = (
    "SPLAM: the negative prompts of this batch differ, and prompts are joined by AND: normalised attention guidance "
    "cannot tell which belongs to which. Set the batch size to 1."
)

IN_PARTS = (
    "SPLAM: another extension evaluates cross-attention in parts, as Regional Prompter does in its mode Attention; "
    "normalised attention guidance cannot tell the parts apart. Take the tick from the negative prompt at guidance 1 "
    "in the section SPLAM, or turn that extension off."
)


class Negative:
    """The negative prompt of the evaluation that is being made; `step` says which one that is."""

    def __init__(self, schedules: Any, step: Callable[[], int]) -> None:
        self.schedules, self.step = schedules, step

    def rows(self, like: Tensor) -> Tensor:
        """[len(like), tokens, C] on the device and in the dtype of the positive prompt's rows `like`.

        Raises ValueError where a batch's negative prompts differ and its rows are not one for each picture.
        """
        found: Any = prompt_parser.reconstruct_cond_batch(self.schedules, self.step())
        embedded: Tensor = found["crossattn"] if isinstance(found, dict) else found  # a dict with SDXL
        rows = hosts.without_mark(embedded).to(like)
        if all(torch.equal(row, rows[0]) for row in rows[1:]):
            return rows[:1].expand(len(like), -1, -1)
        if len(like) != len(rows):
            raise ValueError(UNLIKE)
        return rows


@contextmanager
def guided(nag: Nag, negative: Negative) -> Iterator[None]:
    """While sampling: cross-attention is led away from the negative prompt; afterwards all is as it was.

    Rows with the negative prompt itself stay as they are, since there z+ and z- are one.
    """
    with ExitStack() as stack:
        if hosts.has_patcher():
            stack.enter_context(hosts.attention_replaced(lambda *block: _Replacement(nag, negative, *block)))
        else:
            for name, module in shared.sd_model.model.diffusion_model.named_modules():
                if name.endswith("attn2") and hasattr(module, "to_out"):
                    stack.enter_context(_hooked(module, nag, negative))
        yield


class _Replacement:
    """Forge and reForge: what is put in the place of a block's cross-attention, around another replacement's if any."""

    def __init__(self, nag: Nag, negative: Negative, attn2: Any, inner: hosts.Attention | None) -> None:
        self.nag, self.negative, self.attn2, self.inner = nag, negative, attn2, inner

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        context = self.negative.rows(q)
        keys, values = self.attn2.to_k(context), self.attn2.to_v(context)
        return normalized_attention(self._attend(q, k, v, options), self._attend(q, keys, values, options), self.nag)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        if self.inner is not None:
            return self.inner(q, k, v, options)
        precision = {"attn_precision": options["attn_precision"]} if "attn_precision" in options else {}
        z: Tensor = hosts.attention_function()(q, k, v, self.attn2.heads, **precision)
        return z


@contextmanager
def _hooked(attn2: Any, nag: Nag, negative: Negative) -> Iterator[None]:
    """Automatic1111: hooks on a CrossAttention, whichever optimisation has replaced its forward.

    The output projection's first layer is where z+ arrives; the module is then run again on the negative prompt, up to
    the same place.
    """
    seen: dict[str, Any] = {}

    def remember(_: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if "negative" not in seen:
            seen["call"] = args, keywords

    def guide(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if "negative" in seen:  # the second run
            seen["negative"] = args[0]
            return None
        if "call" not in seen:
            raise ValueError(IN_PARTS)
        (x, *more), keywords = seen.pop("call")
        positive = keywords.get("context", more[0] if more else None)
        if positive is None:
            return None
        keywords = {**keywords, "context": negative.rows(positive)}
        seen["negative"] = None
        try:
            attn2(x, *more[1:], **keywords)
            z = seen["negative"]
        finally:
            del seen["negative"]
        return (normalized_attention(args[0], z, nag), *args[1:])

    handles = [
        attn2.register_forward_pre_hook(remember, with_kwargs=True),
        attn2.to_out[0].register_forward_pre_hook(guide),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
