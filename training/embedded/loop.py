"""One resumable training loop, shared by the autoencoder, the judge and the teacher of the embedded pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState

from ..files import whole_file

# bf16 where the processor computes in it, fp32 elsewhere: without avx512_bf16 a product in bf16 takes 7 times as long.
HALF = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
SAVE_SECONDS = 240  # between checkpoints at the most, as far as steps are shorter


def half_precision() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=HALF)


def save_whole(state: dict, path: Path) -> None:
    with whole_file(path) as place:
        torch.save(state, place)


def average(modules: torch.nn.Module) -> None:
    """Each gradient becomes the mean over processes."""
    gradients = [parameter.grad for parameter in modules.parameters() if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    for gradient, mean in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_((mean / dist.get_world_size()).view_as(gradient))


def train(
    modules: torch.nn.Module,
    loss_at: Callable[[int, object], torch.Tensor],  # (step, batch) -> scalar loss
    data_from: Callable[[int], Iterator],  # first step -> iterator of batches
    checkpoint: Path,
    steps: int,
    learning_rate: float,
    ema: torch.nn.Module | None = None,  # a copy of `modules` that follows it with `ema_decay`
    ema_decay: float = 0.999,
    warmup: int = 100,
    save_every: int = 500,
    report_every: int = 50,
) -> Iterator[int]:
    """AdamW with linear warm-up and cosine decay, clip 1; yields the number of steps done every `save_every`.

    Saves there, and at the latest after SAVE_SECONDS. Resumes from `checkpoint` when it is there; a resumed run takes
    the same batches as an uninterrupted one. Under `accelerate launch` the gradients are the mean of the processes',
    each of which draws its own noise; the first of them saves.
    """
    process = PartialState(cpu=True)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=learning_rate, weight_decay=1e-4, fused=True)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        first = state["step"]
        print(f"resumed {checkpoint} at step {first}", flush=True)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    running, since, seen = 0.0, time.time(), 0
    saved = time.time()
    for step, batch in zip(range(first, steps), data_from(first), strict=False):
        progress = step / steps
        scale = min(1.0, (step + 1) / warmup) * (
            0.02 + 0.98 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        torch.manual_seed(step * process.num_processes + process.process_index)
        loss = loss_at(step, batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}; the last good state is in {checkpoint}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if process.num_processes > 1:
            average(modules)
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        if ema is not None:
            decay = min(ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(modules.parameters()), 1 - decay)
        running, seen = running + loss.item(), seen + 1
        if process.is_main_process and (step + 1) % report_every == 0:
            rate = seen / (time.time() - since)
            print(
                f"step {step + 1}/{steps}  loss {running / seen:.4f}  {rate:.2f} steps/s  "
                f"{(steps - step - 1) / rate / 60:.0f} min left",
                flush=True,
            )
            running, since, seen = 0.0, time.time(), 0
        due = (step + 1) % save_every == 0 or step + 1 == steps
        if process.is_main_process and (due or time.time() - saved >= SAVE_SECONDS):
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_whole(state | ({"ema": ema.state_dict()} if ema is not None else {}), checkpoint)
            saved = time.time()
        if due:
            yield step + 1
