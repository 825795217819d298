"""What runs on Spark's executors: a loaded model for each Python worker, and its answers.

This file is shipped to the executors without the rest of the project, and imports nothing of it.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa


class Answer(NamedTuple):
    """What is added to a row; either `error` is null, or everything else."""

    answer: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


ARROW = (pa.string(), pa.string(), pa.int64(), pa.int64(), pa.string())  # of Answer's fields


@dataclass(frozen=True)
class Work:
    """What to do with each row.

    `folder` is the logged model's, a path or the name of a Spark archive. `column` holds texts, or
    conversations if `holds_messages`; the table's last column is the row's seed, and is dropped.
    `prefix` goes before the names of the added columns.
    """

    folder: str
    column: str
    holds_messages: bool
    system: str | None
    parameters: dict[str, Any]
    settings: dict[str, Any]
    prefix: str = ""


def answer_batches(batches: Iterable[pa.RecordBatch], work: Work) -> Iterator[pa.RecordBatch]:
    """The rows with their answers, in the same order; the model is loaded at the first row."""
    for batch in batches:
        if batch.num_rows:
            *columns, seeds = batch.columns
            requests = batch.column(batch.schema.get_field_index(work.column)).to_pylist()
            answers = opened(work).answer(requests, seeds.to_pylist())
            added = map(pa.array, map(list, zip(*answers, strict=True)), ARROW)
            names = [*batch.schema.names[:-1], *(work.prefix + name for name in Answer._fields)]
            yield pa.RecordBatch.from_arrays([*columns, *added], names=names)


MODELS: dict[str, "Model"] = {}  # of this process, which serves many tasks


def opened(work: Work) -> "Model":
    """The model, loaded once in this process."""
    if repr(work) not in MODELS:
        MODELS.clear()
        MODELS[repr(work)] = Model(work)
    return MODELS[repr(work)]


class Model:
    """A logged ONNX model that answers rows, as many at once as its batch has room for."""

    def __init__(self, work: Work) -> None:
        import mlflow.pyfunc

        folder = work.folder
        if not Path(folder).is_absolute():
            from pyspark import SparkFiles

            folder = SparkFiles.get(folder)
        self.work = work
        loaded = mlflow.pyfunc.load_model(
            folder, suppress_warnings=True, model_config=work.settings
        )
        self.python_model = loaded.unwrap_python_model()
        self.runtime = self.python_model.runtime
        self.is_chat = loaded.metadata.metadata["interface"] == "chat"

    def answer(self, requests: list[Any], seeds: list[int | None]) -> list[Answer]:
        """Answer each row by itself, from threads whose sequences share each run of the model.

        Twice as many threads as a batch has room for: a sequence that ends is replaced at once.
        """
        with ThreadPoolExecutor(2 * self.runtime.settings.max_batch_size) as pool:
            return list(pool.map(self.answer_row, requests, seeds))

    def answer_row(self, request: Any, seed: int | None) -> Answer:
        """The answer to one row, or what is wrong with it: no row takes others with it."""
        try:
            return self.chat(request, seed) if self.is_chat else self.complete(request, seed)
        except Exception as error:  # whatever it is, it is this row's alone
            text = " ".join(str(getattr(error, "message", error)).split())
            return Answer(error=text or type(error).__name__)

    def complete(self, prompt: Any, seed: int | None) -> Answer:
        defaults = self.runtime.defaults
        parameters = replace(defaults.of(self.work.parameters, defaults), seed=seed)
        [[completion]] = self.runtime.answer([prompt], parameters)
        return Answer(
            completion.text,
            completion.finish_reason,
            completion.prompt_tokens,
            completion.completion_tokens,
        )

    def chat(self, request: Any, seed: int | None) -> Answer:
        import pandas as pd

        messages = conversation(request, self.work.holds_messages, self.work.system)
        row = {"messages": messages, **self.work.parameters, "seed": seed}
        completion = self.python_model.predict(None, pd.DataFrame([row], dtype=object))
        [choice], usage = completion["choices"], completion["usage"]
        return Answer(
            choice["message"]["content"],
            choice["finish_reason"],
            usage["prompt_tokens"],
            usage["completion_tokens"],
        )


def conversation(request: Any, holds_messages: bool, system: str | None) -> Any:
    """The messages of a row: a list of them, the same as JSON, or a text of the user's.

    `system` goes before those that have no system message of their own. What is no conversation
    stays as it is, for the model to say so.
    """
    if not holds_messages:
        if not isinstance(request, str):
            raise ValueError(f"prompt is {request!r}; it must be a string")
        messages: Any = [{"role": "user", "content": request}]
    elif isinstance(request, str):
        try:
            messages = json.loads(request)
        except ValueError as error:
            raise ValueError(f"messages is no JSON: {error}") from error
    else:
        messages = request
    roles = [m.get("role") for m in messages or [] if isinstance(m, dict)]
    if system is not None and roles and not {"system", "developer"} & {*roles}:
        return [{"role": "system", "content": system}, *messages]
    return messages
