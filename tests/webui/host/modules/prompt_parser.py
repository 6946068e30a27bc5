"""Conditions of a batch: every picture's prompts (several with AND) as rows of one tensor, with their weights."""


class Multicond:
    def __init__(self, prompts):
        """prompts: for every picture a list of (embedding [L, C], weight)."""
        import torch

        flat = [pair for picture in prompts for pair in picture]
        self.tensor = torch.stack([embedding for embedding, _ in flat])
        rows = iter(range(len(flat)))
        self.conds_list = [[(next(rows), weight) for _, weight in picture] for picture in prompts]


def reconstruct_multicond_batch(cond, step):
    return cond.conds_list, cond.tensor


def reconstruct_cond_batch(cond, step):
    return cond
