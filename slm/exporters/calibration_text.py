"""The text that calibration reads: written texts, and the model's own answers to prompts.

    {"kind": "prose", "language": "en", "text": "The mill had not ground a sack of flour …"}
    {"kind": "chat", "language": "en", "messages": [{"role": "user", "content": "How does a …"}]}

Conversations are put in the checkpoint's chat format. The answers are those of a draft of the
export itself, rounded to nearest.
"""

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jsonschema

from slm.config.packaging import WINDOW
from slm.errors import InputError
from slm.running.whole import write_whole
from slm.sources.rows import MESSAGES, data_file, read_jsonl, readable
from slm_pyfunc.chat_template import ChatTemplate
from slm_pyfunc.engine.runtime import Runtime
from slm_pyfunc.parameters import Parameters

T = TypeVar("T")

# Sampled, since greedy answers of small models go round in circles; the seed makes them repeatable.
ANSWER_TOKENS = 192
SAMPLING = Parameters(max_tokens=ANSWER_TOKENS, temperature=0.8, top_p=0.9, seed=1)
TOGETHER = 4  # conversations: of 3.8 billion parameters, one's keys and values take 0.2 GB
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples' fractions lie evenly, however many there are
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


def calibration_windows(
    rows: list[dict[str, Any]],
    checkpoint: Path,
    most: int,
    draft: Callable[[], Path],
    kept: Path,
    said: Callable[[str], None],
) -> list[list[int]]:
    """Windows of WINDOW tokens, `most` in all: half of them of conversations if there are any.

    Rows come from all over the file, and where one half has too few tokens, the other fills up.
    Each window begins as the tokenizer begins a text. `draft` makes the ONNX folder that answers,
    and the answers stay in the file `kept`.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = spread([row["text"] for row in rows if "text" in row])
    written = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    conversations = spread([row["messages"] for row in rows if "messages" in row])
    share = max(most // 2, most - len(written))
    spoken = answered(conversations, share, draft, kept, said)[:share]
    tokens = written[: most - len(spoken)] + spoken
    windows = windows_of(tokens, tokenizer("")["input_ids"])[: most // WINDOW]
    require_window(len(tokens) if not windows else WINDOW)
    return windows


def answered(
    conversations: list[list[dict[str, str]]],
    most: int,
    draft: Callable[[], Path],
    kept: Path,
    said: Callable[[str], None],
) -> list[int]:
    """Conversations and the model's answers to them, as the checkpoint's chat format has them.

    As many as it takes for `most` tokens, one after the other.
    """
    spoken: list[list[int]] = json.loads(kept.read_text()) if kept.is_file() else []
    runtime, started, before = None, time.monotonic(), sum(map(len, spoken))
    while sum(map(len, spoken)) < most and len(spoken) < len(conversations):
        runtime = runtime or Runtime(draft(), cache_mb=0)
        turn_end = runtime.tokenizer.template.turn_end()
        asked = conversations[len(spoken) :][:TOGETHER]
        answers = runtime.answer([runtime.encode_chat(each) for each in asked], SAMPLING)
        for messages, [own] in zip(asked, answers, strict=True):
            ended = own.text + (turn_end if own.finish_reason == "stop" else "")
            spoken.append(runtime.encode_chat(messages, begins=ended))
        write_whole(kept, json.dumps(spoken))
        now = sum(map(len, spoken))
        left_s = (time.monotonic() - started) / (now - before) * max(most - now, 0)
        said(f"{len(spoken)} answers, {now} of {most} tokens, {left_s:.0f} s left")
    return list(itertools.chain(*spoken))


def spread(rows: list[T]) -> list[T]:
    """The rows in an order whose beginnings are from all over the list, however long they are."""
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: i * GOLDEN % 1)]


def windows_of(tokens: list[int], prefix: list[int]) -> list[list[int]]:
    """Whole windows of WINDOW tokens, each of which begins with the prefix."""
    windows, at = [], 0
    while at < len(tokens):
        begins = [] if tokens[at : at + len(prefix)] == prefix else prefix
        piece = tokens[at : at + WINDOW - len(begins)]
        windows.append([*begins, *piece])
        at += len(piece)
    return [window for window in windows if len(window) == WINDOW]


def require_readable(rows: list[dict[str, Any]], checkpoint: Path) -> None:
    """Raise InputError if the model cannot take a row, or if all are too short together."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint).get_text_config()
    context = getattr(config, "max_position_embeddings", math.inf)
    template, tokens = None, 0
    for number, row in enumerate(rows, 1):
        if "text" in row:
            tokens += len(tokenizer(row["text"])["input_ids"]) if tokens < WINDOW else 0
            continue
        where = f"export.calibration, row {number}"
        if row["messages"][-1]["role"] == "assistant":
            raise InputError(f"{where} ends with an answer: end it with a question.")
        try:
            template = template or ChatTemplate(checkpoint)
            prompt = template.render(row["messages"])
        except ValueError as error:
            raise InputError(f"{where}: {error}.") from error
        own = len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) + ANSWER_TOKENS
        if own > context:
            raise InputError(
                f"{where} takes {own} tokens with its answer; the model's context is {context}."
            )
        tokens += own
    require_window(tokens)


def require_window(tokens: int) -> None:
    if tokens < WINDOW:
        raise InputError(
            f"export.calibration has {tokens} tokens; calibration reads windows of {WINDOW}, and "
            "dozens of them are better."
        )
