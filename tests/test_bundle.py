"""One logged model that serves several targets."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from slm.bundle import bundle, digests_of
from slm.config.packaging import Interface
from slm.digests import Provenance, read_provenance, write_provenance
from slm.errors import InputError
from slm.exporters.builder import make
from slm.exporters.generation import carry_over
from slm.exporters.graph import Rtn, write
from slm.exporters.worker import silent
from slm.records import LoggedModel
from slm_pyfunc.engine.runtime import Runtime
from steps.log_pyfunc import Packaging, log_interface, runtime_requirements
from tests.checkpoints import write_tiny, write_tokenizer
from tests.conftest import Project, composed, tracking

pytestmark = pytest.mark.xdist_group("bundle")  # its fixtures once, not in every process

CUDA = "cuda-int4-rtn-block-32"
CPU, PLAIN = "cpu-int4-rtn-block-32-acc-level-4", "cpu-int4-rtn-block-32"
TOKENS = list(range(5, 40))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ONNX folders of one random checkpoint, by target; those for the CPU have equal weights."""
    folder = tmp_path_factory.mktemp("bundle")
    checkpoint = write_tiny(folder / "checkpoint", write_tokenizer(folder / "tokenizer"))
    origin = write_provenance(checkpoint, model="tiny", source="hub:tiny", licence="mit")
    made = {}
    for name in (CUDA, CPU, PLAIN):
        target, onnx = composed(f"target={name}").target, folder / name
        rtn = Rtn(4, 32, target.accuracy_level)
        make(checkpoint, target, target.precision, onnx, partial(write, quantizer=rtn, said=silent))
        carry_over(checkpoint, onnx)
        write_provenance(onnx, target=name, checkpoint=origin, checked_on="cpu", graph="genai")
        made[name] = onnx
    return made


@pytest.fixture(scope="module")
def bundled(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Provenance]:
    into = tmp_path_factory.mktemp("bundled") / "onnx"
    return into, bundle(list(folders.values()), [*map(read_provenance, folders.values())], into)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def logged(bundled: tuple[Path, Provenance], project: Project) -> LoggedModel:
    config = composed(f"target={CUDA}", "model.name=tiny")
    requirements = runtime_requirements(config.target)
    packaging = Packaging("tiny", config.target, config.log_pyfunc, requirements, config.signing)
    with tracking(project):
        return log_interface(Interface.prompt, *bundled, packaging)


def test_weights_that_are_equal_lie_once_and_every_target_reads_them(
    folders: dict[str, Path], bundled: tuple[Path, Provenance]
) -> None:
    into, provenance = bundled
    assert len(list((into / "weights").iterdir())) == 2
    digests = digests_of(into, provenance)
    for name, folder in folders.items():
        assert sum(file.startswith("../weights/") for file in digests[name]) == 1
        found = Runtime(into / name, sha256=digests[name]).log_probabilities(TOKENS)
        np.testing.assert_array_equal(found, Runtime(folder).log_probabilities(TOKENS))


def test_a_bundles_provenance_survives_json_and_names_every_target(
    bundled: tuple[Path, Provenance],
) -> None:
    provenance = Provenance.of(bundled[1].json())
    assert provenance == bundled[1] == read_provenance(bundled[0])
    assert provenance.target == f"{CUDA}_{CPU}_{PLAIN}" and list(provenance.parts) == [
        *(CUDA, CPU, PLAIN)
    ]


def test_the_first_target_whose_device_is_there_serves(
    logged: LoggedModel, project: Project, folders: dict[str, Path]
) -> None:
    with tracking(project):
        assert LoggedModel.load(logged.uri).execution_provider == "any"
        model = mlflow.pyfunc.load_model(logged.uri)
        [answer] = model.predict({"prompt": ["abc"]}, {"max_tokens": 4})
        runtime = model.unwrap_python_model().runtime
        assert (runtime.execution_provider, runtime.folder.name) == ("cpu", CPU)
        own = Runtime(folders[CPU])
        [[expected]] = own.answer(["abc"], replace(own.defaults, max_tokens=4))
        assert answer == expected.text


@pytest.mark.parametrize(
    ("asked", "words"),
    [("cuda", f"{CUDA}: cuda: "), ("dml", "this model has targets for cuda, cpu")],
)
def test_an_execution_provider_that_is_asked_for_is_the_one_that_serves(
    asked: str, words: str, logged: LoggedModel, project: Project
) -> None:
    with tracking(project), pytest.raises(Exception, match=words):
        mlflow.pyfunc.load_model(logged.uri, model_config={"execution_provider": asked})


def test_shared_weights_that_changed_are_refused(
    logged: LoggedModel, project: Project, tmp_path: Path
) -> None:
    with tracking(project):
        folder = Path(mlflow.artifacts.download_artifacts(logged.uri, dst_path=str(tmp_path)))
        for weights in (folder / "artifacts" / "onnx" / "weights").iterdir():
            *kept, last = weights.read_bytes()
            weights.write_bytes(bytes([*kept, last ^ 1]))
        with pytest.raises(ValueError, match="changed since the model was logged"):
            mlflow.pyfunc.load_model(str(folder))


def test_targets_of_two_checkpoints_are_no_one_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    first, second = (read_provenance(folders[name]) for name in (CUDA, CPU))
    assert second.checkpoint
    other: Any = replace(second, checkpoint=replace(second.checkpoint, files={"config.json": "0"}))
    with pytest.raises(InputError, match="two checkpoints: those for cuda-.* and cpu-"):
        bundle([folders[CUDA], folders[CPU]], [first, other], tmp_path / "onnx")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"target={CPU}"], f"begins with a folder for {CUDA}.*Give target={CUDA}"),
        ([f"target={CUDA}", f"log_pyfunc.targets=[{CUDA}]"], "log_pyfunc.targets is"),
    ],
)
def test_folders_for_other_targets_than_those_told_are_refused(
    overrides: list[str], words: str, folders: dict[str, Path], project: Project
) -> None:
    source = f"source=[{folders[CUDA]},{folders[CPU]}]"
    with pytest.raises(InputError, match=words):
        project.call("log_pyfunc", source, "model.name=tiny", *overrides)
