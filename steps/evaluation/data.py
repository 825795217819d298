"""Read what models are measured on: texts to score, and prompts to answer.

Texts are JSON Lines, plain text, CSV or Parquet, here or in a dataset at the Hugging Face hub:

    evaluate.texts=/data/texts.jsonl
    evaluate.texts=hf://datasets/my-org/my-texts@main/data/test.parquet evaluate.text_column=body
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from steps.config import ROOT, Evaluate
from steps.evaluation.tasks import require_prompt
from steps.hub import hub_file

# Characters read of the texts for each token to score: no tokenizer comes near on real text, so
# that a file of any size is read as far as it is needed.
CHARACTERS_PER_TOKEN = 16


def read_texts(config: Evaluate) -> list[dict[str, Any]]:
    """Rows with `text`, and `kind` and `language` where given, enough for `max_tokens`."""
    path = data_file(config.texts, "evaluate.texts")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"evaluate.texts={config.texts}: valid are {', '.join(READERS)} files.")
    texts, characters = [], 0
    for row in reader(path):
        text = row.get(config.text_column)
        if not isinstance(text, str):
            raise ValueError(
                f"{config.texts} has a row without text in {config.text_column!r}; "
                f"it has {', '.join(map(str, row))}. Set evaluate.text_column."
            )
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
        raise ValueError(
            f"{config.texts} has no text of kinds {config.kinds} and languages {config.languages}."
        )
    return texts


def read_prompts(config: Evaluate) -> list[dict[str, Any]]:
    """The first `max_prompts` prompts, as MLflow's rows of inputs and expectations."""
    path = data_file(config.prompts, "evaluate.prompts")
    prompts = []
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            require_prompt(row)
        except ValueError as error:
            raise ValueError(f"{config.prompts}, row {number} {error}.") from error
        prompts.append(row)
    if not prompts:
        raise ValueError(f"{config.prompts} has no prompts.")
    return prompts[: config.max_prompts]


def data_file(uri: str, key: str) -> Path:
    """The local file behind a path, relative to the project, or a URI of the hub."""
    if match := re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/\s]+))?/(\S+)", uri):
        name, revision, path = match.groups()
        return hub_file(name, revision or "main", path)
    if "://" in uri:
        raise ValueError(
            f"{key}={uri} is not one of a file and hf://datasets/org/name@revision/file."
        )
    path = ROOT / Path(uri).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{key}={uri}: no such file.")
    return path


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object.")
            yield row


def read_plain(path: Path) -> Iterator[dict[str, Any]]:
    """Plain text in rows of 100,000 characters."""
    with path.open(encoding="utf-8") as file:
        while text := file.read(100_000):
            yield {"text": text}


def read_csv(path: Path) -> Iterable[dict[str, Any]]:
    import pandas as pd

    chunks = pd.read_csv(path, chunksize=1000)
    return itertools.chain.from_iterable(chunk.to_dict("records") for chunk in chunks)


def read_parquet(path: Path) -> Iterable[dict[str, Any]]:
    import pyarrow.parquet

    batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000)
    return itertools.chain.from_iterable(batch.to_pylist() for batch in batches)


READERS: dict[str, Callable[[Path], Iterable[dict[str, Any]]]] = {
    ".jsonl": read_jsonl,
    ".txt": read_plain,
    ".md": read_plain,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
