"""SHA-256 digests, and provenance.json: the record of where a folder of weights came from.

provenance.json stands inside the folder that it describes, so that it travels with the folder: from
the checkpoint to the ONNX model made of it, and into the logged model.
"""

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm.errors import InputError

PROVENANCE = "provenance.json"
# Where files came from, which makes them no other ones.
ORIGIN = ("source", "revision", "training", "adapter")
LOCAL_FOLDER = "a local folder"  # as a source: the same files elsewhere are the same


@dataclass(frozen=True)
class Provenance:
    """Where a folder of weights came from, and the SHA-256 of its `files` by name.

    A checkpoint has a `source`. An ONNX folder has a `target`, and inside it the provenance of the
    `checkpoint` that it was exported from; `checked_on` is the execution provider that it generated
    on, or "none". `graph` is who made the graph, and `refused` why others were not taken, by name.
    `notes` say what was mended, and what of the checkpoint is not served. `training` names the
    MLflow run that trained the weights, if one is known (slm/sources/mlflow_uri.py), and `adapter`
    is what was merged into the source. Where ONNX folders for several targets are in one
    (slm/bundle.py), `parts` are theirs, by target.
    """

    files: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    model: str = ""
    source: str = ""
    revision: str = ""
    licence: str = ""
    training: dict[str, str] = field(default_factory=dict)
    target: str = ""
    checked_on: str = ""
    graph: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    quantizer: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)
    builder_arguments: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    adapter: "Provenance | None" = None
    checkpoint: "Provenance | None" = None
    parts: dict[str, "Provenance"] = field(default_factory=dict)

    @property
    def origin(self) -> "Provenance":
        """The checkpoint's provenance."""
        return self.checkpoint or self

    @property
    def described_source(self) -> str:
        """In words, where the checkpoint came from, and the adapter that was merged into it."""
        origin = self.origin
        adapter = origin.adapter
        words = f", with the adapter {adapter.source} ({adapter.revision[:12]})" if adapter else ""
        return origin.source + words

    @property
    def all_notes(self) -> list[str]:
        """The notes of the checkpoint, and those of the ONNX folder."""
        return (self.checkpoint.notes if self.checkpoint else []) + self.notes

    def json(self) -> dict[str, Any]:
        """What provenance.json and a logged model's metadata hold: everything that is not empty."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for part in ("checkpoint", "adapter"):
            own[part] = own[part].json() if own[part] else None
        own["parts"] = {name: part.json() for name, part in self.parts.items()}
        return {name: value for name, value in own.items() if value or name == "files"}

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its files from others, for keys and contents: not where they came from.

        Another commit of the same files, a new README say, makes nothing anew.
        """
        bare = {k: v for k, v in self.json().items() if k not in ORIGIN}
        return bare | ({"checkpoint": self.checkpoint.identity} if self.checkpoint else {})

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Provenance":
        """Read what `json` gave; fields of other versions are passed over."""
        known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        for part in ("checkpoint", "adapter"):
            if known.get(part):
                known[part] = cls.of(known[part])
        known["parts"] = {name: cls.of(part) for name, part in known.get("parts", {}).items()}
        return cls(**known)


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex; read again in this process only if the file changed meanwhile."""
    found = path.stat()
    state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return digest_in_state(path, state)


@functools.lru_cache(maxsize=4096)
def digest_in_state(path: Path, _: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(path: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder by its relative name, or of the one file."""
    if path.is_file():
        return {path.name: digest_file(path)}
    files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {file.relative_to(path).as_posix(): digest_file(file) for file in files}


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, in hex, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def size_mb(folder: Path) -> float:
    """Size of a folder's files, in MB (10^6 bytes)."""
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6, 3)


def require_files(folder: Path, *names: str, made_by: str) -> None:
    """Raise InputError if one of the files is missing."""
    for name in names:
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} has no {name}: it is not what {made_by} makes. Run {made_by} again."
            )


def write_provenance(folder: Path, **facts: Any) -> Provenance:
    """Write provenance.json with `facts` and the digests of the other files, and return it."""
    provenance = Provenance(files=digest_others(folder), **facts)
    (folder / PROVENANCE).write_text(json.dumps(provenance.json(), indent=2) + "\n")
    return provenance


def read_provenance(folder: Path) -> Provenance:
    """Read provenance.json; InputError if a file no longer has the digest that it lists.

    A folder without one was made by other means.
    """
    files = digest_others(folder)
    path = folder / PROVENANCE
    if not path.is_file():
        return Provenance(files, source=LOCAL_FOLDER)
    provenance = Provenance.of(json.loads(path.read_text()))
    recorded = provenance.files
    changed = sorted(n for n in files.keys() | recorded if files.get(n) != recorded.get(n))
    if changed:
        raise InputError(
            f"{folder}: {', '.join(changed)} differ from {PROVENANCE}. Make the folder again."
        )
    return provenance


def require_model(provenance: Provenance, name: str) -> None:
    """Raise InputError if the weights were fetched as another model: they would bear its name."""
    found = provenance.origin.model
    if found not in ("", name):
        raise InputError(
            f"source is of the model {found}; model.name is {name}. Give model.name={found}."
        )


def digest_others(folder: Path) -> dict[str, str]:
    """The digests of a folder's files, all but provenance.json."""
    return {name: digest for name, digest in digest_files(folder).items() if name != PROVENANCE}
