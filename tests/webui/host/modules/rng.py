"""The seeded noise of a batch: a generator for every picture, the initial noise optionally turned towards a subseed."""

import torch


def slerp(amount, low, high):
    cosine = (low / low.norm(dim=1, keepdim=True) * high / high.norm(dim=1, keepdim=True)).sum(1)
    angle = torch.acos(cosine)
    weights = (torch.sin((1 - amount) * angle), torch.sin(amount * angle))
    return sum((w / torch.sin(angle)).unsqueeze(1) * part for w, part in zip(weights, (low, high), strict=True))


class ImageRNG:
    def __init__(self, shape, seeds, subseeds=None, subseed_strength=0.0):
        self.shape, self.subseeds, self.subseed_strength = tuple(shape), subseeds, subseed_strength
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.drawn = []
        self.is_first = True

    def next(self):
        noise = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        if self.is_first and self.subseed_strength:
            others = (torch.randn(self.shape, generator=torch.Generator().manual_seed(s)) for s in self.subseeds)
            noise = [slerp(self.subseed_strength, a, b) for a, b in zip(noise, others, strict=True)]
        self.is_first = False
        self.drawn.append(torch.stack(noise))
        return self.drawn[-1]
