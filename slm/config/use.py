"""conf/score, serve and clean: what is done with versions, and with what steps left."""

import enum
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING

from slm.config.common import valid_at_load, valid_settings
from slm.errors import InputError
from slm_pyfunc.parameters import Parameters, RequestError

# Parameters that a row of a table cannot have: it holds one text, and no log-probabilities.
UNSCORED = ("n", "schema", "logprobs", "top_logprobs")


class Format(enum.Enum):
    """How a table is stored: files in one of Spark's formats, or a table of its catalog."""

    parquet = "parquet"
    csv = "csv"
    json = "json"  # JSON Lines
    delta = "delta"
    table = "table"


@dataclass
class Score:
    """How a table is answered with Spark.

    `column` holds prompts or conversations; null takes `messages`, else `prompt`. A row's seed
    follows from `parameters.seed` and the column `id`, or without one from the whole row.
    `parameters` are those of every request; the seed is 0 unless given. `system` is put before
    conversations without a system message. `settings` are the model's on each executor (Settings),
    `cache_mb` is 256 unless given. Formats are told by the suffix if null. `prefix` goes before the
    names of the added columns.

    Rows are answered and kept in parts of about `rows_per_part` (null: 256 for each task that runs
    at once). `master` is a cluster's `spark://host:port`; null takes the session that is there, or
    what spark-defaults.conf says, or this machine. Each executor of `executor_cores` holds one copy
    of the weights; null is all cores on this machine, and what the cluster says on a cluster.
    """

    column: str | None = None
    id: str | None = None
    parameters: Any = None
    system: str | None = None
    settings: Any = None
    input_format: Format | None = None
    output_format: Format | None = None
    prefix: str = ""
    rows_per_part: int | None = None
    master: str | None = None
    executor_cores: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.parameters or {}, dict):
            raise InputError(
                f"score.parameters is {self.parameters!r}; it must be {{name: value, …}}."
            )
        self.parameters = {"seed": 0, **(self.parameters or {})}
        self.settings = {"cache_mb": 256, **valid_settings("score.settings", self.settings)}
        valid = [f.name for f in fields(Parameters) if f.name not in UNSCORED]
        valid = [*valid, "response_format"]
        for name in self.parameters:
            if name not in valid:
                hint = " The system prompt is score.system." if name == "system" else ""
                raise InputError(
                    f"score.parameters: {name!r} is unknown; valid: {', '.join(valid)}.{hint}"
                )
        try:
            Parameters.of(self.parameters)
        except RequestError as error:
            raise InputError(f"score.parameters: {error}.") from error
        for key in ("rows_per_part", "executor_cores"):
            value = getattr(self, key)
            if isinstance(value, int) and value < 1:
                raise InputError(f"score.{key} is {value}; it must be at least 1.")


@dataclass
class Serve:
    """How `serve` answers over HTTP.

    It listens at `host`, for this machine alone unless told otherwise. `settings` are what every
    ONNX model is loaded with: Settings, `execution_provider`, defaults of Parameters. A body may
    have `max_body_mb` (10^6 bytes), an answer may take `timeout_s`, and those under way when the
    server stops have `shutdown_s` to end. With `follow`, the registry is asked every
    `follow_every_s` what the aliases name.
    """

    host: str = MISSING
    settings: Any = None
    max_body_mb: float = MISSING
    timeout_s: float = MISSING
    shutdown_s: float = MISSING
    follow_every_s: float = MISSING

    def __post_init__(self) -> None:
        self.settings = valid_at_load("serve.settings", self.settings)
        for key in ("max_body_mb", "timeout_s", "shutdown_s", "follow_every_s"):
            value = getattr(self, key)
            if isinstance(value, (int, float)) and not value > 0:
                raise InputError(f"serve.{key} is {value}; it must be above 0.")


@dataclass
class Clean:
    """What `clean` removes of the work folder, the longest unused first.

    Outcomes that nothing used for `older_than_days`, and as many more as keep the folder within
    `max_gb` (10^9 bytes); null: no bound. What a registered version was made from stays unless
    `registered`, what a live run uses in any case. `dry_run` only says what would go.
    """

    older_than_days: float | None = MISSING
    max_gb: float | None = MISSING
    registered: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for key in ("older_than_days", "max_gb"):
            value = getattr(self, key)
            if isinstance(value, (int, float)) and not value >= 0:
                raise InputError(f"clean.{key} is {value}; it must be at least 0.")
