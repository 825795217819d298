"""The checkpoint's own chat template, rendered as transformers renders it.

The environment (sandbox, extensions, filters, globals) is that of transformers 5:
https://huggingface.co/docs/transformers/chat_templating. onnxruntime-genai 0.18 has a renderer of
its own, and it renders some templates wrongly: `in` on a string is always false, `.replace()` and
filters raise, and trim_blocks is not known.
"""

import contextlib
import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from .parameters import RequestError

# Private use characters. One that the prompt lacks stands inside the control tokens of contents
# while the template is rendered.
MARKS = range(0xF0000, 0x10FFFE)
HALF_PAIR = re.compile("[\ud800-\udfff]")
# Conversations that show what a template writes around contents.
SAID = "\u00a7"
PROBES = [
    [{"role": role, "content": SAID} for role in roles]
    for roles in (("user",), ("system", "user"), ("user", "assistant"), ("assistant", "user"))
]


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for training; its content is rendered."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """The chat template and special tokens of a folder that holds a tokenizer.

    Raises ValueError if there is no template, or if it is not valid.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / "tokenizer_config.json")
        self.variables = special_tokens(config, read_json(folder / "special_tokens_map.json"))
        source = template_source(folder, config)
        try:
            self.template = environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{folder}: its chat template is not valid: {error}") from error
        added = read_json(folder / "tokenizer.json").get("added_tokens", [])
        self.special = frozenset(token["content"] for token in added if token.get("special"))
        self.control_tokens = control_tokens(added, source, self.written())

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt, up to the assistant's turn; RequestError if the template refuses it."""
        try:
            return self.template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as error:  # of jinja2, the template's raise_exception, or its Python
            reason = " ".join(str(error).split())
            raise RequestError(
                f"messages: the model's chat template refuses them: {reason}"
            ) from error

    def pieces(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[str]:
        """The prompt in pieces, to be encoded one by one.

        The prompt is one piece unless a message or a tool holds a control token. Then it is cut
        inside each such token, so that the token is read as text and cannot forge a turn. A token
        that the template itself reads in an answer stays whole there, such as Qwen3's `</think>`.
        """
        prompt = self.render(messages, tools)
        contents = "\n".join(strings([messages, tools]))
        present = [token for token in self.control_tokens if token in contents]
        if not present:
            return [prompt]
        for token in present:
            if len(token) == 1:  # cannot be cut
                raise RequestError(f"messages hold {token!r}, with which the model marks turns")
        taken = set(prompt + contents)
        mark = next(mark for mark in map(chr, MARKS) if mark not in taken)

        def cut(user: list[str], assistant: list[str]) -> str:
            return self.render(
                [
                    broken(message, assistant if message["role"] == "assistant" else user, mark)
                    for message in messages
                ],
                broken(tools, user, mark),
            )

        in_answers = [
            token
            for token in present
            if token in self.special or cut([], [token]).replace(mark, "") == prompt
        ]
        return cut(present, in_answers).split(mark)

    def written(self) -> str:
        """What the template writes for those PROBES that it accepts."""
        prompts = []
        for messages in PROBES:
            with contextlib.suppress(RequestError):
                prompts.append(self.render(messages))
        return "\n".join(prompts)

    def turn_end(self) -> str:
        """What the template writes after an assistant's message; "" if it does not write it."""
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": SAID}
        rendered = self.render([user, answer], add_generation_prompt=False)
        return rendered.rpartition(SAID)[2] if SAID in rendered else ""


def environment() -> jinja2.Environment:
    """jinja2 as transformers sets it up."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    allow_nan: bool = True,
) -> str:
    """JSON as it is; jinja2's own filter escapes HTML.

    Half of a surrogate pair is written as an escape, as the arguments of a call may have held it.
    """
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        allow_nan=allow_nan,
    )
    return HALF_PAIR.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def template_source(folder: Path, config: dict[str, Any]) -> str:
    """The template beside the tokenizer, or inside its configuration (named ones: `default`)."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    inside = config.get("chat_template")
    if isinstance(inside, list):
        inside = {entry["name"]: entry["template"] for entry in inside}.get("default")
    if not isinstance(inside, str):
        raise ValueError(f"{folder} has no chat template")
    return inside


def special_tokens(*configs: dict[str, Any]) -> dict[str, Any]:
    """The special tokens that a template may name: bos_token, eos_token and so on."""
    found: dict[str, Any] = {}
    for config in configs:
        for name, value in config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found.setdefault(name, text)
    return found


def control_tokens(added: list[dict[str, Any]], source: str, written: str) -> list[str]:
    """The added tokens that only a template may write, longest first.

    They are the special tokens, and others that stand in the template's source or output, except
    words and spaces, which any text has. A token of one character cannot be cut: it counts only if
    it is special and the template writes it.
    """

    def is_control(token: str, special: bool) -> bool:
        if len(token) == 1:
            return special and not token.isspace() and token in written
        is_text = not token.strip() or token.strip().isalnum()
        return special or (not is_text and (token in source or token in written))

    found = {token["content"] for token in added}
    special = {token["content"] for token in added if token.get("special")}
    return sorted((t for t in found if is_control(t, t in special)), key=len, reverse=True)


def strings(value: Any) -> Iterator[str]:
    """Every text in a structure of JSON's types, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from strings(list(pair))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def broken(value: Any, tokens: list[str], mark: str) -> Any:
    """The structure with `mark` inside each of the tokens that its texts hold."""
    if isinstance(value, dict):
        return {broken(k, tokens, mark): broken(v, tokens, mark) for k, v in value.items()}
    if isinstance(value, list):
        return [broken(item, tokens, mark) for item in value]
    if isinstance(value, str):
        for token in tokens:
            value = value.replace(token, token[:1] + mark + token[1:])
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, an empty one without the file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
