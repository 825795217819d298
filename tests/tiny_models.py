"""Logged models of a few kilobytes, and evaluations of them: registries do not look inside."""

import tempfile
from pathlib import Path
from typing import Any

import mlflow
from mlflow.models import infer_signature

from slm.config.packaging import Interface
from slm.digests import Provenance
from slm.evaluation.metrics import METRICS
from slm.records import Evaluation, LoggedModel
from tests.conftest import MODEL, TARGET

ECHO = """
import mlflow


class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str]) -> list[str]:
        return model_input


mlflow.models.set_model(Echo())
"""
PROMPT = ["What is the capital of France?"]


def evaluated(generation: str, **champion: Any) -> Evaluation:
    """Log a generation of a chat model, a prompt model and their checkpoint, as if evaluated."""
    chat, prompt = (
        log_tiny(generation, i.value, TARGET) for i in (Interface.chat, Interface.prompt)
    )
    metrics = {f"{name}{end}": 1 / 3 for name in METRICS for end in ("", "_ci95_low", "_at_128")}
    own = {"champion": "", "champion_metrics": {}, **champion}
    return Evaluation(
        uri="",
        candidates=[chat.uri, prompt.uri],
        reference=log_tiny("the checkpoint", "transformers", "").uri,
        verdict="passed",
        reasons=[],
        gates=[],
        candidate_metrics=metrics,
        reference_metrics=metrics,
        answers=[],
        conditions="one machine",
        model_card="# Card",
        **own,
    )


def log_tiny(generation: str, interface: str, target: str) -> LoggedModel:
    """Log a model that answers what it is asked; its content is its generation's."""
    files = {"model.data": generation}
    provenance = Provenance(files=files, target=target, licence="mit", source="hub:echo")
    name = f"{MODEL}-{interface}"
    model = LoggedModel("", name, MODEL, interface, f"{generation} {interface}", provenance)
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch) / "echo.py"
        code.write_text(ECHO)
        logged = mlflow.pyfunc.log_model(
            name=model.logged_name,
            python_model=str(code),
            signature=infer_signature(PROMPT, PROMPT),
            input_example=PROMPT,
            pip_requirements=["mlflow"],
            metadata=model.metadata(),
        )
    return model.stored_as(logged.model_uri)
