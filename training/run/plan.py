"""What a run will take, before it starts: memory, UNet evaluations, steps and pictures.

The run's own networks take its own step on torch's meta device, which has shapes and no values, while the bytes of
living storages are counted: neither memory nor weights nor a GPU are needed. Shapes come from the teacher's own
files or, where it is not on this machine, from the published ones.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from splam_core import NoiseSchedule

from ..data.latents import GROUP
from ..models.architectures import ARCHITECTURES, Architecture
from ..models.files import read_model
from ..models.lora import named_with_weight
from ..models.pipeline import DTYPES, Conditioning, Pipeline
from ..models.sampling import guided_output
from ..models.teachers import TEACHERS, resolve
from .adapters import LoraNetworks
from .config import Config
from .consistency import first_stage
from .counting import GPU, Living, rounded
from .finishing import Stage, finish_of
from .networks import base_dtype
from .optimizers import state_bytes
from .whole import FullNetworks

GB = 1e9
CARDS = (8, 12, 16, 24, 48, 80)  # GB
# CUDA's context and what its allocator cannot use.
RESERVED, FRAGMENTED = 0.5 * GB, 1.05
BATCHES = (1, 4, 16)  # that a step is counted at


@dataclass(frozen=True)
class Phase:
    """Peak bytes on the device, by batch size; one entry for what does not depend on it."""

    counted: dict[int, float]

    def bytes(self, batch_size: int) -> float:
        """On the lines through what was counted, beyond it on the last."""
        sizes = sorted(self.counted)
        if len(sizes) == 1:
            return self.counted[sizes[0]]
        over = next((place for place, size in enumerate(sizes[1:-1], 1) if batch_size <= size), len(sizes) - 1)
        (low, less), (high, more) = ((size, self.counted[size]) for size in sizes[over - 1 : over + 1])
        return less + (batch_size - low) * (more - less) / (high - low)


@dataclass(frozen=True)
class Plan:
    """Bytes on the device, but for `release`, which lies in main memory."""

    unet_parameters: int
    trained_parameters: int
    frozen: float  # UNet as teacher
    trained: float  # student or its adapters, fp32
    target: float
    optimizer: float
    encoders: float  # VAE and text encoders, fp32
    phases: dict[str, Phase]
    release: float
    finish: float = 0.0  # fake network, starting student and the fake one's optimizer

    def disk(self, kept: int) -> float:
        """Checkpoints `kept`, one that is being written, and the best."""
        each = self.trained + self.target + max(self.release, self.finish) + self.optimizer
        return (kept + 1) * each + self.target

    def allocated(self, batch_size: int) -> float:
        """The largest of all phases, as torch.cuda.max_memory_allocated counts it."""
        return max(phase.bytes(batch_size) for phase in self.phases.values())

    def peak(self, batch_size: int) -> float:
        """What a card must have."""
        return self.allocated(batch_size) * FRAGMENTED + RESERVED


def plan(config: Config) -> Plan:
    """Count a run. Raises ValueError for a teacher that is neither here nor a preset."""
    architecture, resolution = shapes(config)
    # A jump's solver steps follow one another and leave nothing; the release average is not on the device.
    counted = replace(config, skip=config.solver_skip, release_decay=0.0)
    phases = {}
    with Living() as living, torch.device("meta"):
        pipeline = _pipeline(architecture, base_dtype(config) if config.lora else torch.float32)
        parameters = sum(one.numel() for one in pipeline.unet.parameters())
        vae, texts = _bytes(pipeline.vae), _bytes(pipeline.text_encoder, pipeline.text_encoder_2)
        if config.paths is None:
            phases["data"] = Phase({1: living.peak_of(lambda: _make_data(config, pipeline, resolution))})
        networks = LoraNetworks(pipeline, counted) if config.lora else FullNetworks(pipeline, counted)
        trained = sum(one.numel() for one in networks.trainable())
        optimizer = state_bytes(config.optimizer) * trained
        resident = living.bytes - vae - texts + optimizer
        away = optimizer - vae - texts  # what the count below has too little of, or too much
        if config.paths is not None and config.finish == "none":
            phases["begin"] = Phase({1: float(resident)})
            networks.let_teacher_go(pipeline)
            resident = living.bytes - vae - texts + optimizer
        if config.max_train_steps:
            phases["step"] = _steps(living, counted, pipeline, networks, resolution, away)
        phases["optimizer"] = Phase({1: resident + 4.0 * trained})
        more = learning = 0.0
        if config.finish != "none":
            before = living.bytes
            networks.begin_finish()
            learning = sum(one.numel() for one in networks.trainable("fake"))
            more = living.bytes - before
            if config.lora:  # its adapters are there from the first
                more = 4.0 * learning * len(networks.finishing)
            away += state_bytes(config.optimizer) * learning
            phases["finish"] = _steps(living, counted, pipeline, networks, resolution, away)
            phases["optimizer"] = Phase({1: living.bytes + away + 4.0 * max(trained, learning)})
        phases["sheet"] = Phase({1: living.peak_of(lambda: _draw(pipeline, resolution)) + away + vae})
    frozen = parameters * torch.finfo(base_dtype(config)).bits / 8 * (config.lora or "begin" not in phases)
    return Plan(
        unet_parameters=parameters,
        trained_parameters=trained,
        frozen=frozen,
        trained=4.0 * trained,
        target=resident - optimizer - frozen - 4.0 * trained - (more if config.lora else 0.0),
        optimizer=optimizer,
        encoders=float(vae + texts),
        phases=phases,
        release=4.0 * trained if config.release_decay and config.max_train_steps else 0.0,
        finish=more + state_bytes(config.optimizer) * learning,
    )


def _pipeline(architecture: Architecture, dtype: torch.dtype) -> Pipeline:
    """The teacher as it is loaded, on the meta device; dtype: the UNet's."""
    unet = nn.Module.to(UNet2DConditionModel.from_config(architecture.unet), dtype)
    parts = [unet, AutoencoderKL.from_config(architecture.vae), CLIPTextModel(architecture.clip())]
    second = CLIPTextModelWithProjection(architecture.clip(second=True)) if architecture.text_encoder_2 else None
    for part in (*parts, second):
        if part is not None:
            part.eval().requires_grad_(False)
    scheduler = architecture.scheduler
    # Moved by name: once transformers has loaded a model, torch.linspace may no longer heed the device around it.
    return Pipeline(*parts, None, NoiseSchedule.from_config(scheduler).to("meta"), scheduler, second)


