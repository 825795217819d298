"""onnxruntime-genai behind typed calls: load a folder, render a chat, answer, score tokens."""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported


class ExecutionProviderUnavailable(RuntimeError):
    """This onnxruntime-genai lacks the execution provider, or this machine its device."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. None leaves a value as the checkpoint's generation_config has it.

    `temperature` 0 is greedy. `seed` makes sampling repeatable.
    """

    max_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        require(
            "temperature",
            self.temperature,
            self.temperature is None or self.temperature >= 0,
            "0 or more",
        )
        require(
            "top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"
        )
        require("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1")
        penalty = self.repetition_penalty
        require("repetition_penalty", penalty, penalty is None or penalty > 0, "above 0")
        require(
            "seed", self.seed, self.seed is None or 0 <= self.seed < 2**31, "from 0 to 2147483647"
        )

    def search_options(self, prompt_tokens: int) -> dict[str, Any]:
        """The search options of onnxruntime-genai's GeneratorParams."""
        options: dict[str, Any] = {"max_length": prompt_tokens + self.max_tokens}
        if self.temperature is not None:
            options["do_sample"] = self.temperature > 0
            if self.temperature > 0:
                options["temperature"] = self.temperature
        names = {
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
        }
        options |= {name: value for name, value in names.items() if value is not None}
        if self.seed is not None:
            options["random_seed"] = self.seed
        return options


@dataclass(frozen=True)
class Completion:
    """An answer; `finish_reason` is `stop` or `length`, the end token counts as generated."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


class Runtime:
    """A loaded model. Threads may share it: their prompts are answered one after the other.

    `folder` is what the model builder wrote; `execution_provider` one of cpu, cuda, dml, webgpu;
    `threads` the number of intra-op threads, by default the cores that this process may use.
    """

    def __init__(
        self, folder: Path, execution_provider: str = "cpu", threads: int | None = None
    ) -> None:
        import onnxruntime_genai as og

        self.og = og
        config = og.Config(str(folder))
        config.clear_providers()
        if execution_provider != "cpu":
            config.append_provider(execution_provider)
        session = {"intra_op_num_threads": threads or available_cores()}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        try:
            self.model = og.Model(config)
        except RuntimeError as error:
            if execution_provider == "cpu":
                raise
            raise ExecutionProviderUnavailable(
                f"{execution_provider}: {' '.join(str(error).split())}"
            ) from error
        self.tokenizer = og.Tokenizer(self.model)
        genai_config = json.loads((folder / "genai_config.json").read_text())
        self.one_at_a_time = threading.Lock()
        self.context_length: int = genai_config["model"]["context_length"]
        self.vocabulary_size: int = genai_config["model"]["vocab_size"]

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt that the checkpoint's chat template makes, up to the assistant's turn."""
        return self.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text; ValueError where the tokenizer knows a part of it not."""
        tokens = [int(token) for token in self.tokenizer.encode(text)]
        require(
            "prompt",
            "a text with unknown tokens",
            min(tokens, default=0) >= 0,
            "in the model's vocabulary",
        )
        return tokens

    def complete(self, prompt: str, sampling: Sampling) -> Completion:
        """Answer one prompt, taken as it is."""
        require("prompt", repr(prompt), isinstance(prompt, str), "a string")
        tokens = self.encode(prompt)
        require("prompt", f"{len(tokens)} tokens", len(tokens) > 0, "not empty")
        limit = self.context_length
        total = f"{len(tokens)} tokens + max_tokens {sampling.max_tokens}"
        require(
            "prompt",
            total,
            len(tokens) + sampling.max_tokens <= limit,
            f"at most {limit}, the context length",
        )
        with self.one_at_a_time:
            generated = self.generate(tokens, sampling)
        ended = len(generated) > 0 and int(generated[-1]) in self.tokenizer.eos_token_ids
        text = self.tokenizer.decode(generated[: len(generated) - ended])
        return Completion(text, len(tokens), len(generated), "stop" if ended else "length")

    def generate(self, tokens: list[int], sampling: Sampling) -> np.ndarray:
        """The tokens that follow `tokens`, the end token included: int32 [generated]."""
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(**sampling.search_options(len(tokens)))
        generator = self.og.Generator(self.model, parameters)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
        return generator.get_sequence(0)[len(tokens) :]

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        """Natural-log probabilities of the token after each: float32 [tokens, vocabulary]."""
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(tokens) + 1)
        generator = self.og.Generator(self.model, parameters)
        generator.append_tokens(tokens)
        logits = generator.get_output("logits")[0].astype(np.float32)
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def available_cores() -> int:
    """The cores that this process may use: its affinity, capped by the CPU quota of its cgroup."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()  # cgroup v2
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def require(name: str, value: Any, holds: bool, limit: str) -> None:
    """Raise ValueError naming the field, what it was and its limit."""
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {limit}")
