"""A checkpoint or an adapter in MLflow, in a cloud's storage, or on a web server."""

import functools
import uuid
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from slm.config.model import Model
from slm.digests import digest_of
from slm.errors import InputError, UnreachableError
from slm.sources import mlflow_uri, remote
from slm.sources.artifacts import Listed
from slm.sources.gguf import template_beside
from slm.sources.verify import holds_weights, key_of, require_same, taken_names


@dataclass(frozen=True)
class Stored:
    """Files of a store by the name that they have in a checkpoint; the revision is their content.

    `base` is the source of an adapter's base, where MLflow recorded it.
    """

    pinned: str
    files: dict[str, Listed]
    store: remote.Store
    training: dict[str, str] = field(default_factory=dict)
    base: str = ""
    revision: str = ""

    form: ClassVar[str] = ", ".join((*mlflow_uri.FORMS, *remote.FORMS))

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Files without a mark count as changed in each run."""
        files = {
            name: [listed.size, listed.mark or uuid.uuid4().hex]
            for name, listed in self.files.items()
        }
        return {"source": self.pinned, "files": digest_of(files), "training": self.training}

    @classmethod
    def parse(cls, uri: str, model: Model) -> "Stored | None":
        found = mlflow_uri.find(uri, model) or remote.find(uri)
        if found is None:
            return None
        listed: dict[str, Listed] = {}
        for folder in found.folders:
            listed |= found.store.files_in(folder)
        if not listed:
            raise InputError(
                f"{key_of(uri, model)}={uri} holds no files. Give the folder of a checkpoint, or "
                "the path of a .gguf file."
            )
        if found.file and found.file not in listed:
            raise InputError(f"{uri}: there are {', '.join(sorted(listed)[:5])}, and no such file.")
        names = (
            [found.file, *template_beside(found.file, list(listed))]
            if found.file
            else (taken_names(list(listed), uri, model, lambda name: f"{uri.rstrip('/')}/{name}"))
        )
        taken = {name: listed[name] for name in names}
        return cls(found.pinned, taken, found.store, found.training, found.base)

    def names(self) -> list[str]:
        return list(self.files)

    def licence(self) -> str | None:
        return None

    def weights_gb(self) -> float | None:
        return sum(f.size for name, f in self.files.items() if holds_weights(name)) / 1e9 or None

    def take(self, names: list[str], folder: Path) -> Path:
        for name in names:
            try:
                self.store.take(self.files[name], folder / name)
            except UnreachableError:  # of another size, say
                self.require_unchanged([name])
                raise
        return folder

    def require_unchanged(self, names: list[str]) -> None:
        before = {self.files[name].path: self.files[name] for name in names}
        after: dict[str, Listed] = {}
        for folder in {str(PurePosixPath(path).parent) for path in before}:
            found = self.store.files_in("" if folder == "." else folder)
            after |= {file.path: file for file in found.values()}
        require_same(before, after, self.pinned)
