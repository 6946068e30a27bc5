"""What `benchmarks.reproduction` measured, as docs/results/*.json, plots, and the tables of docs/reproduction.md.

    python -m benchmarks.reproduction_report --work-dir runs/reproduction --docs docs

A table stands in the page between `<!-- NAME -->` and `<!-- end -->`, and is written anew; the words around it stay.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

from harness.server import ROOT

from .reproduction import ALL, GROUPS, GUIDANCE, LONG, SHORT, TEACHER_W
from .reproduction_plots import save_plots
from .reproduction_results import (
    HEADLINE,
    LCM,
    MULTIPLE,
    RECIPES,
    SINGLE,
    TIMESTEPS,
    Results,
    Row,
    at_iteration,
    error,
    reach,
)


def quality(results: Results) -> list[dict[str, Any]]:
    """docs/results/comparison.json: the recipes against the paper's LCM at the same budget, seed by seed."""
    teacher = results.where(group="teacher", method="teacher", guidance_scale=TEACHER_W).values("frechet_distance")[0]
    lcm = results.where(group=LCM[0], method=LCM[1])
    return [
        _against(recipe, results.where(group=group, method=method), lcm, teacher)
        for recipe, (group, method) in RECIPES.items()
        if results.where(group=group, method=method).rows
    ]


def _against(recipe: str, ours: Results, lcm: Results, teacher: float) -> dict[str, Any]:
    """Means over seeds of ratios to LCM of the same seed; null where a seed never got there."""
    seeds = [seed for seed in ours.seeds() if seed in lcm.seeds()]
    entry: dict[str, Any] = {"recipe": recipe, "unet_forwards": LONG, "seeds": seeds}

    def last(one: Results, seed: int, steps: int, key: str) -> float:
        return one.where(seed=seed, steps=steps).near(LONG).values(key)[0]

    def add(name: str, of: Callable[[int], float | None]) -> None:
        values = [of(seed) for seed in seeds]
        entry[name] = None if None in values else mean(values)
        entry[f"{name}_by_seed"] = values

    for key, name in (
        ("frechet_distance", "ratio"),
        ("frechet_distance_clipped", "clipped_ratio"),
        ("frechet_distance_teacher", "ratio_by_teacher_pictures"),
        ("frechet_distance_teacher_clipped", "clipped_ratio_by_teacher_pictures"),
    ):
        for steps in (1, 2, 4):
            add(
                f"{name}_to_lcm_{steps}",
                lambda seed, steps=steps, key=key: last(ours, seed, steps, key) / last(lcm, seed, steps, key),
            )
    key = "frechet_distance"
    add("ratio_to_teacher50_4", lambda seed: last(ours, seed, 4, key) / teacher)
    add("ratio_at_2_to_lcm_at_4", lambda seed: last(ours, seed, 2, key) / last(lcm, seed, 4, key))
    for t in TIMESTEPS:

        def ratio(seed: int, t: str = t) -> float:
            a, b = (one.curve(seed)[-1]["endpoint_error"][t] for one in (ours, lcm))
            return a / b

        add(f"endpoint_error_to_lcm_{t}", ratio)

    def compute(seed: int) -> float | None:
        best = min(lcm.curve(seed), key=error)
        found = reach(ours.curve(seed), error(best))
        return None if found is None else found / best["unet_forwards"]

    add("compute_to_reach_lcm_best", compute)
    return entry


