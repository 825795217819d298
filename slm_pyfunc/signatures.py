"""The MLflow signatures of the interfaces, derived from the parameters that a request may hold."""

from dataclasses import fields
from typing import Any

import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
from mlflow.types.schema import AnyType, Array, Object, Property

from .parameters import Parameters

QUESTION = "What is the capital of France?"
TYPES = {"int": DataType.long, "int | None": DataType.long, "float": DataType.double}
# The prompt interface returns strings, and its params have one type each: no room for these.
CHAT_ONLY = {"logprobs", "top_logprobs", "logit_bias"}
RESPONSE_FORMAT = Object(
    [Property("type", DataType.string), Property("json_schema", AnyType(), required=False)]
)


def prompt_signature() -> tuple[ModelSignature, Any]:
    """A string in, a string out, and the parameters that have one MLflow type; with an example."""
    specs = []
    for parameter in fields(Parameters):
        if parameter.name == "schema":
            specs.append(ParamSpec("response_format", RESPONSE_FORMAT, {"type": "text"}))
        elif parameter.name == "stop":
            specs.append(ParamSpec("stop", DataType.string, [], shape=(-1,)))
        elif parameter.name not in CHAT_ONLY:
            specs.append(ParamSpec(parameter.name, TYPES[type_name(parameter.type)], None))
    inputs = Schema([ColSpec(DataType.string, "prompt")])
    outputs = Schema([ColSpec(DataType.string)])
    example = pd.DataFrame({"prompt": [QUESTION]}), {"max_tokens": 16}
    return ModelSignature(inputs, outputs, ParamSchema(specs)), example


def chat_signature() -> tuple[ModelSignature, Any]:
    """The fields of the transformers flavor's `llm/v1/chat`, and ours besides; with an example."""
    names = [column.name for column in CHAT_MODEL_INPUT_SCHEMA if column.name != "messages"]
    ours = [p.name for p in fields(Parameters) if p.name != "schema"]
    ours += ["max_completion_tokens", "response_format", "tool_choice", "parallel_tool_calls"]
    names += [name for name in ours if name not in names]
    # Columns of any type: MLflow would refuse 2 for 2.0, and `stop` is a string or a list. The
    # model itself says what is wrong, in fewer words.
    # Messages too may have keys that MLflow's schema would refuse, as clients send answers back.
    columns: list[Any] = [ColSpec(Array(AnyType()), "messages")]
    columns += [ColSpec(AnyType(), name, required=False) for name in names]
    example = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16}
    return ModelSignature(Schema(columns), CHAT_MODEL_OUTPUT_SCHEMA), example


def type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
