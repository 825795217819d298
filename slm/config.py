"""The schema of conf/: the dataclasses that Hydra validates the YAML against, one per group."""

import contextlib
import enum
import json
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from platformdirs import user_cache_path

from slm.errors import InputError
from slm.target_name import joined, true_name, untrue
from slm_pyfunc.dialects import DIALECTS
from slm_pyfunc.parameters import Parameters, RequestError
from slm_pyfunc.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
WINDOW = 512  # tokens that calibration reads at a time
# Parameters that a row of a table cannot have: it holds one text, and no log-probabilities.
UNSCORED = ("n", "schema", "logprobs", "top_logprobs")


class ExecutionProvider(enum.Enum):
    """ONNX Runtime's execution providers, by the names of the model builder's `-e`."""

    cpu = "cpu"
    cuda = "cuda"
    dml = "dml"
    webgpu = "webgpu"
    NvTensorRtRtx = "NvTensorRtRtx"


class Precision(enum.Enum):
    """Precision of the weights, by the names of the model builder's `-p`."""

    int4 = "int4"
    int8 = "int8"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"

    @property
    def bits(self) -> int | None:
        """Of a quantized weight; None where weights are floats."""
        return {"int4": 4, "int8": 8}.get(self.value)


class Quantizer(enum.Enum):
    """Who rounds the weights to int4 or int8.

    `rtn` is the exporter's own round to nearest, one tensor at a time: the builder's `default` to
    the bit. `grid` keeps the integers and scales of a checkpoint that was quantized before, such as
    a GGUF. `mse` searches the scale of least squared error, `gptq` scales and integers together;
    both weigh errors by the inputs that a calibration text gives, layer by layer. `builder` leaves
    it to the builder and its options, at three times the memory.
    """

    rtn = "rtn"
    grid = "grid"
    mse = "mse"
    gptq = "gptq"
    builder = "builder"

    @property
    def calibrates(self) -> bool:
        """Whether it reads a text."""
        return self in (Quantizer.mse, Quantizer.gptq)


class Preflight(enum.Enum):
    """What becomes of a run that needs more disk or memory than there is."""

    stop = "stop"
    warn = "warn"
    off = "off"


class Objective(enum.Enum):
    """Which target `choose` takes of those that passed their gates and kept the budget.

    `closest` is the one whose KL divergence from the checkpoint is least, `smallest` that of the
    least size on disk, `fastest` that of the most decoded tokens a second, `cheapest` the first of
    the ladder, after which nothing else is tried.
    """

    closest = "closest"
    smallest = "smallest"
    fastest = "fastest"
    cheapest = "cheapest"


class Graph(enum.Enum):
    """Who makes the graph; `auto` is the first of two whose twin agrees with transformers.

    It leaves out optimum, which needs an environment of its own and the whole model in memory.
    """

    genai = "genai"
    mobius = "mobius"
    optimum = "optimum"
    auto = "auto"

    @property
    def makers(self) -> list[str]:
        return ["genai", "mobius"] if self is Graph.auto else [self.value]


def user_cache() -> str:
    """The folder for outcomes that no one chose another place for, which outlives every clone."""
    return str(user_cache_path("slm-packaging"))


def require_name(key: str, name: str) -> None:
    """Raise InputError unless MLflow can use the name, for models and in URIs."""
    if name != MISSING and not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"{key} is {name!r}; it must be letters, digits, dots, _ and -.")


def require_template(key: str, template: str, *fields: str) -> None:
    """Raise InputError unless the template makes names; it may hold model, interface, `fields`."""
    valid = dict.fromkeys(("model", *fields, "interface"), "x")
    try:
        require_name(key, template.format(**valid))
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        known = ", ".join(f"{{{field}}}" for field in valid)
        raise InputError(
            f"{key} is {template!r}; it must be letters, digits, dots, _ and -, and of {known}."
        ) from error


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