def figures(results: Results) -> list[Row]:
    """docs/results/reproduction.json: every measurement, under each figure that it belongs to."""
    keys = (
        "figure",
        "method",
        "group",
        "k",
        "multiple_estimation",
        "steps",
        "seed",
        "teacher_evaluations",
        "iterations",
    )
    found: list[Row] = []

    def add(figure: str, rows: Iterable[Row]) -> None:
        for row in rows:
            row = {"figure": figure, **row}
            found.append({**{key: row.get(key) for key in keys}, **row})

    pictures, curves = results.having("attribute_accuracy"), results.having("endpoint_error")
    final = [row for group, method in HEADLINE for row in pictures.where(group=group, method=method).near(LONG).rows]
    teacher = pictures.where(group="teacher")
    add("table1", [*teacher.where(guidance_scale=TEACHER_W).rows, *final])
    add("table3", [row for row in final if row["group"] == "k100"])
    for k in SINGLE:
        for group in dict.fromkeys((SINGLE[k], MULTIPLE.get(k, SINGLE[k]))):
            for method in ("lcm", "splam-noise-level"):
                one = results.where(group=group, method=method, seed=0).near(SHORT)
                add("fig2a", one.rows)
    long = [name for name, group in GROUPS.items() if group.budget == LONG]
    add("fig2b", [row for row in curves.rows if row["group"] in long])
    add("fig2c", results.having("delta").rows)
    for w in GUIDANCE:
        group = "k100" if w == TEACHER_W else f"fig3-w{w:g}"
        for method in ("lcm", "splam-noise-level"):
            add("fig3", results.where(group=group, method=method, seed=0).near(SHORT).rows)
        add("fig3", teacher.where(method="teacher", guidance_scale=w).rows)
    add("embedding", [row for row in results.rows if row["group"] in ("bandwidth", "embedding-half")])
    add("embedding", results.where(group="k100", method="splam-embedding-10000").rows)
    add("sampling", results.where(group="sampling").rows)
    return found


def _cell(values: Sequence[float], digits: int = 3, scale: float = 1.0) -> str:
    """The mean, and the range where there are several."""
    if not values:
        return ""
    values = [scale * value for value in values]
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _pictures_table(results: Results, key: str, digits: int = 3, scale: float = 1.0) -> str:
    rows = []
    base = results.where(group="teacher", guidance_scale=TEACHER_W)
    for method, name in (
        ("ddim", "DDIM, guided (2 evaluations a step)"),
        ("dpm-solver++", "DPM-Solver++(2M), guided"),
        ("teacher-undistilled", "undistilled, the few-step sampler"),
    ):
        cells = [_cell(base.where(method=method, steps=steps).values(key), digits, scale) for steps in ALL]
        rows.append([name, *cells])
    for (group, method), name in HEADLINE.items():
        one = results.where(group=group, method=method).near(LONG)
        rows.append([name, *(_cell(one.where(steps=steps).values(key), digits, scale) for steps in ALL)])
    rows.append(["teacher, DDIM 50 steps", "", "", "", _cell(base.where(method="teacher").values(key), digits, scale)])
    return _table(["", "1 step", "2 steps", "4 steps", "8 steps"], rows)


def _endpoint_table(results: Results) -> str:
    few = min(
        (row["iterations"] for row in results.where(group="k100").near(LONG).rows), default=0
    )  # iterations of the dearest students
    rows = []
    for (group, method), name in HEADLINE.items():
        one = results.where(group=group, method=method).having("endpoint_error")
        last = one.near(LONG)
        if not last.rows:
            continue
        cells = [_cell([row["endpoint_error"][t] for row in last.rows]) for t in TIMESTEPS]
        equal = [at_iteration(one.curve(seed), few) for seed in one.seeds()]
        known = [value for value in equal if value is not None]
        iterations = str(last.rows[0]["iterations"])
        rows.append([name, iterations, *cells, _cell([error(row) for row in last.rows]), _cell(known)])
    start = results.where(group="teacher", guidance_scale=TEACHER_W).having("endpoint_error_unguided").rows
    for row in start:
        values = row["endpoint_error_unguided"]
        cells = [f"{values[t]:.3f}" for t in TIMESTEPS]
        rows.append(["before training", "0", *cells, f"{geometric_mean(values.values()):.3f}", ""])
    heads = ["", "iterations", *(f"t = {t}" for t in TIMESTEPS), "geometric mean", f"after {few} iterations"]
    return _table(heads, rows)


