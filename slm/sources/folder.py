"""A checkpoint or an adapter in a local folder, or a GGUF file."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slm.config.common import ROOT
from slm.config.model import Model
from slm.digests import LOCAL_FOLDER, digest_file, digest_of
from slm.errors import InputError
from slm.sources.gguf import template_beside
from slm.sources.verify import holds_weights, key_of, taken_names


@dataclass(frozen=True)
class Folder:
    """A folder's wanted files, or one GGUF file of it; `revision` is the digest of what is taken.

    The same files in another folder are the same revision.
    """

    path: str
    taken: tuple[str, ...]
    revision: str

    form: ClassVar[str] = "a local folder, or a path to a .gguf file"

    @property
    def pinned(self) -> str:
        return "a local GGUF file" if self.taken[0].endswith(".gguf") else LOCAL_FOLDER

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
        digests = {name: digest_file(folder / name) for name in taken}
        return cls(str(folder), tuple(taken), digest_of(digests))

    def names(self) -> list[str]:
        return list(self.taken)

    def licence(self) -> str | None:
        return None

    def weights_gb(self) -> float | None:
        sizes = [
            (Path(self.path) / name).stat().st_size for name in filter(holds_weights, self.taken)
        ]
        return sum(sizes) / 1e9 if sizes else None

    def take(self, names: list[str], folder: Path) -> Path:
        return Path(self.path)


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]
