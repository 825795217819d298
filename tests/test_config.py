import re
from pathlib import Path

import pytest
import yaml

from steps.command import PARAMETERS
from steps.config import CONF, ROOT
from tests.conftest import Project, composed

FILES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_yaml_file_composes_into_the_schema(file: Path) -> None:
    config = composed(f"{file.parent}={file.stem}")
    if file.parent.name in ("model", "target"):
        assert getattr(config, file.parent.name).name == file.stem


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name in ("model", "target")], ids=str
)
def test_a_model_or_target_is_a_short_yaml_file(file: Path) -> None:
    assert len((CONF / file).read_text().splitlines()) <= 20


@pytest.mark.parametrize("file", sorted((CONF / "model").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_model_pins_what_it_fetches(file: Path) -> None:
    source = composed(f"model={file.stem}").model.source
    assert re.search(r"@[0-9a-f]{40}$|==[\d.]+/", source)


def test_mlflow_takes_every_models_and_targets_name(project: Project) -> None:
    models, targets = ([f.stem for f in FILES if f.parent.name == g] for g in ("model", "target"))
    for name in [f"{m}-{t}-prompt" for m in models for t in targets]:
        project.client.create_logged_model("1", name.replace(".", "_"))
        project.client.create_registered_model(name)


def test_every_gate_of_a_model_replaces_one_of_the_evaluation() -> None:
    config = composed()
    assert set(config.model.gates) <= set(config.evaluate.gates)


def test_mlproject_has_an_entry_point_for_every_step_with_the_declared_parameters() -> None:
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    assert set(entry_points) == set(PARAMETERS)
    for name, entry_point in entry_points.items():
        assert (ROOT / "steps" / f"{name}.py").is_file()
        assert list(entry_point["parameters"]) == [*PARAMETERS[name], "overrides"]
        flags = " ".join(
            f"--{parameter} {{{parameter}}}" for parameter in entry_point["parameters"]
        )
        assert entry_point["command"] == f"python -m steps.{name} {flags}"


def test_mlproject_defaults_are_those_of_conf() -> None:
    main = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]["main"]["parameters"]
    assert (main["model"]["default"], main["target"]["default"]) == (
        composed().model.name,
        composed().target.name,
    )
