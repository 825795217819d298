"""The chat interface, as models-from-code: OpenAI's Chat Completions in and out.

https://platform.openai.com/docs/api-reference/chat
"""

from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from .engine.runtime import Runtime
from .engine.scheduler import Completion, Events, LogProbability, Sequence, receive
from .interface import Answer, header, mlflow_errors, open_runtime, require_known
from .parameters import Parameters, RequestError, is_absent, require_text
from .tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
DEVELOPER = "developer"  # OpenAI's newer name of the system role
# Fields that this runtime does not serve; left alone they are null, false, 0 or empty.
UNSERVED = ("stream", "tools", "tool_choice")
# What a body may hold besides Parameters.
FIELDS = ("messages", "max_completion_tokens", *UNSERVED)


class ChatModel(PythonModel):
    """Answers conversations, through the checkpoint's own chat template."""

    def load_context(self, context: PythonModelContext) -> None:
        self.runtime = open_runtime(context)
        self.model = context.model_config["model_name"]

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """A chat completion for one conversation; a list of them for several, in order."""
        with mlflow_errors():
            requests = [
                read_request(row, self.runtime)
                for row in model_input.astype(object).to_dict("records")
            ]
            answers = self.runtime.answer(*map(list, zip(*requests, strict=True)))
        completions = [self.completion(answer) for answer in answers]
        return completions[0] if len(completions) == 1 else completions

    def predict_stream(
        self,
        context: PythonModelContext,
        model_input: dict[str, Any],
        params: dict[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The answer to one conversation, as chunks; the last of each choice says why it ended.

        The very last has the usage.
        """
        with mlflow_errors():
            answer = self.answer({**model_input, "stream": False}, SimpleQueue(), streamed=True)
            for choice, event in receive(answer.sequences):
                chunk = answer.take(choice, event)
                if answer.is_whole:
                    chunk["usage"] = answer.usage()
                yield chunk

    def begin(self, request: dict[str, Any], events: Events, streamed: bool) -> Answer:
        """Begin to answer a body of /v1/chat/completions, for a server; returns at once.

        `events` receives what becomes of it, for `Answer.take`: pieces of text if it is `streamed`.
        """
        with mlflow_errors():
            require_known(request, *FIELDS)
            return self.answer({**request, "stream": False}, events, streamed)

    def answer(self, request: dict[str, Any], events: Events, streamed: bool) -> Answer:
        prompt, parameters = read_request(request, self.runtime)
        kind = "chat.completion.chunk" if streamed else "chat.completion"
        head = header("chatcmpl", kind, request.get("model") or self.model)
        sequences = self.runtime.begin([prompt], parameters, events, streamed)
        return Answer(ChatForm(self.runtime.tokenizer), head, parameters.n, sequences)

    def completion(self, completions: list[Completion]) -> dict[str, Any]:
        """The chat completion of one conversation."""
        head = header("chatcmpl", "chat.completion", self.model)
        form = ChatForm(self.runtime.tokenizer)
        answer = Answer(form, head, len(completions), [], dict(enumerate(completions)))
        return answer.whole()


class ChatForm:
    """A choice of a chat completion: a message, or what is new of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.told: dict[int, int] = {}  # by choice: tokens whose log-probabilities were sent

    def choice(self, completion: Completion) -> dict[str, Any]:
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": completion.text}}
        if completion.logprobs:
            choice["logprobs"] = self.log_probabilities(completion.logprobs)
        return choice

    def piece(self, sequence: Sequence, text: str, begins: bool) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        piece: dict[str, Any] = {
            "delta": {"role": "assistant", "content": text} if begins else delta
        }
        told = self.told.get(sequence.choice, 0)
        if new := sequence.logprobs[told:]:
            piece["logprobs"] = self.log_probabilities(new)
            self.told[sequence.choice] = told + len(new)
        return piece

    def log_probabilities(self, tokens: list[LogProbability]) -> dict[str, Any]:
        """`logprobs` of a choice; `bytes` is null for a token that is a part of a character."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            whole = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": whole}

        content = [
            {**entry(token, logprob), "top_logprobs": [entry(*pair) for pair in top]}
            for token, logprob, top in tokens
        ]
        return {"content": content}


def read_request(request: dict[str, Any], runtime: Runtime) -> tuple[list[int], Parameters]:
    """The prompt's tokens and the parameters of one request; RequestError if a field is wrong."""
    messages = request.get("messages")
    messages = list(messages) if isinstance(messages, np.ndarray) else messages
    request = {name: value for name, value in request.items() if not is_absent(value)}
    for name in UNSERVED:
        if value := request.get(name):
            hint = "; use predict_stream" if name == "stream" else ""
            raise RequestError(f"{name} is {value!r}; this model does not serve it{hint}")
    if "max_completion_tokens" in request:  # OpenAI's newer name
        request["max_tokens"] = request["max_completion_tokens"]
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {messages!r}; it must be a list of at least one message")
    prompt = runtime.encode_chat([read_message(i, m) for i, m in enumerate(messages)])
    return prompt, Parameters.of(request, runtime.defaults)


def read_message(index: int, message: Any) -> dict[str, str]:
    """Role and content of a message, its text parts joined; other keys do not matter.

    An answer of any OpenAI client can be sent back as it came: its `refusal`, `annotations` and the
    like are passed over, and an assistant's content of null is an empty turn.
    """
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise RequestError(f"{where} is {message!r}; it must be an object with role and content")
    role = "system" if message.get("role") == DEVELOPER else message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role is {role!r}; it must be one of {(*ROLES, DEVELOPER)}")
    if calls := message.get("tool_calls"):
        raise RequestError(f"{where}.tool_calls is {calls!r}; this model does not serve them")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, (list, np.ndarray)):
        parts = list(content)
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            raise RequestError(
                f"{where}.content has parts that are not text; this model reads text"
            )
        content = "".join(str(part.get("text", "")) for part in parts)
    return {"role": role, "content": require_text(f"{where}.content", content)}
