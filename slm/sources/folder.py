"""A checkpoint in a local folder, or a GGUF file."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slm.config import ROOT, Model
from slm.digests import LOCAL_FOLDER, digest_file, digest_of
from slm.errors import InputError
from slm.sources.gguf import dequantize, template_beside
from slm.sources.verify import (
    Declared,
    is_weights,
    place_description,
    place_weights,
    require_known,
    require_safetensors,
    wanted_names,
)


@dataclass(frozen=True)
class Folder:
    """A folder's wanted files, or one GGUF file of it; `revision` is the digest of what is taken.

    The same files in another folder are the same revision.
    """

    path: str
    names: tuple[str, ...]
    revision: str

    form: ClassVar[str] = "a local folder, or a path to a .gguf file"

    @property
    def pinned(self) -> str:
        return "a local GGUF file" if self.names[0].endswith(".gguf") else LOCAL_FOLDER

    @property
    def identity(self) -> dict[str, str]:
        return {"revision": self.revision}

    @classmethod
    def parse(cls, model: Model) -> "Folder | None":
        if "://" in model.source:
            return None
        path = ROOT / Path(model.source).expanduser()
        if path.suffix == ".gguf" and path.is_file():
            folder, taken = path.parent, [path.name]
        elif path.is_dir():
            folder, taken = path, names_to_take(path, model)
        else:
            raise InputError(
                f"model.source={model.source}: no such folder. Give the folder of a checkpoint, "
                "or the path of a .gguf file."
            )
        read = [*taken, *template_beside(folder, taken)]
        digests = {name: digest_file(folder / name) for name in read}
        return cls(str(folder), tuple(taken), digest_of(digests))

    def weights_gb(self) -> float | None:
        sizes = [(Path(self.path) / name).stat().st_size for name in filter(is_weights, self.names)]
        return sum(sizes) / 1e9 if sizes else None

    def bring(self, model: Model, checkpoint: Path) -> Declared:
        folder, names = Path(self.path), list(self.names)
        require_known(names, model)
        if names[0].endswith(".gguf"):
            return dequantize(folder / names[0], model, checkpoint)
        place_description(folder, names, model, checkpoint)
        place_weights(folder, names, model, checkpoint)
        return Declared()


def names_to_take(folder: Path, model: Model) -> list[str]:
    """The files of a safetensors checkpoint, else the one GGUF file in the folder."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if any(map(is_weights, names)) or not ggufs:
        require_safetensors(names, model.source)
        return wanted_names(names)
    if len(ggufs) > 1:
        raise InputError(
            f"{model.source} holds {len(ggufs)} GGUF files: {', '.join(ggufs)}. Choose one by its "
            f"path: model.source={folder / ggufs[0]}"
        )
    return ggufs
