"""Folders in a cloud's storage or on a web server."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from slm.redaction import redacted
from slm.sources.artifacts import Artifacts, Listed
from slm.sources.web import Web

FORMS = (
    "s3://bucket/folder",
    "gs://bucket/folder",
    "abfss://container@account.dfs.core.windows.net/folder",
    "dbfs:/Volumes/catalog/schema/volume/folder",
    "https://host/folder",
)


class Store(Protocol):
    """Files, listed by folder and brought one by one."""

    def files_in(self, folder: str = "") -> dict[str, Listed]: ...

    def take(self, listed: Listed, destination: Path) -> None: ...

    def read(self, listed: Listed) -> str:
        """The text of a small file."""


@dataclass(frozen=True)
class Found:
    """Where the files of a source lie in a store: in the last of the folders that has one.

    `file` is the one GGUF that is meant. `pinned`, `training` and `base` are those of Stored.
    """

    store: Store
    folders: tuple[str, ...]
    pinned: str
    file: str = ""
    training: dict[str, str] = field(default_factory=dict)
    base: str = ""


def find(uri: str) -> Found | None:
    """The folder, or the GGUF file, at a URI of a cloud or a web server; None for other URIs."""
    if not re.match(r"(s3|gs|abfss|https)://.|dbfs:/Volumes/.", uri):
        return None
    place, _, query = uri.partition("?")
    folder, file = place.rstrip("/"), ""
    if folder.endswith(".gguf"):
        folder, _, file = folder.rpartition("/")
    shown = redacted(uri)
    if uri.startswith("https:"):
        return Found(Web(folder, query, shown), ("",), redacted(place), file)
    return Found(Artifacts(folder, shown), ("",), redacted(place), file)
