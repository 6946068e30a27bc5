"""Called by ComfyUI-Manager once and by Automatic1111, Forge and reForge at every start.

There is nothing to install: the pack needs torch and safetensors, which each of these hosts has. It only says so when
that is not true.
"""

import importlib.util
import sys

if __name__ == "__main__":
    missing = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"ComfyUI-SPLAM: {sys.executable} has no {' and no '.join(missing)}. "
            "Run install.py with the Python of ComfyUI or of the web UI."
        )
