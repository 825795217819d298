"""The chat interface, as models-from-code: OpenAI's Chat Completions in and out.

https://platform.openai.com/docs/api-reference/chat
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from .chat_template import ChatTemplate
from .dialects import DIALECTS, Dialect
from .engine.runtime import Runtime
from .engine.scheduler import Completion, Events, LogProbability, Sequence, receive
from .interface import Answer, header, mlflow_errors, open_runtime, require_known
from .parameters import Parameters, RequestError, is_absent
from .plain import require_text
from .tokenizer import NoGrammar, Tokenizer
from .tools import NOTHING, Tools, as_content, read_calls, read_tools

ROLES = ("system", "user", "assistant")
DEVELOPER = "developer"  # OpenAI's newer name of the system role
# What a body may hold besides Parameters.
FIELDS = (
    *("messages", "max_completion_tokens", "stream"),
    *("tools", "tool_choice", "parallel_tool_calls"),
)
PROBE = "look_up"  # a tool that a template has to write down


class ChatModel(PythonModel):
    """Answers conversations, through the checkpoint's own chat template."""

    def load_context(self, context: PythonModelContext) -> None:
        self.runtime = open_runtime(context)
        self.model = context.model_config["model_name"]
        self.dialect = DIALECTS[context.model_config.get("tool_calls") or "none"]
        if self.dialect is not None:
            require_tools_rendered(self.runtime.tokenizer.template, self.dialect)

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """A chat completion for one conversation; a list of them for several, in order."""
        with mlflow_errors():
            asked = [
                read_request(row, self.runtime, self.dialect)
                for row in model_input.astype(object).to_dict("records")
            ]
            with naming_tools(asked):
                answers = self.runtime.answer(
                    [a.prompt for a in asked], [a.parameters for a in asked]
                )
        completions = [
            self.completion(answer, of.tools) for answer, of in zip(answers, asked, strict=True)
        ]
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
                chunks = answer.take(choice, event)
                if answer.is_whole:
                    chunks[-1]["usage"] = answer.usage()
                yield from chunks

    def begin(self, request: dict[str, Any], events: Events, streamed: bool) -> Answer:
        """Begin to answer a body of /v1/chat/completions, for a server; returns at once.

        `events` receives what becomes of it, for `Answer.take`: pieces of text if it is `streamed`.
        """
        with mlflow_errors():
            require_known(request, *FIELDS)
            return self.answer({**request, "stream": False}, events, streamed)

    def answer(self, request: dict[str, Any], events: Events, streamed: bool) -> Answer:
        asked = read_request(request, self.runtime, self.dialect)
        kind = "chat.completion.chunk" if streamed else "chat.completion"
        head = header("chatcmpl", kind, request.get("model") or self.model)
        with naming_tools([asked]):
            sequences = self.runtime.begin([asked.prompt], asked.parameters, events, streamed)
        form = ChatForm(self.runtime.tokenizer, asked.tools)
        return Answer(form, head, asked.parameters.n, sequences)

    def completion(self, completions: list[Completion], tools: Tools | None) -> dict[str, Any]:
        """The chat completion of one conversation."""
        head = header("chatcmpl", "chat.completion", self.model)
        form = ChatForm(self.runtime.tokenizer, tools)
        return Answer(form, head, len(completions), [], dict(enumerate(completions))).whole()


def require_tools_rendered(template: ChatTemplate, dialect: Dialect) -> None:
    """Raise ValueError if a chat template does not write down the tools of a request."""
    tools = Tools(dialect, {PROBE: {"name": PROBE, "parameters": NOTHING}})
    messages = tools.with_tools([{"role": "user", "content": "Hello"}])
    if PROBE not in template.render(messages, tools.rendered):
        raise ValueError(
            "tool_calls is set, and the model's chat template writes no tools: set it to none"
        )


class Asked(NamedTuple):
    """What a request asks: the tokens of its prompt, its parameters, and its tools."""

    prompt: list[int]
    parameters: Parameters
    tools: Tools | None


@contextmanager
def naming_tools(asked: list[Asked]) -> Iterator[None]:
    """An error in the schema of a call that is forced is one of the tools, not of a response."""
    try:
        yield
    except NoGrammar as error:
        if any(a.tools is not None and a.parameters.schema == error.schema for a in asked):
            raise RequestError(f"tools: no grammar of their schemas: {error.reason}") from error
        raise


