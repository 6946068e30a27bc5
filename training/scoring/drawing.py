"""Pictures for scoring, drawn by one process or by several, and the curves, from a request of training/evaluate.py."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from ..models.load import load_pipeline
from ..models.lora import merged, read_lora
from ..models.pipeline import DTYPES, Pipeline, weights_hash
from ..models.sampling import generate, teacher_function, unet_evaluations
from ..models.teachers import EMBEDDED, NAMED
from ..pictures import to_uint8
from ..scenes.emoji import Caption
from .curves import delta_samples, endpoint_squares, student_function, teacher_endpoints
from .embedded_scores import drawn_captions, rendered
from .pictures import PictureFolder, Source, batches_of
from .protocols import protocol_captions
from .request import SCENE_SOURCES, Request, device_of, share_of, size_of
from .variety import OPEN_PROMPTS, TEACHER_STEPS, embedded_judge, spread

TIMINGS = "timings.jsonl"
SEED_STRIDE = 1_000_003  # seeds of two runs do not meet before as many pictures
CURVE_SEED = 0xC04E  # of the curves' captions and noise: apart from those of the pictures


@dataclass
class Drawn:
    """What `draw` leaves. Not complete: another process scores."""

    count: int
    evaluations: int  # of the UNet, an image
    pipeline: Pipeline | None
    complete: bool = True
    folder: PictureFolder | None = None
    pictures: Tensor | None = None  # uint8 [count, 3, H, W], without a folder
    seconds: list[float] = field(default_factory=list)  # an image, of each batch

    @property
    def seconds_per_image(self) -> float | None:
        """Median over batches: wall-clock time of text encoding, sampling and decoding; noisy on a shared machine."""
        return median(self.seconds) if self.seconds else None

    def read(self) -> Tensor:
        return self.pictures if self.folder is None else self.folder.read(self.count)

    def files(self) -> list[Path]:
        return [self.folder.path(index) for index in range(self.count)]


def draw(request: Request, captions: Sequence) -> Drawn:
    """A picture for each caption: in memory, or in request.output_dir, where what is there already stays.

    Of several processes (--shard, or RANK and WORLD_SIZE as accelerate and torchrun set them) each draws its share;
    rank 0 then waits for the others. Raises ValueError for several processes without a folder.
    """
    shard, shards = share_of(request)
    if shards > 1 and request.output_dir is None:
        raise ValueError("several processes need --output-dir, where their pictures meet")
    pipeline = None if request.model == "renders" else load_model(request)
    source = _Timed(source_of(request, pipeline, captions))
    batches = batches_of(len(captions), request.batch_size, shard, shards)
    evaluations = 0 if request.model in SCENE_SOURCES else unet_evaluations(request.steps, request.guidance_scale)
    drawn = Drawn(len(captions), evaluations, pipeline)
    with tqdm(total=sum(map(len, batches)), desc="pictures", disable=None) as bar:
        if request.output_dir is None:
            drawn.pictures = torch.cat([source(batch, bar) for batch in batches])
            drawn.seconds = source.warm
            return drawn
        drawn.folder = PictureFolder(request.output_dir, settings(request, pipeline))
        timings = request.output_dir / TIMINGS
        try:
            drawn.folder.fill(source, batches, bar.update)
        finally:
            with open(timings, "a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(one) + "\n" for one in source.warm)
    if request.shard or shard:
        drawn.complete = False
        return drawn
    drawn.folder.wait(len(captions))
    drawn.seconds = [json.loads(line) for line in timings.read_text(encoding="utf-8").splitlines()]
    return drawn


class _Timed:
    """A source with the seconds an image that its calls took."""

    def __init__(self, source: Source) -> None:
        self.source, self.seconds = source, []

    def __call__(self, batch: range, bar: tqdm | None = None) -> Tensor:
        since = time.perf_counter()
        pictures = self.source(batch)
        self.seconds.append((time.perf_counter() - since) / len(batch))
        if bar is not None:
            bar.update(len(batch))
        return pictures

    @property
    def warm(self) -> list[float]:
        """Without a process's first batch, which warms up, where there are others."""
        return self.seconds[1:] or self.seconds


def load_model(request: Request) -> Pipeline:
    """The pipeline of a request, with its LoRA merged and a cond_proj folded at gamma = 1."""
    model = EMBEDDED if request.model in SCENE_SOURCES else request.model
    embedded = request.gamma_embedding
    if embedded not in ("splam", "zero"):
        try:
            embedded = float(embedded)
        except ValueError:
            raise ValueError(f"--gamma-embedding is splam, zero or a guidance_scale, got {embedded!r}") from None
    dtype = DTYPES[request.dtype]
    pipeline = load_pipeline(model, device_of(request), dtype, embedded=embedded, clip_skip=request.clip_skip)
    if request.lora:
        lora, unet = read_lora(request.lora), pipeline.unet
        unet.load_state_dict(merged(unet.state_dict(), lora, request.lora_scale, str(request.lora)))
    return pipeline