def _table3(results: Results) -> str:
    rows = []
    paper = {"lcm": "14.53", "dl-embedding": "13.89", "splam-embedding": "13.39"}
    lcm = results.where(group="k100", method="lcm").near(LONG)
    for method, name in (("lcm", "LCM"), ("dl-embedding", "DL"), ("splam-embedding", "SL (SPLAM)")):
        one = results.where(group="k100", method=method).near(LONG)
        cells = []
        for steps in (2, 4):
            ours, theirs = (of.where(steps=steps).values("frechet_distance") for of in (one, lcm))
            cells.append(_cell([a / b for a, b in zip(ours, theirs, strict=False)], 2))
        ratios = [
            error(a) / error(b)
            for a, b in zip(one.having("endpoint_error").rows, lcm.having("endpoint_error").rows, strict=False)
        ]
        rows.append([name, *cells, _cell(ratios, 2), f"{float(paper[method]) / 14.53:.2f} ({paper[method]})"])
    heads = ["", "Frechet distance / LCM's, 2 steps", "4 steps", "endpoint error / LCM's", "the paper's FID / LCM's"]
    return _table(heads, rows)


def _fig2a(results: Results) -> str:
    rows = []
    for k in SINGLE:
        for groups, me in ((SINGLE, "no"), (MULTIPLE, "yes")):
            if k not in groups:
                continue
            cells = []
            for method in ("lcm", "splam-noise-level"):
                one = results.where(group=groups[k], method=method, seed=0).near(SHORT)
                last = one.having("endpoint_error").rows
                cells += [
                    _cell([error(row) for row in last]),
                    _cell(one.where(steps=4).values("frechet_distance")),
                    _cell(one.where(steps=4).values("attribute_accuracy"), 1, 100),
                ]
                count = str(last[0]["iterations"]) if last else ""
            rows.append([f"{k}", me, count, *cells])
    heads = ["k", "ME", "iterations"]
    for name in ("LCM", "SPLAM"):
        heads += [f"{name}: endpoint error", "Frechet distance", "right, %"]
    return _table(heads, rows)


def _fig3(results: Results) -> str:
    rows = []
    for w in GUIDANCE:
        group = "k100" if w == TEACHER_W else f"fig3-w{w:g}"
        cells = []
        for method in ("lcm", "splam-noise-level"):
            one = results.where(group=group, method=method, seed=0, steps=4).near(SHORT)
            cells += [
                _cell(one.values("attribute_accuracy"), 1, 100),
                _cell(one.values("frechet_distance")),
                _cell(one.values("frechet_distance_teacher")),
            ]
        teacher = results.where(group="teacher", method="teacher", guidance_scale=w)
        cells += [_cell(teacher.values("attribute_accuracy"), 1, 100), _cell(teacher.values("frechet_distance"))]
        rows.append([f"{w:g}", *cells])
    heads = ["w"]
    for name in ("LCM", "SPLAM"):
        heads += [f"{name}: right, %", "Frechet distance", "to the teacher's"]
    return _table([*heads, "teacher, 50 steps: right, %", "Frechet distance"], rows)


def _quality(entries: Sequence[dict[str, Any]]) -> str:
    names = {
        "ratio_to_lcm_1": "Frechet distance / LCM's, 1 step",
        "ratio_to_lcm_2": "the same, 2 steps (goal 0.86)",
        "ratio_to_lcm_4": "the same, 4 steps (goal 0.94)",
        "ratio_at_2_to_lcm_at_4": "at 2 steps / LCM's at 4 (goal 1)",
        "ratio_to_teacher50_4": "at 4 steps / the teacher's at 50 (goal 1.05)",
        **{
            f"clipped_ratio_by_teacher_pictures_to_lcm_{steps}": f"to the teacher's pictures, clipped / LCM's, {steps}"
            for steps in (1, 2, 4)
        },
        **{f"endpoint_error_to_lcm_{t}": f"endpoint error / LCM's, t = {t}" for t in TIMESTEPS},
        "compute_to_reach_lcm_best": "compute to reach LCM's best endpoint error (goal 0.375)",
    }
    rows = []
    for key, name in names.items():
        cells = [
            _cell(entry[f"{key}_by_seed"], 2)
            if entry[key] is not None
            else f"not reached in {sum(value is None for value in entry[f'{key}_by_seed'])} of {len(entry['seeds'])}"
            for entry in entries
        ]
        rows.append([name, *cells])
    return _table(["", *(f"`--recipe {entry['recipe']}`" for entry in entries)], rows)


