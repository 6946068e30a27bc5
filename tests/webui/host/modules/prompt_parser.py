"""Conditions of a batch: every picture's prompts (several with AND), each a schedule of embeddings over the steps."""

from collections import namedtuple

import torch

ScheduledPromptConditioning = namedtuple("ScheduledPromptConditioning", ["end_at_step", "cond"])


class ComposableScheduledPromptConditioning:
    def __init__(self, schedules, weight=1.0):
        self.schedules, self.weight = schedules, weight


class MulticondLearnedConditioning:
    def __init__(self, batch):
        """batch: for every picture a list of ComposableScheduledPromptConditioning."""
        self.batch, self.shape = batch, (len(batch),)


def schedule_of(prompt):
    """prompt: an embedding [L, C], or for an edited prompt {last step: embedding}."""
    edits = prompt if isinstance(prompt, dict) else {100: prompt}
    return [ScheduledPromptConditioning(step, cond) for step, cond in edits.items()]


def get_learned_conditioning(prompts):
    return [schedule_of(prompt) for prompt in prompts]


def get_multicond_learned_conditioning(prompts):
    """prompts: for every picture a prompt, or with AND a list of (prompt, weight)."""
    pictures = [prompt if isinstance(prompt, list) else [(prompt, 1.0)] for prompt in prompts]
    return MulticondLearnedConditioning(
        [[ComposableScheduledPromptConditioning(schedule_of(part), weight) for part, weight in p] for p in pictures]
    )


def at(schedules, step):
    return next((entry.cond for entry in schedules if step <= entry.end_at_step), schedules[0].cond)


def reconstruct_cond_batch(c, step):
    return torch.stack([at(schedules, step) for schedules in c])


def reconstruct_multicond_batch(c, step):
    """([picture][part] (row, weight), rows [N, L, C]); shorter rows are filled with their last vector."""
    tensors, pictures = [], []
    for parts in c.batch:
        pictures.append([(len(tensors) + i, part.weight) for i, part in enumerate(parts)])
        tensors += [at(part.schedules, step) for part in parts]
    longest = max(len(tensor) for tensor in tensors)
    rows = [torch.cat([tensor, tensor[-1:].expand(longest - len(tensor), -1)]) for tensor in tensors]
    return pictures, torch.stack(rows)
