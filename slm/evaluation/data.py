"""Read what models are measured on: texts to score, and prompts to answer.

Texts are JSON Lines, plain text, CSV or Parquet, here or in a dataset at the Hugging Face hub:

    evaluate.texts=/data/texts.jsonl
    evaluate.texts=hf://datasets/my-org/my-texts@main/data/test.parquet evaluate.text_column=body
"""

from dataclasses import replace
from typing import Any

from slm.config.packaging import Evaluate
from slm.errors import InputError
from slm.evaluation.positions import LIMIT
from slm.evaluation.tasks import require_prompt
from slm.sources.rows import READERS, data_file, read_jsonl, readable

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
