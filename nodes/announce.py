"""One sentence for the user: in the log, and as text on the node that is running."""

import logging

import server
from comfy_execution.utils import get_executing_context


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
    # A host without it has the sentence in its log, and the node.
    context, running = get_executing_context(), getattr(getattr(server, "PromptServer", None), "instance", None)
    if context is not None and running is not None:
        running.send_progress_text(text, context.node_id, running.client_id)
