"""The file that `benchmarks.sampling` and `benchmarks.training` share: speed and memory, docs/results/performance.json.

A row is {"benchmark", "shape", "ours", "peer", "ratio", "spread", "unit"}; spread is [lower, upper] quartile of the
ratio, or null where one number was counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median, quantiles

KEYS = ("benchmark", "shape", "ours", "peer", "ratio", "spread", "unit")


def paired_row(benchmark: str, shape: str, ours: list[float], peer: list[float], unit: str) -> dict:
    """The row of measurements taken in turn: medians of each side, median and quartiles of the ratios pair by pair.

    Raises ValueError where the two are not equally many, or none.
    """
    ratios = [mine / other for mine, other in zip(ours, peer, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    row = (benchmark, shape, median(ours), median(peer), middle, [low, high], unit)
    return dict(zip(KEYS, row, strict=True))


def write_rows(file: Path, rows: list[dict]) -> None:
    """Put these rows in the file in place of its rows of the same benchmarks; all its others stay, in their order."""
    for row in rows:
        if set(row) != set(KEYS):
            raise ValueError(f"A row has the keys {', '.join(KEYS)}; found {', '.join(row)}.")
    measured = {row["benchmark"] for row in rows}
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    kept = [row for row in before if row["benchmark"] not in measured]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept + rows, indent=1) + "\n", encoding="utf-8")


def print_table(rows: list[dict]) -> None:
    """A Markdown table, a line a row."""
    print(
        "| benchmark | shape | ours | peer | unit | ratio | quartiles |\n| --- | --- | ---: | ---: | --- | ---: | --- |"
    )
    for row in rows:
        quartiles = " to ".join(f"{bound:.3f}" for bound in row["spread"] or ())
        numbers = f"{row['ours']:.4g} | {row['peer']:.4g} | {row['unit']} | {row['ratio']:.3f}"
        print(f"| {row['benchmark']} | {row['shape']} | {numbers} | {quartiles} |")
