"""Tools: what a request lets the model call, and the calls in what the model wrote.

Models write calls in dialects of their own; a model's YAML says which (`tool_calls`). In and out
they are OpenAI's: https://platform.openai.com/docs/guides/function-calling
"""

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

from .dialects import Dialect
from .parameters import JSON_STYLE, RequestError
from .tokenizer import overlap

NAME = re.compile(r"[\w-]{1,64}", re.ASCII)
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
Delta = dict[str, Any]  # what is new of a message: `content`, or `tool_calls`


PYTHON_TAG = "<|python_tag|>"  # Llama 3.1 may begin a call with it
# As Phi-4-mini's model card has it.
SYSTEM = "You are a helpful assistant with some tools."


@dataclass(frozen=True)
class Tools:
    """The functions of a request, by name, and which the model must call: some, one, or none."""

    dialect: Dialect
    functions: dict[str, dict[str, Any]]
    forced: tuple[str, ...] = ()
    parallel: bool = True

    @property
    def begins(self) -> str:
        """What the assistant's turn begins with."""
        return self.dialect.begins if self.forced else ""

    @property
    def rendered(self) -> list[dict[str, Any]] | None:
        """As a chat template takes them."""
        if self.dialect.by_message:
            return None
        return [{"type": "function", "function": f} for f in self.functions.values()]

    def schema(self) -> str | None:
        """The JSON schema of the call that is forced, as text."""
        if not self.forced:
            return None
        definitions: dict[str, Any] = {}
        calls = []
        for name in self.forced:
            parameters = self.functions[name].get("parameters") or NOTHING
            properties = {
                "name": {"const": name},
                self.dialect.arguments: hoisted(parameters, name, definitions),
            }
            calls.append({**NOTHING, "properties": properties, "required": list(properties)})
        schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return json.dumps({"x-guidance": JSON_STYLE, **schema, "$defs": definitions})

    def reader(self) -> "FoundCalls | ForcedCall":
        return ForcedCall(self) if self.forced else FoundCalls(self)

    def with_tools(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the template takes them, with the tools where it looks for them."""
        if not self.dialect.by_message:
            return messages
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        text = json.dumps(list(self.functions.values()), ensure_ascii=False)
        return [{**messages[0], "tools": text}, *messages[1:]]


def read_tools(request: dict[str, Any], dialect: Dialect | None) -> Tools | None:
    """The tools of a request; None without, RequestError if they are wrong or not served."""
    given, choice = request.get("tools"), request.get("tool_choice")
    if not given:
        if choice not in (None, "none", "auto"):
            raise RequestError(f"tool_choice is {choice!r}; it needs tools")
        return None
    if dialect is None:
        raise RequestError(
            "tools are given, and this model calls none: tool_calls is none in its configuration"
        )
    if not isinstance(given, list):
        raise RequestError(f"tools is {given!r}; it must be a list")
    functions = dict(read_function(f"tools[{i}]", tool) for i, tool in enumerate(given))
    forced: tuple[str, ...] = ()
    if choice == "required":
        forced = tuple(functions)
    elif isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if name not in functions:
            raise RequestError(
                f"tool_choice names {name!r}; it must be one of {', '.join(functions)}"
            )
        forced = (name,)
    elif choice not in (None, "auto", "none"):
        raise RequestError(
            f"tool_choice is {choice!r}; it must be none, auto, required, or name a function"
        )
    if choice == "none":
        return None
    if request.get("response_format") not in (None, {"type": "text"}):
        raise RequestError("response_format cannot be joined with tools: it would forbid calls")
    return Tools(dialect, functions, forced, request.get("parallel_tool_calls") is not False)


def read_function(where: str, tool: Any) -> tuple[str, dict[str, Any]]:
    """Name and definition of a function; RequestError for what is none."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type") != "function":
        raise RequestError(f"{where} is {tool!r}; it must have type: function, and a function")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestError(
            f"{where}.function.name is {name!r}; it must be 1 to 64 letters, digits, _ and -"
        )
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(f"{where}.function.parameters is {parameters!r}; it must be an object")
    kept = ("name", "description", "parameters")
    return name, {key: function[key] for key in kept if function.get(key) is not None}


