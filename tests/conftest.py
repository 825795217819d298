"""The real pipeline on the real small model, once for the session, and what it left."""

import atexit
import contextlib
import functools
import importlib
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlflow
import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from slm.config import Config
from slm.config.common import CONF, ROOT
from slm.config.packaging import Interface, Signing
from slm.digests import read_provenance
from slm.evaluation.data import read_long_text, read_prompts, read_texts
from slm.evaluation.measure import Inputs, Measurement, Measuring, request_of
from slm.exporters import worker
from slm.exporters.builder import make
from slm.exporters.graph import Rtn, write
from slm.records import (
    Checkpoint,
    Evaluation,
    LoggedModel,
    LoggedModels,
    OnnxModel,
    Registration,
    from_json,
)
from slm.running.command import entry_point, heed_another_source, split_overrides
from slm.running.summary import CURRENT
from slm.running.tracking import calling_folder
from slm.seal import verifier_requirements
from tests.checkpoints import write_as_phi3, write_tiny, write_tokenizer

if TYPE_CHECKING:
    from tests.databricks import Workspace

T = TypeVar("T")

MODEL = "smollm2-135m-instruct"
TARGET = "cpu-int4-rtn-block-32-acc-level-4"
# Overrides that keep a run to seconds; so few tokens need looser gates.
TINY = (
    f"hydra.searchpath=[file://{ROOT / 'tests' / 'conf'}] evaluate=tiny "
    "log_pyfunc.prove_environment=false "
    "model.gates.perplexity_ratio.max=3 model.gates.perplexity_ratio_tail.max=4 "
    "model.gates.kl_divergence.max=2 "
    "model.gates.top1_agreement.min=0.2 "
    "~evaluate.gates.decode_tokens_per_s"  # no verdict of a test hangs on a time
)


@dataclass(frozen=True)
class Project:
    """A place to run the project in: a work folder and a tracking store of its own."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        own = {"MLFLOW_TRACKING_URI": self.tracking_uri, "SLM_WORK": str(self.folder / "work")}
        own |= {"MLFLOW_EXPERIMENT_NAME": "tests"}
        return {**inherited, **own, "PATH": path}

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.tracking_uri)

    def mlflow_run(
        self, entry_point: str, *parameters: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", entry_point]
        command += ["--env-manager", "local"]
        for parameter in parameters:
            command += ["-P", parameter]
        return self.run(command, **environment)

    def step(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run([sys.executable, "-m", f"steps.{name}", *arguments])

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        everything = {**self.environment, **environment}
        return subprocess.run(command, cwd=ROOT, env=everything, text=True, capture_output=True)

    def call(self, step: str, *overrides: str) -> Any:
        """Run a step in this process, and return its outcome or raise its error."""
        config = composed(*overrides, f"paths.work={self.folder / 'work'}")
        with tracking(self):
            try:
                return importlib.import_module(f"steps.{step}").main(config)
            finally:
                mlflow.end_run()

    def runs(self, name: str) -> list[mlflow.entities.Run]:
        """The MLflow runs of that name, newest first."""
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        query = f"attributes.run_name = '{name}'"
        return list(
            self.client.search_runs(experiments, query, order_by=["attributes.start_time DESC"])
        )


@pytest.fixture(autouse=True)
def registry_of_its_own() -> Iterator[None]:
    """MLflow keeps a registry that a test set, for the process and in its environment."""
    yield
    mlflow.set_registry_uri("")
    os.environ.pop("MLFLOW_REGISTRY_URI", None)


@pytest.fixture(autouse=True)
def called_from_here() -> None:
    """A command keeps for the process where it was called."""
    calling_folder.cache_clear()


@pytest.fixture
def exports_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are made in the test's process; the exporter's own is that of `packaged`."""
    monkeypatch.setattr("steps.export_onnx.run_worker", worker.export)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty project for a test that makes its own mess."""
    create_experiment(tmp_path)
    return Project(tmp_path)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Workspace"]:
    """A Databricks workspace's stand-in; what uses it is of the xdist_group `databricks`."""
    from tests.databricks import Workspace

    with Workspace(tmp_path_factory.mktemp("databricks")) as workspace:
        yield workspace


