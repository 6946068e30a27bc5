"""The embedded pipeline's table: the teacher, the student at 1, 2, 4, 8 steps, and what bounds them.

    python -m benchmarks.scores --json docs/results/embedded.json

Each row is one `training/evaluate.py --protocol embedded` with the same captions and seeds. Rows that the file has
already are kept, so that an interrupted run goes on; --rows names the ones to make.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from training.evaluate import evaluate
from training.scoring.request import Request

ROWS = {
    "renders (the judge's ceiling)": {"model": "renders"},
    "reconstructions (the autoencoder's ceiling)": {"model": "reconstructions"},
    "teacher, DDIM 50 steps, w=3": {"model": "embedded-teacher", "sampler": "ddim", "steps": 50, "guidance_scale": 3.0},
    "student, 1 step": {"model": "embedded-student", "steps": 1},
    "student, 2 steps": {"model": "embedded-student", "steps": 2},
    "student, 4 steps": {"model": "embedded-student", "steps": 4},
    "student, 8 steps": {"model": "embedded-student", "steps": 8},
    "teacher undistilled, same sampler, 1 step": {"model": "embedded-teacher", "steps": 1},
    "teacher undistilled, same sampler, 2 steps": {"model": "embedded-teacher", "steps": 2},
    "teacher undistilled, same sampler, 4 steps": {"model": "embedded-teacher", "steps": 4},
    "teacher, DDIM 2 steps, w=3": {"model": "embedded-teacher", "sampler": "ddim", "steps": 2, "guidance_scale": 3.0},
    "teacher, DDIM 4 steps, w=3": {"model": "embedded-teacher", "sampler": "ddim", "steps": 4, "guidance_scale": 3.0},
}
COLUMNS = {
    "all right": "attribute_accuracy",
    "one object": "attribute_accuracy_one_object",
    "two objects": "attribute_accuracy_two_objects",
    "held out": "attribute_accuracy_held_out",
}


def table(results: dict[str, dict]) -> str:
    """Markdown: a row a result, accuracies in percent."""
    lines = [
        f"| | evaluations | {' | '.join(COLUMNS)} | Frechet distance |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 2),
    ]
    for name, result in results.items():
        cells = [f"{100 * result[key]:.1f} %" if key in result else "" for key in COLUMNS.values()]
        cells = [str(result["unet_evaluations_per_image"]), *cells, f"{result['frechet_distance']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    done = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {}
    results = {name: done[name] for name in ROWS if name in done}
    for name in options.rows:
        if name in results:
            continue
        row = ROWS[name]
        results[name] = evaluate(Request(**row, num_images=options.num_images, seed=options.seed))
        print(f"{name}: {100 * results[name]['attribute_accuracy']:.1f} %", flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table({name: results[name] for name in ROWS if name in results}))


if __name__ == "__main__":
    main()
