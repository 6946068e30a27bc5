"""The way down: the learning rate over a run, a watch over the loss, and how averages of weights follow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
# The loss explodes when the mean of WINDOW steps is EXPLOSION times the least mean of any WINDOW steps before them.
WINDOW, EXPLOSION = 20, 100.0
RELEASE_EVERY = 10  # steps between two updates of the release average, which waits in main memory


def learning_rate_share(scheduler: str, step: int, steps: int, warmup: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`, as a share of the full one."""
    done, warm = step / steps, min(1.0, (step + 1) / max(1, warmup))
    if scheduler == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * done))
    return warm * (1 - done) if scheduler == "linear" else warm


class LossWatch:
    """Says whether a loss is not finite, or explodes against what it was."""

    def __init__(self) -> None:
        self.recent: list[float] = []  # the last WINDOW losses
        self.least: float | None = None  # the least mean of WINDOW losses

    def fault(self, loss: float) -> str | None:
        """What is wrong with the next loss, as a part of a sentence; None if nothing is."""
        self.recent = [*self.recent[-(WINDOW - 1) :], loss]
        mean = sum(self.recent) / WINDOW if len(self.recent) == WINDOW else None
        if not math.isfinite(loss):
            return f"is {loss}"
        if mean is not None and self.least is not None and mean > EXPLOSION * self.least:
            return f"has risen to {mean:.3g} from {self.least:.3g}"
        if mean is not None:
            self.least = mean if self.least is None else min(self.least, mean)
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent, "least": self.least}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent, self.least = list(state["recent"]), state["least"]


@torch.no_grad()
def ema_update(target: Iterable[Tensor], source: Iterable[Tensor], decay: float) -> None:
    """target <- decay*target + (1-decay)*source in place, over parameters in the same order (Algorithm 1, last line).

    Computed in target's dtype. Raises ValueError if one has more parameters than the other.
    """
    for average, parameter in zip(target, source, strict=True):
        average.lerp_(parameter.to(average), 1 - decay)


def release_decay_at(step: int, decay: float) -> float | None:
    """The decay of the release average at a step, None for those between two updates. It starts by forgetting fast.

    Before its first average it is the student, so that a run of a few steps does not hand on the untrained start.
    """
    n, between = divmod(step, RELEASE_EVERY)
    if n and between:
        return None
    return min(decay**RELEASE_EVERY, n / (n + 9))
