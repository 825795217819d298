"""Read what models are measured on: texts to score, and prompts to answer.

Texts are JSON Lines, plain text, CSV or Parquet, here or in a dataset at the Hugging Face hub:

    evaluate.texts=/data/texts.jsonl
    evaluate.texts=hf://datasets/my-org/my-texts@main/data/test.parquet evaluate.text_column=body
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm.config import ROOT, Evaluate
from slm.errors import InputError
from slm.evaluation.positions import LIMIT
from slm.evaluation.tasks import require_prompt
from slm.sources.hub import hub_file

# Characters read of the texts for each token to score: no tokenizer comes near on real text, so
# that a file of any size is read as far as it is needed.
CHARACTERS_PER_TOKEN = 16


def read_texts(config: Evaluate) -> list[dict[str, Any]]:
    """Rows with `text`, and `kind` and `language` where given, enough for `max_tokens`."""
    path = data_file(config.texts, "evaluate.texts")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise InputError(f"evaluate.texts={config.texts}: valid are {', '.join(READERS)} files.")
    texts, characters = [], 0
    for row in readable(reader(path), config.texts):
        if config.text_column not in row:
            raise InputError(
                f"{config.texts} has a row without {config.text_column!r}; it has "
                f"{', '.join(map(str, row))}. Set evaluate.text_column."
            )
        text = row[config.text_column]
        text = text if isinstance(text, str) else ""  # an empty cell
        # A row that does not say its kind or language is of any.
        if (
            all(
                not wanted or row.get(field) is None or row[field] in wanted
                for field, wanted in (("kind", config.kinds), ("language", config.languages))
            )
            and text.strip()
        ):
            texts.append({"text": text, "kind": row.get("kind"), "language": row.get("language")})
            characters += len(text)
        if characters >= config.max_tokens * CHARACTERS_PER_TOKEN:
            break
    if not texts:
        raise InputError(
            f"{config.texts} has no text of kinds {config.kinds} and languages {config.languages}."
        )
    return texts


def read_long_text(config: Evaluate) -> str:
    """All texts in one, whatever their kind and language, long enough for LIMIT and a window."""
    everything = replace(config, kinds=[], languages=[], max_tokens=LIMIT + config.window)
    return "\n\n".join(row["text"] for row in read_texts(everything))


def read_prompts(config: Evaluate) -> list[dict[str, Any]]:
    """The first `max_prompts` prompts, as MLflow's rows of inputs and expectations."""
    path = data_file(config.prompts, "evaluate.prompts")
    prompts = []
    for number, row in enumerate(readable(read_jsonl(path), config.prompts), 1):
        try:
            require_prompt(row)
        except ValueError as error:
            raise InputError(f"{config.prompts}, row {number} {error}.") from error
        prompts.append(row)
    if not prompts:
        raise InputError(f"{config.prompts} has no prompts.")
    return prompts[: config.max_prompts]


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
