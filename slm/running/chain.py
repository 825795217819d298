"""The chain of steps from a model's source to registered versions, and what is kept of it."""

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slm.config import Config
from slm.records import Checkpoint, Evaluation, LoggedModels, OnnxModel, Registration
from slm.running.run import ASKED, Ask


@dataclass(frozen=True)
class Link:
    """A step, the record that it ends with, and what its parameters take of earlier outcomes."""

    step: str
    outcome: type[Any]
    takes: dict[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> list[str]:
        """The steps whose outcomes it takes."""
        return [of.split(".")[0] for of in self.takes.values()]

    def inputs(self, outcomes: Mapping[str, Any]) -> dict[str, Any]:
        """Its parameters, out of the outcomes of the steps before."""
        return {
            parameter: getattr(outcomes[step], attribute)
            for parameter, of in self.takes.items()
            for step, attribute in [of.split(".")]
        }


PIPELINE = (
    Link("fetch", Checkpoint),
    Link("export_onnx", OnnxModel, {"source": "fetch.uri"}),
    Link("log_pyfunc", LoggedModels, {"source": "export_onnx.uri"}),
    Link("log_transformers", LoggedModels, {"source": "fetch.uri"}),
    Link(
        "evaluate",
        Evaluation,
        {"candidate": "log_pyfunc.uris", "reference": "log_transformers.uri"},
    ),
    Link("register", Registration, {"source": "evaluate.uri"}),
)


def kept(step: str, config: Config, inputs: Mapping[str, Any], ask: Ask) -> Any:
    """What a step is known to end with, without a process of its own; NotKept if it has to run."""
    words = logging.getLogger("slm")
    level = words.level
    token = ASKED.set(ask)
    words.setLevel(logging.WARNING)  # what is said while asking, the step will say
    try:
        return importlib.import_module(f"steps.{step}").main(replace(config, **inputs))
    finally:
        ASKED.reset(token)
        words.setLevel(level)
