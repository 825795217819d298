"""The prompt interface, as models-from-code: a string in, its answer out, row for row.

To a server it gives and takes OpenAI's text completions:
https://platform.openai.com/docs/api-reference/completions
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from .engine.runtime import Runtime
from .engine.scheduler import Completion, Events, LogProbability, Sequence
from .interface import Answer, header, mlflow_errors, open_runtime, require_known
from .parameters import Parameters, RequestError, is_absent
from .tokenizer import Tokenizer

# Fields of OpenAI's text completions that are served at their defaults alone.
UNSERVED = {"echo": False, "suffix": "", "best_of": 1}
# What a body may hold besides Parameters.
FIELDS = ("prompt", *UNSERVED)


class PromptModel(PythonModel):
    """Answers prompts as they are given: the caller writes the chat template."""

    def load_context(self, context: PythonModelContext) -> None:
        self.runtime = open_runtime(context)
        self.model = context.model_config["model_name"]

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        """The answers, row for row; `n` of them for each row, one after the other."""
        with mlflow_errors():
            parameters = Parameters.of(params or {}, self.runtime.defaults)
            answers = self.runtime.answer(prompts_of(model_input), parameters)
        return [completion.text for completions in answers for completion in completions]

    def predict_stream(
        self,
        context: PythonModelContext,
        model_input: dict[str, Any],
        params: dict[str, Any] | None = None,
    ) -> Iterator[str]:
        """The answer to one prompt, in pieces of text."""
        with mlflow_errors():
            parameters = Parameters.of(params or {}, self.runtime.defaults)
            if parameters.n > 1:
                raise RequestError(f"n is {parameters.n}; it must be 1 to stream a prompt's answer")
            for _, event in self.runtime.stream(model_input["prompt"], parameters):
                if isinstance(event, str):
                    yield event

    def begin(self, request: dict[str, Any], events: Events, streamed: bool) -> Answer:
        """Begin to answer a body of /v1/completions, for a server; returns at once.

        `events` receives what becomes of it, for `Answer.take`: pieces of text if it is `streamed`.
        """
        with mlflow_errors():
            require_known(request, *FIELDS)
            prompts, parameters = read_request(request, self.runtime)
            head = header("cmpl", "text_completion", request.get("model") or self.model)
            sequences = self.runtime.begin(prompts, parameters, events, streamed)
        return Answer(TextForm(self.runtime.tokenizer), head, parameters.n, sequences)


class TextForm:
    """A choice of a text completion: a text, or what is new of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.told: dict[int, int] = {}  # by choice: tokens whose log-probabilities were sent

    def choice(self, completion: Completion) -> dict[str, Any]:
        return self.part(completion.text, completion.logprobs, completion.finish_reason)

    def pieces(self, sequence: Sequence, event: str | Completion) -> list[dict[str, Any]]:
        told = self.told.get(sequence.choice, 0)
        new = sequence.logprobs[told:]
        self.told[sequence.choice] = told + len(new)
        text, reason = (event, None) if isinstance(event, str) else ("", event.finish_reason)
        return [self.part(text, new, reason)]

    def part(self, text: str, tokens: list[LogProbability], reason: str | None) -> dict[str, Any]:
        logprobs = self.log_probabilities(tokens) if tokens else None
        return {"text": text, "logprobs": logprobs, "finish_reason": reason}

    def log_probabilities(self, tokens: list[LogProbability]) -> dict[str, Any]:
        """OpenAI's older form of `logprobs`: lists of tokens, and of their alternatives by text."""
        decode = self.tokenizer.decode
        return {
            "tokens": [decode([token]) for token, _, _ in tokens],
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": [
                {decode([other]): logprob for other, logprob in top} for *_, top in tokens
            ],
        }


def read_request(
    request: dict[str, Any], runtime: Runtime
) -> tuple[list[str | list[int]], Parameters]:
    """The prompts of a body, each a text or token ids, and its parameters."""
    prompt, values = request.get("prompt"), {**request}
    count = values.pop("logprobs", None)  # a number, where a chat has two fields
    if not is_absent(count) and count is not False:
        values |= {"logprobs": True, "top_logprobs": count}
    parameters = Parameters.of(values, runtime.defaults)
    for name, default in UNSERVED.items():
        if not is_absent(value := request.get(name)) and value != default:
            raise RequestError(f"{name} is {value!r}; this model does not serve it")
    one = isinstance(prompt, str) or (isinstance(prompt, list) and all(map(is_id, prompt)))
    prompts = [prompt] if one else prompt
    if not isinstance(prompts, list) or not prompts or prompts == [[]]:
        raise RequestError(f"prompt is {prompt!r}; it must be a string, or a list of strings")
    return prompts, parameters


def is_id(value: Any) -> bool:
    return type(value) is int


def prompts_of(model_input: pd.DataFrame) -> list[Any]:
    """The prompts of a frame, row for row.

    MLflow makes one row of a dict of columns, {"prompt": ["a", "b"]}: its cell holds the prompts.
    """
    prompts: list[Any] = []
    for cell in model_input["prompt"]:
        prompts += list(cell) if isinstance(cell, (list, tuple, np.ndarray)) else [cell]
    return prompts