def _make_data(config: Config, pipeline: Pipeline, resolution: int) -> None:
    """Encode pictures or, for prompts, have the teacher draw them: the VAE and the text encoders are there."""
    embedded = config.teacher in ("embedded", "embedded-teacher")
    if config.data.endswith(".txt") if config.data else not embedded:
        x, conditioning = _batch(pipeline, GROUP, resolution)
        with torch.no_grad(), GPU(None):
            guided_output(pipeline, x, torch.empty(GROUP), conditioning, _batch(pipeline, 1, resolution)[1], 2.0)
    else:
        with torch.no_grad(), GPU(None):
            pipeline.vae.encode(torch.empty(1, 3, resolution, resolution))


def _draw(pipeline: Pipeline, resolution: int) -> None:
    """Decode a picture of a sheet: one by one, the UNet's activations having gone."""
    with torch.no_grad(), GPU(None):
        pipeline.vae.decode(_batch(pipeline, 1, resolution)[0])


def _batch(pipeline: Pipeline, size: int, resolution: int) -> tuple[Tensor, Conditioning]:
    """Latents and conditioning of so many samples."""
    side, width = resolution // pipeline.vae_scale, pipeline.unet.config.cross_attention_dim
    conditioning = {"encoder_hidden_states": torch.empty(size, 77, width)}
    if pipeline.text_encoder_2 is not None:
        pooled = pipeline.text_encoder_2.config.projection_dim
        conditioning |= {"text_embeds": torch.empty(size, pooled), "time_ids": torch.empty(size, 6)}
    return torch.empty(size, pipeline.latent_shape[0], side, side), conditioning


def _steps(
    living: Living,
    config: Config,
    pipeline: Pipeline,
    networks: FullNetworks | LoraNetworks,
    resolution: int,
    away: float,
) -> Phase:
    """The forward and backward passes of a stage, with `away` bytes that are not on the meta device."""
    return Phase({
        size: living.peak_of(lambda: _step(config, pipeline, networks, size, resolution)) + away  # noqa: B023
        for size in BATCHES
    })  # fmt: skip


def _step(
    config: Config, pipeline: Pipeline, networks: FullNetworks | LoraNetworks, size: int, resolution: int
) -> None:
    """The forward and backward passes of a batch, of the finish once it has begun."""
    gpu = GPU(DTYPES[config.mixed_precision] if config.mixed_precision != "no" else None)
    batch = _batch(pipeline, size, resolution)
    negative = _batch(pipeline, 1, resolution)[1]
    stage: Stage = first_stage(config, pipeline, negative, networks)
    if "fake" in networks.roles:
        stage = finish_of(stage)
    elif config.paths is not None:  # of one sub-path: the others' points are small beside what a UNet keeps
        batch = torch.stack([batch[0]] * 2, 1), {**batch[1], "timesteps": torch.zeros(size, 2, dtype=torch.long)}
    losses, role = stage.losses(*batch, range(size)), "student"
    with gpu:
        while True:
            with gpu.autocast():
                pair = next(losses, None)
            if pair is None:
                break
            if pair[0] != role:  # its update is made, and the gradient gone
                for weight in networks.trainable(role):
                    weight.grad = None
            role = pair[0]
            with networks.learning(role):
                pair[1].backward()
            del pair
    for weight in networks.trainable(role):
        weight.grad = None