def source_of(request: Request, pipeline: Pipeline | None, captions: Sequence) -> Source:
    """Pictures by index: of the model, or, of the embedded protocol's ceilings, scenes."""

    def scenes(batch: range) -> Tensor:
        return rendered(captions[batch.start : batch.stop], request.seed, batch.start)

    def renders(batch: range) -> Tensor:
        return to_uint8(scenes(batch))

    def reconstructions(batch: range) -> Tensor:
        return to_uint8(pipeline.decode(pipeline.latents(scenes(batch))))

    def model(batch: range) -> Tensor:
        prompts = [str(caption) for caption in captions[batch.start : batch.stop]]
        seeds = [request.seed * SEED_STRIDE + index for index in batch]
        settings = (request.sampler, request.steps, request.guidance_scale, len(prompts), size_of(request))
        return to_uint8(pipeline.decode(generate(pipeline, prompts, seeds, *settings)))

    return {"renders": renders, "reconstructions": reconstructions}.get(request.model, model)


def settings(request: Request, pipeline: Pipeline | None) -> dict:
    """All that a picture depends on, besides its index."""
    names = ("protocol", "seed", "sampler", "steps", "guidance_scale", "dtype")
    prompts, weights = request.prompts, None
    if pipeline:
        weights = weights_hash(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    return {name: getattr(request, name) for name in names} | {
        "image_size": size_of(request),
        "captions": hashlib.sha256(prompts.read_bytes()).hexdigest()[:16] if prompts else "drawn",
        "weights": weights,
        "source": request.model if request.model in SCENE_SOURCES else "model",
    }


def measure_curves(request: Request, pipeline: Pipeline) -> dict:
    """endpoint_error and delta of the pipeline over timesteps, on request.curves samples.

    Their latents are encoded scenes in the embedded protocol, elsewhere pictures that the teacher draws of the
    captions (DDIM, 50 steps).
    """
    teacher, w = (
        load_pipeline(request.teacher, device_of(request), DTYPES[request.dtype], clip_skip=request.clip_skip),
        request.teacher_guidance_scale,
    )
    captions = curve_captions(request)
    size, schedule = size_of(request), teacher.schedule
    squares: dict[int, list[Tensor]] = {}
    distances: dict[int, list[Tensor]] = {}
    for batch in tqdm(batches_of(len(captions), request.batch_size), desc="curves", disable=None):
        some = captions[batch.start : batch.stop]
        prompts, seeds = [str(one) for one in some], [CURVE_SEED * SEED_STRIDE + index for index in batch]
        if request.protocol == "embedded":
            latents = teacher.latents(rendered(some, CURVE_SEED, batch.start)).float()
        else:
            latents = generate(teacher, prompts, seeds, "ddim", 50, w, len(prompts), size).to(teacher.device)
        # Other seeds than the pictures': a latent is not noised with the noise that it was drawn from.
        generators = [torch.Generator().manual_seed(seed + SEED_STRIDE) for seed in seeds]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in generators]).to(latents)
        with torch.no_grad():
            guide = teacher_function(teacher, teacher.encode(prompts, size), teacher.unconditional(size), w)
            own = pipeline.encode(prompts, size), pipeline.unconditional(size), request.guidance_scale
            student = student_function(pipeline, *own)
            ends = teacher_endpoints(guide, latents, noise, schedule)
            for results, found in (
                (squares, endpoint_squares(student, ends)),
                (distances, delta_samples(student, latents, noise, schedule)),
            ):
                for t, values in found.items():
                    results.setdefault(t, []).append(values.cpu())
    return {
        "endpoint_error": {str(t): torch.cat(parts).mean().sqrt().item() for t, parts in squares.items()},
        "delta": {str(t): torch.cat(parts).mean().item() for t, parts in distances.items()},
        "curve_images": len(captions),
        "teacher": request.teacher,
        "teacher_guidance_scale": w,
    }


def measure_variety(request: Request, pipeline: Pipeline) -> dict:
    """`spread` of the pipeline over request.variety seeds, and, under "_teacher", that of the teacher (DDIM).

    The embedded protocol has its own prompts, and the judge's features; another one's are its first captions, and its
    teacher is the one that was named.
    """
    embedded = request.protocol == "embedded"
    prompts = OPEN_PROMPTS if embedded else protocol_captions(request.protocol, request.prompts, len(OPEN_PROMPTS))
    judge, size = embedded_judge() if embedded else None, size_of(request)
    seeds = [request.seed * SEED_STRIDE + index for index in range(request.variety)]

    def spread_of(model: Pipeline, sampler: str, steps: int, w: float) -> dict[str, float]:
        def pictures(prompts: list[str], seeds: list[int]) -> Tensor:
            return model.decode(generate(model, prompts, seeds, sampler, steps, w, request.batch_size, size))

        return spread(pictures, tqdm(prompts, desc="variety", disable=None), seeds, judge)

    found = spread_of(pipeline, request.sampler, request.steps, request.guidance_scale)
    found["variety_seeds"] = request.variety
    if embedded or request.teacher not in NAMED:
        teacher = load_pipeline(request.teacher, device_of(request), DTYPES[request.dtype], clip_skip=request.clip_skip)
        theirs = spread_of(teacher, "ddim", TEACHER_STEPS, request.teacher_guidance_scale)
        found |= {f"{name}_teacher": value for name, value in theirs.items()}
        found |= {"teacher": request.teacher, "teacher_guidance_scale": request.teacher_guidance_scale}
    return found


def curve_captions(request: Request) -> list[str] | list[Caption]:
    if request.protocol == "embedded":
        return drawn_captions(CURVE_SEED + request.seed, request.curves)
    return protocol_captions(request.protocol, request.prompts, request.curves)
