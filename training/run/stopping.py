"""How a run ends before its last step: asked to by a signal, or out of memory."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from .checkpoints import checkpoints
from .config import Config

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


class StoppedError(Exception):
    """The run has stopped as it was asked to; the message says how to go on."""


class OutOfMemoryError(ValueError):
    """The message says which flags to lower."""


class StopRequest:
    """While entered, Ctrl-C and SIGTERM ask for a stop at a step's end. The second one ends the process as ever."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """As a shell counts it. Another process of the run may have been asked, and not this one."""
        return 128 + (self.signal or signal.SIGTERM)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # the only one that may have handlers
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
        os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")


@contextlib.contextmanager
def memory_explained(config: Config) -> Iterator[None]:
    """Raises OutOfMemoryError, naming flags, for what a device or the system raises when memory is at an end."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        short = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not short and not any(sign in text.lower() for sign in NO_MEMORY):
            raise
        raise OutOfMemoryError(_advice(config, text.splitlines()[0] if text else "no more memory")) from error


def _advice(config: Config, found: str) -> str:
    batch, many = config.train_batch_size, config.gradient_accumulation_steps
    ways = {
        f"lower --train-batch-size (it is {batch}; --gradient-accumulation-steps {2 * many} makes up for half of it)": (
            batch > 1
        ),
        "add --gradient-checkpointing": not config.gradient_checkpointing,
        "take --mixed-precision bf16": config.mixed_precision == "no",
        "train a --lora instead of whole weights": not config.lora,
        f"lower --lora-rank (it is {config.lora_rank})": config.lora and config.lora_rank > 8,
        "lower --resolution": True,
    }
    chosen = "; ".join(way for way, fits in ways.items() if fits)
    again = " Go on with --resume-from-checkpoint latest." if checkpoints(config.output_dir) else ""
    return f"out of memory ({found}). To need less, in this order: {chosen}. --plan says what a run takes.{again}"
