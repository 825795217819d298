"""Parse `model.source` into one of the kinds of source, and pin what it names."""

from pathlib import Path
from typing import Any, ClassVar, Protocol

from slm.config.model import Model
from slm.errors import InputError
from slm.sources.folder import Folder
from slm.sources.hub import Hub
from slm.sources.package import Package
from slm.sources.stored import Stored
from slm.sources.verify import key_of


class Source(Protocol):
    """A place that holds a checkpoint or an adapter.

    `form` shows how such a source is written. `revision` cannot move: a commit, a version, or a
    digest of the files; it is "" if only the brought files tell it. `pinned` is the source as
    provenance records it: with the revision if it has a place for one, without secrets, and without
    a path on this machine.
    """

    form: ClassVar[str]

    @property
    def revision(self) -> str: ...

    @property
    def pinned(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its content from that of others; for a folder, not where it lies."""

    @property
    def training(self) -> dict[str, str]:
        """The MLflow run that trained it: see Provenance; empty if none is known."""

    @classmethod
    def parse(cls, uri: str, model: Model) -> "Source | None":
        """The source that a URI names, pinned; None if it is of another kind."""

    def names(self) -> list[str]:
        """The files to take: of a checkpoint, of an adapter, or a GGUF and its chat template."""

    def licence(self) -> str | None:
        """The licence that the source states beside its files; None if it states none."""

    def weights_gb(self) -> float | None:
        """Size of its safetensors or GGUF, in GB, before it is brought; None if it is not known."""

    def take(self, names: list[str], folder: Path) -> Path:
        """Bring some of its files; return where they lie: in `folder`, in a cache, or as they are.

        `folder` is for what has to be copied from elsewhere.
        """

    def require_unchanged(self, names: list[str]) -> None:
        """Raise InputError if files changed since the source was pinned, so that copies are mixed.

        To be called once all are copied.
        """


SOURCES: tuple[type[Source], ...] = (Hub, Package, Stored, Folder)


def resolve(uri: str, model: Model) -> Source:
    """The source at `model.source` or `model.adapter`; InputError if it is of no known kind."""
    for kind in SOURCES:
        if source := kind.parse(uri, model):
            return source
    valid = ", ".join(kind.form for kind in SOURCES)
    raise InputError(f"{key_of(uri, model)}={uri} is not a source; valid: {valid}.")
