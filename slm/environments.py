"""Python environments of given requirements, made once and kept in the work folder."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from slm.digests import digest_of
from slm.errors import StepError

log = logging.getLogger("slm.environments")


def environment_of(requirements: list[str], folder: Path) -> Path:
    """The Python of an environment that holds the requirements and nothing else.

    It lies in `folder` under the digest of the requirements, and is reused from there. uv makes it
    if it is installed, else pip. Raises StepError if it cannot be made.
    """
    key = digest_of([sys.version, sys.prefix, *requirements])[:16]
    place = folder / key
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        ready = place / "ready"
        if not ready.is_file():
            log.info("building an environment of %s", ", ".join(requirements))
            shutil.rmtree(place, ignore_errors=True)
            for command, complaint in commands(requirements, place, python):
                run(command, complaint)
            ready.touch()
    return python


def commands(requirements: list[str], place: Path, python: Path) -> list[tuple[list[str], str]]:
    """What makes an environment, each command with what to say if it fails."""
    made, installed = "the environment cannot be made", "the requirements cannot be installed"
    if uv := shutil.which("uv"):
        return [
            ([uv, "venv", "--quiet", "--python", sys.executable, str(place)], made),
            ([uv, "pip", "install", "--quiet", "--python", str(python), *requirements], installed),
        ]
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    # Compiling all that is installed takes longer than installing it.
    install += ["--no-compile", *requirements]
    return [([sys.executable, "-m", "venv", str(place)], made), (install, installed)]


def run(command: list[str], complaint: str) -> None:
    """Run a command; StepError with the end of its output if it fails."""
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        lines = (process.stderr or process.stdout).strip().splitlines()[-5:]
        raise StepError(f"{complaint}: {' '.join(lines)}")