def read_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Past calls of an assistant as templates take them: arguments as an object, not as text."""
    if not isinstance(calls, list):
        raise RequestError(f"{where} is {calls!r}; it must be a list")
    read = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        try:
            if not isinstance(arguments, dict):
                arguments = json.loads(arguments or "{}")
        except (TypeError, ValueError):
            arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise RequestError(
                f"{where}[{index}] is {call!r}; it must have a function with a name, and arguments "
                "that are a JSON object, as text"
            )
        read.append({"type": "function", "function": {"name": name, "arguments": arguments}})
        if isinstance(call.get("id"), str):
            read[-1]["id"] = call["id"]
    return read


def as_content(message: dict[str, Any], dialect: Dialect) -> dict[str, Any]:
    """A message whose past calls stand in its content, for a template that knows none."""
    if not dialect.by_message or "tool_calls" not in message:
        return message
    calls = [call["function"] for call in message["tool_calls"]]
    text = dialect.opens + json.dumps(calls, ensure_ascii=False).removeprefix("[")
    return {"role": message["role"], "content": message["content"] + text}


def hoisted(schema: dict[str, Any], name: str, definitions: dict[str, Any]) -> Any:
    """The schema with its own definitions moved into `definitions`, under names of its own."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        made = {}
        for key, item in value.items():
            if key == "$ref" and isinstance(item, str):
                item = re.sub(r"^#/(\$defs|definitions)/", f"#/$defs/{name}.", item)
            made[key] = moved(item)
        return made

    own = {**schema}
    for place in ("$defs", "definitions"):
        for key, item in own.pop(place, {}).items():
            definitions[f"{name}.{key}"] = moved(item)
    return moved(own)


def call_delta(index: int, name: str, arguments: str) -> Delta:
    """The beginning of a call, or all of it."""
    function = {"name": name, "arguments": arguments}
    call = {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
    return {"tool_calls": [{**call, "function": function}]}


class FoundCalls:
    """Finds calls in an answer; the rest is its content.

    A call is given once it is whole. What begins as one, and is no call of a tool of the request,
    is content.
    """

    def __init__(self, tools: Tools) -> None:
        self.tools, self.dialect = tools, tools.dialect
        self.text = ""  # what may still be a call, or the beginning of its mark
        self.inside = False
        self.calls = 0
        self.said = False  # content that is not space

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
        """Give the text before a call as content; whether there is a call."""
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
        """Spaces before the first word, and around calls, are none."""
        if not text or (not text.strip() and (self.calls or not self.said)):
            return []
        self.said = True
        return [{"content": text}]

    def close(self, body: str, closed: str = "") -> list[Delta]:
        """The calls in what stood between the marks; content if there are none."""
        found = self.parsed(body)
        if found is None:
            return self.content(self.dialect.opens + body + closed)
        deltas = []
        for name, arguments in found:
            if self.tools.parallel or not self.calls:
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
        except (ValueError, RecursionError):
            return None
        calls = []
        for value in values:
            if not isinstance(value, dict) or value.get("name") not in self.tools.functions:
                return None
            given = value.get("arguments", value.get("parameters"))
            if not isinstance(given := {} if given is None else given, dict):
                return None
            calls.append((value["name"], json.dumps(given, ensure_ascii=False)))
        return calls or None

    def end(self, reason: str) -> list[Delta]:
        """What was held back."""
        text, self.text = self.text, ""
        if self.inside:
            self.inside = False
            return self.close(text)
        return self.content(text)


class ForcedCall:
    """Reads the one call that a grammar let the model write, and gives its arguments as they come.

    The grammar's JSON_STYLE fixes what stands around them.
    """

    def __init__(self, tools: Tools) -> None:
        self.text = ""
        self.calls = 0
        key = re.escape(tools.dialect.arguments)
        self.head = re.compile(rf'\{{"name": "([\w-]+)", "{key}": ')

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
        return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}] if text else []

    def end(self, reason: str) -> list[Delta]:
        """An answer that was cut short may end within the arguments."""
        return self.arguments(self.text) if self.calls and reason == "length" else []
