"""Training samples: latents and captions by sample index, and the random numbers that go with an index."""

from __future__ import annotations

import torch
from torch import Tensor

from .embedded.loop import to_tensor
from .embedded.scenes import scene
from .pipeline import Pipeline

CHUNK = 32


class SceneLatents:
    """A pool of procedural scenes as latents of unit scale, encoded when they are first asked for.

    Scenes are encoded in fixed chunks, so that their latents do not depend on who asks first.
    """

    def __init__(self, pipeline: Pipeline, size: int, seed: int) -> None:
        self.pipeline, self.size, self.seed = pipeline, size, seed
        self._chunks: dict[int, tuple[Tensor, list[str]]] = {}

    def batch(self, indices: range) -> tuple[Tensor, list[str]]:
        """Latents [B, 4, h, w] on the pipeline's device, and B captions; sample i is scene i modulo the pool."""
        latents, captions = [], []
        for index in indices:
            chunk, position = divmod(index % self.size, CHUNK)
            if chunk not in self._chunks:
                self._chunks[chunk] = self._encode(chunk)
            latents.append(self._chunks[chunk][0][position])
            captions.append(self._chunks[chunk][1][position])
        return torch.stack(latents).to(self.pipeline.device), captions

    @torch.no_grad()
    def _encode(self, chunk: int) -> tuple[Tensor, list[str]]:
        scenes = [scene(self.seed, index) for index in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
        images = torch.stack([to_tensor(image) for image, _, _ in scenes]).to(self.pipeline.device)
        encoded = self.pipeline.vae.encode(images).latent_dist.mean * self.pipeline.vae.config.scaling_factor
        return encoded.cpu(), [str(caption) for _, caption, _ in scenes]


def draws(seed: int, indices: range, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Noise [B, *shape], and two uniforms [B] in [0, 1) for timestep and gamma.

    Sample i's numbers are a function of (seed, i) alone: the same whatever the batch size, the number of processes or
    the step at which a run was resumed.
    """
    noise, uniforms = [], []
    for index in indices:
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index) % 2**63)
        noise.append(torch.randn(shape, generator=generator))
        uniforms.append(torch.rand(2, generator=generator))
    u_t, u_gamma = torch.stack(uniforms).unbind(1)
    return torch.stack(noise), u_t, u_gamma
