"""Python environments of given requirements, made once and kept in the work folder."""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from slm.digests import digest_of
from slm.errors import StepError
from slm.variables import variables

log = logging.getLogger("slm.environments")

# uv's names for what pip is told of package indexes by its own variables.
UV_SETTINGS = {
    "UV_FIND_LINKS": "PIP_FIND_LINKS",
    "UV_DEFAULT_INDEX": "PIP_INDEX_URL",
    "UV_INDEX": "PIP_EXTRA_INDEX_URL",
}


def environment_of(requirements: list[str], folder: Path) -> Path:
    """The Python of an environment that holds the requirements and nothing else.

    It lies in `folder` under the digest of the requirements, and is reused from there. uv makes it
    in seconds; if uv is absent or fails, pip does. Raises StepError if it cannot be made.
    """
    key = digest_of([sys.version, sys.prefix, *requirements])[:16]
    place = folder / key
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        ready = place / "ready"
        if not ready.is_file():
            log.info("building an environment of %s", ", ".join(requirements))
            if not made_by_uv(requirements, place, python):
                make_by_pip(requirements, place, python)
            ready.touch()
        with contextlib.suppress(OSError):  # of another user
            os.utime(place)  # it was used: `clean` removes the longest unused first
    return python


def made_by_uv(requirements: list[str], place: Path, python: Path) -> bool:
    """Whether uv is here and made the environment; it does not read pip's configuration files."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        return False
    shutil.rmtree(place, ignore_errors=True)
    told = {ours: os.environ[pips] for ours, pips in UV_SETTINGS.items() if pips in os.environ}
    environment = {**told, **variables()}
    commands = [
        [uv, "venv", "--quiet", "--python", sys.executable, str(place)],
        [uv, "pip", "install", "--quiet", "--python", str(python), *requirements],
    ]
    return all(
        subprocess.run(command, env=environment, capture_output=True).returncode == 0
        for command in commands
    )


def make_by_pip(requirements: list[str], place: Path, python: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(place)], "the environment cannot be made")
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    # Compiling all that is installed takes longer than installing it.
    run([*install, "--no-compile", *requirements], "the requirements cannot be installed")


def run(command: list[str], complaint: str) -> None:
    """Run a command; StepError with the end of its output if it fails."""
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        lines = (process.stderr or process.stdout).strip().splitlines()[-5:]
        raise StepError(f"{complaint}: {' '.join(lines)}")