@dataclass(frozen=True)
class Packaged(Project):
    """A project in which `main` ran to its end, and the outcome of each of its steps."""

    stdout: str = ""
    outcomes: dict[str, Any] = field(default_factory=dict)

    def outcome(self, step: str, record: type[T]) -> T:
        return from_json(record, self.outcomes[step])

    @property
    def fetched(self) -> Checkpoint:
        return self.outcome("fetch", Checkpoint)

    @property
    def exported(self) -> OnnxModel:
        return self.outcome("export_onnx", OnnxModel)

    @property
    def candidates(self) -> LoggedModels:
        return self.outcome("log_pyfunc", LoggedModels)

    @property
    def reference(self) -> LoggedModel:
        return self.outcome("log_transformers", LoggedModels).models[0]

    @property
    def evaluation(self) -> Evaluation:
        return self.outcome("evaluate", Evaluation)

    @property
    def registration(self) -> Registration:
        return self.outcome("register", Registration)

    @property
    def pair(self) -> list[str]:
        """The arguments of evaluate."""
        candidates = f"candidate=[{','.join(self.candidates.uris)}]"
        return [candidates, f"reference={self.reference.uri}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what needs no packaged model, but for one test: the first worker packages it.

    Groups, each of which is one worker's, come before single tests, which fill up both workers.
    """

    def unit(item: pytest.Item) -> str:
        group = item.get_closest_marker("xdist_group")
        return group.args[0] if group else item.nodeid

    needing = [item for item in items if "packaged" in getattr(item, "fixturenames", [])]
    later = {unit(item) for item in needing}
    items.sort(key=lambda item: (unit(item) in later, unit(item) == item.nodeid))
    if first := next((item for item in items if item in needing), None):
        items.remove(first)
        items.insert(0, first)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder for the session that the first worker to ask for it makes, and all read."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".whole").exists():
            assert not folder.exists(), f"{folder} could not be made before"
            folder.mkdir()
            make(folder)
            folder.with_suffix(".whole").touch()
    return folder


@pytest.fixture(scope="session")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """A project in which `main` ran to its end; tests read it, and add under other keys."""

    def package(folder: Path) -> None:
        project = Project(folder)
        create_experiment(folder)
        process = project.mlflow_run("main", f"overrides={TINY}")
        assert process.returncode == 0, process.stderr[-3000:]
        (folder / "stdout.txt").write_text(process.stdout)

    project = Project(made_once(tmp_path_factory, "packaged", package))
    [run] = project.client.search_runs(
        ["1"],
        "tags.mlflow.project.entryPoint = 'main'",
        order_by=["attributes.start_time"],
        max_results=1,
    )
    with tracking(project):
        outcomes = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/result.json")
    return Packaged(project.folder, (project.folder / "stdout.txt").read_text(), outcomes)


@pytest.fixture(scope="session")
def smollm2(packaged: Packaged) -> Path:
    """The checkpoint that fetch made."""
    return Path(packaged.fetched.uri)


@pytest.fixture(scope="session")
def onnx(packaged: Packaged) -> Path:
    """The ONNX folder that export_onnx made."""
    return Path(packaged.exported.uri)


@pytest.fixture(scope="session")
def chat_folder(packaged: Packaged) -> Path:
    """The logged chat model, as a folder."""
    return logged_folder(packaged, "chat")


@pytest.fixture(scope="session")
def prompt_folder(packaged: Packaged) -> Path:
    """The logged prompt model, as a folder."""
    return logged_folder(packaged, "prompt")


def logged_folder(project: Packaged, interface: str) -> Path:
    [model] = [model for model in project.candidates.models if model.interface == interface]
    return folder_of(project, model)


def folder_of(project: Project, model: LoggedModel) -> Path:
    """Where the store keeps a logged model."""
    location = project.client.get_logged_model(model.model_id).artifact_location
    return Path(location.removeprefix("file://"))


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few MB with random weights, for tests that do not depend on them."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint", smollm2)


@pytest.fixture(scope="session")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights and a tokenizer of letters, which needs no other model."""
    folder = tmp_path_factory.mktemp("lettered")
    (folder / "tokenizer").mkdir()
    return write_tiny(folder / "checkpoint", write_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="session")
def tiny_onnx(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX folder of `tiny`."""
    folder, target = tmp_path_factory.mktemp("tiny-onnx") / "onnx", composed().target
    rtn = Rtn(4, target.builder_options["block_size"], target.builder_options["accuracy_level"])
    fill = functools.partial(write, quantizer=rtn, said=worker.silent)
    make(tiny, target, target.precision, folder, fill)
    return folder


@pytest.fixture(scope="session")
def phi3(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's weights as a `Phi3ForCausalLM` checkpoint."""
    return write_as_phi3(tmp_path_factory.mktemp("phi3"), smollm2)


@pytest.fixture(scope="session")
def measuring(packaged: Packaged) -> Measuring:
    """How `main` measured, and where it kept that."""
    settings = composed(*split_overrides(TINY)).evaluate
    texts = read_texts(settings), read_prompts(settings), read_long_text(settings)
    inputs = Inputs([], packaged.reference, None, *texts)
    request = request_of(inputs, settings)
    return Measuring(request, packaged.evaluation.conditions, str(packaged.folder / "work"))


@pytest.fixture(scope="session")
def measured_checkpoint(packaged: Packaged, measuring: Measuring) -> Measurement:
    """The checkpoint as `main` measured it: what an ONNX model is compared with."""
    with tracking(packaged):
        return measuring.measure(packaged.reference)


def composed(*overrides: str) -> Config:
    """conf/ as a step sees it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", list(overrides)))
    assert isinstance(config, Config)
    chosen = [o.removeprefix("model=") for o in overrides if o.startswith("model=")] or [MODEL]
    heed_another_source(config, list(overrides), chosen[-1])
    return config


def ended(
    step: Callable[[Config], object],
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
    name: str = "fetch",
    together: Callable[[Config], object] | None = None,
) -> int:
    """The exit code of a step as a command, in this process."""
    monkeypatch.setattr(sys, "argv", [f"/steps/{name}.py", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    logger = logging.getLogger("slm")
    for name in ("handlers", "level", "propagate"):  # as they are, once the test has ended
        monkeypatch.setattr(logger, name, getattr(logger, name))
    with pytest.raises(SystemExit) as raised:
        entry_point(step, together)
    CURRENT.set(None)
    return int(raised.value.code or 0)


@functools.cache
def empty_store() -> Path:
    """MLflow's SQLite store with its tables, which take a second to make, and nothing else."""
    path = Path(tempfile.mkdtemp(prefix="empty-store-")) / "mlflow.db"
    atexit.register(shutil.rmtree, path.parent)
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def create_experiment(folder: Path) -> None:
    """An experiment whose artifacts stay in the test's folder, in a store of its own."""
    copy_store(empty_store(), folder)
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    client.create_experiment("tests", artifact_location=(folder / "mlruns").as_uri())


@contextlib.contextmanager
def tracking(project: Project) -> Iterator[None]:
    """Point this process's MLflow at a project's store."""
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        # MLflow puts a registry that is set into the environment, and leaves it there.
        patch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        mlflow.set_tracking_uri(project.tracking_uri)
        mlflow.set_experiment("tests")
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)


@dataclass(frozen=True)
class Generations(Project):
    """A registry with generations of one model, and the evaluation of each, oldest first."""

    evaluations: tuple[Evaluation, ...] = ()

    @property
    def first(self) -> Evaluation:
        return self.evaluations[0]

    @property
    def second(self) -> Evaluation:
        return self.evaluations[1]

    @property
    def third(self) -> Evaluation:
        return self.evaluations[2]


@pytest.fixture(scope="session")
def generations(
    packaged: Packaged, onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generations:
    """Three generations of packaged's model in a registry of their own.

    The first is champion. The others came too late: evaluated before there was a champion, and
    registered after. `first/mlflow.db` is the store before they were registered. That the models
    answer is taken for granted: `packaged` proved it of the same weights.
    """
    from steps.register import register

    folder = tmp_path_factory.mktemp("generations")
    copy_store(packaged.folder / "mlflow.db", folder)
    evaluation = replace(
        packaged.evaluation,
        champion="",
        champion_metrics={},
        conditions="one machine",
        model_card="# Card",
        gates=[],
    )
    evaluations = [evaluation]
    project = Project(folder)
    for model in project.client.search_registered_models():
        project.client.delete_registered_model(model.name)
    with tracking(project):
        for max_tokens in (200, 300):
            with mlflow.start_run():
                logged = log_onnx(onnx, max_tokens, Interface.chat, Interface.prompt)
            evaluations.append(replace(evaluation, candidates=[model.uri for model in logged]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slm.registry.versions.prove", lambda *_, **__: None)
            for number, made in enumerate(evaluations, 1):
                register(made, composed().register, f"generation-{number}")
                if number == 1:
                    copy_store(folder / "mlflow.db", folder / "first")
    return Generations(folder, tuple(evaluations))


@pytest.fixture
def registry(generations: Generations, tmp_path: Path) -> Generations:
    """A copy of the three generations' registry, for a test that changes it."""
    copy_store(generations.folder / "mlflow.db", tmp_path)
    return Generations(tmp_path, generations.evaluations)


def log_onnx(
    onnx: Path,
    max_tokens: int,
    *interfaces: Interface,
    signing: Signing | None = None,
    tool_calls: str = "none",
) -> list[LoggedModel]:
    """Log an ONNX folder under a setting, which makes it another content."""
    from steps.log_pyfunc import Packaging, log_interface, runtime_requirements

    config = composed(f"log_pyfunc.max_tokens={max_tokens}", f"model.tool_calls={tool_calls}")
    signing = signing or config.signing
    requirements = runtime_requirements(config.target)
    requirements += verifier_requirements(signing)
    packaging = Packaging(
        *(config.model.name, config.target, config.log_pyfunc, requirements, signing),
        tool_calls=config.model.tool_calls,
    )
    return [log_interface(i, onnx, read_provenance(onnx), packaging) for i in interfaces]


def copy_store(database: Path, folder: Path) -> None:
    """Copy MLflow's SQLite store; the files that it names stay where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.closing(sqlite3.connect(database)) as source,
        contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as copy,
    ):
        source.backup(copy)
