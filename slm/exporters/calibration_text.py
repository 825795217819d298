"""The text that calibration reads: written texts, and the model's own answers to prompts.

    {"kind": "prose", "language": "en", "text": "The mill had not ground a sack of flour …"}
    {"kind": "chat", "language": "en", "messages": [{"role": "user", "content": "How does a …"}]}

Conversations are put in the checkpoint's chat format. The answers are those of a draft of the
export itself, rounded to nearest.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema

from slm.config.packaging import WINDOW
from slm.errors import InputError
from slm.running.whole import write_whole
from slm.sources.rows import MESSAGES, data_file, read_jsonl, readable
from slm_pyfunc.engine.runtime import Runtime
from slm_pyfunc.parameters import Parameters

# Sampled, since greedy answers of small models go round in circles; the seed makes them repeatable.
SAMPLING = Parameters(max_tokens=192, temperature=0.8, top_p=0.9, seed=1)
SPARE = 64  # tokens of a chat format that a conversation may have beside its messages
TOGETHER = 4  # conversations: of 3.8 billion parameters, one's keys and values take 0.2 GB
ROW = {
    "properties": {
        "text": {"type": "string"},
        "messages": MESSAGES,
    }
}


def read_calibration(uri: str) -> list[dict[str, Any]]:
    """The rows of `export.calibration`, each with `text` or `messages`."""
    rows = list(readable(read_jsonl(data_file(uri, "export.calibration")), uri))
    for number, row in enumerate(rows, 1):
        if "text" not in row and "messages" not in row:
            raise InputError(f"{uri}, row {number} has neither a text nor messages.")
        try:
            jsonschema.validate(row, ROW)
        except jsonschema.ValidationError as error:
            raise InputError(
                f"{uri}, row {number} is malformed at {error.json_path}: {error.message}"
            ) from error
    if not rows:
        raise InputError(f"{uri} has no rows.")
    return rows


def calibration_tokens(
    rows: list[dict[str, Any]],
    checkpoint: Path,
    most: int,
    draft: Callable[[], Path],
    kept: Path,
    said: Callable[[str], None],
) -> list[int]:
    """At most `most` tokens, half of them of conversations if there are any.

    `draft` makes the ONNX folder that answers. The answers stay in the file `kept`.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    conversations = [row["messages"] for row in rows if "messages" in row]
    spoken: list[str] = json.loads(kept.read_text()) if kept.is_file() else []
    if len(spoken) < len(conversations):
        runtime, started, before = Runtime(draft(), cache_mb=0), time.monotonic(), len(spoken)
        while left := conversations[len(spoken) :]:
            prompts = [runtime.render(messages) for messages in left[:TOGETHER]]
            answers = runtime.answer(prompts, SAMPLING)
            spoken += [prompt + own.text for prompt, [own] in zip(prompts, answers, strict=True)]
            write_whole(kept, json.dumps(spoken))
            each_s = (time.monotonic() - started) / (len(spoken) - before)
            left_s = each_s * (len(conversations) - len(spoken))
            said(f"{len(spoken)} of {len(conversations)} answers, {left_s:.0f} s left")
    written = [row["text"] for row in rows if "text" in row]
    share = most // 2 if written and spoken else most
    tokens: list[int] = []
    for text in ("\n\n".join(written), "\n".join(spoken)):
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"][:share]
    require_window(len(tokens))
    return tokens


def require_enough(rows: list[dict[str, Any]], checkpoint: Path) -> None:
    """Raise InputError if the text is too short, whatever the model answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = 0
    for row in rows:
        texts = [row["text"]] if "text" in row else [m["content"] for m in row["messages"]]
        tokens += sum(len(tokenizer(text)["input_ids"]) for text in texts)
        tokens += 0 if "text" in row else SAMPLING.max_tokens + SPARE
        if tokens >= WINDOW:
            return
    require_window(tokens)


def require_window(tokens: int) -> None:
    if tokens < WINDOW:
        raise InputError(
            f"export.calibration has {tokens} tokens; calibration reads windows of {WINDOW}, and "
            "dozens of them are better."
        )
