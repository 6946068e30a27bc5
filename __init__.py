"""ComfyUI's entry. The host is imported only when it asks for the nodes, so that anything else may import this file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension | None:
    try:
        from .nodes import SPLAMExtension
    except ImportError as error:
        import logging

        logging.warning(f"ComfyUI-SPLAM: this ComfyUI is too old or too new for it ({error}). Update both.")
        return None
    return SPLAMExtension()
