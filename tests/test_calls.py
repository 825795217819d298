"""Calls of tools in what a model wrote: found in text, forced, and written by real templates."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_pyfunc.chat import joined
from slm_pyfunc.chat_template import ChatTemplate
from slm_pyfunc.tools import as_content, read_calls
from tests.test_tools import (
    ARGUMENTS,
    CALL,
    CLOCK,
    GET_WEATHER,
    PHI4,
    QUESTION,
    TEMPLATES,
    WEATHER,
    tools_of,
)

SAID = {
    "hermes": [
        (f"Let me see.\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>", "Let me see.\n", 1),
        (f"<tool_call>{json.dumps(CALL)}</tool_call>\n<tool_call>{json.dumps(CALL)}", None, 2),
        ("<tool_call>{broken}</tool_call> so", "<tool_call>{broken}</tool_call> so", 0),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, -1),
        ("a < b <tool", "a < b <tool", 0),
        ("\n\nSo: \n\n", "\n\nSo: \n\n", 0),
        ("\n\n", "\n\n", 0),
        (f"\n<tool_call>{json.dumps(CALL)}</tool_call>\n\n So.\n", "\n\n So.\n", 1),
        ('<tool_call>{"name": ["get_weather"]}</tool_call>', None, -1),
        ('<tool_call>{"name": "get_time", "arguments": {"a": NaN}}</tool_call>', None, -1),
    ],
    "llama3": [
        ('{"name": "get_weather", "parameters": {"city": "Paris", "unit": "C"}}', None, 1),
        (f"<|python_tag|>{json.dumps(CALL)}; {json.dumps(CALL)}", None, 1),  # its template's most
        ('\n\n{"name": {"a": ["get_time"]}, "parameters": {}}', None, -1),
        ('{"city": "Paris"}', '{"city": "Paris"}', 0),
        (f"Well: {json.dumps(CALL)}", f"Well: {json.dumps(CALL)}", 0),
    ],
    "phi4": [
        (f"functools[{json.dumps(CALL)}, {json.dumps(CALL)}]", None, 2),
        (f"Sure. functools[{json.dumps(CALL)}", "Sure. ", 1),
        ("functools are tools", "functools are tools", 0),
    ],
}


@pytest.mark.parametrize(
    ("dialect", "text", "content", "count"),
    [(dialect, *case) for dialect, cases in SAID.items() for case in cases],
)
def test_calls_are_found_in_text_however_it_is_cut(
    dialect: str, text: str, content: str | None, count: int
) -> None:
    tools = tools_of(dialect)
    for cut in range(40):
        rng = random.Random(cut)
        size = [1, 2, 3, 7, len(text)][cut % 5]
        reader, deltas, left = tools.reader(), [], text
        while left:
            length = size if cut < 5 else rng.randint(1, 9)
            deltas += reader.push(left[:length])
            left = left[length:]
        message = joined(deltas + reader.end("stop"))
        calls = message.get("tool_calls", [])
        assert len(calls) == max(count, 0)
        assert message["content"] == (text if count < 0 else content)
        for call in calls:
            assert json.loads(call["function"]["arguments"]) == CALL["arguments"]
    if count > 1:
        reader = tools_of(dialect, parallel_tool_calls=False).reader()
        assert len(joined(reader.push(text) + reader.end("stop"))["tool_calls"]) == 1


PARTS = ["\n", " ", "\n\n", "Well", "{", "}", "[", "]", "; "]
PARTS += ["<tool_call>", "</tool_call>", "<|python_tag|>", "functools["]
PARTS += [json.dumps(CALL), '{"name": "get_time", "arguments": {}}']
PARTS += ['{"name": {"get_time": 1}}', '{"name": "get_time", "arguments": {"a": "\\ud800"}}']


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(st.sampled_from(PARTS), max_size=9).map("".join),
    st.randoms(use_true_random=False),
)
def test_a_stream_says_what_the_whole_answer_says(
    dialect: str, text: str, rng: random.Random
) -> None:
    def message(pieces: list[str]) -> dict[str, Any]:
        reader = tools_of(dialect).reader()
        deltas = [delta for piece in pieces for delta in reader.push(piece)]
        said = joined(deltas + reader.end("stop"))
        for call in said.get("tool_calls", []):
            del call["id"]
        json.dumps(said, ensure_ascii=False).encode()
        return said

    cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 9)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = message([text])
    assert message(pieces) == whole
    if "tool_calls" not in whole:
        assert whole["content"] == text


@pytest.mark.parametrize("arguments", ["{}", ARGUMENTS, '{"a": {"b": "}"}}', "12", '"}"'])
def test_a_forced_call_gives_what_was_written_of_its_arguments(arguments: str) -> None:
    head = '{"name": "get_weather", "arguments": '
    written = f"{head}{arguments}}}"
    for length in range(1, len(written) + 1):
        for size in (1, 3, length):
            reader = tools_of("hermes", tool_choice=GET_WEATHER).reader()
            cut = written[:length]
            deltas = [d for at in range(0, length, size) for d in reader.push(cut[at : at + size])]
            message = joined(deltas + reader.end("length"))
            given_back = "".join(c["function"]["arguments"] for c in message.get("tool_calls", []))
            assert given_back == arguments[: max(length - len(head), 0)]
    assert joined(reader.push("") + reader.end("stop")) == {"content": ""}


class Conversation:
    """QUESTION and what follows it, as a dialect's template writes them."""

    def __init__(self, dialect: str, onnx: Path, folder: Path) -> None:
        shutil.copy(onnx / "tokenizer_config.json", folder)
        (folder / "chat_template.jinja").write_text(TEMPLATES[dialect])
        self.template, self.tools = ChatTemplate(folder), tools_of(dialect)
        self.begins = self.after([])

    def after(self, calls: list[dict[str, Any]], *more: dict[str, Any]) -> str:
        """The prompt after an assistant's calls, if there are any, and other messages."""
        past = {"role": "assistant", "content": "", "tool_calls": read_calls("", calls)}
        messages = [*QUESTION, *([as_content(past, self.tools.dialect)] if calls else []), *more]
        return self.template.render(self.tools.with_tools(messages), self.tools.rendered)

    def read(self, text: str) -> dict[str, Any]:
        reader = self.tools.reader()
        return joined(reader.push(text) + reader.end("stop"))


