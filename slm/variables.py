"""This process's environment variables, as they are at one moment."""

import os


def variables() -> dict[str, str]:
    """All of them; `{**os.environ}` raises KeyError if one is unset meanwhile.

    MLflow 3.17 sets and unsets its telemetry's from a thread of its own.
    """
    found = {name: os.environ.get(name) for name in list(os.environ)}
    return {name: value for name, value in found.items() if value is not None}
