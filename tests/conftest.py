"""The real pipeline on the real small model, once for the session, and what it left."""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from steps.config import CONF, ROOT, Config, Interface
from steps.evaluation.data import read_prompts, read_texts
from steps.evaluation.measurements import Inputs, measure, request_of
from steps.provenance import read_provenance

MODEL = "smollm2-135m-instruct"
TARGET = "cpu-int4-rtn-block-32-acc-level-4"
# Overrides that keep a run to seconds; so few tokens need looser gates.
TINY = (
    f"hydra.searchpath=[file://{ROOT / 'tests' / 'conf'}] evaluate=tiny "
    "log_pyfunc.prove_environment=false "
    "model.gates.perplexity_ratio.max=3 model.gates.kl_divergence.max=2 "
    "model.gates.top1_agreement.min=0.2 "
    "~evaluate.gates.decode_tokens_per_s"  # no verdict of a test hangs on a time
)


@dataclass(frozen=True)
class Project:
    """A place to run the project in: a work folder and a tracking store of its own.

    `made` holds the outcome of each step, where `main` ran.
    """

    folder: Path
    made: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        own = {"MLFLOW_TRACKING_URI": self.tracking_uri, "SLM_WORK": str(self.folder / "work")}
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
        command += ["--env-manager", "local", "--experiment-name", "tests"]
        for parameter in parameters:
            command += ["-P", parameter]
        return self.run(command, **environment)

    def step(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run([sys.executable, "-m", f"steps.{name}", *arguments])

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        everything = {**self.environment, **environment}
        return subprocess.run(command, cwd=ROOT, env=everything, text=True, capture_output=True)

    def outcome(self, step: str) -> dict[str, Any]:
        """The newest outcome of a step in the work folder."""
        results = (self.folder / "work" / step).glob("*/result.json")
        newest = max(results, key=lambda path: path.stat().st_mtime_ns)
        return json.loads(newest.read_text())["outcome"]

    def runs(self, name: str) -> list[mlflow.entities.Run]:
        """The MLflow runs of that name, newest first."""
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        query = f"attributes.run_name = '{name}'"
        return list(
            self.client.search_runs(experiments, query, order_by=["attributes.start_time DESC"])
        )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty project for a test that makes its own mess."""
    create_experiment(tmp_path)
    return Project(tmp_path)


@pytest.fixture(scope="session")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which `main` ran to its end; tests read it, and add under other keys."""
    project = Project(tmp_path_factory.mktemp("packaged"))
    create_experiment(project.folder)
    process = project.mlflow_run("main", f"overrides={TINY}")
    assert process.returncode == 0, process.stderr[-3000:]
    (project.folder / "stdout").write_text(process.stdout)
    for folder in (project.folder / "work").iterdir():
        project.made[folder.name] = project.outcome(folder.name)
    return project


@pytest.fixture(scope="session")
def smollm2(packaged: Project) -> Path:
    """The checkpoint that fetch made."""
    return Path(packaged.made["fetch"]["uri"])


@pytest.fixture(scope="session")
def onnx(packaged: Project) -> Path:
    """The ONNX folder that export_onnx made."""
    return Path(packaged.made["export_onnx"]["uri"])


@pytest.fixture(scope="session")
def chat_folder(packaged: Project) -> Path:
    """The logged chat model, as a folder."""
    return logged_folder(packaged, "chat")


@pytest.fixture(scope="session")
def prompt_folder(packaged: Project) -> Path:
    """The logged prompt model, as a folder."""
    return logged_folder(packaged, "prompt")


def logged_folder(project: Project, interface: str) -> Path:
    models = project.made["log_pyfunc"]["models"]
    [model_id] = [model["model_id"] for model in models if model["interface"] == interface]
    location = project.client.get_logged_model(model_id).artifact_location
    return Path(location.removeprefix("file://"))


@pytest.fixture(scope="session")
def phi3(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's weights as a `Phi3ForCausalLM` checkpoint: trained, small, and on the Phi-3 path.

    q, k and v become one `qkv_proj`, gate and up one `gate_up_proj`.
    """
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("phi3")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder / name)
    config = json.loads((smollm2 / "config.json").read_text())
    config |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": 2047}
    config |= {"original_max_position_embeddings": config["max_position_embeddings"]}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(smollm2 / "model.safetensors")
    for i in range(config["num_hidden_layers"]):
        for parts, fused in (
            (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv_proj"),
            (("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"),
        ):
            names = [f"model.layers.{i}.{part}.weight" for part in parts]
            fused_weight = torch.cat([weights.pop(name) for name in names])
            weights[f"model.layers.{i}.{fused}.weight"] = fused_weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def checkpoint(packaged: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, measured: the folder that an ONNX model is compared with."""
    settings = composed("evaluate.max_tokens=192", "evaluate.max_prompts=3").evaluate
    settings = replace(settings, prompt_lengths=[32], repeats=1, max_new_tokens=8)
    inputs = Inputs([], "", None, read_texts(settings), read_prompts(settings))
    folder = tmp_path_factory.mktemp("measured")
    (folder / "request.json").write_text(json.dumps(request_of(inputs, settings)))
    with tracking(packaged):
        measure(packaged.made["log_transformers"]["uri"], folder / "checkpoint")
    return folder / "checkpoint"


def composed(*overrides: str) -> Config:
    """conf/ as a step sees it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", list(overrides)))
    assert isinstance(config, Config)
    return config


def create_experiment(folder: Path) -> None:
    """An experiment whose artifacts stay in the test's folder."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    client.create_experiment("tests", artifact_location=(folder / "mlruns").as_uri())


@contextlib.contextmanager
def tracking(project: Project) -> Iterator[None]:
    """Point this process's MLflow at a project's store."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(project.tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


@pytest.fixture(scope="session")
def generations(packaged: Project, onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three generations of packaged's model in a registry of their own; `made` holds evaluations.

    The first is champion. The others came too late: evaluated before there was a champion, and
    registered after. `first.db` is the store before they were registered.
    """
    from steps.register import register

    folder = tmp_path_factory.mktemp("generations")
    copy_store(packaged.folder / "mlflow.db", folder)
    evaluation = packaged.made["evaluate"] | {"champion": "", "champion_metrics": {}}
    evaluation |= {"conditions": "one machine", "model_card": "# Card", "gates": []}
    project = Project(folder, {"1": evaluation})
    for model in project.client.search_registered_models():
        project.client.delete_registered_model(model.name)
    with tracking(project):
        for generation, max_tokens in (("2", 200), ("3", 300)):
            with mlflow.start_run(experiment_id="1"):
                candidates = log_onnx(onnx, max_tokens, Interface.chat, Interface.prompt)
            project.made[generation] = evaluation | {"candidates": candidates}
        for generation, made in project.made.items():
            register(made, composed().register, f"generation-{generation}")
            if generation == "1":
                copy_store(folder / "mlflow.db", folder / "first")
    return project


@pytest.fixture
def registry(generations: Project, tmp_path: Path) -> Project:
    """A copy of the three generations' registry, for a test that changes it."""
    copy_store(generations.folder / "mlflow.db", tmp_path)
    return Project(tmp_path, generations.made)


def log_onnx(onnx: Path, max_tokens: int, *interfaces: Interface) -> list[str]:
    """Log an ONNX folder under a setting, which makes it another content; return the URIs."""
    from steps.log_pyfunc import log_interface, runtime_requirements

    config = composed(f"log_pyfunc.max_tokens={max_tokens}")
    requirements = runtime_requirements(config.target.runtime_package)
    provenance = read_provenance(onnx)
    logged = [log_interface(i, onnx, provenance, requirements, config) for i in interfaces]
    return [f"models:/{model['model_id']}" for model in logged]


def copy_store(database: Path, folder: Path) -> None:
    """Copy MLflow's SQLite store; the files that it names stay where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.closing(sqlite3.connect(database)) as source,
        contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as copy,
    ):
        source.backup(copy)