BLOCK_SIZES = (16, 32, 64, 128, 256)  # of MatMulNBits
# Those that a quantizer can make; the others leave it to the builder.
PRECISIONS = {
    Quantizer.grid: [Precision.int4],
    Quantizer.mse: [Precision.int4, Precision.int8],
    Quantizer.gptq: [Precision.int4, Precision.int8],
}
# The model builder's options of how it quantizes itself; older names of them begin with int4_.
QUANTIZING = frozenset(
    {
        "is_symmetric",
        "matmul_mixed_precision",
        "matmulnbits_weights_prepacked",
        "nodes_to_exclude",
        "op_types_to_quantize",
        "use_qdq",
    }
)


@dataclass
class Target:
    """A hardware target: what the model builder is told, and which runtime wheel serves the result.

    `builder_options` are the builder's `--extra_options`. `runtime_package` is pinned to the
    version of the onnxruntime-genai that exported the model; `provider_package`, a pin, brings the
    execution provider if the runtime does not. What the words of `name` say of the target has to be
    true (slm/target_name.py). `int8` are endings of the names of
    linears to which `quantizer=gptq` leaves 8 bits, as the checkpoint names them. Of
    `budget_mb` and `budget_bits` one may be given instead: `gptq` then leaves 8 bits to the linears
    that int4 harms most. The budget is what the linears' integers and scales take: 10^6 bytes, or
    bits for each weight, which suits models of any size.
    """

    name: str = MISSING
    execution_provider: ExecutionProvider = MISSING
    precision: Precision = MISSING
    runtime_package: str = MISSING
    provider_package: str | None = None
    quantizer: Quantizer = Quantizer.builder
    int8: list[str] = field(default_factory=list)
    budget_mb: float | None = None
    budget_bits: float | None = None
    builder_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_name("target.name", self.name)
        if not isinstance(self.precision, Precision):  # the YAML lacks it, which Hydra says
            return
        options, quantizer = self.builder_options, f"target.quantizer={self.quantizer.value}"
        own = self.precision.bits and self.quantizer is not Quantizer.builder
        fits = options.get("block_size") in BLOCK_SIZES
        fits &= options.get("algo_config", "default") == "default"
        unheeded = [key for key in options if key in QUANTIZING or key.startswith("int4_")]
        precisions = PRECISIONS.get(self.quantizer, list(Precision))
        mixing = {name: getattr(self, name) for name in ("int8", "budget_mb", "budget_bits")}
        mixing = {name: value for name, value in mixing.items() if value not in (None, [])}
        mixes = self.precision is Precision.int4 and self.quantizer is Quantizer.gptq
        first = next((f"target.{name} is {value}" for name, value in mixing.items()), "")
        positive = all(0 < v < float("inf") for v in mixing.values() if not isinstance(v, list))
        for broken, words in (
            (
                own and not fits,
                f"{quantizer} needs a block_size of 16, 32, 64, 128 or 256, and no algo_config "
                f"but default; found {options}. Other algorithms are the builder's: "
                "target.quantizer=builder.",
            ),
            (
                own and unheeded,
                f"target.builder_options has {', '.join(unheeded)}, which the builder's own "
                "quantizer alone heeds: leave it out, or set target.quantizer=builder.",
            ),
            (
                self.precision not in precisions,
                f"target.precision is {self.precision.value}; with {quantizer} it must be "
                f"{' or '.join(each.value for each in precisions)}.",
            ),
            (len(mixing) > 1, f"target has {' and '.join(mixing)}; give one of them."),
            (not positive, f"{first}; it must be above 0."),
            (
                mixing and not mixes,
                f"{first}, which only target.quantizer=gptq with precision=int4 can heed.",
            ),
        ):
            if broken:
                raise InputError(words)
        self.require_served()
        self.require_true_name()

    @property
    def accuracy_level(self) -> int:
        """4 rounds activations to int8 inside the matrix products, 0 leaves them."""
        return int(self.builder_options.get("accuracy_level", 0))

    def require_served(self) -> None:
        """Raise InputError if the provider does not read weights of this kind."""
        rounded = isinstance(self.precision, Precision) and bool(self.precision.bits)
        read = self.quantizer is Quantizer.rtn and self.precision is Precision.int4
        if self.execution_provider is ExecutionProvider.NvTensorRtRtx and rounded and not read:
            raise InputError(
                f"target.precision is {self.precision.value} by {self.quantizer.value}; for "
                "TensorRT-RTX it must be int4 by target.quantizer=rtn, or floats."
            )

    def require_true_name(self) -> None:
        """Raise InputError if the name says otherwise than the other keys."""
        if "???" in (self.name, self.precision, self.execution_provider):
            return  # what the YAML lacks is said elsewhere
        options, quantizer = self.builder_options, self.quantizer.value
        if self.quantizer is Quantizer.builder:
            algorithm = options.get("algo_config", "default")
            quantizer = {"default": "rtn"}.get(algorithm, algorithm)
        if self.int8 or self.budget_mb or self.budget_bits:
            quantizer = "mixed"
        bits = self.precision.bits
        own: dict[str, Any] = {
            "execution_provider": self.execution_provider.value,
            "precision": self.precision.value,
            "quantizer": quantizer if bits else None,
            "block_size": options.get("block_size", 32) if bits else None,
            "accuracy_level": self.accuracy_level if bits else None,
        }
        if found := untrue(self.name, own):
            raise InputError(
                f"target.name is {self.name}, which says that {'; that '.join(found)}. "
                f"Name it as it is: target.name={true_name(own)}."
            )


