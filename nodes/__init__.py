"""The ComfyUI nodes: a schema and one call each. Imports are relative: ComfyUI has a module `nodes` of its own."""

import importlib
import logging
import sys
from pathlib import Path

from comfy_api.latest import ComfyExtension, io

# The modules of the nodes, each with what it offers; `register` puts sampler and scheduler into the host's lists.
OFFERS = {
    "distil": ("SPLAMDistil",),
    "distil_report": ("SPLAMDistilReport",),
    "fetch": ("SPLAMFetch",),
    "loader": ("SPLAMLoader",),
    "lora": ("SPLAMLoraLoader",),
    "model_patch": ("SPLAMModelPatch",),
    "negative_prompt": ("SPLAMNegativePrompt",),
    "sampler": ("SPLAMSampler",),
    "custom_sampling": ("SPLAMSamplerSelect", "SPLAMScheduler"),
}


class SPLAMExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        if other := _other_copy():
            logging.warning(
                f"ComfyUI-SPLAM: there are two copies in custom_nodes, {other.name} and {_HERE.name}. The first is "
                "used, the second adds nothing: remove one, and restart."
            )
            return []
        return offered()


_HERE = Path(__file__).parents[1]


def offered() -> list[type[io.ComfyNode]]:
    """The nodes that this ComfyUI can run. One sentence says which it cannot, for want of what in it."""
    found: list[type[io.ComfyNode]] = []
    lost: list[str] = []
    reason = ""
    for module, names in OFFERS.items():
        try:
            room = importlib.import_module(f".{module}", __name__)
            nodes = [getattr(room, name) for name in names]
            for node in nodes:
                node.GET_SCHEMA()  # which asks the host for its kinds of inputs
            found += nodes
        except (ImportError, AttributeError) as error:
            lost, reason = [*lost, *names], reason or str(error).partition(" (")[0]
    try:
        importlib.import_module(".few_step", __name__).register()
    except (ImportError, AttributeError) as error:
        lost, reason = [*lost, "the sampler and scheduler 'splam'"], reason or str(error).partition(" (")[0]
    if lost:
        logging.warning(
            f"ComfyUI-SPLAM: this ComfyUI does not fit {', '.join(lost)}, which are left out ({reason}); the others "
            "work. Update ComfyUI and this pack."
        )
    return found


def _other_copy() -> Path | None:
    """The folder of another copy of this pack that the host has loaded before."""
    known = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get("SPLAMLoader")
    file = getattr(sys.modules.get(getattr(known, "__module__", "")), "__file__", None)
    other = Path(file).parents[1] if file else _HERE
    return None if other == _HERE else other
