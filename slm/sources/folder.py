"""A checkpoint or an adapter in a local folder, or a GGUF file."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slm.config.common import ROOT
from slm.config.model import Model
from slm.digests import LOCAL_FOLDER, digest_file, digest_of
from slm.errors import InputError
from slm.sources.gguf import template_beside
from slm.sources.verify import holds_weights, key_of, require_same, taken_names


@dataclass(frozen=True)
class Folder:
    """A folder's wanted files, or one GGUF file of it; `digests` are their SHA-256 by name.

    The same files in another folder are the same revision.
    """

    path: str
    digests: dict[str, str]

    form: ClassVar[str] = "a local folder, or a path to a .gguf file"

    @property
    def revision(self) -> str:
        return digest_of(self.digests)

    @property
    def pinned(self) -> str:
        return "a local GGUF file" if self.names()[0].endswith(".gguf") else LOCAL_FOLDER

    @property
    def training(self) -> dict[str, str]:
        return {}

    @property
    def identity(self) -> dict[str, str]:
        return {"revision": self.revision}

    @classmethod
    def parse(cls, uri: str, model: Model) -> "Folder | None":
        if "://" in uri:
            return None
        path = ROOT / Path(uri).expanduser()
        if path.suffix == ".gguf" and path.is_file():
            folder = path.parent
            taken = [path.name, *template_beside(path.name, files_in(folder))]
        elif path.is_dir():
            folder, taken = path, taken_names(files_in(path), uri, model, lambda n: str(path / n))
        else:
            raise InputError(
                f"{key_of(uri, model)}={uri}: no such folder. Give the folder of a checkpoint, "
                "or the path of a .gguf file."
            )
        return cls(str(folder), digests_in(folder, taken))

    def names(self) -> list[str]:
        return list(self.digests)

    def licence(self) -> str | None:
        return None

    def weights_gb(self) -> float | None:
        weights = filter(holds_weights, self.digests)
        sizes = [(Path(self.path) / name).stat().st_size for name in weights]
        return sum(sizes) / 1e9 if sizes else None

    def take(self, names: list[str], folder: Path) -> Path:
        return Path(self.path)

    def require_unchanged(self, names: list[str]) -> None:
        """Their digests; a file is read for it only if it was written to since it was pinned."""
        before = {name: self.digests[name] for name in names}
        require_same(before, digests_in(Path(self.path), names), self.path)


def digests_in(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: digest_file(folder / name) for name in names if (folder / name).is_file()}


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]
