"""Networks of a LoRA: one frozen UNet with adapters, switched."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from splam_core.lora import lora_start
from splam_core.recipe import LORA_TARGETS

from ..models.lora import as_adapter, merged
from ..models.pipeline import Pipeline
from .config import Config
from .memory import keep_less
from .networks import COND_PROJ, FINISHING, Networks, base_dtype, copy_into, on_cpu, with_projection


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


class LoraNetworks(Networks):
    """One frozen UNet: without adapter the teacher, with "target", "student", "fake" or "start" those (peft), in fp32.

    The gamma projection is trained beside the student's adapter. The target needs none: it is only asked at gamma = 1,
    where the embedding is zero.
    """

    sharded = False

    def __init__(self, pipeline: Pipeline, config: Config, begun: dict[str, Tensor] | None = None) -> None:
        """begun: a LoRA of `read_lora` that student and target begin with; None: one that changes nothing."""
        super().__init__(pipeline, config)
        self.rank, self.alpha = config.lora_rank, config.lora_alpha or config.lora_rank
        unet = nn.Module.to(pipeline.unet, base_dtype(config))
        if config.conditioning == "embedding":
            unet = with_projection(unet, copied=False)
        names = dict(unet.state_dict())  # before the adapters
        roles = ["student", "target", *(FINISHING[: 1 + (config.finish_anchor > 0)] if config.finish != "none" else ())]
        targets = _targets(config.lora_target_modules, unet) if config.lora_target_modules else LORA_TARGETS
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # peft's, that there are two adapters
            for role in roles:
                unet.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(targets)), role)
        self.layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        for name, parameter in unet.named_parameters():
            trained = ".student." in name or name == COND_PROJ
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
            copy_into({key: self.weights("student")[key] for key in own}, adapter)
        copy_into(self.weights("target"), self.weights("student"))
        self.release = on_cpu(self.weights("target")) if config.release_decay else {}
        self.switch("student")

    @property
    def roles(self) -> list[str]:
        return ["student", "target", *(["release"] if self.release else []), *self.finishing]

    def begin_finish(self) -> None:
        """Student and target go on from the slower average, where there is one; the fake adapter changes nothing."""
        better = self.release or self.weights("target")
        student = self.weights("student")
        copy_into(self.weights("target"), better)
        copy_into({key: student[key] for key in better}, better)
        self.release, self.finishing = {}, ["fake"]
        if self.config.finish_anchor:
            self.finishing.append("start")
            copy_into(self.weights("start"), better)
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

    def unet_of(self, role: str) -> nn.Module | AdaptedUNet:
        return self.student if role == "student" else AdaptedUNet(self, role)

    def switch(self, role: str) -> None:
        """Make the UNet that of a role, till the next switch. It is the student's wherever nobody asks."""
        # Not peft's set_adapter: it also turns requires_grad of the other adapters off, which would drop the student's
        # parameters out of an optimizer step or out of DistributedDataParallel's books.
        for layer in self.layers:
            layer._disable_adapters = role == "teacher"
            if role != "teacher":
                layer._active_adapter = [role]

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
            if f".{role}." in name or (role == "student" and name == COND_PROJ)
        }

    def compile(self) -> None:
        self.unet.compile()

    def lora(self, role: str) -> dict[str, Tensor]:
        """The adapter of a role, on the CPU, under peft's names."""
        weights = self.weights(role)
        return {key: weight.detach().cpu().clone() for key, weight in weights.items() if key != COND_PROJ}

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


def _targets(names: str, unet: nn.Module) -> list[str]:
    """The layers of --lora-target-modules. Raises ValueError for one that the UNet has not, which peft passes over."""
    targets = [name.strip() for name in names.split(",")]
    layers = [name for name, _ in unet.named_modules()]
    unknown = [one for one in targets if not one or not any(f".{name}".endswith(f".{one}") for name in layers)]
    if unknown:
        raise ValueError(
            f"--lora-target-modules: this UNet has no layer {', '.join(map(repr, unknown))}; expected names such as "
            f"{', '.join(LORA_TARGETS[:4])}, separated by commas"
        )
    return targets
