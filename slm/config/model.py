"""conf/model and conf/fetch: a checkpoint, what is expected of it, and its gates."""

import enum
import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from slm.config.common import require_name
from slm.errors import InputError
from slm_pyfunc.dialects import DIALECTS


class Baseline(enum.Enum):
    """What a gate's bounds are: constants, or factors of another model's value of the metric.

    `checkpoint` is another word for the reference, which is the checkpoint.
    """

    constant = "constant"
    reference = "reference"
    champion = "champion"
    checkpoint = "reference"


@dataclass
class Gate:
    """The bounds, inclusive, that a metric has to keep; a missing or NaN metric keeps none.

    `metric` is the gate's name unless given: two gates may bound one metric, of two baselines.
    """

    min: float | None = None
    max: float | None = None
    of: Baseline = Baseline.constant
    metric: str | None = None

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.min, self.max) if bound is not None]
        if not bounds or not all(map(math.isfinite, bounds)) or bounds != sorted(bounds):
            raise InputError(
                f"a gate has min {self.min} and max {self.max}; it must have one of them, or both "
                "in this order."
            )


@dataclass
class Model:
    """A checkpoint: where it comes from and what is expected of it.

    `source` is one of the forms that slm/sources lists. `adapter`, in the same forms, is a PEFT
    adapter to merge into it; without a `source`, its own configuration names the base. What lies in
    MLflow is looked up at `tracking_uri` and `registry_uri`; null: where this project's runs go.
    `sha256` maps names of files in the source to the digests they must have. Where given,
    `licence` must be what the source states, if it states one; `architecture` and `context_length`
    (tokens) what config.json says. `parameters` is how many weights there are, for
    `plan` before the checkpoint is there. `tool_calls` is how the model writes calls of tools
    (slm_pyfunc/tools.py). `gates` replace those of conf/evaluate by metric.
    """

    name: str = MISSING
    source: str | None = MISSING
    adapter: str | None = None
    tracking_uri: str | None = None
    registry_uri: str | None = None
    tool_calls: str = "none"
    licence: str | None = None
    architecture: str | None = None
    context_length: int | None = None
    parameters: float | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_name("model.name", self.name)
        if self.source is None and self.adapter is None:
            raise InputError("model.source is null, and so is model.adapter: give one of them.")
        if self.tool_calls not in DIALECTS:
            valid = ", ".join(DIALECTS)
            raise InputError(f"model.tool_calls is {self.tool_calls!r}; valid: {valid}.")


@dataclass
class Fetch:
    """What may be fetched: `allowed_licences` are names of licences; null allows any."""

    allowed_licences: list[str] | None = None
