"""conf/export, log_pyfunc, evaluate, register and signing: how a checkpoint becomes versions."""

import enum
import re
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from slm.config.common import ROOT, require_template
from slm.config.model import Baseline, Gate
from slm.errors import InputError
from slm_pyfunc.parameters import MAX_TOKENS, Parameters
from slm_pyfunc.settings import Settings

WINDOW = 512  # tokens that calibration reads at a time


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


@dataclass
class Export:
    """How a checkpoint becomes a graph; `parity_tokens` bounds the text on which it is compared.

    `calibration` is the file of what `target.quantizer` calibrates on
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
    max_tokens: int = MAX_TOKENS

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
