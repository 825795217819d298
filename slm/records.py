"""What passes between steps: each outcome is one of these records, written as result.json."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.exceptions import MlflowException
from pydantic import TypeAdapter

from slm.config.model import Baseline
from slm.digests import Provenance
from slm.errors import InputError, one_line

T = TypeVar("T")
ANY = "any"  # as an execution provider: that of the first target which the machine can serve


def from_json(record: type[T], values: Any) -> T:
    """A record out of parsed JSON, nested records included; ValueError where it does not fit."""
    return TypeAdapter(record).validate_python(values)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; `files` are SHA-256 by name, `revision` a commit, version or digest.

    `source` is pinned and holds no path; as it was given, it is a parameter of the run.
    """

    uri: str
    source: str
    revision: str
    licence: str
    architecture: str
    size_mb: float
    files: dict[str, str]


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX folder; `checked_on` is the execution provider that it generated on, or "none".

    `tokenizer_differences` counts the probe texts that it encodes otherwise than the checkpoint.
    `graph` is who made the graph, and `refused` why others were not taken. The float32 twin of
    `parity_layers` layers was compared with transformers on `parity_tokens` tokens in `parity_s`;
    `parity_kl` (nats) is the worst of all positions.
    """

    uri: str
    target: str
    checked_on: str
    tokenizer_differences: int
    graph: str
    refused: dict[str, str]
    parity_layers: int
    parity_tokens: int
    parity_kl: float
    parity_s: float
    size_mb: float
    build_s: float
    peak_rss_mb: float
    builder_arguments: list[str]
    versions: dict[str, str]
    files: dict[str, str]


@dataclass(frozen=True)
class LoggedModel:
    """A model that log_pyfunc or log_transformers put into MLflow's store.

    `uri` is its immutable models:/m-…; `content` the digest of its weights, code, environment and
    settings. Only an ONNX model has a `target`, or several in one name.
    """

    uri: str
    name: str
    model: str
    interface: str
    content: str
    provenance: Provenance
    execution_provider: str = "cpu"
    size_mb: float = 0.0

    @property
    def model_id(self) -> str:
        return self.uri.removeprefix("models:/")

    @property
    def target(self) -> str:
        return self.provenance.target

    @property
    def is_onnx(self) -> bool:
        return bool(self.target)

    @property
    def logged_name(self) -> str:
        """The name of the logged model; MLflow forbids dots here, though not in the registry."""
        return self.name.replace(".", "_")

    def stored_as(self, uri: str) -> "LoggedModel":
        return replace(self, uri=uri)

    def metadata(self) -> dict[str, Any]:
        """What MLflow stores with the model, and `load` reads back."""
        return {
            "name": self.name,
            "model": self.model,
            "interface": self.interface,
            "content": self.content,
            "provenance": self.provenance.json(),
        }

    @classmethod
    def load(cls, uri: str) -> "LoggedModel":
        """Look a model up by any of its URIs: models:/m-…, a registered version, an alias.

        Raises InputError if there is none, or if this project did not log it.
        """
        try:
            stored = mlflow.models.Model.load(uri)
        except (MlflowException, OSError) as error:
            raise InputError(f"{uri} is not a logged model: {one_line(error)}") from error
        metadata = stored.metadata or {}
        if not stored.model_id or "content" not in metadata:
            raise InputError(f"{uri} was not logged by this project.")
        settings = stored.flavors.get("python_function", {}).get("config", {})
        return cls(
            uri=f"models:/{stored.model_id}",
            name=metadata.get("name", ""),
            model=metadata["model"],
            interface=metadata["interface"],
            content=metadata["content"],
            provenance=Provenance.of(metadata["provenance"]),
            execution_provider=settings.get("execution_provider", "cpu") or ANY,
            size_mb=(stored.model_size_bytes or 0) / 1e6,
        )


@dataclass(frozen=True)
class LoggedModels:
    """What one logging step left: the interfaces of an ONNX model, or the checkpoint's one model.

    `uri` is that of the first.
    """

    uri: str
    models: list[LoggedModel]
    size_mb: float

    @property
    def uris(self) -> list[str]:
        return [model.uri for model in self.models]


@dataclass(frozen=True)
class Judged:
    """A metric held against a gate.

    `min` and `max` are the bounds in the metric's own unit. If the gate is `of` the reference or
    the champion, they are that model's value times `min_factor` and `max_factor`.
    """

    name: str
    metric: str
    value: float
    of: Baseline
    passed: bool
    min: float | None = None
    max: float | None = None
    min_factor: float | None = None
    max_factor: float | None = None

    def words(self) -> str:
        """How the gate was missed: the metric, its value, the bound, and by how much."""
        if math.isnan(self.value):
            return f"{self.metric} was not measured"
        if any(bound is not None and math.isnan(bound) for bound in (self.min, self.max)):
            return f"{self.metric} was not measured of the {self.of.value}"
        is_value = f"{self.metric} is {self.value:.4g}"
        if self.max is not None and self.value > self.max:
            bound = f"above {self.max:.4g}{self.whose(self.max_factor)}"
            return f"{is_value}, {bound} by {self.value - self.max:.4g}"
        if self.min is not None and self.value < self.min:
            bound = f"below {self.min:.4g}{self.whose(self.min_factor)}"
            return f"{is_value}, {bound} by {self.min - self.value:.4g}"
        return is_value

    def whose(self, factor: float | None) -> str:
        return "" if factor is None else f" ({factor:g} of the {self.of.value}'s)"


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt, what its answer has to meet, and both answers; "" if a model gave none."""

    messages: list[dict[str, Any]]
    expectations: dict[str, Any]
    candidate: str
    reference: str