@dataclass
class Export:
    """How a checkpoint becomes a graph; `parity_tokens` bounds the text on which it is compared.

    `calibration` is the file of what `target.quantizer=gptq` is calibrated on
    (slm/exporters/calibration_text.py), `calibration_tokens` bounds it.
    """

    graph: Graph = MISSING
    parity_tokens: int = MISSING
    calibration: str = MISSING
    calibration_tokens: int = MISSING

    def __post_init__(self) -> None:
        if isinstance(self.parity_tokens, int) and self.parity_tokens < 2:
            raise InputError(
                f"export.parity_tokens is {self.parity_tokens}; it must be at least 2."
            )
        if isinstance(self.calibration_tokens, int) and self.calibration_tokens < WINDOW:
            raise InputError(
                f"export.calibration_tokens is {self.calibration_tokens}; it must be at least "
                f"{WINDOW}, the length of one window."
            )


class Interface(enum.Enum):
    """How the logged ONNX model is asked: with prompts as they are, or with conversations."""

    prompt = "prompt"
    chat = "chat"


@dataclass
class LogPyfunc(Settings):
    """The models to log from one ONNX folder, and how they serve unless told otherwise at load.

    `prove_environment` builds a fresh environment from the logged requirements, and asks the models
    in it. `max_tokens` is that of a request that names none. `targets` are those of one model that
    serves several devices, the preferred one first. The rest are the Settings that ship with the
    model.
    """

    targets: list[str] = field(default_factory=list)
    interfaces: list[Interface] = field(default_factory=lambda: [Interface.prompt, Interface.chat])
    prove_environment: bool = True
    max_tokens: int = Parameters.max_tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        Parameters(max_tokens=self.max_tokens)  # raises outside its limits
        if not self.interfaces or len(set(self.interfaces)) < len(self.interfaces):
            valid = ", ".join(interface.value for interface in Interface)
            raise InputError(f"log_pyfunc.interfaces must hold one or more of {valid}, each once.")
        if len(set(self.targets)) < len(self.targets):
            raise InputError(f"log_pyfunc.targets is {self.targets}; each must stand there once.")


@dataclass
class Harness:
    """Tasks of EleutherAI's lm-evaluation-harness, by name; none needs it installed.

    `limit` bounds the examples of each (null: all); `include` is a folder of task files of one's
    own.
    """

    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    include: str | None = None


