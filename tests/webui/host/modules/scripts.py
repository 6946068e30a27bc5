"""Script classes, how a file of them is loaded, and the runner that calls them for a request."""

import importlib.util
import sys
from pathlib import Path

from . import HOST

AlwaysVisible = object()


class Script:
    infotext_fields = None

    def title(self):
        raise NotImplementedError

    def show(self, is_img2img):
        return True

    def ui(self, is_img2img):
        return None

    def elem_id(self, name):
        return f"script_{name}"

    def before_process(self, p, *args):
        pass


def load_script(path):
    """As the hosts do: the extension's folder in front of sys.path, for good in Forge and reForge."""
    path, kept = Path(path), list(sys.path)
    sys.path.insert(0, str(path.parents[1]))
    try:
        spec = importlib.util.spec_from_file_location(path.name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        if HOST == "a1111":
            sys.path[:] = kept
    return [
        value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Script)
    ]  # fmt: skip


class ScriptRunner:
    def __init__(self, classes):
        self.alwayson = []
        self.values = {}
        for cls in classes:
            script = cls()
            if script.show(False) is AlwaysVisible:
                self.alwayson.append(script)
                self.values[script] = [component.value for component in script.ui(False) or []]

    def before_process(self, p):
        for script in self.alwayson:
            script.before_process(p, *(p.script_args or self.values[script]))