class ChatForm:
    """A choice of a chat completion: a message, or what is new of it."""

    def __init__(self, tokenizer: Tokenizer, tools: Tools | None) -> None:
        self.tokenizer, self.tools = tokenizer, tools
        self.readers: dict[int, Any] = {}  # of the calls of each choice
        self.told: dict[int, int] = {}  # by choice: tokens whose log-probabilities were sent

    def choice(self, completion: Completion) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": completion.text}
        reason = completion.finish_reason
        if self.tools is not None:
            reader = self.tools.reader()
            deltas = reader.push(completion.text) + reader.end(reason)
            message |= joined(deltas)
            reason = reason_of(reason, reader.calls)
        choice: dict[str, Any] = {"message": message, "finish_reason": reason}
        if completion.logprobs:
            choice["logprobs"] = self.log_probabilities(completion.logprobs)
        return choice

    def pieces(self, sequence: Sequence, event: str | Completion) -> list[dict[str, Any]]:
        begins = sequence.choice not in self.told
        told = self.told.setdefault(sequence.choice, 0)
        text, reason = (event, None) if isinstance(event, str) else ("", event.finish_reason)
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        if self.tools is not None:
            if begins:
                self.readers[sequence.choice] = self.tools.reader()
            reader = self.readers[sequence.choice]
            deltas = reader.push(text) if reason is None else reader.end(reason)
            reason = reason and reason_of(reason, reader.calls)
        if begins:
            first = {"role": "assistant", "content": "" if self.tools is None else None}
            deltas = [{**first, **(deltas[0] if deltas else {})}, *deltas[1:]]
        if reason and (not deltas or self.tools is not None):
            deltas.append({})
        pieces: list[dict[str, Any]] = [{"delta": delta, "finish_reason": None} for delta in deltas]
        if reason:
            pieces[-1]["finish_reason"] = reason
        if pieces and (new := sequence.logprobs[told:]):
            pieces[0]["logprobs"] = self.log_probabilities(new)
            self.told[sequence.choice] = told + len(new)
        return pieces

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


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The content and calls of a whole message, put together from its deltas."""
    calls: list[dict[str, Any]] = []
    for call in (call for delta in deltas for call in delta.get("tool_calls", [])):
        if call["index"] == len(calls):
            calls.append({key: value for key, value in call.items() if key != "index"})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    content = "".join(delta.get("content", "") for delta in deltas)
    return {"content": content or None, "tool_calls": calls} if calls else {"content": content}


def reason_of(reason: str, calls: int) -> str:
    return "tool_calls" if calls and reason == "stop" else reason


def read_request(
    request: dict[str, Any], runtime: Runtime, dialect: Dialect | None = None
) -> Asked:
    """What one request asks; RequestError if a field is wrong."""
    messages = request.get("messages")
    messages = list(messages) if isinstance(messages, np.ndarray) else messages
    request = {name: value for name, value in request.items() if not is_absent(value)}
    if "max_completion_tokens" in request:  # OpenAI's newer name
        request["max_tokens"] = request["max_completion_tokens"]
    parameters = Parameters.of(request, runtime.defaults)  # first: it looks at every field
    if value := request.get("stream"):
        raise RequestError(f"stream is {value!r}; this model does not serve it; use predict_stream")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {messages!r}; it must be a list of at least one message")
    read = [read_message(index, message, dialect) for index, message in enumerate(messages)]
    tools = read_tools(request, dialect)
    if tools is None:
        return Asked(runtime.encode_chat(read), parameters, None)
    prompt = runtime.encode_chat(tools.with_tools(read), tools.rendered, tools.begins)
    if schema := tools.schema():  # it ends the answer: a stop string would cut the arguments
        parameters = replace(parameters, schema=schema, stop=())
    return Asked(prompt, parameters, tools)


def read_message(index: int, message: Any, dialect: Dialect | None) -> dict[str, Any]:
    """Role, content and calls of a message, its text parts joined; other keys do not matter.

    An answer of any OpenAI client can be sent back as it came: its `refusal`, `annotations` and the
    like are passed over, and an assistant's content of null is an empty turn.
    """
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise RequestError(f"{where} is {message!r}; it must be an object with role and content")
    role = "system" if message.get("role") == DEVELOPER else message.get("role")
    roles = ROLES if dialect is None else (*ROLES, "tool")
    if role not in roles:
        raise RequestError(f"{where}.role is {role!r}; it must be one of {(*roles, DEVELOPER)}")
    calls = message.get("tool_calls")
    if not is_absent(calls) and (dialect is None or role != "assistant"):
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
        content = "".join(
            require_text(f"{where}.content[{at}].text", part.get("text"))
            for at, part in enumerate(parts)
        )
    read = {"role": role, "content": require_text(f"{where}.content", content)}
    if dialect is not None:
        if not is_absent(calls):
            read["tool_calls"] = read_calls(f"{where}.tool_calls", calls)
            read = as_content(read, dialect)
        read |= {key: message[key] for key in ("tool_call_id", "name") if message.get(key)}
    return read
