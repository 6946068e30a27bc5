"""The training loop: Algorithm 1 of the paper on accelerate, and a finish, as a generator of what happened."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoints import latest_checkpoint
from .consistency import KeptPaths, plain_attention
from .distillation import Distillation
from .learner import learning_rate
from .networks import update_averages
from .stopping import StoppedError, StopRequest

SKIPPED_IN_A_ROW = 20  # steps without a finite gradient after which a run stops


@dataclass
class Progress:
    """What one optimizer step did; `seconds` are of this step alone."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    images: int
    unet_forwards: int
    skipped: int  # steps of the run so far whose gradient was not finite, and which moved nothing
    seconds: float
    fake_loss: float | None = None  # of a finish's second network, the mean of its updates


def train(run: Distillation, stop: StopRequest | None = None) -> Iterator[Progress]:
    """Steps up to total_steps: Algorithm 1, then its finish.

    Raises FloatingPointError, naming the last checkpoint, for a loss not finite or one that explodes and for
    SKIPPED_IN_A_ROW gradients that are not finite, CheckpointError for a checkpoint that cannot be written, and
    StoppedError, after a checkpoint, when any process has been asked to stop.
    """
    config = run.config
    if isinstance(run.stage, KeptPaths) and config.finish == "none":
        run.let_teacher_go()
    while run.step < config.total_steps:
        if run.step >= config.max_train_steps and not run.finishing:
            run.begin_finish()
        decays = (config.finish_ema_decay, 0.0) if run.finishing else (config.ema_decay, config.release_decay)
        since = time.perf_counter()
        losses: dict[str, list[float]] = {role: [] for role in run.learners}
        rates, norms, finite, stopping = {}, {}, True, False
        for role, part in backward(run):
            learner = run.learners[role]
            loss, asked = _agreed(run, part, stop)
            losses[role].append(loss)
            stopping = stopping or asked
            _check(run, learner.watch.fault(loss), "the loss" if role == "student" else f"the {role} network's loss")
            rates[role] = learning_rate(config, role, run.step)
            norms[role] = learner.clip(config.max_grad_norm)
            moves = math.isfinite(norms[role])
            learner.descend(rates[role], moves)
            if moves and role == "student":
                update_averages(run.networks, run.step + 1, *decays)
            finite = finite and moves
        run.skipped += not finite
        run.skipped_in_a_row = 0 if finite else run.skipped_in_a_row + 1
        if run.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            _check(run, f"has not been finite for {SKIPPED_IN_A_ROW} steps", "the gradient")
        drawn = range(run.samples, run.samples + run.samples_per_step)
        run.step += 1
        run.samples = drawn.stop
        yield Progress(
            step=run.step,
            loss=losses["student"][0],
            gradient_norm=norms["student"],
            learning_rate=rates["student"],
            images=len(drawn),
            unet_forwards=run.stage.forwards(drawn),
            skipped=run.skipped,
            seconds=time.perf_counter() - since,
            fake_loss=sum(losses["fake"]) / len(losses["fake"]) if run.finishing else None,
        )
        last = run.step == config.total_steps
        between = run.step == config.max_train_steps
        # After the caller has logged the step, so that a log never lacks a step that its checkpoint has.
        if run.step % config.checkpointing_steps == 0 or last or between or stopping:
            folder = run.save()
        if stopping and not last:
            raise StoppedError(f"stopped at step {run.step}. Go on with --resume-from-checkpoint latest ({folder}).")


def backward(run: Distillation) -> Iterator[tuple[str, Tensor]]:
    """The updates of a step, each a role whose gradient is at hand, and its loss [] in this process.

    A gradient is of --gradient-accumulation-steps batches; batch j of process p is the samples from
    first + (j*processes + p)*batch on: more processes, more accumulation or a larger batch see the same samples.
    """
    config, accelerator = run.config, run.accelerator
    size, many = config.train_batch_size, config.gradient_accumulation_steps
    turns = range(accelerator.process_index, many * accelerator.num_processes, accelerator.num_processes)
    batches = [run.losses(range(start, start + size)) for start in (run.samples + turn * size for turn in turns)]
    while True:
        total = torch.zeros((), device=accelerator.device)
        for turn, batch in enumerate(batches):
            # Sharded gradients are summed as shards: waiting for the last batch would take them whole.
            together = turn + 1 == many or run.networks.sharded
            with contextlib.nullcontext() if together else accelerator.no_sync(run.networks.student):
                pair = next(batch, None)
                if pair is None:
                    return
                role, loss = pair
                part = loss / many if many > 1 else loss
                # A checkpointed backward pass runs forward again and must pick the same attention.
                with plain_attention(accelerator.device), run.networks.learning(role):
                    accelerator.backward(part)
                total += part.detach()
                del pair, loss, part
        run.learners[role].average_gradient()
        yield role, total


def _agreed(run: Distillation, loss: Tensor, stop: StopRequest | None) -> tuple[float, bool]:
    """The mean loss of the processes, and whether any of them has been asked to stop: an update's first wait."""
    asked = torch.full_like(loss, float(bool(stop)))
    mean, stopping = run.accelerator.reduce(torch.stack([loss, asked]), "mean").tolist()
    return mean, stopping > 0


def _check(run: Distillation, fault: str | None, what: str) -> None:
    """Raises FloatingPointError for a fault. It is the same on every process."""
    if fault is None:
        return
    half = run.config.mixed_precision == "fp16"
    rates = "--finish-learning-rate and --fake-learning-rate" if run.finishing else "--learning-rate"
    cure = f"Lower {rates}" + (", or take --mixed-precision bf16 or no" if half else "")
    if run.step == 0 and run.skipped == 0:
        cure = "No step has been made yet: it comes of the teacher or the data"
    raise FloatingPointError(
        f"{what} {fault} at step {run.step + 1}. {cure}; the last good checkpoint is "
        f"{latest_checkpoint(run.config.output_dir) or 'not there yet'}."
    )
