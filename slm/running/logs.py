"""What the project says while it works: plain lines on stderr."""

import logging


def set_up_logging() -> None:
    """Show the project's log, each line with the time."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("slm")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
