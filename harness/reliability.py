"""The figures of the long tests (`python dev.py test --long`), in docs/results/reliability.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "docs" / "results" / "reliability.json"
# What is added up over the parts, and what is true of a whole only if it is of every part.
SUMS = (
    *("kills", "kills_bit_exact", "fuzz_files", "fuzz_failures", "hostile_graphs", "server_deaths", "soak_prompts"),
    "control_pictures",
)
LARGEST, EVERY = "memory_growth", "control_pictures_identical"


def note(part: str, figures: dict[str, Any], file: Path = FILE) -> None:
    """Puts the figures of one long test in place of its last ones, and the whole's totals in front."""
    parts = json.loads(file.read_text(encoding="utf-8"))["parts"] if file.is_file() else {}
    parts = dict(sorted((parts | {part: figures}).items()))
    whole: dict[str, Any] = {name: sum(one.get(name, 0) for one in parts.values()) for name in SUMS}
    whole[LARGEST] = max((one[LARGEST] for one in parts.values() if LARGEST in one), default=None)
    whole[EVERY] = all(one.get(EVERY, True) for one in parts.values())
    file.write_text(json.dumps({**whole, "parts": parts}, indent=2) + "\n", encoding="utf-8")