@dataclass(frozen=True)
class Evaluation:
    """What was measured of two logged models, and the verdict.

    `candidates` are the URIs of one ONNX model's interfaces, the measured one first; `reference` is
    the checkpoint's. `champion` is the version `models:/name/version` that stood against them, ""
    for none. `verdict` is `passed`, `failed` or `not_evaluated`; `reasons` say in words what keeps
    it from `passed`. Metrics that were measured under the same `conditions` can be compared.
    `report` is the path of a page, `model_card` text in Markdown.
    """

    uri: str
    candidates: list[str]
    reference: str
    champion: str
    verdict: str
    reasons: list[str]
    gates: list[Judged]
    candidate_metrics: dict[str, float]
    reference_metrics: dict[str, float]
    champion_metrics: dict[str, float]
    answers: list[AnsweredPrompt]
    conditions: str
    report: str = ""
    model_card: str = ""

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """What evaluate left: its folder, or its result.json. InputError if it is not that."""
        path = path / "result.json" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"{path} does not exist: evaluate did not finish. Run it again.")
        try:
            return from_json(cls, json.loads(path.read_text())["outcome"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not what evaluate ends with. Pass its uri as source."
            ) from error

    def metrics(self, side: str) -> dict[str, float]:
        """The metrics of a side: candidate, reference or champion."""
        return getattr(self, f"{side}_metrics")

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model, and the alias that it has, "" for none."""

    name: str
    version: str
    alias: str


@dataclass(frozen=True)
class Registration:
    """The versions of one evaluation, the measured one (the lead) first; `uri` is the lead's.

    `promoted` says that the lead is champion, `reasons` why it is not.
    """

    uri: str
    verdict: str
    versions: list[RegisteredVersion]
    promoted: bool
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Scored:
    """A table that was answered by `model`; `uri` is where the answers are.

    Rows, errors and tokens are those of the whole table; of its rows, `answered_rows` were answered
    by this run, the others before.
    """

    uri: str
    model: str
    rows: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    parts: int
    answered_rows: int
    rows_per_s: float
