"""The calls in what a model wrote, found in free text or forced by a grammar, piece by piece."""

import json
import re
import uuid
from collections.abc import Container
from typing import Any

from .chat_template import to_json
from .dialects import Dialect
from .tokenizer import overlap

Delta = dict[str, Any]  # what is new of a message: `content`, or `tool_calls`
PYTHON_TAG = "<|python_tag|>"  # Llama 3.1 may begin a call with it


class FoundCalls:
    """Finds calls in an answer; the rest is its content.

    A call is given once it is whole. Text that begins like a call, and is no call of a tool of the
    request, is content.
    """

    def __init__(self, dialect: Dialect, functions: Container[str], parallel: bool) -> None:
        self.dialect, self.functions, self.parallel = dialect, functions, parallel
        self.text = ""  # what may still be a call, or the beginning of its mark
        self.inside = False
        self.calls = 0
        self.said = False  # whether there was text since the last call
        self.spaces = ""  # that wait for what follows them

    def push(self, text: str) -> list[Delta]:
        self.text += text
        deltas: list[Delta] = []
        while True:
            opened = not self.inside and self.find_open(deltas)
            if not (opened or self.inside):
                return deltas
            body, closed, rest = self.text.partition(self.dialect.closes or "\0")
            if not closed:
                return deltas
            deltas += self.close(body, closed)
            self.text, self.inside = rest, False

    def find_open(self, deltas: list[Delta]) -> bool:
        """Add the text before a call to the deltas; True if a call begins."""
        opens = self.dialect.opens
        if not opens:  # the answer is a call from its beginning, or has none
            if self.said:
                before, self.text = self.text, ""
                deltas += self.content(before)
                return False
            begun = self.text.lstrip()
            self.inside = begun.startswith(("{", PYTHON_TAG))
            if begun and not self.inside and not PYTHON_TAG.startswith(begun):
                before, self.text = self.text, ""
                deltas += self.content(before)
            return self.inside
        before, found, after = self.text.partition(opens)
        if found:
            deltas += self.content(before)
            self.text, self.inside = after, True
            return True
        certain = len(self.text) - overlap(self.text, opens)
        deltas += self.content(self.text[:certain])
        self.text = self.text[certain:]
        return False

    def content(self, text: str) -> list[Delta]:
        """Spaces wait for what follows: they are content before text, and dropped beside a call."""
        text = self.spaces + text
        if not self.said and not text.strip():
            self.spaces = text
            return []
        self.said, self.spaces = True, ""
        return [{"content": text}] if text else []

    def close(self, body: str, closed: str = "") -> list[Delta]:
        """The calls in what stood between the marks; content if there are none."""
        found = self.parsed(body)
        if found is None:
            return self.content(self.dialect.opens + body + closed)
        self.said, self.spaces = False, ""
        deltas = []
        for name, arguments in found:
            if self.parallel or not self.calls:
                deltas.append(call_delta(self.calls, name, arguments))
                self.calls += 1
        return deltas

    def parsed(self, body: str) -> list[tuple[str, str]] | None:
        """Names and arguments; None unless all of the text is calls of the request's tools."""
        text = body.strip()
        if self.dialect.by_message:
            text = "[" + text if text.endswith("]") else f"[{text}]"
        text = text.removeprefix(PYTHON_TAG)
        values, at, decoder = [], 0, json.JSONDecoder()
        try:
            while at < len(text):
                value, at = decoder.raw_decode(text, at)
                values += value if isinstance(value, list) else [value]
                at += len(text[at:]) - len(text[at:].lstrip(" \n;"))
            calls = [self.call_in(value) for value in values]
        except (ValueError, RecursionError):
            return None
        return calls or None

    def call_in(self, value: Any) -> tuple[str, str]:
        """Name and arguments; ValueError if the value is no call, or holds NaN, as no JSON may."""
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self.functions:
            raise ValueError(f"{name!r} is no function of the request")
        given = value.get("arguments", value.get("parameters"))
        if not isinstance(given := {} if given is None else given, dict):
            raise ValueError(f"{given!r} is no object")
        return name, to_json(given, allow_nan=False)

    def end(self, reason: str) -> list[Delta]:
        """What was held back in case it became a call."""
        text, self.text = self.text, ""
        deltas = self.close(text) if self.inside else self.content(text)
        if self.spaces and not self.calls:  # the answer is nothing else
            deltas.append({"content": self.spaces})
        return deltas


class ForcedCall:
    """Reads the one call that a grammar let the model write, and gives its arguments as they come.

    JSON_STYLE fixes what the grammar writes around the arguments; `key` is their name in the call.
    """

    def __init__(self, key: str) -> None:
        self.text = ""
        self.given = ""  # of the arguments
        self.calls = 0
        self.head = re.compile(rf'\{{"name": "([\w-]+)", "{re.escape(key)}": ')

    def push(self, text: str) -> list[Delta]:
        self.text += text
        deltas = []
        if not self.calls and (head := self.head.match(self.text)):
            self.calls = 1
            self.text = self.text[head.end() :]
            deltas.append(call_delta(0, head[1], ""))
        if self.calls:
            new, self.text = self.text[:-1], self.text[-1:]  # the last } is the call's own
            deltas += self.arguments(new)
        return deltas

    def arguments(self, text: str) -> list[Delta]:
        self.given += text
        return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}] if text else []

    def end(self, reason: str) -> list[Delta]:
        """The character that was held back, unless it is the call's own }."""
        if not self.calls or reason != "length" or (self.text == "}" and is_json(self.given)):
            return []
        return self.arguments(self.text)


def call_delta(index: int, name: str, arguments: str) -> Delta:
    """The beginning of a call, or all of it."""
    function = {"name": name, "arguments": arguments}
    call = {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
    return {"tool_calls": [{**call, "function": function}]}


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
