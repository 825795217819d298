"""Text to tokens and back: encoding, the chat template, streams, stop strings, grammars.

Encoding and decoding are onnxruntime-genai's. It opens a tokenizer only together with a model, so
here it gets one without weights. Grammars are llguidance's own: those of onnxruntime-genai 0.18
refuse a character of several tokens in a `const` or an `enum`.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from .chat_template import ChatTemplate, read_json
from .plain import RequestError, require_text


class NoGrammar(RequestError):
    """No answer can be held to a JSON schema, for a reason."""

    def __init__(self, told: str, reason: str, schema: str) -> None:
        super().__init__(f"{told}: {reason}")
        self.reason, self.schema = reason, schema


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
        """The token ids of a text; RequestError if it has no token for a part of it."""
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
        texts = [require_text("messages", piece) for piece in pieces]
        return [token for text in texts for token in self.encode_alone(text)]

    def stream(self, stop: tuple[str, ...] = ()) -> "TextStream":
        return TextStream(self.tokenizer.create_stream(), stop)

    @functools.cached_property
    def guide(self) -> Any:
        """llguidance's view of the tokenizer; half a second for 50,000 tokens, so made when needed.

        Raises ValueError if llguidance does not know its kind.
        """
        from llguidance import LLTokenizer

        text = (self.folder / "tokenizer.json").read_text(encoding="utf-8")
        count = max(self.rows, *(token + 1 for token in named_ids(json.loads(text))))
        return LLTokenizer(text, n_vocab=count, eos_token=sorted(self.end_tokens))

    def grammar(self, schema: str) -> "Grammar":
        """The grammar of a JSON schema; NoGrammar if it is malformed, or the tokenizer has none."""
        from llguidance import LLMatcher

        try:
            guide = self.guide
        except ValueError as error:
            told, reason = "response_format: no grammars for this model's tokenizer", str(error)
            raise NoGrammar(told, " ".join(reason.split()), schema) from error
        matcher = LLMatcher(guide, LLMatcher.grammar_from_json_schema(schema))
        if matcher.is_error():
            told = "response_format.json_schema.schema is not a JSON schema"
            raise NoGrammar(told, " ".join(matcher.get_error().split()), schema)
        return Grammar(matcher, guide.vocab_size, self.rows)


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
        """What was held back, for a sequence that does not end in a stop string."""
        text, self.held = self.held, ""
        return text


class Grammar:
    """Says which tokens one sequence may go on with."""

    def __init__(self, matcher: Any, tokens: int, rows: int) -> None:
        self.matcher = matcher
        self.mask = np.zeros((1, -(-tokens // 32)), np.int32)  # a bit for each token
        self.rows = rows  # of the model, which may have fewer

    def within(self, scores: np.ndarray) -> np.ndarray:
        """Scores, float32 [vocabulary], with -inf for the tokens that may not come next.

        RequestError if no token may: no text fits the schema, as none does {"$ref": "#"}.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self.matcher, self.mask)
        allowed = np.unpackbits(self.mask.view(np.uint8), bitorder="little")[: self.rows]
        if self.matcher.is_error() or not allowed.any():
            reason = " ".join(self.matcher.get_error().partition("<state>")[0].split())
            raise RequestError(
                f"no token fits the schema of response_format, or of the tools. {reason}".rstrip()
            )
        return np.where(allowed, scores, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Go on with a token."""
        self.matcher.consume_token(token)


def ids_without_token(tokenizer: dict[str, Any], rows: int) -> np.ndarray:
    """The ids below `rows` that stand for nothing, as a padded embedding has them: int64."""
    return np.setdiff1d(np.arange(rows), named_ids(tokenizer))


def named_ids(tokenizer: dict[str, Any]) -> list[int]:
    """The ids that a tokenizer.json has a token for."""
    vocabulary = tokenizer["model"]["vocab"]
    named = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return [*named, *(token["id"] for token in tokenizer.get("added_tokens", []))]


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
