"""Teacher, student, target and release average of one run: four UNets, or one UNet with LoRA adapters switched.

A finish has two more networks, and no release average: the fake one, and the student that it began with ("start").

The pipeline's own UNet is the teacher all the while: whatever asks the pipeline asks the teacher.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from splam_core import ema_update, gamma_embedding, release_decay_at, sinusoid_frequencies
from splam_core.denoiser import Network
from splam_core.lora import lora_start
from splam_core.recipe import LORA_TARGETS

from ..models.lora import as_adapter, merged
from ..models.pipeline import DTYPES, Conditioning, Pipeline, unet_arguments
from .config import Config
from .memory import keep_less
from .sharding import gathered, own_shards, shard, shards_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

GAMMA_DIM = 256
FINISHING = ("fake", "start")
_COND_PROJ = "time_embedding.cond_proj.weight"


def make_student(teacher: UNet2DConditionModel, gamma_conditioning: str) -> UNet2DConditionModel:
    """A copy of the teacher that can be told gamma; with cond_proj at zero it *is* the teacher, to the bit."""
    plain = gamma_conditioning == "noise-level"
    student = copy.deepcopy(teacher) if plain else _with_projection(teacher, copied=True)
    return student.float().to(teacher.device).requires_grad_(True)


def base_dtype(config: Config) -> torch.dtype:
    """Of the frozen UNet. A LoRA student's own forward passes go through it: without mixed precision it stays fp32."""
    if config.lora and config.mixed_precision == "no":
        return torch.float32
    return DTYPES[config.teacher_dtype]


class _Networks:
    """What both kinds of networks share: a role as a function, and how it is told gamma."""

    def __init__(self, pipeline: Pipeline, config: Config) -> None:
        self.bandwidth = config.gamma_bandwidth
        projected = config.conditioning == "embedding"
        self.frequencies = sinusoid_frequencies(GAMMA_DIM).to(pipeline.device) if projected else None

    def net(self, role: str, conditioning: Conditioning) -> Network:
        """A role's UNet as a function of (x [B, ...], t [B], gamma [B] or None), told these prompts."""
        told = unet_arguments(conditioning)

        def net(x: Tensor, t: Tensor, gamma: Tensor | None) -> Tensor:
            phi = None
            if self.frequencies is not None and gamma is not None:
                phi = gamma_embedding(gamma.to(x), GAMMA_DIM, self.bandwidth, frequencies=self.frequencies)
            with self.use(role) as unet:
                return unet(x, t, **told, timestep_cond=phi).sample

        return net


