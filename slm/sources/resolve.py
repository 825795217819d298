"""Parse `model.source` into one of the kinds of source, and pin what it names."""

from pathlib import Path
from typing import ClassVar, Protocol

from slm.config import Model
from slm.errors import InputError
from slm.sources.folder import Folder
from slm.sources.hub import Hub
from slm.sources.package import Package
from slm.sources.verify import Declared


class Source(Protocol):
    """A place that holds a checkpoint.

    `form` shows how such a source is written. `revision` cannot move: a commit, a version, or a
    digest of the files. `pinned` is the source as provenance records it: with the revision if it
    has a place for one, and without a path.
    """

    form: ClassVar[str]

    @property
    def revision(self) -> str: ...

    @property
    def pinned(self) -> str: ...

    @property
    def identity(self) -> dict[str, str]:
        """What tells its content from that of others; for a folder, not where it lies."""

    @classmethod
    def parse(cls, model: Model) -> "Source | None":
        """The source that `model.source` names, pinned; None if it is of another kind."""

    def weights_gb(self) -> float | None:
        """Size of its safetensors, in GB, without bringing them; None if it cannot be known."""

    def bring(self, model: Model, checkpoint: Path) -> Declared:
        """Put the checkpoint's files into a folder; return what else the source declares.

        What is cheap to check is checked before the weights are brought.
        """


SOURCES: tuple[type[Source], ...] = (Hub, Package, Folder)


def resolve(model: Model) -> Source:
    """The source of a model; InputError if `model.source` is of no known kind."""
    for kind in SOURCES:
        if source := kind.parse(model):
            return source
    valid = ", ".join(kind.form for kind in SOURCES)
    raise InputError(f"model.source={model.source} is not a source; valid: {valid}.")
