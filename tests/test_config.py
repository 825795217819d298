import functools
import re
from pathlib import Path

import pytest
import yaml

from slm.config import Config
from slm.config.common import CONF, ROOT
from slm.config.model import Baseline
from tests.conftest import Project, composed

ENTRY_POINTS = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
FILES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))


@functools.cache
def chosen(group: str, name: str) -> Config:
    """conf/ with another file of a group, composed once."""
    return composed(f"{group}={name}")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_yaml_file_composes_into_the_schema(file: Path) -> None:
    config = chosen(str(file.parent), file.stem)
    if file.parent.name in ("model", "target"):
        assert getattr(config, file.parent.name).name == file.stem


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name in ("model", "target")], ids=str
)
def test_a_model_or_target_is_a_short_yaml_file(file: Path) -> None:
    assert len((CONF / file).read_text().splitlines()) <= 20


@pytest.mark.parametrize("file", sorted((CONF / "model").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_model_pins_what_it_fetches(file: Path) -> None:
    source = chosen("model", file.stem).model.source
    assert re.search(r"@[0-9a-f]{40}$|==[\d.]+/", source or "")


def test_mlflow_takes_every_models_and_targets_name(project: Project) -> None:
    models, targets = ([f.stem for f in FILES if f.parent.name == g] for g in ("model", "target"))
    model, target = (max(names, key=len) for names in (models, targets))
    pairs = {*((model, each) for each in targets), *((each, target) for each in models)}
    for name in [f"{m}-{t}-prompt" for m, t in sorted(pairs)]:
        project.client.create_logged_model("1", name.replace(".", "_"))
        project.client.create_registered_model(name)


@pytest.mark.parametrize("file", sorted((CONF / "model").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_gate_of_a_model_replaces_one_of_the_evaluation(file: Path) -> None:
    config = chosen("model", file.stem)
    assert set(config.model.gates) <= set(config.evaluate.gates)


def test_mlproject_passes_every_parameter_that_it_declares() -> None:
    for name, entry_point in ENTRY_POINTS.items():
        of_any_model = {"score": {"model_uri"}, "serve": {"model_uri"}, "clean": set()}
        of_any_model["choose"] = {"model", "ladder"}
        own = of_any_model.get(name, {"model", "target"})
        assert own | {"overrides"} <= entry_point["parameters"].keys()
        flags = " ".join(
            f"--{parameter} {{{parameter}}}" for parameter in entry_point["parameters"]
        )
        assert entry_point["command"] == f"python -m steps.{name} {flags}"


def test_mlproject_has_no_defaults_of_its_own() -> None:
    for entry_point in ENTRY_POINTS.values():
        for parameter in entry_point["parameters"].values():
            assert parameter in ("string", {"type": "string", "default": ""})


def test_steps_holds_the_entry_points_and_nothing_else() -> None:
    files = {path.stem for path in (ROOT / "steps").iterdir() if path.suffix == ".py"}
    assert files - {"__init__"} == set(ENTRY_POINTS)


def test_the_checkpoint_is_another_word_for_the_reference_in_a_gate() -> None:
    config = composed("+evaluate.gates={load_s: {max: 1, of: checkpoint}}")
    assert config.evaluate.gates["load_s"].of is Baseline.reference


def test_candidates_are_a_list_however_they_are_written() -> None:
    for text in ("a", "[a]", "'[\"a\"]'"):
        assert composed(f"candidate={text}").candidate == ["a"]
    for text in ("[a, b]", "a+b", '\'["a", "b"]\''):
        assert composed(f"candidate={text}").candidate == ["a", "b"]
