"""Errors whose message is for the user: one line that says what was wrong, found, and to be done.

Every other exception is a fault of this project or of a library, and is shown with its traceback,
unless `words_for` can name it and its cure.
"""

import errno

from mlflow.exceptions import MlflowException

from slm.redaction import redacted

AWAY = (
    "API request to",
    "Max retries exceeded",
    "Failed to download artifacts",
    "failures occurred while downloading",
)
NO_CREDENTIALS = "Reading Databricks credential configuration failed"  # MLflow's
OUT_OF_MEMORY = "can't allocate memory"  # torch's words


class UserError(Exception):
    """The base of the errors that are shown as one line; a command exits with its `exit_code`."""

    exit_code = 1


class InputError(UserError, ValueError):
    """What the user gave (a source, a setting, a file, a URI) is wrong."""

    exit_code = 2


class StepError(UserError, RuntimeError):
    """A step cannot do its work, for a reason that it can name."""


class VerdictError(StepError):
    """A model failed its evaluation."""

    exit_code = 3


class ToldError(StepError):
    """A step failed in a process of its own, which printed why, and exited with `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class InfrastructureError(UserError):
    """What the run stands on failed it; run again once it is mended, and what was done is kept."""

    exit_code = 4


class KilledError(InfrastructureError):
    """A process that works for this one was killed from outside; `what` names it."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} was killed, most likely for lack of memory (`-e plan` says what it takes). "
            "Run it again where there is more."
        )


class UnreachableError(InfrastructureError, ConnectionError):
    """A server (the model hub, the tracking server, the package index) does not answer."""


def error_of(message: str, exit_code: int) -> UserError:
    """The error with which another process of this project ended."""
    kinds = (InputError, VerdictError, InfrastructureError)
    return next((kind for kind in kinds if kind.exit_code == exit_code), StepError)(message)


def as_user_error(error: BaseException) -> UserError | None:
    """The error as one for the user, with its cure; None for an error that nobody expected."""
    if isinstance(error, UserError):
        return error
    text, number = one_line(error), getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return InfrastructureError(
            f"the disk is full ({text}). Free space there, or set paths.work to a folder with more."
        )
    if isinstance(error, MemoryError) or number == errno.ENOMEM or OUT_OF_MEMORY in text:
        return InfrastructureError(
            f"there is not enough memory ({text[:300]}). `-e plan` says what a step takes; run it "
            "again where there is more."
        )
    if isinstance(error, PermissionError) or number == errno.EROFS:
        return InfrastructureError(
            f"cannot write ({text}). Set paths.work to a folder that you may write to."
        )
    if isinstance(error, MlflowException):
        if NO_CREDENTIALS in text:
            return InputError(
                "no credentials of a Databricks workspace were found. Set DATABRICKS_HOST and "
                "DATABRICKS_TOKEN, or DATABRICKS_CONFIG_PROFILE."
            )
        if error.error_code != "INTERNAL_ERROR":
            return StepError(f"MLflow refuses: {text}")
        if is_away(text):
            return UnreachableError(
                f"the tracking server stopped answering: {text[:300]}. Run it again."
            )
    return None


def is_away(text: str) -> bool:
    """Whether MLflow's words, or an error with them in it, are of a server that stopped answering.

    MLflow 3.17 tries a request again for minutes, but no download that was cut short.
    """
    return any(words in text for words in AWAY)


def told_of(error: BaseException) -> tuple[str, int]:
    """What is said of an error in one line, and the exit code of a command that ends with it."""
    known = as_user_error(error)
    if known is None:
        return f"{type(error).__name__}: {one_line(error)}", UserError.exit_code
    return one_line(known), known.exit_code


def words_for(error: BaseException) -> str | None:
    """The error in one line with its cure; None for an error that nobody expected."""
    found = as_user_error(error)
    return None if found is None else one_line(found)


def one_line(error: BaseException) -> str:
    """The message of any exception in one line, without secrets; its type where it has none."""
    return redacted(" ".join(str(error).split())) or type(error).__name__
