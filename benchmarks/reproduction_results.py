"""What `benchmarks.reproduction` left in its work folder, to be asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from .reproduction import ALONE, GROUPS

Row = dict[str, Any]

# Students of the same group compare at once; these are read together. (group, method) -> its name in tables.
HEADLINE = {
    ("k20", "lcm"): "LCM, k=20 (the paper's LCM)",
    ("k100", "lcm"): "LCM, k=100, ME",
    ("k100", "lcm-random-jump"): "LCM, random jump up to 100, ME",
    ("k100", "dl-embedding"): "DL, embedding",
    ("k100", "splam-embedding"): "SPLAM, embedding (`--recipe paper`)",
    ("k100", "splam-noise-level"): "SPLAM, noise level",
    ("k100", "splam-noise-level-half"): "SPLAM, noise level, gamma = 1 in half",
    ("default", "splam-default"): "SPLAM, default recipe",
    ("default", "lcm"): "LCM, the default recipe's jumps",
    ("default-single", "splam-default"): "SPLAM, default with `--solver-skip 150`: one step a jump",
}
LCM = ("k20", "lcm")
RECIPES = {
    "paper": ("k100", "splam-embedding"),
    "default": ("default", "splam-default"),
    "default --solver-skip 150": ("default-single", "splam-default"),
}
SINGLE = {20: "k20", 40: "k40-single", 100: "k100-single", 200: "k200-single"}
MULTIPLE = {40: "k40", 100: "k100", 200: "k200"}
TIMESTEPS = ("999", "759", "499", "259")


class Results:
    """The rows of a work folder."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    @classmethod
    def read(cls, work: Path) -> Results:
        """Raises FileNotFoundError if nothing has been measured."""
        files = sorted(file for name in (*ALONE, *GROUPS) for file in work.glob(f"{name}-seed*.json"))
        if not files:
            raise FileNotFoundError(f"{work} holds no results: run python -m benchmarks.reproduction first")
        return cls([row for file in files for row in json.loads(file.read_text(encoding="utf-8"))])

    def where(self, **wanted: Any) -> Results:
        return Results([row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())])

    def having(self, key: str) -> Results:
        return Results([row for row in self.rows if key in row])

    def near(self, unet_forwards: int) -> Results:
        """Rows at the mark of this budget: of each run, those whose own budget is the nearest to it."""
        found = []
        for group, method, seed in dict.fromkeys((row["group"], row["method"], row["seed"]) for row in self.rows):
            rows = self.where(group=group, method=method, seed=seed).rows
            best = min((row["unet_forwards"] for row in rows), key=lambda one: abs(one - unet_forwards))
            found += [row for row in rows if row["unet_forwards"] == best]
        return Results(found)

    def values(self, key: str) -> list[float]:
        return [row[key] for row in sorted(self.rows, key=lambda row: row["seed"] or 0) if key in row]

    def curve(self, seed: int) -> list[Row]:
        return sorted(self.where(seed=seed).having("endpoint_error").rows, key=lambda row: row["unet_forwards"])

    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.rows})


def error(row: Row) -> float:
    """The endpoint errors of a row as one number: their geometric mean, so that every timestep counts the same."""
    return geometric_mean(row["endpoint_error"].values())


def at_iteration(curve: Sequence[Row], iteration: int) -> float | None:
    """`error` on a training curve, on the line between the two measurements around it."""
    for before, after in pairwise(curve):
        if before["iterations"] <= iteration <= after["iterations"]:
            share = (iteration - before["iterations"]) / (after["iterations"] - before["iterations"])
            return error(before) + share * (error(after) - error(before))
    return None


def reach(curve: Sequence[Row], wanted: float) -> float | None:
    """The budget at which `error` first is down to `wanted`, on the line between measurements; None if never."""
    for before, after in zip([None, *curve], curve, strict=False):
        if error(after) > wanted:
            continue
        if before is None:
            return after["unet_forwards"]
        share = (error(before) - wanted) / (error(before) - error(after))
        return before["unet_forwards"] + share * (after["unet_forwards"] - before["unet_forwards"])
    return None
