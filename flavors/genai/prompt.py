"""The prompt interface, as models-from-code: a string in, its answer out, row for row."""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from flavors.genai.runtime import Runtime, Sampling


class PromptModel(PythonModel):
    """Answers prompts as they are given: the caller writes the chat template."""

    def load_context(self, context: PythonModelContext) -> None:
        config = context.model_config
        folder = Path(context.artifacts["onnx"])
        self.runtime = Runtime(folder, config["execution_provider"], config.get("threads"))

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        try:
            sampling = Sampling(**{k: v for k, v in (params or {}).items() if v is not None})
            return [
                self.runtime.complete(prompt, sampling).text for prompt in model_input["prompt"]
            ]
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


mlflow.models.set_model(PromptModel())