class FullNetworks(_Networks):
    """The teacher as it was loaded, and a student and a target that are fp32 UNets of their own.

    With a mesh all three lie in shards over its processes, which must then take part in every forward pass together.
    """

    def __init__(
        self, pipeline: Pipeline, config: Config, mesh: DeviceMesh | None = None, begun: dict[str, Tensor] | None = None
    ) -> None:
        """begun: weights of a plain UNet that student and target begin with; None: the teacher's."""
        super().__init__(pipeline, config)
        self.config, self.mesh = config, mesh
        self.teacher, self.sharded = pipeline.unet, mesh is not None
        self.fake: nn.Module | None = None
        self.start: nn.Module | None = None
        self.student: nn.Module = make_student(pipeline.unet, config.conditioning)
        if begun is not None:
            own = self.student.state_dict()
            _copy({key: own[key] for key in own if key != _COND_PROJ}, begun)
        nn.Module.to(self.teacher, base_dtype(config))  # diffusers' own `to` warns of every cast
        if mesh is not None:
            shard(self.teacher, mesh)  # before there is a third whole UNet
        self.target = copy.deepcopy(self.student).requires_grad_(False)
        keep_less(self.student, config.gradient_checkpointing)
        keep_less(self.target, False)
        if config.mixed_precision != "no":  # else nothing makes fp32 of its 16 bits
            keep_less(self.teacher, False)
        self.student.train()
        if mesh is not None:
            shard(self.target, mesh)
            shard(self.student, mesh)
        self.release = _on_cpu(self.weights("target")) if config.release_decay else {}

    def let_teacher_go(self, pipeline: Pipeline) -> None:
        """Nobody will ask it again; its place in the pipeline, whose shapes are still read, is the target's."""
        self.teacher = pipeline.unet = self.target

    @contextlib.contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """The UNet of a role. The release average lies in the target's place meanwhile."""
        swapped = role == "release"
        if swapped:
            _exchange(self.weights("target"), self.release)
        try:
            yield self._unets().get(role, self.target)
        finally:
            if swapped:
                _exchange(self.weights("target"), self.release)

    def _unets(self) -> dict[str, nn.Module | None]:
        return {"teacher": self.teacher, "student": self.student, "fake": self.fake, "start": self.start}

    @property
    def roles(self) -> list[str]:
        """Those with weights of their own, which a checkpoint holds."""
        unets = self._unets()
        more = ["release"] if self.release else []
        return ["student", "target", *more, *(role for role in FINISHING if unets[role] is not None)]

    def begin_finish(self) -> None:
        """Student and target go on from the slower average, where there is one; the fake network is the teacher."""
        better = self.release or self.weights("target")
        for role in ("target", "student"):
            _copy(self.weights(role), better)
        self.release = {}
        self.fake = self._another(self.teacher).requires_grad_(True)
        keep_less(self.fake, self.config.gradient_checkpointing)
        self.fake.train()
        if self.config.finish_anchor:
            self.start = self._another(self.target)
            keep_less(self.start, False)
        if self.config.compile:
            for unet in filter(None, (self.fake, self.start)):
                unet.compile()

    def _another(self, unet: nn.Module) -> nn.Module:
        """A frozen fp32 UNet with the weights of one that lies as all do, in shards or not."""
        if not self.sharded:
            return nn.Module.to(copy.deepcopy(unet), torch.float32).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            config = {key: value for key, value in unet.config.items() if key != "_use_default_values"}
            other = UNet2DConditionModel.from_config(config).to(unet.device).eval().requires_grad_(False)
        shard(other, self.mesh)
        _copy(own_shards(other.state_dict()), own_shards(unet.state_dict()))
        return other

    @contextlib.contextmanager
    def learning(self, role: str) -> Iterator[None]:
        """Around a role's backward pass: a checkpointed one runs its UNet again."""
        yield

    def trainable(self, role: str = "student") -> list[nn.Parameter]:
        return list(self._unets()[role].parameters())

    def weights(self, role: str) -> dict[str, Tensor]:
        """What a checkpoint holds of a role, sharing memory with the network: this process's shards, if any."""
        if role == "release":
            return self.release
        return own_shards(self._state(role)) if self.sharded else self._state(role)

    def whole(self, role: str) -> dict[str, Tensor]:
        """The same without shards. Where there are, all processes must ask; the main one alone is answered."""
        if not self.sharded:
            return self.weights(role)
        with self.use(role):
            return gathered(self._state(role))

    def cut(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `weights` would be of these whole ones. Raises ValueError where a shape differs."""
        return shards_of(whole, self._state("target")) if self.sharded else whole

    def _state(self, role: str) -> dict[str, Tensor]:
        return dict(_bare(self._unets().get(role, self.target)).state_dict())

    def compile(self) -> None:
        for unet in (self.teacher, self.target, _bare(self.student)):
            unet.compile()

    def export(self, role: str) -> dict[str, Tensor]:
        """The plain UNet's fp32 state dict, as `whole` gives it."""
        return {key: weight.cpu().clone() for key, weight in self.whole(role).items() if "cond_proj" not in key}


class AdaptedUNet:
    """One UNet with its adapters, seen as the UNet of one role: called as a UNet is, and the student's again after."""

    def __init__(self, networks: LoraNetworks, role: str) -> None:
        self.networks, self.role = networks, role

    def __call__(self, *inputs, **arguments):
        self.networks.switch(self.role)
        try:
            return self.networks.unet(*inputs, **arguments)
        finally:  # a checkpointed backward pass runs the student again
            self.networks.switch("student")

    @property
    def config(self):
        return self.networks.unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.networks.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.networks.unet.device

    def state_dict(self) -> dict[str, Tensor]:
        """The frozen UNet's weights under its own names, whatever the role."""
        return self.networks.base()


class LoraNetworks(_Networks):
    """One frozen UNet: without adapter the teacher, with "target", "student", "fake" or "start" those (peft), in fp32.

    The gamma projection is trained beside the student's adapter. The target needs none: it is only asked at gamma = 1,
    where the embedding is zero.
    """

    sharded = False

    def __init__(self, pipeline: Pipeline, config: Config, begun: dict[str, Tensor] | None = None) -> None:
        """begun: a LoRA of `read_lora` that student and target begin with; None: one that changes nothing."""
        super().__init__(pipeline, config)
        self.config = config
        self.rank, self.alpha = config.lora_rank, config.lora_alpha or config.lora_rank
        unet = nn.Module.to(pipeline.unet, base_dtype(config))
        if config.conditioning == "embedding":
            unet = _with_projection(unet, copied=False)
        names = dict(unet.state_dict())  # before the adapters
        roles = ["student", "target", *(FINISHING[: 1 + (config.finish_anchor > 0)] if config.finish != "none" else ())]
        targets = config.lora_target_modules.split(",") if config.lora_target_modules else LORA_TARGETS
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # peft's, that there are two adapters
            for role in roles:
                unet.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(targets)), role)
        self.layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        for name, parameter in unet.named_parameters():
            trained = ".student." in name or name == _COND_PROJ
            parameter.requires_grad_(trained)
            if trained or any(f".{role}." in name for role in roles):
                parameter.data = parameter.data.float()
        keep_less(unet, config.gradient_checkpointing)
        self.unet = unet.train()
        self.student: nn.Module = self.unet
        pipeline.unet = AdaptedUNet(self, "teacher")
        for place, role in enumerate(("student", "fake")[: 1 + (config.finish != "none")]):
            for key, weight in self.weights(role).items():
                name, lora, _ = key.partition(".lora_A.")
                if lora:
                    weight.copy_(lora_start(config.seed + place, name, tuple(weight.shape)))
        self.finishing: list[str] = []
        if begun is not None:
            own = self.weights("target")  # without the gamma projection
            adapter = as_adapter(begun, own, names, self.alpha / self.rank, f"--student {config.student}")
            _copy({key: self.weights("student")[key] for key in own}, adapter)
        _copy(self.weights("target"), self.weights("student"))
        self.release = _on_cpu(self.weights("target")) if config.release_decay else {}
        self.switch("student")

    @property
    def roles(self) -> list[str]:
        return ["student", "target", *(["release"] if self.release else []), *self.finishing]

    def begin_finish(self) -> None:
        """Student and target go on from the slower average, where there is one; the fake adapter changes nothing."""
        better = self.release or self.weights("target")
        student = self.weights("student")
        _copy(self.weights("target"), better)
        _copy({key: student[key] for key in better}, better)
        self.release, self.finishing = {}, ["fake"]
        if self.config.finish_anchor:
            self.finishing.append("start")
            _copy(self.weights("start"), better)
        for name, parameter in self.unet.named_parameters():
            if ".fake." in name:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def learning(self, role: str) -> Iterator[None]:
        self.switch(role)
        try:
            yield
        finally:
            self.switch("student")

    def let_teacher_go(self, pipeline: Pipeline) -> None:
        """It is the student's own base."""

    def switch(self, role: str) -> None:
        """Make the UNet that of a role, till the next switch. It is the student's wherever nobody asks."""
        # Not peft's set_adapter: it also turns requires_grad of the other adapters off, which would drop the student's
        # parameters out of an optimizer step or out of DistributedDataParallel's books.
        for layer in self.layers:
            layer._disable_adapters = role == "teacher"
            if role != "teacher":
                layer._active_adapter = [role]

    @contextlib.contextmanager
    def use(self, role: str) -> Iterator[nn.Module | AdaptedUNet]:
        """The UNet of a role. The release average lies in the target's place meanwhile."""
        swapped = role == "release"
        if swapped:
            _exchange(self.weights("target"), self.release)
        try:
            yield self.student if role == "student" else AdaptedUNet(self, "target" if swapped else role)
        finally:
            if swapped:
                _exchange(self.weights("target"), self.release)

    def trainable(self, role: str = "student") -> list[nn.Parameter]:
        named = self.unet.named_parameters()
        return [one for name, one in named if one.requires_grad and (".fake." in name) == (role == "fake")]

    def weights(self, role: str) -> dict[str, Tensor]:
        """Adapter weights under peft's names without the adapter's own, and for the student the gamma projection."""
        if role == "release":
            return self.release
        return {
            name.replace(f".{role}.", "."): parameter.data
            for name, parameter in self.unet.named_parameters()
            if f".{role}." in name or (role == "student" and name == _COND_PROJ)
        }

    whole = weights

    def cut(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        return whole

    def compile(self) -> None:
        self.unet.compile()

    def lora(self, role: str) -> dict[str, Tensor]:
        """The adapter of a role, on the CPU, under peft's names."""
        weights = self.weights(role)
        return {key: weight.detach().cpu().clone() for key, weight in weights.items() if key != _COND_PROJ}

    def base(self) -> dict[str, Tensor]:
        """The frozen UNet's weights under its own names."""
        return {
            name.replace(".base_layer.", "."): weight.detach()
            for name, weight in self.unet.state_dict().items()
            if ".lora_" not in name and "cond_proj" not in name
        }

    def export(self, role: str) -> dict[str, Tensor]:
        """The plain UNet's fp32 state dict with the adapter merged in.

        Exact only as the base is: where that is held in 16 bits, merge into the teacher's own file (`merged`).
        """
        base = {name: weight.float().cpu() for name, weight in self.base().items()}
        return merged(base, self.lora(role), self.alpha / self.rank)


Networks = FullNetworks | LoraNetworks


def update_averages(networks: Networks, step: int, decay: float, release_decay: float) -> None:
    """The target after every step; the release average where `release_decay_at` says so."""
    student, target = networks.weights("student"), networks.weights("target")
    floating = [key for key, average in target.items() if average.is_floating_point()]
    ema_update([target[key] for key in floating], [student[key] for key in floating], decay)
    slower = release_decay_at(step, release_decay)
    if networks.release and slower is not None:
        ema_update(networks.release.values(), [student[key] for key in networks.release], slower)


def load_weights(networks: Networks, role: str, weights: dict[str, Tensor]) -> None:
    """Whole weights, into every process. Raises ValueError for those of another run's shape."""
    own, weights = networks.weights(role), networks.cut(weights)
    if own.keys() != weights.keys() or any(own[key].shape != weights[key].shape for key in own):
        different = sorted(own.keys() ^ weights.keys()) or ["shapes"]
        raise ValueError(f"{role}: {len(different)} weights differ, the first {different[0]}")
    _copy(own, weights)


class RoleState:
    """A role's weights as a checkpoint holds them: whole, whatever the shards."""

    def __init__(self, networks: Networks, role: str) -> None:
        self.networks, self.role = networks, role

    def state_dict(self) -> dict[str, Tensor]:
        return self.networks.whole(self.role)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_weights(self.networks, self.role, state)


def _with_projection(teacher: UNet2DConditionModel, copied: bool) -> UNet2DConditionModel:
    """The teacher with a cond_proj of zeros; unless copied it takes the teacher's own tensors over."""
    dtype = teacher.dtype
    # diffusers notes which keys a config.json lacked, and would take the default for them once more.
    config = {key: value for key, value in teacher.config.items() if key != "_use_default_values"}
    with torch.device("meta" if not copied else "cpu"):
        student = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": GAMMA_DIM})
    shape = student.time_embedding.cond_proj.weight.shape
    weights = {**teacher.state_dict(), _COND_PROJ: torch.zeros(shape, dtype=dtype, device=teacher.device)}
    student.load_state_dict(weights, assign=not copied)
    return student.eval().requires_grad_(False)


def _bare(unet: nn.Module) -> nn.Module:
    return getattr(unet, "module", unet)


def _on_cpu(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: weight.detach().cpu().clone() for key, weight in weights.items()}


@torch.no_grad()
def _copy(into: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    for key, weight in into.items():
        weight.copy_(source[key])


@torch.no_grad()
def _exchange(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for key, weight in one.items():
        kept = weight.to(other[key].device, copy=True)
        weight.copy_(other[key])
        other[key].copy_(kept)
