"""The prompt interface, as models-from-code: a string in, its answer out, row for row."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from .interface import mlflow_errors, open_runtime
from .parameters import Parameters, RequestError


class PromptModel(PythonModel):
    """Answers prompts as they are given: the caller writes the chat template."""

    def load_context(self, context: PythonModelContext) -> None:
        self.runtime = open_runtime(context)

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


def prompts_of(model_input: pd.DataFrame) -> list[Any]:
    """The prompts of a frame, row for row.

    MLflow makes one row of a dict of columns, {"prompt": ["a", "b"]}: its cell holds the prompts.
    """
    prompts: list[Any] = []
    for cell in model_input["prompt"]:
        prompts += list(cell) if isinstance(cell, (list, tuple, np.ndarray)) else [cell]
    return prompts
