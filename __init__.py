"""ComfyUI's entry. The host is imported only when it asks for the nodes, so that anything else may import this file."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import SPLAMExtension

    return SPLAMExtension()
