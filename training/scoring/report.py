"""Results side by side: tables in the paper's layout, and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import whole_file


@dataclass(frozen=True)
class Column:
    title: str
    better: int  # -1: lower, 1: higher, 0: neither
    form: str = ".3f"
    scale: float = 1.0

    @property
    def head(self) -> str:
        return self.title + {-1: " (↓)", 0: "", 1: " (↑)"}[self.better]


# Key of a result -> its column, in the order of the tables.
COLUMNS = {
    "fid": Column("FID", -1, ".2f"),
    "kid": Column("KID x 1000", -1, ".2f", 1000),
    "precision": Column("precision", 1),
    "recall": Column("recall", 1),
    "clip_score": Column("CLIP score", 1, ".2f"),
    "attribute_accuracy": Column("attribute accuracy, %", 1, ".1f", 100),
    "attribute_accuracy_one_object": Column("one object, %", 1, ".1f", 100),
    "attribute_accuracy_two_objects": Column("two objects, %", 1, ".1f", 100),
    "attribute_accuracy_held_out": Column("held-out pairs, %", 1, ".1f", 100),
    "frechet_distance": Column("Frechet distance", -1),
    "frechet_distance_clipped": Column("clipped", -1),
    "frechet_distance_floor": Column("floor", 0),
    "nearest_training_ratio_features": Column("nearest training scene, ratio", 0, ".2f"),
    "nearest_training_copies_features": Column("copies, %", 0, ".1f", 100),
    "spread": Column("spread over seeds, pixels", 0),
    "spread_teacher": Column("of the teacher", 0),
    "spread_features": Column("spread, features", 0),
    "spread_features_teacher": Column("of the teacher", 0),
}
BY_STEPS = ("fid", "clip_score", "attribute_accuracy", "frechet_distance")  # what the paper's Table 1 sets by steps
NOTE = (
    "Latency: median wall-clock seconds an image (text encoding, sampling, decoding) on the machine and at the batch "
    "size of each run; noisy, so that ratios on one machine mean more. UNet evaluations count a guided step as two."
)


def read_results(files: Sequence[Path]) -> list[dict]:
    """Results of JSON files, each of one, a list of them, or a mapping from label to result.

    Raises FileNotFoundError or ValueError naming the file.
    """
    results = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there; expected scores that training/evaluate.py --json wrote")
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(found, dict) and "model" not in found:
                found = [{"label": label, "row": label, **result} for label, result in found.items()]
            found = found if isinstance(found, list) else [found]
            if not found or not all("model" in result and "steps" in result for result in found):
                raise ValueError("results without 'model' and 'steps'")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{file}: expected scores that training/evaluate.py --json wrote, found {error}"
            ) from error
        results += found
    return results


def method(result: dict) -> str:
    """What a row is called: its label, or model, sampler and guidance."""
    if result.get("label"):
        return result["label"]
    name = Path(result["model"]).name + (f" + {Path(result['lora']).stem}" if result.get("lora") else "")
    guidance = "" if result.get("guidance_scale", 1) == 1 else f", w={result['guidance_scale']:g}"
    return f"{name} ({result['sampler']}{guidance})"


def markdown(results: Sequence[dict]) -> str:
    """Tables: a row a result with latency and scores (the paper's Table 2), by steps (Table 1), endpoint errors."""
    parts = [_rows(results)]
    for make in (_by_steps, _endpoints):
        table = make(results)
        if table:
            parts.append(table)
    return "\n\n".join([*parts, NOTE]) + "\n"


def _rows(results: Sequence[dict]) -> str:
    columns = {key: column for key, column in COLUMNS.items() if any(key in result for result in results)}
    heads = ["method", "steps", "UNet evaluations", "images", "latency, s (↓)"]
    heads += [column.head for column in columns.values()]
    rows = []
    best = {key: _best(key, results) for key in columns}
    for result in results:
        latency = result.get("seconds_per_image")
        row = [
            method(result),
            _steps(result),
            str(result["unet_evaluations_per_image"]),
            str(result.get("images", "-")),
        ]
        row += ["-" if latency is None else f"{latency:.3g}"]
        rows.append([*row, *(_cell(key, result, best[key]) for key in columns)])
    return _table(heads, rows, left=1)


def _by_steps(results: Sequence[dict]) -> str:
    """Methods against steps, where a method was run at several."""
    steps = sorted({result["steps"] for result in results})
    methods = list(dict.fromkeys(method(result) for result in results))
    found = {(method(result), result["steps"]): result for result in results}
    keys = [key for key in BY_STEPS if any(key in result for result in results)]
    if len(steps) < 2 or len(methods) == len(results) or not keys:
        return ""
    heads = ["", *(f"{COLUMNS[key].head}, {_plural(n)}" for key in keys for n in steps)]
    best = {
        (key, n): _best(key, [found[one, n] for one in methods if (one, n) in found]) for key in keys for n in steps
    }
    rows = [
        [one, *(_cell(key, found.get((one, n), {}), best[key, n]) for key in keys for n in steps)] for one in methods
    ]
    return _table(heads, rows, left=1)


def _endpoints(results: Sequence[dict]) -> str:
    found = [result for result in results if result.get("endpoint_error")]
    if not found:
        return ""
    times = sorted({t for result in found for t in result["endpoint_error"]}, key=int, reverse=True)
    best = {t: min(result["endpoint_error"].get(t, float("inf")) for result in found) for t in times}
    rows = []
    for result in found:
        values = [result["endpoint_error"].get(t) for t in times]
        cells = [_bold(f"{v:.4f}", v == best[t]) if v is not None else "-" for v, t in zip(values, times, strict=True)]
        rows.append([method(result), *cells])
    return _table(["endpoint error (↓)", *(f"t = {t}" for t in times)], rows, left=1)


def _best(key: str, results: Sequence[dict]) -> float | None:
    """The value that is set in bold; none where a table has nothing to choose between."""
    values = [result[key] for result in results if key in result]
    sign = COLUMNS[key].better
    return sign * max(sign * value for value in values) if sign and len(values) > 1 else None


def _cell(key: str, result: dict, best: float | None) -> str:
    if result.get(key) is None:
        return "-"
    column = COLUMNS[key]
    return _bold(format(column.scale * result[key], column.form), result[key] == best)


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _plural(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def _steps(result: dict) -> str:
    return "-" if result["unet_evaluations_per_image"] == 0 else str(result["steps"])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))


