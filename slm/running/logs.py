"""What the project says while it works: plain lines on stderr, without secrets."""

import logging

from slm.redaction import redacted


class Redacting(logging.Formatter):
    """Tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def set_up_logging() -> None:
    """Show the project's log, each line with the time."""
    handler = logging.StreamHandler()
    handler.setFormatter(Redacting("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("slm")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
