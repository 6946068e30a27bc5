"""What a run trains on: prompts or a prepared set, and the teacher's own pictures where there are no latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...splam_core.order import Order, held_out
from ...splam_core.solver import draw_latents
from .host import HostUNet, Told

GROUP = 8  # pictures that the teacher draws at once, always the same ones together
PROMPT_STEPS, PROMPT_GUIDANCE = 10, 7.5  # of such a picture, as training/distill.py draws them
HELD_OUT = 64  # samples kept for the endpoint error, about a twentieth of all at most


class Samples:
    """Latents, of the UNet's scale, with what the UNet is told, by the index that counts over the run.

    tell: number -> what the UNet is told of that sample; latents: by number, or None for those that the teacher draws,
    each when it is first asked for. The order is that of training/distill.py on a list of as many prompts.
    """

    def __init__(
        self,
        host: HostUNet,
        count: int,
        tell: Callable[[int], Told],
        nothing: Told,
        shape: tuple[int, int, int],
        latents: Sequence[torch.Tensor] | None,
        batch_size: int,
        seed: int,
    ):
        self.host, self.tell, self.nothing, self.shape = host, tell, nothing, shape
        self.drawn: dict[int, torch.Tensor] = {}
        self.given, self.told = latents, dict[int, Told]()
        sizes: dict[tuple[int, ...], list[int]] = {}
        for number in range(count):
            sizes.setdefault(tuple(latents[number].shape) if latents else shape, []).append(number)
        largest = max(sizes, key=lambda size: (len(sizes[size]), size))
        kept = len(sizes[largest]) - held_out(count, len(sizes[largest]), HELD_OUT)
        self.held = sizes[largest][kept:] or sizes[largest][-1:]
        self.buckets = [
            *(ids for size, ids in sorted(sizes.items()) if size != largest), sizes[largest][:kept]
        ]  # fmt: skip
        self.count = count
        # The order of training/distill.py, whose data have the run's seed and one more.
        self.order = Order([len(ids) for ids in self.buckets], batch_size, seed + 1)

    def identity(self) -> list[float]:
        """Tells prepared sets apart."""
        told = [float(one.cond.double().sum()) for one in self.of(0).values()]
        return told + [float(one.double().sum()) for one in self.given or []]

    def numbers(self, indices: range) -> list[int]:
        return [self.buckets[bucket][position] for bucket, position in map(self.order.place, indices)]

    def used(self, samples: int) -> list[int]:
        """The numbers that the first so many samples of a run have, and the held-out ones."""
        found = dict.fromkeys(self.held)
        for index in range(samples):
            if len(found) == self.count:
                break
            found |= dict.fromkeys(self.numbers(range(index, index + 1)))
        return list(found)

    def group(self, group: int) -> range:
        return range(group * GROUP, min(self.count, (group + 1) * GROUP))

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Groups of pictures that are still to be drawn for these samples."""
        if self.given is not None:
            return []
        return sorted({number // GROUP for number in numbers if number not in self.drawn})

    def draw(self, group: int) -> None:
        """Has the teacher draw a group of pictures; their noise is a function of their number alone."""
        numbers = self.group(group)
        told = [self.of(number) for number in numbers]
        noise = torch.stack([_noise(number, self.shape) for number in numbers]).to(self.host.device)
        teacher = self.host.guided_epsilon(told, self.nothing, PROMPT_GUIDANCE)
        with torch.no_grad():
            made = draw_latents(teacher, noise, self.host.schedule, PROMPT_STEPS)
        # Half precision, as the trainer keeps them.
        self.drawn.update(zip(numbers, made.half().cpu(), strict=True))

    def of(self, number: int) -> Told:
        if number not in self.told:
            self.told[number] = self.tell(number)
        return self.told[number]

    def told_of(self, numbers: Sequence[int]) -> list[Told]:
        """What the UNet is told of these samples."""
        return [self.of(number) for number in numbers]

    def size(self, number: int) -> tuple[int, ...]:
        """(C, h, w) of a sample."""
        return self.shape if self.given is None else tuple(self.given[number].shape)

    def latents(self, numbers: Sequence[int]) -> torch.Tensor:
        """[B, C, h, w], fp32; those to be drawn must have been."""
        source = self.drawn if self.given is None else self.given
        return torch.stack([source[number] for number in numbers]).float().to(self.host.device)


def _noise(number: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number + 1))  # the trainer counts from 1
