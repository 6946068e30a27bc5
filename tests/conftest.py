"""The repository root on sys.path, so that tests import `splam_core` from wherever pytest is started."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