@dataclass
class Evaluate:
    """What to measure, how much of it, and the gates of the verdict.

    `texts` is a file of texts to score (slm/evaluation/data.py), each in `text_column`; `kinds`
    and `languages` pick texts (empty: all), `max_tokens` bounds the tokens scored, `window` is the
    context, in tokens, that they are scored in. `prompts` is a file of prompts to answer
    (slm/evaluation/tasks.py), of which the first `max_prompts` are taken (null: all). Times are
    those of `repeats` answers of `max_new_tokens` at each of `prompt_lengths`, in tokens, and of
    one batch of `batch_size`.

    The champion's metrics are read from its version where they were measured under the same
    conditions, and measured again where not; `remeasure_champion` always measures.
    """

    texts: str = MISSING
    text_column: str = "text"
    kinds: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    max_tokens: int = MISSING
    window: int = MISSING
    prompts: str = MISSING
    max_prompts: int | None = None
    prompt_lengths: list[int] = MISSING
    repeats: int = MISSING
    max_new_tokens: int = MISSING
    batch_size: int = MISSING
    harness: Harness = field(default_factory=Harness)
    remeasure_champion: bool = False
    gates: dict[str, Gate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        smallest = {"max_tokens": 2, "window": 2, "repeats": 1, "max_new_tokens": 2}
        for key, least in {**smallest, "batch_size": 1, "max_prompts": 1}.items():
            value = getattr(self, key)
            if isinstance(value, int) and value < least:  # what the YAML lacks is the string "???"
                raise InputError(f"evaluate.{key} is {value}; it must be at least {least}.")
        if not self.prompt_lengths or any(
            isinstance(length, int) and length < 1 for length in self.prompt_lengths
        ):
            raise InputError("evaluate.prompt_lengths must hold lengths in tokens, at least one.")


@dataclass
class Register:
    """The names of registered models, and what keeps a challenger from becoming champion.

    The templates may hold {model}, {target} and {interface}; the reference, the checkpoint, is of
    no target. `catalog` is Unity Catalog's `catalog.schema`. `margins` are factors of the
    champion's metrics.
    """

    name_template: str = MISSING
    reference_name_template: str = MISSING
    catalog: str | None = None
    failed: bool = False
    margins: dict[str, Gate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_template("register.name_template", self.name_template, "target")
        require_template("register.reference_name_template", self.reference_name_template)
        if self.catalog is not None and not re.fullmatch(r"[\w-]+\.[\w-]+", self.catalog):
            raise InputError(
                f"register.catalog is {self.catalog!r}; it must be Unity Catalog's catalog.schema."
            )
        for name, margin in self.margins.items():
            if margin.of is not Baseline.champion:
                raise InputError(
                    f"register.margins.{name} is of the {margin.of.value}; it must be of: champion."
                )


def valid_settings(key: str, settings: Any) -> dict[str, Any]:
    """Settings of serving by name, {} for null; InputError for what a load would refuse."""
    if isinstance(settings, str):  # of an environment variable
        with contextlib.suppress(ValueError):
            settings = json.loads(settings)
    if not isinstance(settings := settings or {}, dict):
        raise InputError(f"{key} is {settings!r}; it must be {{name: value, …}}.")
    try:
        Settings(**settings)
    except TypeError as error:
        valid = ", ".join(f.name for f in fields(Settings))
        raise InputError(f"{key} has {', '.join(settings)}; valid: {valid}.") from error
    except ValueError as error:
        raise InputError(f"{key}: {error}.") from error
    return settings


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

    It listens at `host`, for this machine alone unless told otherwise. `settings` are those of
    every ONNX model (Settings). A body may have `max_body_mb` (10^6 bytes), an answer may take
    `timeout_s`, and those under way when the server stops have `shutdown_s` to end. With `follow`,
    the registry is asked every `follow_every_s` what the aliases name.
    """

    host: str = MISSING
    settings: Any = None
    max_body_mb: float = MISSING
    timeout_s: float = MISSING
    shutdown_s: float = MISSING
    follow_every_s: float = MISSING

    def __post_init__(self) -> None:
        self.settings = valid_settings("serve.settings", self.settings)
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


@dataclass
class Ladder:
    """Targets for `choose`, by name, the cheapest to make first."""

    targets: list[str] = MISSING

    def __post_init__(self) -> None:
        names = self.targets  # what the YAML lacks is the string "???"
        if isinstance(names, list) and (not names or len(set(names)) < len(names)):
            raise InputError(f"ladder.targets is {names}; it must hold targets, each once.")


@dataclass
class Signing:
    """The keys, as paths, that sign logged models and verify them; null for unsigned models."""

    private_key: str | None = None
    public_key: str | None = None

    def __post_init__(self) -> None:
        if self.private_key and not self.public_key:
            raise InputError(
                f"signing.private_key={self.private_key} is set, and signing.public_key is not: "
                "register and the model itself verify with it. Set both."
            )
        for name in ("private_key", "public_key"):
            if key := getattr(self, name):
                path = ROOT / Path(key).expanduser()
                if not path.is_file():
                    raise InputError(f"signing.{name}={key}: no such file.")
                setattr(self, name, str(path))


@dataclass
class Paths:
    """`work` holds the outcomes of steps, by content: `<work>/<step>/<key>/`."""

    work: str = MISSING


@dataclass
class Config:
    """Everything that a step may read. `source`, `candidate` and `reference` are URIs.

    `candidate` may be several, as a list: the interfaces of one ONNX model. `source` may be, for
    log_pyfunc: the ONNX folders of several targets. `reason` says why to roll back. `budget` and
    `objective` are what `choose` goes by. `preflight` says what becomes of a run that does not fit
    into this machine. `force` names the steps to do again, `summary` the file for how the command
    ended. `score` reads a table at `input`, asks the model at `model_uri`, and writes `output`.
    `serve` answers for one or several models at `model_uri` on `port` (0: any that is free), and
    takes up what their aliases name next if it shall `follow`.
    """

    model: Model = field(default_factory=Model)
    target: Target = field(default_factory=Target)
    fetch: Fetch = field(default_factory=Fetch)
    export: Export = field(default_factory=Export)
    log_pyfunc: LogPyfunc = field(default_factory=LogPyfunc)
    evaluate: Evaluate = field(default_factory=Evaluate)
    register: Register = field(default_factory=Register)
    clean: Clean = field(default_factory=Clean)
    score: Score = field(default_factory=Score)
    serve: Serve = field(default_factory=Serve)
    signing: Signing = field(default_factory=Signing)
    ladder: Ladder = field(default_factory=Ladder)
    paths: Paths = field(default_factory=Paths)
    source: Any = None
    candidate: Any = None
    reference: str | None = None
    reason: str | None = None
    budget: str | None = None
    objective: Objective = Objective.closest
    preflight: Preflight = Preflight.stop
    force: Any = None
    summary: str | None = None
    model_uri: Any = None
    input: str | None = None
    output: str | None = None
    port: int = 8000
    follow: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise InputError(f"port is {self.port}; it must be from 0 to 65535.")
        if isinstance(self.candidate, str):
            self.candidate = uris_of(self.candidate)
        for key in ("source", "model_uri"):
            if isinstance(value := getattr(self, key), str) and value.startswith("["):
                setattr(self, key, json.loads(value))
        if isinstance(self.force, str):
            self.force = re.split(r"[,\s]+", self.force.strip())
        self.force = self.force or []

    @property
    def target_name(self) -> str:
        """The target in a registered name: all of them, if one model serves several."""
        return joined(self.log_pyfunc.targets) or self.target.name


def uris_of(text: str) -> list[str]:
    """URIs out of a string: one, a JSON list, or, as earlier versions wrote it, with + between."""
    return json.loads(text) if text.startswith("[") else text.split("+")


ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("user_cache", user_cache)
