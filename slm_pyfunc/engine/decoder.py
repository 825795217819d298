"""What runs the ONNX model: tokens in, logits out, keys and values kept from one call to the next.

Two classes do the same for the scheduler: `BatchDecoder` runs many sequences in one call, on the
CPU; `GeneratorDecoder` one after the other, with any execution provider and any kind of cache.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

CAPACITY_STEP = 256  # keys and values are allocated for a multiple of so many tokens
PROMPT_PIECE = 256  # tokens of a prompt per call; bounds the memory of logits and attention scores
# The session option, in genai_config.json, of where weights are, relative to its folder.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# The graph that prompts are read by, where there is one beside the decoder's.
PROMPT_GRAPH = "prompt.onnx"
# The input of a graph that says for how many of the last tokens to give logits; 0 means all.
LOGITS_TO_KEEP = "logits_to_keep"
LONGROPE_SWITCH = 4096  # tokens; beyond them Phi's LongRoPE graphs use other factors


class ExecutionProviderUnavailable(RuntimeError):
    """This onnxruntime-genai lacks the execution provider, or this machine its device."""


@dataclass(eq=False)
class Row:
    """A sequence in a decoder: the tokens whose keys and values are computed.

    The first `prompt_length` are, or will be, its prompt's.
    """

    tokens: list[int] = field(default_factory=list)
    prompt_length: int = 0
    state: Any = None


class Decoder(Protocol):
    """What the scheduler drives, from one thread. Logits are float32."""

    takes_drafts: bool  # whether `extend_by_draft` may be asked

    def open(self, prompt: list[int], length: int) -> Row:
        """A new row for a sequence of at most `length` tokens, begun from what is computed."""

    def extend(self, row: Row, tokens: list[int]) -> np.ndarray:
        """Append tokens of a prompt, at most PROMPT_PIECE, to a row.

        Returns the logits after them, [vocabulary].
        """

    def step(self, rows: list[Row], tokens: list[int]) -> list[np.ndarray | Exception]:
        """Append one token to each row; logits after it, [vocabulary] each.

        A row that cannot be computed gets its error in place of logits.
        """

    def extend_by_draft(self, row: Row, tokens: list[int]) -> np.ndarray:
        """Append tokens to a row; logits after each, [tokens, vocabulary].

        If the last tokens turn out wrong, the caller cuts them off `row.tokens`, which undoes them.
        """

    def close(self, row: Row) -> None:
        """Give up a row; what it computed is kept for later ones, within the budget."""

    def clear(self) -> None:
        """Give up all rows after an error, and keep nothing of them."""

    def score(self, tokens: list[int], prompt: int | None = None) -> np.ndarray:
        """Logits after each of the tokens, [tokens, vocabulary].

        The first `prompt` of them are read as a prompt's are, which may be by another graph; half
        of them if None.
        """


def has_longrope(genai_config: dict[str, Any]) -> bool:
    """Whether the graph changes its rotary factors with the length, as Phi's long models do.

    onnxruntime-genai goes by the type as well: https://github.com/microsoft/onnxruntime-genai/pull/1161
    """
    model = genai_config["model"]
    return model["type"].startswith("phi") and model["context_length"] > LONGROPE_SWITCH


def runs_alone(genai_config: dict[str, Any]) -> bool:
    """Whether each sequence of a graph needs a Generator of its own, also on the CPU.

    A graph without GroupQueryAttention returns caches that have grown, and treats every row as if
    it were as long as the longest.
    """
    shares = genai_config["search"].get("past_present_share_buffer", True)
    return has_longrope(genai_config) or not shares


def capacity_for(length: int) -> int:
    """The tokens for which to allocate keys and values, where `length` are needed."""
    return -(-length // CAPACITY_STEP) * CAPACITY_STEP


def common(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
