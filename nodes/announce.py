"""One sentence for the user: in the log, and as text on the node that is running."""

import logging

from comfy_execution.utils import get_executing_context
from server import PromptServer


def warn(text: str) -> None:
    """Logs a warning and shows it on the node."""
    logging.warning(text)
    show(text)


def tell(text: str) -> None:
    """Logs at the everyday level and shows it on the node."""
    logging.info(text)
    show(text)


def show(text: str) -> None:
    """Shows it on the node alone, as often as it changes."""
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id, server.client_id)