def _embedding(results: Results) -> str:
    rows = []
    for group, method, name in (
        ("bandwidth", "splam-embedding-10", "embedding, bandwidth 10"),
        ("bandwidth", "splam-embedding-100", "embedding, bandwidth 100"),
        ("k100", "splam-embedding", "embedding, bandwidth 1000"),
        ("k100", "splam-embedding-10000", "embedding, bandwidth 10000"),
        ("embedding-half", "splam-embedding-half", "embedding, bandwidth 1000, gamma = 1 in half"),
        ("k100", "splam-noise-level", "noise level"),
        ("k100", "splam-noise-level-half", "noise level, gamma = 1 in half"),
    ):
        one = results.where(group=group, method=method, seed=0).near(SHORT)
        last = one.having("endpoint_error").rows
        cells = [_cell([row["endpoint_error"][t] for row in last]) for t in TIMESTEPS]
        accuracy = [_cell(one.where(steps=steps).values("attribute_accuracy"), 1, 100) for steps in (2, 4)]
        rows.append([name, *cells, *accuracy])
    heads = ["gamma by", *(f"t = {t}" for t in TIMESTEPS), "right at 2 steps, %", "at 4 steps, %"]
    return _table(heads, rows)


def _sampling(results: Results) -> str:
    rows = []
    for row in results.where(group="sampling").rows:
        how = "one noise for all steps" if row["noise_fixed"] else ""
        how = f"{row['refinements']} refinement{'s' * (row['refinements'] > 1)} a step" if row["refinements"] else how
        scores = (row["frechet_distance"], row["frechet_distance_teacher"])
        counts = str(row["steps"]), str(row["unet_evaluations_per_image"]), f"{100 * row['attribute_accuracy']:.1f}"
        rows.append([how, *counts, *(f"{value:.3f}" for value in scores)])
    return _table(["", "steps", "evaluations", "right, %", "Frechet distance", "to the teacher's pictures"], rows)


def tables(results: Results) -> dict[str, str]:
    return {
        "quality": _quality(quality(results)),
        "endpoint": _endpoint_table(results),
        "accuracy": _pictures_table(results, "attribute_accuracy", 1, 100),
        "frechet": _pictures_table(results, "frechet_distance"),
        "frechet-clipped": _pictures_table(results, "frechet_distance_clipped"),
        "frechet-teacher": _pictures_table(results, "frechet_distance_teacher"),
        "frechet-teacher-clipped": _pictures_table(results, "frechet_distance_teacher_clipped"),
        "table3": _table3(results),
        "fig2a": _fig2a(results),
        "fig3": _fig3(results),
        "embedding": _embedding(results),
        "sampling": _sampling(results),
    }


def fill(page: str, found: dict[str, str]) -> str:
    """The page with every table renewed. Raises KeyError for a name that is not a table's."""
    pattern = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
    return pattern.sub(lambda match: f"<!-- {match[1]} -->\n{found[match[1]]}\n<!-- end -->", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "reproduction")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    results = Results.read(options.work_dir)
    folder = options.docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("reproduction", figures(results)), ("comparison", quality(results))):
        lines = ",\n".join(json.dumps(_rounded(one)) for one in content)
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    save_plots(results, options.docs / "reproduction")
    page = options.docs / "reproduction.md"
    if page.exists():
        page.write_text(fill(page.read_text(encoding="utf-8"), tables(results)), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n{text}" for name, text in tables(results).items()))


def _rounded(value: Any) -> Any:
    """Six significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
