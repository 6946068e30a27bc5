"""The plots of docs/reproduction.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .reproduction import GUIDANCE, SHORT, TEACHER_W
from .reproduction_results import HEADLINE, Results, error

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = (0.18, 0.265)  # of the endpoint error in fig2b.png: the paper's recipe lies above it


def save_plots(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    colors = dict(zip(HEADLINE, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for place, (group, method) in enumerate(HEADLINE):
        one = results.where(group=group, method=method)
        for seed in one.seeds():
            curve = one.curve(seed)
            label = HEADLINE[group, method].replace("`", "") if seed == one.seeds()[0] else None
            heights = [error(row) for row in curve]
            style = {"color": colors[group, method], "lw": 1.2, "ls": "--" if place > 6 else "-", "label": label}
            axes[0].plot([row["unet_forwards"] / 1000 for row in curve], heights, **style)
            axes[1].plot([row["seconds"] / 60 for row in curve], heights, **style)
    axes[0].set(xlabel="UNet forwards of one sample, thousands", ylabel="endpoint error, geometric mean", ylim=SHOWN)
    axes[1].set(xlabel="minutes on one thread")
    axes[1].legend(fontsize=7, loc="upper right")
    _save(figure, folder / "fig2b.png")

    figure, axis = plt.subplots(figsize=(6, 4))
    for group, method in HEADLINE:
        for row in results.where(group=group, method=method, seed=0).having("delta").rows:
            pairs = sorted((int(t), value) for t, value in row["delta"].items())
            axis.plot(
                *zip(*pairs, strict=True),
                color=colors[group, method],
                lw=1.2,
                label=HEADLINE[group, method].replace("`", ""),
            )
    for row in results.where(group="teacher").having("delta").rows:
        pairs = sorted((int(t), value) for t, value in row["delta"].items())
        axis.plot(*zip(*pairs, strict=True), color="black", ls=":", label="teacher, guided")
    axis.set(xlabel="t", ylabel="delta(t, 20)", yscale="log")
    axis.legend(fontsize=6)
    _save(figure, folder / "fig2c.png")

    figure, axis = plt.subplots(figsize=(6, 4))
    for method, name in (("lcm", "LCM"), ("splam-noise-level", "SPLAM"), ("teacher", "teacher, 50 steps")):
        points = []
        for w in GUIDANCE:
            group = "k100" if w == TEACHER_W else f"fig3-w{w:g}"
            one = (
                results.where(group="teacher", method="teacher", guidance_scale=w)
                if method == "teacher"
                else results.where(group=group, method=method, seed=0, steps=4).near(SHORT)
            )
            points += [
                (row["frechet_distance"], 100 * row["attribute_accuracy"], w)
                for row in one.having("attribute_accuracy").rows
            ]
        if points:
            axis.plot(*zip(*(point[:2] for point in points), strict=True), marker="o", label=name)
            for place in points:
                axis.annotate(f"{place[2]:g}", place[:2], fontsize=7, xytext=(3, 3), textcoords="offset points")
    axis.set(xlabel="Frechet distance", ylabel="pictures all right, %")
    axis.legend(fontsize=8)
    _save(figure, folder / "fig3.png")


def _save(figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