@pytest.mark.parametrize("dialect", TEMPLATES)
def test_a_call_is_read_as_the_template_writes_it(dialect: str, onnx: Path, tmp_path: Path) -> None:
    chat = Conversation(dialect, onnx, tmp_path)
    assert "get_weather" in chat.begins and "get_time" in chat.begins
    call = {"function": {"name": "get_weather", "arguments": ARGUMENTS}}
    turn = chat.after([call]).removeprefix(chat.begins)
    message = chat.read(turn[: turn.rindex("}") + 1] + chat.tools.dialect.closes)
    assert [call["function"] for call in message["tool_calls"]] == [call["function"]]
    assert message["content"] is None


HALF_PAIR = '{"name": "get_time", "arguments": {"a": "\\ud800"}}'


@pytest.mark.parametrize("dialect", TEMPLATES)
def test_the_calls_of_a_turn_can_be_sent_back(dialect: str, onnx: Path, tmp_path: Path) -> None:
    chat = Conversation(dialect, onnx, tmp_path)
    half = f"{chat.tools.dialect.opens}{HALF_PAIR}{chat.tools.dialect.closes}"
    texts = [half, *(text for text, _, count in SAID[dialect] if count > 0)]
    for text in texts:
        calls = chat.read(text)["tool_calls"]
        results = [{"role": "tool", "tool_call_id": c["id"], "content": "21"} for c in calls]
        rendered = chat.after(calls, *results).removeprefix(chat.begins)
        assert rendered.count("21") == len(calls) and rendered.encode()
        assert ("\\ud800" in rendered) == (text == half)


def test_phi4_gets_tools_in_the_system_message_and_past_calls_as_it_writes_them(
    onnx: Path, tmp_path: Path
) -> None:
    shutil.copy(onnx / "tokenizer_config.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(PHI4)
    tools = tools_of("phi4")
    messages = tools.with_tools([{"role": "user", "content": "Hello"}])
    rendered = ChatTemplate(tmp_path).render(messages, tools.rendered)
    written = rendered.partition("<|tool|>")[2].partition("<|/tool|>")[0]
    assert json.loads(written) == [WEATHER, CLOCK] and rendered.startswith("<|system|>")
    assert tools.rendered is None and tools.begins == ""
    calls = read_calls("", [{"function": {"name": "get_weather", "arguments": ARGUMENTS}}])
    past = as_content({"role": "assistant", "content": "", "tool_calls": calls}, tools.dialect)
    reader = tools.reader()
    [delta] = reader.push(past["content"]) + reader.end("stop")
    assert json.loads(delta["tool_calls"][0]["function"]["arguments"]) == CALL["arguments"]