def save_plots(results: Sequence[dict], folder: Path) -> list[Path]:
    """PNG files of what the results hold: scores against steps, alignment against FID over w, delta and endpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, draw in (("steps", _plot_steps), ("guidance", _plot_guidance), ("curves", _plot_curves)):
        figure = draw(results)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=120)
            made.append(folder / f"{name}.png")
    return made


def _figure(panels: int):
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=(5 * panels, 3.8), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _series(results: Sequence[dict], by: str, keys: Sequence[str]) -> dict[str, list[dict]]:
    """Results that hold all keys, by method, sorted by the number that `by` names."""
    series: dict[str, list[dict]] = {}
    for result in results:
        if all(result.get(key) is not None for key in keys):
            name = result.get("label") or f"{Path(result['model']).name} ({result['sampler']})"
            series.setdefault(name, []).append(result)
    return {name: sorted(some, key=lambda one: one[by]) for name, some in series.items()}


def _plot_steps(results: Sequence[dict]):
    keys = [key for key in BY_STEPS if len({one["steps"] for one in results if key in one}) > 1]
    if not keys:
        return None
    figure, panels = _figure(len(keys))
    for panel, key in zip(panels, keys, strict=True):
        for name, some in _series(results, "steps", [key]).items():
            values = [COLUMNS[key].scale * one[key] for one in some]
            panel.plot([one["steps"] for one in some], values, "o-", label=name)
        panel.set(xlabel="steps", ylabel=COLUMNS[key].head, xscale="log")
        ticks = sorted({one["steps"] for one in results if key in one})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.legend(fontsize="small")
    return figure


def _plot_guidance(results: Sequence[dict]):
    """As the paper's Fig. 3b. w: a result's "training_guidance_scale", which its reader adds, or else sampling's."""
    for across, up in (("fid", "clip_score"), ("frechet_distance", "attribute_accuracy")):
        some = [
            {**one, "w": one.get("training_guidance_scale", one["guidance_scale"])}
            for one in results
            if one.get(across) is not None and one.get(up) is not None
        ]
        if len({one["w"] for one in some}) < 2:
            continue
        figure, (panel,) = _figure(1)
        for name, line in _series(some, "w", [across, up]).items():
            x, y = [one[across] for one in line], [COLUMNS[up].scale * one[up] for one in line]
            panel.plot(x, y, "o-", label=name)
            for one, *place in zip(line, x, y, strict=True):
                panel.annotate(f"w={one['w']:g}", place, fontsize="small")
        panel.set(xlabel=COLUMNS[across].head, ylabel=COLUMNS[up].head)
        panel.legend(fontsize="small")
        return figure
    return None


def _plot_curves(results: Sequence[dict]):
    panels_of = {"delta": ("δ(t, 20)", "linear"), "endpoint_error": ("endpoint error", "log")}
    keys = [key for key in panels_of if any(one.get(key) for one in results)]
    if not keys:
        return None
    figure, panels = _figure(len(keys))
    for panel, key in zip(panels, keys, strict=True):
        title, scale = panels_of[key]
        for one in results:
            if one.get(key):
                points = sorted((int(t), value) for t, value in one[key].items())
                panel.plot(*zip(*points, strict=True), "o-", markersize=3, label=method(one))
        panel.set(xlabel="t", ylabel=f"{title} (↓)", yscale=scale)
        panel.legend(fontsize="small")
    return figure


def write(file: Path, text: str) -> None:
    """Whole or not at all."""
    with whole_file(file) as place:
        place.write_text(text, encoding="utf-8")
