"""What lies in shards over the processes of a run, where `accelerate launch` is told FSDP: torch's FSDP2.

Accelerate would shard the student alone; student, target and teacher are cut in the same way here, so that averages
are updates of each process's own shards. Checkpoints hold everything whole, and fit runs of any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers import Transformer2DModel
from torch import Tensor, distributed

from .config import Config

if distributed.is_available():  # some builds for one device are without
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

UNITS = (BasicTransformerBlock, Transformer2DModel, ResnetBlock2D)  # gathered one at a time; the rest with the UNet


def sharding_mesh(config: Config, accelerator: Accelerator) -> DeviceMesh | None:
    """All processes of the run if it is an FSDP one, else None. Raises ValueError for what FSDP does not go with."""
    # Accelerate's own distributed_type says FSDP on GPUs only, though torch shards on a CPU too.
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or not distributed.is_initialized():
        return None
    own = {
        "fsdp_version 1 (write fsdp_version: 2)": os.environ.get("FSDP_VERSION", "1") != "2",
        "fsdp_offload_params": os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true",
    }
    _check(config, own)
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def _check(config: Config, own: Mapping[str, bool]) -> None:
    if config.lora:
        raise ValueError(
            "--lora does not go with FSDP, nor needs it: its one UNet is frozen. Take training/configs/ddp.yaml."
        )
    wrong = {
        f"--optimizer {config.optimizer} (take adamw)": config.optimizer != "adamw",
        "--mixed-precision fp16 (take bf16 or no)": config.mixed_precision == "fp16",
        "--compile": config.compile,
        **own,
    }
    if any(wrong.values()):
        raise ValueError(
            f"FSDP is not supported together with {', '.join(key for key, value in wrong.items() if value)}. "
            f"See training/configs/fsdp.yaml."
        )


def shard(unet: UNet2DConditionModel, mesh: DeviceMesh) -> None:
    """In place. A unit's weights are whole only while it runs."""
    for module in [*reversed([one for one in unet.modules() if isinstance(one, UNITS)]), unet]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def own_shards(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process holds of a state dict, sharing memory with it."""
    return {key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()}


def gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors on the CPU, for the main process; {} for the others, who must call this too."""
    main, result = distributed.get_rank() == 0, {}
    for key, value in state.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if main:
            result[key] = whole.detach().cpu() if isinstance(whole, Tensor) else whole
    return result


def shards_of(whole: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's shards of whole tensors, cut as those of `like`. Raises ValueError where a shape differs."""
    for key in whole.keys() & like.keys():
        if whole[key].shape != like[key].shape:
            raise ValueError(f"{key}: expected {list(like[key].shape)}, found {list(whole[key].shape)}")
    return own_shards({key: _cut(value, like[key]) if key in like else value for key, value in whole.items()})


def gathered_optimizer(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict as one process would have it, for the main process; all must call this."""
    return {**state, "state": {index: gathered(slots) for index, slots in state["state"].items()}}


def sharded_optimizer(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The reverse; `parameters` are in the optimizer's order. What has not its parameter's shape stays whole."""
    own = dict(enumerate(parameters))
    slots = {
        index: {
            name: _cut(value, own[index]) if isinstance(value, Tensor) and value.shape == own[index].shape else value
            for name, value in one.items()
        }
        for index, one in state["state"].items()
    }
    return {**state, "state": slots}


# What a run's own flags and device say of an optimizer, whatever a checkpoint has.
SETTINGS = ("betas", "eps", "weight_decay", "foreach", "fused", "capturable")


class OptimizerState:
    """An optimizer as a checkpoint holds it: moments whole, whatever the shards. Its settings stay the run's own."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], sharded: bool) -> None:
        self.optimizer, self.parameters, self.sharded = optimizer, parameters, sharded

    def state_dict(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        return gathered_optimizer(state) if self.sharded else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """state: on the CPU, where AdamW's step count must stay: on a device it would be waited for at each step."""
        # Before it is loaded, since torch puts a step count where these settings want it.
        groups = [
            {**group, **{key: own[key] for key in SETTINGS if key in own}}
            for group, own in zip(state["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        state = {**state, "param_groups": groups}
        self.optimizer.load_state_dict(sharded_optimizer(state, self.parameters) if self.sharded else state)


def _cut(whole: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return whole
    result = torch.empty_like(like, dtype=whole.dtype, requires_grad=False)
    # Every process has the whole, so none need be sent.
    part = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    result.to_local().copy_(part.to_local())  # a copy, lest a part keep the whole alive
    return result
