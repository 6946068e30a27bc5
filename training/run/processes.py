"""The processes of a run: one group, whatever started them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def join_processes(mixed_precision: str = "no") -> Accelerator:
    """The Accelerator of this process, in one group with all that torchrun or accelerate started beside it.

    On a machine without an accelerator the group is gloo's. Raises ValueError for DeepSpeed, for more processes than
    GPUs, and where the processes form no group: each would believe it is alone, and all would write one folder.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError("DeepSpeed is not supported. Shard with FSDP: --config_file training/configs/fsdp.yaml.")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    local, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if cards and local >= cards and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        raise ValueError(f"process {local + 1} of this machine finds no GPU of its own: start {cards}.")
    # While one process draws a sheet, the others may wait for it.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=3))
    # Of several processes on CPUs alone accelerate makes a group only if told so.
    cpu = started > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=cpu, kwargs_handlers=[patience])
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but on {accelerator.device} they form no group. Start one process, or "
            f"train on CPUs (ACCELERATE_USE_CPU=true) or on GPUs that have NCCL."
        )
    return accelerator


def on_main(accelerator: Accelerator, act: Callable[[], object]) -> None:
    """Act on the main process; what ValueError it raises is raised on every process."""
    found: list[ValueError | None] = [None]
    if accelerator.is_main_process:
        try:
            act()
        except ValueError as error:
            found[0] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[0] is not None:
        raise found[0]


def from_main(accelerator: Accelerator, act: Callable[[], Result]) -> Result:
    """The same, and every process gets what it returned."""
    found: list[Result] = []
    on_main(accelerator, lambda: found.append(act()))
    told: list[Any] = found or [None]
    if accelerator.num_processes > 1:
        broadcast_object_list(told)
    return told[0]
