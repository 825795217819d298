"""Rows of a data file: JSON Lines, plain text, CSV or Parquet, here or in a dataset at the hub."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from slm.config.common import ROOT
from slm.errors import InputError
from slm.sources.hub import hub_file

# A conversation in a row, as a JSON schema.
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "user", "assistant"]},
            "content": {"type": "string"},
        },
    },
}


def readable(rows: Iterable[dict[str, Any]], uri: str) -> Iterator[dict[str, Any]]:
    """The rows; InputError with the file's name where it is not what its suffix says."""
    try:
        yield from rows
    except ValueError as error:  # of json, pandas, pyarrow and UTF-8 alike
        raise InputError(f"{uri} cannot be read: {error}") from error


def data_file(uri: str, key: str) -> Path:
    """The local file behind a path, relative to the project, or a URI of the hub."""
    if match := re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/\s]+))?/(\S+)", uri):
        name, revision, path = match.groups()
        return hub_file(name, revision or "main", path)
    if "://" in uri:
        raise InputError(
            f"{key}={uri} is not one of a file and hf://datasets/org/name@revision/file."
        )
    path = ROOT / Path(uri).expanduser()
    if not path.is_file():
        raise InputError(f"{key}={uri}: no such file.")
    return path


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object.")
            yield row


def read_plain(path: Path) -> Iterator[dict[str, Any]]:
    """Plain text in rows of 100,000 characters."""
    with path.open(encoding="utf-8") as file:
        while text := file.read(100_000):
            yield {"text": text}


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    import pandas as pd

    for chunk in pd.read_csv(path, chunksize=1000):
        yield from chunk.to_dict("records")


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
        yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": read_jsonl,
    ".txt": read_plain,
    ".md": read_plain,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
