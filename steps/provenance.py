"""Digests of files, and provenance.json: the record of where a folder of weights came from.

It stands inside the folder that it describes, so that it travels with it: from the checkpoint to
the ONNX model made of it, and into the logged model.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

PROVENANCE = "provenance.json"


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
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
    """Raise where one of the files is missing."""
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: it is not what {made_by} makes. Run {made_by} again."
            )


def write_provenance(folder: Path, **facts: Any) -> dict[str, Any]:
    """Write provenance.json with `facts` and the digests of the other files, and return it."""
    provenance = {**facts, "files": digest_others(folder)}
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    return provenance


def read_provenance(folder: Path) -> dict[str, Any]:
    """Read provenance.json, where the other files still have the digests that it lists.

    A folder without one, made by other means, is its own provenance.
    """
    files = digest_others(folder)
    path = folder / PROVENANCE
    if not path.is_file():
        return {"source": str(folder), "files": files}
    provenance = json.loads(path.read_text())
    recorded = provenance["files"]
    changed = sorted(n for n in files.keys() | recorded if files.get(n) != recorded.get(n))
    if changed:
        raise ValueError(
            f"{folder}: {', '.join(changed)} differ from {PROVENANCE}. Make the folder again."
        )
    return provenance


def digest_others(folder: Path) -> dict[str, str]:
    """The digests of a folder's files but its provenance.json."""
    return {name: digest for name, digest in digest_files(folder).items() if name != PROVENANCE}
