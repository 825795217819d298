"""Errors whose message is for the user: one line that says what was wrong, found, and to be done.

Every other exception is a fault of this project or of a library, and is shown with its traceback,
unless `words_for` can name it and its cure.
"""

import errno

from mlflow.exceptions import MlflowException


class UserError(Exception):
    """The base of the errors that are shown as one line."""


class InputError(UserError, ValueError):
    """What the user gave (a source, a setting, a file, a URI) is wrong."""


class StepError(UserError, RuntimeError):
    """A step cannot do its work, for a reason that it can name."""


class ToldError(StepError):
    """A step failed in a process of its own, and printed why."""


class UnreachableError(UserError, ConnectionError):
    """A server (the model hub, the tracking server, the package index) does not answer."""


def words_for(error: BaseException) -> str | None:
    """The error in one line with its cure; None for an error that nobody expected."""
    text = one_line(error)
    number = getattr(error, "errno", None)
    if isinstance(error, UserError):
        return text
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return (
            f"the disk is full ({text}). Free space there, or set paths.work to a folder with more."
        )
    if isinstance(error, PermissionError) or number == errno.EROFS:
        return f"cannot write ({text}). Set paths.work to a folder that you may write to."
    if isinstance(error, MlflowException):
        if error.error_code != "INTERNAL_ERROR":
            return f"MLflow refuses: {text}"
        if "API request to" in text or "Max retries exceeded" in text:
            return f"the tracking server stopped answering: {text[:300]}. Run it again."
    return None


def one_line(error: BaseException) -> str:
    """The message of any exception in one line, its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
