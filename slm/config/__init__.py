"""The schema of conf/: the dataclasses that Hydra validates the YAML against, one per group.

`Config` is all of it; its groups are in the files of this folder.
"""

import enum
import json
import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from slm.config.common import user_cache
from slm.config.model import Fetch, Model
from slm.config.packaging import Evaluate, Export, LogPyfunc, Register, Signing
from slm.config.target import Ladder, Objective, Target
from slm.config.use import Clean, Score, Serve
from slm.errors import InputError
from slm.target_name import joined


class Preflight(enum.Enum):
    """What becomes of a run that needs more disk or memory than there is."""

    stop = "stop"
    warn = "warn"
    off = "off"


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
