"""The chain of steps from a model's source to registered versions, and what is kept of it."""

import importlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf

from slm.config import Config
from slm.config.common import CONF
from slm.config.target import Target
from slm.errors import InputError
from slm.records import Checkpoint, Evaluation, LoggedModels, OnnxModel, Registration
from slm.running.run import ASKED, Ask


@dataclass(frozen=True)
class Link:
    """A step, the record that it ends with, and what its parameters take of earlier outcomes.

    `target` is another than that of the run, if a model serves several.
    """

    step: str
    outcome: type[Any]
    takes: dict[str, str | list[str]] = field(default_factory=dict)
    target: str = ""

    @property
    def name(self) -> str:
        return f"{self.step} {self.target}".rstrip()

    @property
    def needs(self) -> list[str]:
        """The names of the links whose outcomes it takes."""
        taken = (of if isinstance(of, list) else [of] for of in self.takes.values())
        return [of.rpartition(".")[0] for each in taken for of in each]

    def inputs(self, outcomes: Mapping[str, Any]) -> dict[str, Any]:
        """Its parameters, out of the outcomes of the links before, by their names."""

        def taken(of: str) -> Any:
            link, _, attribute = of.rpartition(".")
            return getattr(outcomes[link], attribute)

        return {
            parameter: [taken(each) for each in of] if isinstance(of, list) else taken(of)
            for parameter, of in self.takes.items()
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


SHARED = ("fetch", "log_transformers")  # the same for all targets


def pipeline(config: Config) -> list[Link]:
    """The chain of this run: with an export for each target that its model is to serve."""
    further = config.log_pyfunc.targets[1:]
    exports = [Link("export_onnx", OnnxModel, {"source": "fetch.uri"}, each) for each in further]
    uris = ["export_onnx.uri", *(f"{link.name}.uri" for link in exports)]
    links: list[Link] = []
    for link in PIPELINE:
        if link.step == "log_pyfunc" and further:
            links += [*exports, replace(link, takes={"source": uris})]
        else:
            links.append(link)
    return links


def of_first_target(config: Config) -> Config:
    """The configuration of a model's first target, where it is to serve several.

    Raises InputError if another one was chosen.
    """
    targets = config.log_pyfunc.targets
    if not targets or targets[0] == config.target.name:
        return config
    if any(override.startswith("target=") for override in HydraConfig.get().overrides.task):
        raise InputError(
            f"log_pyfunc.targets begins with {targets[0]}, and target is {config.target.name}: the "
            f"first one's runtime is what the model requires. Give target={targets[0]}, or no "
            "target."
        )
    return of_target(config, targets[0])


def of_target(config: Config, target: str) -> Config:
    """The configuration with another target of conf/, to which no override of target.… applies."""
    if not target:
        return config
    others = [override for override in given_overrides() if not is_of_target(override)]
    try:
        composed = OmegaConf.to_object(compose("config", [*others, f"target={target}"]).target)
    except HydraException as error:
        known = ", ".join(sorted(path.stem for path in (CONF / "target").glob("*.yaml")))
        raise InputError(f"log_pyfunc.targets has {target}; valid: {known}.") from error
    assert isinstance(composed, Target)
    return replace(config, target=composed)


def given_overrides(*without: str) -> list[str]:
    """The overrides of this command and where it looks for conf/, `without` those of some keys.

    What is below these keys stays: `model.source=…` without `model=…`.
    """
    hydra = HydraConfig.get()
    search_path = [o for o in hydra.overrides.hydra if o.startswith("hydra.searchpath=")]
    own_conf = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    search_path += [f"hydra.searchpath=[file://{path}]" for path in own_conf]
    dropped = tuple(f"{name}=" for name in without)
    given: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    return [*search_path, *(o for o in given if not o.startswith(dropped))]


def is_of_target(override: str) -> bool:
    """Whether an override chooses or changes a target."""
    return re.match(r"[+~]*target[.=@]", override) is not None


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
