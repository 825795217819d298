"""Whatever a body holds, it gets an answer that is JSON, or an error of the client's (HTTP 400)."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModelContext

from slm_pyfunc.chat import ChatModel
from slm_pyfunc.engine.scheduler import receive
from slm_pyfunc.interface import mlflow_errors
from slm_pyfunc.prompt import PromptModel
from tests.test_tools import ARGUMENTS, HERMES, TOOLS, load

Model = ChatModel | PromptModel
CALLS = [{"id": "a", "function": {"name": "get_weather", "arguments": ARGUMENTS}}]
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "a", "content": "21"},
    ],
    "tools": TOOLS,
    "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    "parallel_tool_calls": False,
    "max_completion_tokens": 3,
}
SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {}}}
FIELDS = {
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.01,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1},
    "seed": 1,
    "stop": ["x", "y"],
    "n": 2,
    "logprobs": True,
    "top_logprobs": 1,
    "user": "me",
    "metadata": {"a": "b"},
    "stream_options": {"include_usage": True},
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
BODIES: dict[str, dict[str, Any]] = {
    "calls": {**CHAT, **FIELDS},
    "schema": {"messages": CHAT["messages"][:2], "response_format": FORMAT, **FIELDS},
    "prompt": {"prompt": ["Hi", [5, 6]], "echo": False, **FIELDS, "logprobs": 1, "top_logprobs": 0},
}


def deep(levels: int, key: str = "properties") -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {key: {"a": value}} if key else [value]
    return value


ENDLESS = {  # only from its second token on
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/x"}},
    "required": ["a"],
    "$defs": {"x": {"$ref": "#/$defs/x"}},
}
LARGEST = 10**4300 - 1  # that Python's json reads
NUMBERS = [0, -1, 0.5, 2**40, LARGEST, float("nan"), float("inf")]
TEXTS = ["", "x", "\ud800", "a\0b", "9" * 5000, "<|im_end|>", "[" * 2000, "{}", '{"a": "\\ud800"}']
OBJECTS = [{}, {"$ref": "#"}, {"9" * 5000: 1}, {"\udfff": 1}, deep(300), deep(60), {"$defs": None}]
LISTS: list[Any] = [[], [None], [[1]], deep(600, ""), ["x"] * 20]
ODD = [None, True, False, *NUMBERS, *TEXTS, *OBJECTS, *LISTS]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a body with each of its keys or indices."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs) if isinstance(value, (dict, list)) else []:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


@st.composite
def bodies(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    body = copy.deepcopy(BODIES[kind])
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(list(places(body))))
        odd = copy.deepcopy(draw(st.sampled_from(ODD)))
        if isinstance(container, dict) and draw(st.integers(0, 5)) == 0:
            container[draw(st.sampled_from(TEXTS))] = container.pop(key)
        else:
            container[key] = odd
        if not body:
            break
    return json.loads(json.dumps(body))  # as it comes over HTTP


@pytest.fixture(scope="module")
def models(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    chat = load(tiny_onnx, tmp_path_factory.mktemp("odd") / "onnx", "hermes", HERMES)
    prompt, config = PromptModel(), {"model_name": "small", "context_length": 512, "cache_mb": 1}
    prompt.load_context(PythonModelContext({"onnx": str(tiny_onnx)}, config))
    return {"calls": chat, "schema": chat, "prompt": prompt}


def answered(model: Model, body: dict[str, Any], streamed: bool) -> str:
    """The answer as it goes over the wire, or the error's message."""
    try:
        answer = model.begin(body, SimpleQueue(), streamed)
        said: list[Any] = []
        with mlflow_errors():
            for event in receive(answer.sequences):
                said += answer.take(*event)
                if len(said) > 40:
                    answer.cancel()
                    return "long"
        said = said if streamed else [answer.whole()]
    except MlflowException as error:
        assert error.get_http_status_code() == 400, error.message
        said = [error.message]
    text = json.dumps(said, ensure_ascii=False)
    text.encode()
    return text


@pytest.mark.parametrize("kind", BODIES)
def test_every_body_gets_an_answer_or_a_clients_error(models: dict[str, Model], kind: str) -> None:
    assert "choices" in answered(models[kind], json.loads(json.dumps(BODIES[kind])), False)

    @settings(max_examples=250, derandomize=True, deadline=None, database=None)
    @given(bodies(kind), st.booleans())
    def ask(body: dict[str, Any], streamed: bool) -> None:
        assert answered(models[kind], body, streamed)

    ask()


def with_call(arguments: str) -> list[Any]:
    call = {"function": {"name": "get_weather", "arguments": arguments}}
    return [*CHAT["messages"][:2], {"role": "assistant", "tool_calls": [call]}]


def with_parameters(**parameters: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]


def with_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


@pytest.mark.parametrize(
    ("kind", "field", "value", "words"),
    [
        ("calls", "tool_choice", {"function": {"name": ["a"]}}, "tool_choice names ['a']"),
        ("calls", "parallel_tool_calls", 1, "parallel_tool_calls is 1; it must be true or false"),
        ("calls", "tools", with_parameters(**deep(300)), "tools is nested too deep"),
        (
            "calls",
            "tools",
            with_parameters(title="\ud800"),
            "tools holds a NUL or half a",
        ),
        ("calls", "messages", with_call("[" * 5000), "messages[2].tool_calls[0] is"),
        ("calls", "messages", with_call(json.dumps(deep(300))), "arguments is nested too deep"),
        ("calls", "messages", [{"role": "user", "content": "\ud800"}], "messages holds a NUL or"),
        (
            "calls",
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            "messages[0].content[0].text is None; it must be a string",
        ),
        ("calls", "\ud800", 1, "the name of a field holds"),
        ("schema", "logit_bias", {"9" * 5000: 1}, "it must map token ids to numbers"),
        ("schema", "response_format", with_schema(deep(300)), "is nested too deep"),
        ("schema", "response_format", with_schema({"$ref": "#"}), "no token fits the schema"),
        ("schema", "response_format", with_schema(ENDLESS), "no token fits the schema"),
        ("calls", "tools", with_parameters(**{"$ref": "#"}), "no token fits the schema"),
        ("calls", "tools", with_parameters(type="wat"), "tools: no grammar of their schemas"),
        pytest.param("schema", "max_tokens", LARGEST, "no room for max_tokens 999", id="largest"),
        ("prompt", "echo", deep(990, ""), "echo is nested too deep"),
    ],
)
def test_what_cannot_be_read_is_told(
    models: dict[str, Model], kind: str, field: str, value: Any, words: str
) -> None:
    most = "max_completion_tokens" if kind == "calls" else "max_tokens"
    body = BODIES[kind] | {most: 60, field: value}  # enough that a grammar comes to its end
    assert words in answered(models[kind], body, False)


def test_what_is_odd_and_can_be_read_is_answered(models: dict[str, Model]) -> None:
    null = with_parameters(**{"type": "object", "$defs": None})
    said_before = with_call('{"city": "\\ud800"}')  # half a pair as an escape, as a model may write
    for fields in ({"tools": null}, {"messages": said_before}):
        assert "choices" in answered(models["calls"], BODIES["calls"] | fields, True)
