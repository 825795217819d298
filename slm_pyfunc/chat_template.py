"""The checkpoint's own chat template, rendered as transformers renders it.

The environment (sandbox, extensions, filters, globals) is that of transformers 5:
https://huggingface.co/docs/transformers/chat_templating. onnxruntime-genai 0.18 has a renderer of
its own, which reads some templates otherwise without a word: `in` on a string is always false
there, `.replace()` and filters raise, and it knows no trim_blocks.
"""

import datetime
import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from .parameters import RequestError

# Stands inside the control tokens of a message's content while the template is rendered: a private
# use character that no message may hold.
BREAK = "\uf8f0"


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is its content."""

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
        self.control_tokens = control_tokens(read_json(folder / "tokenizer.json"))
        source = template_source(folder, config)
        try:
            self.template = environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{folder}: its chat template is not valid: {error}") from error

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt, up to the assistant's turn; RequestError if the template refuses it."""
        try:
            return self.template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as error:  # of jinja2, the template's raise_exception, or its Python
            reason = " ".join(str(error).split())
            raise RequestError(
                f"messages: the model's chat template refuses them: {reason}"
            ) from error

    def pieces(self, messages: list[dict[str, Any]]) -> list[str]:
        """The prompt in pieces, to be encoded one by one.

        One piece, the prompt, unless a message's content holds a control token: then the prompt is
        cut inside each of these, so that it is read as text and cannot forge a turn.
        """
        return self.render([self.broken(message) for message in messages]).split(BREAK)

    def broken(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its control tokens broken."""
        content = message["content"].replace(BREAK, "")
        for token in self.control_tokens:
            content = content.replace(token, token[:1] + BREAK + token[1:])
        return {**message, "content": content}

    def turn_end(self) -> str:
        """What the template writes after an assistant's message; "" if it does not write it."""
        said = "§"
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": said}
        rendered = self.render([user, answer], add_generation_prompt=False)
        return rendered.rpartition(said)[2] if said in rendered else ""


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
) -> str:
    """JSON as it is; jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


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


def control_tokens(tokenizer: dict[str, Any]) -> list[str]:
    """The tokens that only a template may write, longest first."""
    added = tokenizer.get("added_tokens", [])
    return sorted((t["content"] for t in added if t.get("special")), key=len, reverse=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, an empty one without the file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
