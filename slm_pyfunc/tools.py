"""Tools: what a request lets the model call, and what its messages say was called before.

Models write calls in dialects of their own; a model's YAML says which (`tool_calls`). Requests and
answers have them in OpenAI's form: https://platform.openai.com/docs/guides/function-calling
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from .calls import ForcedCall, FoundCalls
from .chat_template import to_json
from .dialects import Dialect
from .parameters import JSON_STYLE, RequestError
from .plain import require_shallow

NAME = re.compile(r"[\w-]{1,64}", re.ASCII)
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# As Phi-4-mini's model card has it.
SYSTEM = "You are a helpful assistant with some tools."
# Keys of a JSON schema that hold subschemas by names of the author's, and values as they are.
NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
DATA = {"const", "enum", "default", "examples"}


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
            definitions[name] = nested(parameters, place := f"#/$defs/{name}")
            properties = {"name": {"const": name}, self.dialect.arguments: {"$ref": place}}
            calls.append({**NOTHING, "properties": properties, "required": list(properties)})
        schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return json.dumps({"x-guidance": JSON_STYLE, **schema, "$defs": definitions})

    def reader(self) -> FoundCalls | ForcedCall:
        """What reads the calls in one answer."""
        if self.forced:
            return ForcedCall(self.dialect.arguments)
        return FoundCalls(self.dialect, self.functions, self.parallel)

    def with_tools(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the template takes them, with the tools where it looks for them."""
        if not self.dialect.by_message:
            return messages
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        text = json.dumps(list(self.functions.values()), ensure_ascii=False)
        return [{**messages[0], "tools": text}, *messages[1:]]


def read_tools(request: dict[str, Any], dialect: Dialect | None) -> Tools | None:
    """The tools of a request, None if it has none; RequestError if they are wrong or not served."""
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
        if not isinstance(name, str) or name not in functions:
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
    parallel = request.get("parallel_tool_calls", True)
    if not isinstance(parallel, (bool, np.bool_)):
        raise RequestError(f"parallel_tool_calls is {parallel!r}; it must be true or false")
    return Tools(dialect, functions, forced, bool(parallel) and not dialect.single)


def read_function(where: str, tool: Any) -> tuple[str, dict[str, Any]]:
    """Name and definition of a function; RequestError if the tool is not one."""
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
        except (TypeError, ValueError, RecursionError):
            arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise RequestError(
                f"{where}[{index}] is {call!r}; it must have a function with a name, and arguments "
                "that are a JSON object, as text"
            )
        require_shallow(f"{where}[{index}].function.arguments", arguments)
        read.append({"type": "function", "function": {"name": name, "arguments": arguments}})
        if isinstance(call.get("id"), str):
            read[-1]["id"] = call["id"]
    return read


def as_content(message: dict[str, Any], dialect: Dialect) -> dict[str, Any]:
    """The message with its past calls in its content, if its template knows no calls."""
    if not dialect.by_message or "tool_calls" not in message:
        return message
    calls = [call["function"] for call in message["tool_calls"]]
    text = dialect.opens + to_json(calls).removeprefix("[")
    return {"role": message["role"], "content": message["content"] + text}


def nested(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """A schema that moves to `place` in another one: its pointers to itself begin there.

    A subschema with an `$id` is where its own pointers begin, so it stays as it is.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict) or isinstance(value.get("$id"), str):
            return value
        made: dict[str, Any] = {}
        for key, item in value.items():
            if key in NAMED and isinstance(item, dict):
                made[key] = {name: moved(named) for name, named in item.items()}
            elif key == "$ref" and isinstance(item, str) and re.match(r"#(/|$)", item):
                made[key] = place + item[1:]
            else:
                made[key] = item if key in DATA else moved(item)
        return made

    return moved({key: item for key, item in schema.items() if key != "$id"})
