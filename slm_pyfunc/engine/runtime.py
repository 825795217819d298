"""A model that answers: prompts in, text out, whole or in pieces, from any number of threads."""

import ctypes
import hashlib
import json
import os
import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from ..parameters import MAX_TOKENS, Parameters, RequestError, TooLong
from ..plain import require_text
from ..settings import PROVIDERS, Settings
from ..tokenizer import Tokenizer
from .batch_decoder import BatchDecoder
from .cores import Turn, all_cores, available_cores
from .decoder import Decoder, runs_alone
from .generator_decoder import GeneratorDecoder
from .lookup import PromptLookup
from .sampling import Sampler, log_softmax
from .scheduler import Completion, Events, Scheduler, Sequence, receive

Prompt = str | list[int]  # a text, or the tokens of one
LOADED: "weakref.WeakSet[Runtime]" = weakref.WeakSet()


class Runtime:
    """An ONNX folder, loaded: what the exporter wrote, and how to serve it.

    `execution_provider` is one of PROVIDERS. `sha256` holds digests that files of the
    folder must have. `defaults` are Parameters by name, for what differs from the checkpoint's
    generation_config. The rest are Settings by name.

    A Runtime may be pickled, and used after a fork: the process that gets it loads it again.
    """

    def __init__(
        self,
        folder: Path,
        execution_provider: str = "cpu",
        *,
        sha256: dict[str, str] | None = None,
        defaults: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.settings = Settings(**settings)
        if execution_provider not in PROVIDERS:
            raise ValueError(
                f"execution_provider is {execution_provider!r}; it must be one of {PROVIDERS}"
            )
        self.folder, self.execution_provider = Path(folder), execution_provider
        self.sha256 = sha256 or {}
        config = "genai_config.json"  # read before the weights, so checked before them
        require_digests(self.folder, {k: v for k, v in self.sha256.items() if k == config})
        self.genai_config = json.loads((self.folder / config).read_text())
        model = self.genai_config["model"]
        model["context_length"] = min(
            self.settings.context_length or 2**62, model["context_length"]
        )
        self.context_length: int = model["context_length"]
        self.defaults = Parameters.of(defaults or {}, generation_defaults(self.genai_config))
        self.max_tokens = self.defaults.max_tokens or MAX_TOKENS
        self.loading = threading.Lock()
        self.load()

    def load(self) -> None:
        """Open weights and tokenizer, while the digests of the files are checked."""
        with ThreadPoolExecutor(2) as pool:
            checked = pool.submit(require_digests, self.folder, self.sha256)
            tokenizer = pool.submit(Tokenizer, self.folder, self.genai_config)
            try:
                decoder = self.open_decoder()
            except Exception:
                checked.result()
                raise
            checked.result()
            self.tokenizer = tokenizer.result()
        settings = self.settings
        leaves_room = settings.threads is not None or 2 * available_cores() <= all_cores()
        turn = Turn(needed=self.execution_provider == "cpu" and not leaves_room)
        nameless = self.tokenizer.nameless
        self.scheduler = Scheduler(
            decoder, settings.max_batch_size, settings.max_queue_size, turn, nameless
        )
        self.loaded = True
        LOADED.add(self)

    def open_decoder(self) -> Decoder:
        model, settings = (self.folder, self.genai_config), self.settings
        threads = settings.threads or available_cores()
        if self.execution_provider == "cpu" and not runs_alone(self.genai_config):
            return BatchDecoder(*model, threads, settings.max_batch_size, settings.cache_mb)
        return GeneratorDecoder(*model, self.execution_provider, threads, settings.cache_mb)

    def __getstate__(self) -> dict[str, Any]:
        kept = self.__dict__.copy()
        for loaded in ("tokenizer", "scheduler", "loading"):
            kept.pop(loaded, None)
        return {**kept, "loaded": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "loading": threading.Lock()}

    def require_loaded(self) -> None:
        """Load if this process has not loaded: after a fork, or out of a pickle."""
        if not self.loaded:
            with self.loading:
                if not self.loaded:
                    self.load()

    def leave_to_parent(self) -> None:
        """In a forked child: load anew when asked, and never free what was inherited.

        The parent's threads did not come along, and ONNX Runtime would wait for them for ever.
        """
        for inherited in (self.scheduler, self.tokenizer):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
        self.scheduler.turn.close()
        self.loaded, self.loading = False, threading.Lock()

    def answer(
        self, prompts: Iterable[Prompt], parameters: Parameters | list[Parameters]
    ) -> list[list[Completion]]:
        """Answer prompts, taken as they are: `n` completions each, in the prompts' order.

        `parameters` are those of all prompts, or of each. Raises RequestError where a prompt is
        wrong, before any is answered, and Busy.
        """
        self.require_loaded()
        prompts = list(prompts)
        each = [parameters] * len(prompts) if isinstance(parameters, Parameters) else parameters
        requests = [
            (self.encode(*request), request[1]) for request in zip(prompts, each, strict=True)
        ]
        answers: list[list[Completion]] = []
        under_way: deque[list[Sequence]] = deque()
        try:
            for number, request in enumerate(requests):
                sequences = self.sequences(*request, SimpleQueue())
                self.scheduler.submit(sequences, may_wait=number > 0)
                under_way.append(sequences)
                if sum(map(len, under_way)) >= 2 * self.settings.max_batch_size:
                    answers.append(collect(under_way.popleft()))
            while under_way:
                answers.append(collect(under_way.popleft()))
        finally:
            for sequence in (s for sequences in under_way for s in sequences):
                sequence.cancelled = True
        return answers

    def stream(
        self, prompt: Prompt, parameters: Parameters
    ) -> Generator[tuple[int, str | Completion], None, None]:
        """Answer one prompt in pieces: (choice, piece of text), at the end (choice, Completion).

        Closing the iterator ends the answer.
        """
        yield from receive(self.begin([prompt], parameters, SimpleQueue(), streamed=True))

    def begin(
        self, prompts: list[Prompt], parameters: Parameters, events: Events, streamed: bool
    ) -> list[Sequence]:
        """Queue the answers to prompts, all or none, and return at once.

        `events` receives what becomes of them; their choices count on from prompt to prompt.
        Raises RequestError and Busy.
        """
        self.require_loaded()
        sequences: list[Sequence] = []
        for prompt in prompts:
            tokens = self.encode(prompt, parameters)
            sequences += self.sequences(tokens, parameters, events, len(sequences), streamed)
        self.scheduler.submit(sequences)
        return sequences

    def sequences(
        self,
        prompt: list[int],
        parameters: Parameters,
        events: Events,
        first: int = 0,
        streamed: bool = False,
    ) -> list[Sequence]:
        """The `n` answers to a prompt, to be queued; `first` is the choice of the first of them."""
        room = self.settings.max_batch_size + self.settings.max_queue_size
        if first + parameters.n > room:
            asked = (
                f"{first + parameters.n} answers are asked for" if first else f"n is {parameters.n}"
            )
            raise RequestError(f"{asked}; max_batch_size and max_queue_size hold {room} answers")
        sequences = []
        most = parameters.max_tokens or min(self.max_tokens, self.context_length - len(prompt))
        for choice in range(parameters.n):
            schema = parameters.schema
            grammar = self.tokenizer.grammar(schema) if schema is not None else None
            sampler = Sampler(parameters, prompt, choice, grammar)
            text = self.tokenizer.stream(parameters.stop)
            end_tokens = self.tokenizer.end_tokens
            takes_drafts = self.scheduler.decoder.takes_drafts
            drafted = self.settings.prompt_lookup_num_tokens if takes_drafts else 0
            sequences.append(
                Sequence(
                    *(prompt, parameters, sampler, text, end_tokens, events, most),
                    first + choice,
                    streamed,
                    lookup=PromptLookup(prompt, drafted) if drafted else None,
                )
            )
        return sequences

    def encode(self, prompt: Prompt, parameters: Parameters) -> list[int]:
        """The prompt's tokens; RequestError if it is no text, empty, or too long to answer."""
        tokenizer = self.tokenizer
        if isinstance(prompt, list):
            tokens = tokenizer.require_tokens("prompt", prompt)
        else:
            tokens = tokenizer.encode(require_text("prompt", prompt))
        tokenizer.require_tokens("logit_bias", [token for token, _ in parameters.logit_bias])
        if not tokens:
            raise RequestError("prompt is empty; it must hold at least one token")
        left, asked = self.context_length - len(tokens), parameters.max_tokens
        if (asked or 1) > left:
            words = "its answer" if asked is None else f"max_tokens {asked}"
            raise TooLong(
                f"prompt is {len(tokens)} tokens and leaves no room for {words}: "
                f"the context length is {self.context_length}"
            )
        return tokens

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt that the checkpoint's chat template makes, up to the assistant's turn."""
        self.require_loaded()
        return self.tokenizer.render(messages)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        begins: str = "",
    ) -> list[int]:
        """The tokens of that prompt, in which no message can forge a turn (Tokenizer has more)."""
        self.require_loaded()
        return self.tokenizer.encode_chat(messages, tools, begins)

    def log_probabilities(self, tokens: list[int], prompt: int | None = None) -> np.ndarray:
        """Natural-log probabilities of the token after each: float32 [tokens, vocabulary].

        The first `prompt` are read as a prompt, by default half of them: the rest as an answer.
        """
        self.require_loaded()
        with self.scheduler.computing:
            return log_softmax(self.scheduler.decoder.score(tokens, prompt))


def leave_all_to_parent() -> None:
    for runtime in list(LOADED):
        runtime.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=leave_all_to_parent)


def collect(sequences: list[Sequence]) -> list[Completion]:
    """Wait for all answers to one prompt, in the order of their choice."""
    events = sorted(receive(sequences), key=lambda event: event[0])
    return [completion for _, completion in events if isinstance(completion, Completion)]


def generation_defaults(genai_config: dict[str, Any]) -> Parameters:
    """What the checkpoint's generation_config says, as the model builder wrote it down."""
    search = genai_config.get("search", {})
    names = ("top_p", "top_k", "repetition_penalty")
    values = {name: search[name] for name in names if name in search}
    temperature = search.get("temperature", 1.0) if search.get("do_sample") else 0.0
    return Parameters(temperature=temperature, **values)


def require_digests(folder: Path, sha256: dict[str, str]) -> None:
    """Raise where a file of the folder is not what it was when the model was logged."""
    for name, expected in sha256.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; the model was logged with it")
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise ValueError(
                f"{folder / name} changed since the model was logged: its SHA-256 is {found}, "
                f"expected {expected}. Do not use it: download the model again."
            )
