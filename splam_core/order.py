"""The order in which samples come: a function of the index alone."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Order:
    """Which sample of which bucket an index stands for.

    A bucket's samples come round and round: first in their own order, then in a new one each time. In an epoch each
    bucket gives as many batches as it has samples for, on average, so that all samples come up equally often, and a
    batch never mixes buckets.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int) -> None:
        self.counts, self.batch_size, self.seed = list(counts), batch_size, seed
        self._epoch: tuple[int, list[tuple[int, int]]] | None = None
        self._rounds: dict[int, tuple[int, Tensor]] = {}

    def place(self, index: int) -> tuple[int, int]:
        """(bucket, sample in it) of the index-th sample of the run."""
        batch, slot = divmod(index, self.batch_size)
        bucket, number = self._batch(batch)
        turn, position = divmod(number * self.batch_size + slot, self.counts[bucket])
        if turn == 0:
            return bucket, position
        if bucket not in self._rounds or self._rounds[bucket][0] != turn:
            generator = _generator(self.seed, "round", bucket, turn)
            self._rounds[bucket] = turn, torch.randperm(self.counts[bucket], generator=generator)
        return bucket, int(self._rounds[bucket][1][position])

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * count // self.batch_size for count in self.counts)

    def _batch(self, batch: int) -> tuple[int, int]:
        """(bucket, number of the batch within it)."""
        if len(self.counts) == 1:
            return 0, batch
        high = 1
        while self._batches_before(high) <= batch:
            high *= 2
        epoch = bisect.bisect_right(range(high + 1), batch, key=self._batches_before) - 1
        if self._epoch is None or self._epoch[0] != epoch:
            firsts = [epoch * count // self.batch_size for count in self.counts]
            lasts = [(epoch + 1) * count // self.batch_size for count in self.counts]
            labels = torch.tensor([b for b, _ in enumerate(firsts) for _ in range(lasts[b] - firsts[b])])
            plan = []
            for bucket in labels[torch.randperm(len(labels), generator=_generator(self.seed, "epoch", epoch))].tolist():
                plan.append((bucket, firsts[bucket]))
                firsts[bucket] += 1
            self._epoch = epoch, plan
        return self._epoch[1][batch - self._batches_before(epoch)]


def held_out(total: int, largest: int, most: int) -> int:
    """How many of `total` samples are held out: about a twentieth, `most` at most, of the largest bucket."""
    return min(most, max(math.ceil(total / 20), min(4, total // 4)), largest - 1)


def digest(*parts: object) -> str:
    """16 hexadecimal digits of a SHA-256 of the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(int(digest(*key), 16) % 2**63)
