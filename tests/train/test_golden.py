"""The losses of fifty steps on the embedded teacher, and of a short finish, as they were: what only moves code may not
move them.

    python dev.py python tests/train/test_golden.py --check    equal to the last bit, on the machine that wrote them
    python dev.py python tests/train/test_golden.py --write    after a change that is meant to change them

Another processor adds in another order, so that the test itself allows for rounding. With torch's kernels for AVX2 and
for no vector unit (ATEN_CPU_CAPABILITY) in place of AVX-512's the losses moved by at most 5e-5 of themselves.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

if __package__ in (None, ""):  # run by path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

GOLDEN = Path(__file__).with_name("golden_losses.json")
RUNS = {
    # A teacher in bf16, the default, rounds by other kernels on another processor: 2 % of a loss.
    "full": ["--teacher-dtype", "fp32"],
    "full, as in the paper": ["--teacher-dtype", "fp32", "--recipe", "paper"],
    "lora": ["--lora", "--lora-rank", "8"],
    "lora, as in the paper": ["--lora", "--lora-rank", "8", "--recipe", "paper"],
    "finish": [
        *("--teacher-dtype", "fp32", "--student", "embedded-student", "--max-train-steps", "0"),
        *("--finish", "distribution-matching", "--finish-steps", "6"),
    ],
}
STEPS = 50


def losses(flags: list[str], folder: Path) -> list[float]:
    import torch

    from training.distill import distill
    from training.run.config import parse

    torch.set_num_threads(1)
    distill(
        parse(
            [
                *("--teacher", "embedded", "--output-dir", str(folder), "--train-batch-size", "2"),
                *("--max-train-steps", str(STEPS), "--sample-every", "0", "--validation-samples", "0"),
                *("--max-samples", "64", "--report-to", "none", "--checkpointing-steps", "1000", *flags),
            ]
        )
    )
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["full", "lora, as in the paper", "finish"])
def test_the_losses_are_those_of_before(name, tmp_path):
    assert losses(RUNS[name], tmp_path / "run") == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {name: losses(flags, Path(folder) / str(index)) for index, (name, flags) in enumerate(RUNS.items())}
    if "--write" in sys.argv:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for name in RUNS:
        same = sum(one == other for one, other in zip(found[name], golden[name], strict=True))
        print(f"{name}: {same} of {len(golden[name])} losses equal to the bit")
    sys.exit(found != golden)