def shapes(config: Config) -> tuple[Architecture, int]:
    """The teacher's shapes and the pictures' side in pixels."""
    preset = TEACHERS.get(config.teacher)
    try:
        folder = resolve(config.teacher, config.revision)
    except FileNotFoundError:
        if preset is None:
            raise
        return ARCHITECTURES[preset.family], config.data_options.resolution or preset.resolution
    model = read_model(folder)
    native = preset.resolution if preset else model.resolution
    return replace(ARCHITECTURES[model.family], **model.configs), config.data_options.resolution or native


def largest_batch(found: Plan, memory: float) -> int:
    """The largest power of two that fits into so many bytes; 0 if one sample does not."""
    fitting = itertools.takewhile(lambda size: found.peak(size) <= memory, (2**n for n in range(12)))
    return max(fitting, default=0)


def describe(config: Config, found: Plan) -> str:
    """The plan as text."""
    batch, many = config.train_batch_size, config.gradient_accumulation_steps
    images, finished = (steps * batch * many for steps in (config.max_train_steps, config.finish_steps))
    kind = f"LoRA of rank {config.lora_rank}" if config.lora else "full weights"
    if config.lora_holds == "both":
        kind += " that holds the teacher's, too"
    teacher = " with ".join([config.teacher, *map(named_with_weight, config.teacher_lora)])
    held = [
        ("frozen UNet" if config.lora else "frozen teacher", found.frozen, str(base_dtype(config))[6:]),
        ("trained weights", found.trained, f"fp32, {found.trained_parameters / 1e6:.1f} M parameters"),
        ("target", found.target, "fp32"),
        (f"optimizer ({config.optimizer})", found.optimizer, ""),
    ]
    if config.finish != "none":
        held.append(("in the finish: fake network, start, optimizer", found.finish, "fp32"))
    named = {
        "data": "while data are made",
        "begin": "while the teacher is asked, before the first step",
        "step": f"forward and backward, batch {batch}",
        "finish": f"forward and backward of the finish, batch {batch}",
        "optimizer": "optimizer step",
        "sheet": "sheet",
    }
    peaks = [(named[name], phase.bytes(batch), "") for name, phase in found.phases.items()]
    lines = [
        f"{config.method.upper()} of {teacher}: {kind}, UNet of {found.unet_parameters / 1e6:.1f} M parameters",
        f"k={config.skip}, k_phi={config.solver_skip} ({config.solver}), w={config.guidance_scale:g}, "
        f"{config.loss_type}, gamma by {config.conditioning}, learning rate {config.learning_rate:g}, "
        f"mixed precision {config.mixed_precision}, "
        f"gradient checkpointing {'on' if config.gradient_checkpointing else 'off'}",
        "",
        "memory on the device that is held throughout training",
        *(_row(row) for row in held if row[1]),
        "peaks, with all of that",
        *map(_row, peaks),
        _row(("a card must have, with allocator and context", found.peak(batch), "")),
        f"  VAE and text encoders (fp32, {found.encoders / GB:.2f} GB) leave when the data are made, or "
        "stay if those are made on the way",
        f"main memory: {found.release / GB:.2f} GB for the release average",
        f"disk: {found.disk(config.checkpoints_total_limit) / GB:.1f} GB of checkpoints, one being written",
        "",
        "largest --train-batch-size with these flags: "
        + ", ".join(f"{card} GB: {largest_batch(found, card * GB) or 'none'}" for card in CARDS),
        "",
        f"steps {config.max_train_steps}, pictures {images} a process ({batch} x {many} a step), UNet evaluations "
        f"{images * config.unet_forwards_per_sample} ({config.unet_forwards_per_sample} a picture; a backward pass "
        "counts 2)",
    ]
    if config.finish != "none":
        lines.append(
            f"finish ({config.finish}): steps {config.finish_steps}, pictures {finished} a process, UNet evaluations "
            f"{finished * config.finish_forwards_per_sample:.0f} ({config.finish_forwards_per_sample:.2f} a picture, "
            "in the mean)"
        )
    if not config.lora and largest_batch(found, 24 * GB) == 0:
        lines.append("--lora needs far less memory.")
    return "\n".join(lines)


def _row(row: tuple[str, float, str]) -> str:
    name, size, note = row
    return f"  {name:<46} {size / GB:8.2f} GB  {note}".rstrip()


def _bytes(*modules: nn.Module | None) -> int:
    weights = itertools.chain(*(module.parameters() for module in modules if module is not None))
    return sum(rounded(one.nbytes) for one in weights)
