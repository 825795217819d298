"""Text to tokens and back: encoding, the chat template, streams, stop strings, grammars.

Encoding, decoding and grammars are onnxruntime-genai's. It opens a tokenizer only together with a
model, so here it gets one without weights, whose logits the caller sets; grammars need no other.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from .chat_template import ChatTemplate, read_json
from .parameters import RequestError


class Tokenizer:
    """The tokenizer of an ONNX folder. Its methods may be called from several threads."""

    def __init__(self, folder: Path, genai_config: dict[str, Any]) -> None:
        self.context_length: int = genai_config["model"]["context_length"]
        config = og.Config(str(folder))
        config.clear_providers()
        without_weights = {"filename": "sampler.onnx", "num_hidden_layers": 0}
        config.overlay(json.dumps({"model": {"decoder": without_weights}}))
        config.add_model_data("sampler.onnx", constant_graph(genai_config["model"]["vocab_size"]))
        self.model = og.Model(config)
        self.tokenizer = og.Tokenizer(self.model)
        self.folder = folder
        self.rows: int = genai_config["model"]["vocab_size"]  # of the embedding, and of the head
        self.nameless = self.ids_without_token()
        # What it puts before every text by itself, such as a bos token.
        self.prefix = [int(token) for token in self.tokenizer.encode("")]
        self.end_tokens = frozenset(int(token) for token in self.tokenizer.eos_token_ids)

    def ids_without_token(self) -> np.ndarray:
        """The ids that stand for nothing, int64; none if the last one is a token's."""
        if self.decode([self.rows - 1]).strip("\ufffd"):  # spares reading megabytes of JSON
            return np.array([], np.int64)
        return ids_without_token(read_json(self.folder / "tokenizer.json"), self.rows)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text; RequestError where the tokenizer knows a part of it not."""
        tokens = [int(token) for token in self.tokenizer.encode(text)]
        if min(tokens, default=0) < 0:
            raise RequestError("prompt has characters that are not in the model's vocabulary")
        if max(tokens, default=0) >= self.rows:
            token = self.decode([max(tokens)])
            raise RequestError(f"prompt has the token {token!r}, which the model has no row for")
        return tokens

    def require_tokens(self, name: str, tokens: list[int]) -> list[int]:
        """The tokens, if the model has a row for each; RequestError otherwise."""
        for token in tokens:
            if type(token) is not int or not 0 <= token < self.rows:
                raise RequestError(f"{name} has the token {token!r}; ids are below {self.rows}")
        return tokens

    def encode_alone(self, text: str) -> list[int]:
        """The token ids of a text and nothing before it, as a chat template's output is encoded."""
        tokens = self.encode(text)
        begins = bool(self.prefix) and tokens[: len(self.prefix)] == self.prefix
        return tokens[len(self.prefix) :] if begins else tokens

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.folder)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt that the checkpoint's chat template makes, up to the assistant's turn."""
        return self.template.render(messages)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        begins: str = "",
    ) -> list[int]:
        """The token ids of that prompt; control tokens in messages and tools are read as text.

        The assistant's turn begins with `begins`.
        """
        *pieces, last = self.template.pieces(messages, tools)
        pieces.append(last + begins)
        return [token for piece in pieces for token in self.encode_alone(piece)]

    def stream(self, stop: tuple[str, ...] = ()) -> "TextStream":
        return TextStream(self.tokenizer.create_stream(), stop)

    def grammar(self, schema: str) -> "Grammar":
        """Constrain tokens to a JSON schema; RequestError where it is malformed."""
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.context_length, do_sample=False)
        try:
            parameters.set_guidance("json_schema", schema)
            return Grammar(og.Generator(self.model, parameters), next(iter(self.end_tokens)))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RequestError(
                f"response_format.json_schema.schema is not a JSON schema: {reason}"
            ) from error


class TextStream:
    """Turns one sequence's tokens into text that may be shown.

    A character is held back until all its bytes are there, text that may begin a stop string until
    it is certain. After a stop string `stopped` is True, and neither it nor what follows is given.
    """

    def __init__(self, stream: Any, stop: tuple[str, ...]) -> None:
        self.stream, self.stop = stream, stop
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became certain with this token, often empty."""
        self.held += self.stream.decode(token)
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self.held = self.held[: min(found)], ""
            return text
        certain = len(self.held) - max((overlap(self.held, s) for s in self.stop), default=0)
        text, self.held = self.held[:certain], self.held[certain:]
        return text

    def end(self) -> str:
        """What was held back, where the sequence ends otherwise than in a stop string."""
        text, self.held = self.held, ""
        return text


class Grammar:
    """Picks one sequence's tokens within a grammar."""

    def __init__(self, generator: Any, first_token: int) -> None:
        self.generator = generator
        generator.append_tokens([first_token])  # any token: the prompt is not the grammar's affair

    def choose(self, scores: np.ndarray) -> int:
        """The token of the highest score (float32 [vocabulary]) among those that may come next.

        RuntimeError where none may: onnxruntime-genai 0.18 takes tokens that are a part of a
        character for U+FFFD, so some characters of several tokens cannot be spelled.
        """
        try:
            self.generator.get_logits()  # none may be set before some were computed
            self.generator.set_logits(scores[np.newaxis])
            self.generator.generate_next_token()
            return int(self.generator.get_next_tokens()[0])
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"response_format: no token fits the schema: {reason}") from error


def ids_without_token(tokenizer: dict[str, Any], rows: int) -> np.ndarray:
    """The ids below `rows` that stand for nothing, as a padded embedding has them: int64."""
    vocabulary = tokenizer["model"]["vocab"]
    named = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = [token["id"] for token in tokenizer.get("added_tokens", [])]
    return np.setdiff1d(np.arange(rows), [*named, *added])


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def constant_graph(vocabulary_size: int) -> bytes:
    """An ONNX model that takes `input_ids` and returns logits of zero, float32 [1, 1, vocabulary].

    Written in protobuf's wire format, because no package that writes ONNX is in the model's
    requirements: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3
    """

    def number(value: int) -> bytes:
        groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
        return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])

    def field(key: int, value: int | str | bytes) -> bytes:
        if isinstance(value, int):
            return number(key << 3) + number(value)
        value = value.encode() if isinstance(value, str) else value
        return number(key << 3 | 2) + number(len(value)) + value

    def tensor(name: str, element_type: int, *shape: int | str) -> bytes:
        dimensions = [field(1, field(1 if isinstance(d, int) else 2, d)) for d in shape]
        tensor_type = field(1, element_type) + field(2, b"".join(dimensions))
        return field(1, name) + field(2, field(1, tensor_type))

    float32, int64 = 1, 7
    shape = [1, 1, vocabulary_size]
    constant = field(1, len(shape)) + field(2, int64) + field(8, "shape")
    constant += b"".join(field(7, size) for size in shape)
    node = field(1, "shape") + field(2, "logits") + field(4, "ConstantOfShape")
    graph = field(1, node) + field(2, "sampler") + field(5, constant)
    graph += field(11, tensor("input_ids", int64, "batch", "sequence"))
    graph += field(12, tensor("logits", float32, *shape))
    return field(1, 8) + field(7, graph) + field(8, field(2, 17))  # IR version, graph, opset
