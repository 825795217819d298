"""Databricks: the bundle's files agree with the project, and run in the stand-in of a workspace."""

import json
import os
import re
import sys
import tarfile
import time
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from databricks.sdk import WorkspaceClient
from databricks.sdk.service.catalog import SchemaInfo
from databricks.sdk.service.compute import ClusterSpec
from databricks.sdk.service.jobs import JobSettings
from databricks.sdk.service.serving import ServingModelWorkloadType
from mlflow import MlflowClient
from mlflow.projects.databricks import DatabricksSubmittedRun

from deploy.databricks import run as driver
from deploy.databricks.serve import FEW_THREADS, THREADS, registered, serve
from deploy.databricks.submit import CLUSTER, LIMIT_MB, submit
from slm.config.common import ROOT
from slm.registry.names import CHAMPION, PREVIOUS, ROLLED_BACK
from slm.running.work import imported_names, module_path
from tests.conftest import MODEL, TARGET, composed
from tests.databricks import READY, USER, Workspace
from tests.tiny_models import log_tiny

pytestmark = pytest.mark.xdist_group("databricks")

BUNDLE = yaml.safe_load((ROOT / "databricks.yml").read_text())
ENTRY_POINTS = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
JOBS = BUNDLE["resources"]["jobs"]


def deployed(value: Any, experiment: str = "1") -> Any:
    """What `databricks bundle deploy` sends: references resolved, and files where it put them."""
    if isinstance(value, dict):
        sent = {key: deployed(part, experiment) for key, part in value.items()}
        if "python_file" in sent:
            sent["python_file"] = str(ROOT / sent["python_file"])
        return sent
    if isinstance(value, list):
        return [deployed(part, experiment) for part in value]
    if not isinstance(value, str):
        return value
    known = {
        "workspace.file_path": str(ROOT),
        "workspace.current_user.userName": USER,
        "resources.experiments.packaging.id": experiment,
        "bundle.name": BUNDLE["bundle"]["name"],
        "bundle.target": "prod",
        **{f"var.{name}": variable["default"] for name, variable in BUNDLE["variables"].items()},
    }

    def resolved(reference: str) -> Any:
        if reference in known:
            return known[reference]
        found = BUNDLE
        for key in reference.split("."):
            found = found[key]
        return deployed(found)

    if whole := re.fullmatch(r"\$\{([\w.]+)\}", value):
        return resolved(whole[1])
    return re.sub(r"\$\{([\w.]+)\}", lambda match: str(resolved(match[1])), value)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_one_that_databricks_understands(name: str) -> None:
    job = deployed(JOBS[name])
    assert JobSettings.from_dict(job).as_dict() == job
    for task in job["tasks"]:
        assert Path(task["spark_python_task"]["python_file"]).is_file()
    used = re.findall(r"\{\{job\.parameters\.(\w+)\}\}", json.dumps(job["tasks"]))
    assert set(used) == {parameter["name"] for parameter in job["parameters"]}
    assert (job["max_concurrent_runs"], job["queue"]) == (1, {"enabled": True})


def test_clusters_and_the_schema_are_ones_that_databricks_understands() -> None:
    cluster = json.loads(CLUSTER.read_text())
    assert ClusterSpec.from_dict(cluster).as_dict() == cluster
    schema = deployed(BUNDLE["resources"]["schemas"]["models"])
    del schema["lifecycle"]  # the bundle's own
    assert SchemaInfo.from_dict(schema).as_dict() == schema


def test_the_jobs_give_what_entry_points_take_and_conf_has() -> None:
    package, score = (deployed(JOBS[name]) for name in ("package", "score"))
    defaults = {p["name"]: p["default"] for p in package["parameters"]}
    project, _, *given = package["tasks"][0]["spark_python_task"]["parameters"]
    assert {p.partition("=")[0] for p in given} == ENTRY_POINTS["main"]["parameters"].keys()
    assert defaults["entry_point"] in ENTRY_POINTS and project == str(ROOT)
    chosen = composed(f"model={defaults['model']}", f"target={defaults['target']}")
    assert chosen == composed()
    flags = [p for p in score["tasks"][0]["spark_python_task"]["parameters"] if p[:2] == "--"]
    assert {flag[2:] for flag in flags} == ENTRY_POINTS["score"]["parameters"].keys()
    assert len(package["schedule"]["quartz_cron_expression"].split()) == 6
    assert BUNDLE["targets"]["dev"]["mode"] == "development"
    assert BUNDLE["targets"]["prod"]["mode"] == "production"
    assert ServingModelWorkloadType(deployed("${var.workload_type}"))


def imported(*modules: str) -> set[str]:
    """The distributions that project modules import, and those that they import in turn."""
    found: set[str] = set()
    waiting, seen, owners = list(modules), set[str](), packages_distributions()
    while waiting:
        name = waiting.pop()
        if path := module_path(name):
            waiting += () if name in seen else imported_names(name, path)
            seen.add(name)
        else:
            found |= {owner.lower() for owner in owners.get(name.split(".")[0], [])}
    return found


def test_the_job_score_installs_what_it_imports_and_the_runtime_has_not() -> None:
    """With the code that the logged models ship; packages that sign are not for this job."""
    there = {"numpy", "pandas", "onnxruntime"}  # the last is required by onnxruntime-genai
    signing = {"model-signing", "cyclonedx-python-lib", "packageurl-python"}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and ";" not in line)
    needed = imported("steps.score", "slm_pyfunc.chat", "slm_pyfunc.prompt") & pins.keys()
    libraries = deployed(JOBS["score"])["tasks"][0]["libraries"]
    expected = {f"{name}=={pins[name]}" for name in needed - there - signing}
    assert {library["pypi"]["package"] for library in libraries} == expected


@pytest.fixture
def client(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[MlflowClient]:
    """A client of the workspace, whose clusters have this environment and a disk of their own."""
    for name, value in workspace.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(workspace.jobs.environment, "SLM_VENV", sys.prefix)
    monkeypatch.setitem(workspace.jobs.environment, "TMPDIR", str(tmp_path))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("databricks")
    mlflow.set_registry_uri("databricks-uc")
    yield MlflowClient()
    mlflow.set_registry_uri("")
    mlflow.set_tracking_uri(before)


def make_champion(client: MlflowClient, name: str, previous: str = "") -> str:
    """Register one more version of a tiny model, and make it champion."""
    mlflow.set_experiment("/Shared/tests")
    version = mlflow.register_model(log_tiny("first", "chat", TARGET).uri, name).version
    client.set_registered_model_alias(name, CHAMPION, version)
    if previous:
        client.set_registered_model_alias(name, PREVIOUS, previous)
    return version


def test_the_job_package_runs_an_entry_point_and_moves_the_endpoint(
    workspace: Workspace, client: MlflowClient
) -> None:
    """The endpoint's model is the one of that run, whatever overrides name it."""
    name = f"main.slm.{MODEL}-prod-chat"
    first = make_champion(client, name)
    make_champion(client, name, previous=first)
    experiment = client.create_experiment(deployed("${resources.experiments.packaging.name}"))
    databricks = WorkspaceClient()
    settings = deployed(JOBS["package"], experiment)
    job: Any = databricks.api_client.do("POST", "/api/2.2/jobs/create", body=settings)
    reason = "it's slow, a=b"
    overrides = f"""reason="{reason}" register.name_template='{{model}}-prod-{{interface}}'"""
    given = {"entry_point": "rollback", "overrides": overrides, "endpoint": "slm-chat"}
    started = databricks.jobs.run_now(job["job_id"], job_parameters=given)
    run = workspace.jobs.runs[started.run_id]
    while run.life_cycle != "TERMINATED":  # the SDK asks ever more rarely
        time.sleep(0.1)
    assert run.states == {"package": "SUCCESS", "serve": "SUCCESS"}, run.logs
    [rolled_back] = client.search_runs([experiment])
    assert rolled_back.info.status == "FINISHED"
    assert client.get_model_version_by_alias(name, CHAMPION).version == first
    assert reason in client.get_model_version(name, "2").tags[ROLLED_BACK]
    [served] = workspace.endpoints["slm-chat"]["config"]["served_entities"]
    assert (served["entity_name"], served["entity_version"]) == (name, first)


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ({"registered": [{"name": "c.s.m-chat"}, {"name": "c.s.m-prompt"}]}, ["c.s.m-chat"]),
        ({"jobs": [{"registered": [{"name": f"c.s.{m}"}]} for m in "ab"]}, ["c.s.a", "c.s.b"]),
        ({"entry_point": "rollback", "result": {"steps": [{"name": "c.s.m"}]}}, ["c.s.m"]),
        ({"entry_point": "plan", "result": {"steps": [{"step": "fetch"}]}}, []),
    ],
    ids=["main", "several", "rollback", "none"],
)
def test_the_endpoint_follows_the_one_model_that_was_registered(
    said: dict[str, Any], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(driver, "variables", lambda _: {"SLM_VENV": sys.prefix})

    def call(command: list[str], _: dict[str, str]) -> None:
        summary = Path(command[-1].removeprefix("summary="))
        told = {"entry_point": "main", "registered": [], "jobs": [], "result": None, **said}
        summary.write_text(json.dumps(told))

    monkeypatch.setattr(driver, "call", call)
    driver.run(ROOT, "main", [])
    if len(names) == 1:
        assert registered() == names[0]
    else:
        with pytest.raises(RuntimeError, match=", ".join(names) or "no model"):
            registered()


@pytest.mark.skipif("SLM_WHOLE" not in os.environ, reason="minutes: make test-databricks")
def test_the_job_package_packages_the_default_model_and_again_makes_no_version(
    workspace: Workspace, client: MlflowClient
) -> None:
    """`main` with the defaults of the bundle, in a catalog where nothing was; the endpoint too."""
    experiment = client.create_experiment("/Shared/whole")
    databricks, settings = WorkspaceClient(), deployed(JOBS["package"], experiment)
    job: Any = databricks.api_client.do("POST", "/api/2.2/jobs/create", body=settings)
    names = [f"main.slm.{MODEL}-{ending}" for ending in (f"{TARGET}-chat", f"{TARGET}-prompt")]
    for status in ("done", "unchanged"):
        given = {"endpoint": "whole"}
        started = databricks.jobs.run_now_and_wait(job["job_id"], job_parameters=given)
        run = workspace.jobs.runs[started.run_id or 0]
        print(run.logs["package"])
        assert run.states == {"package": "SUCCESS", "serve": "SUCCESS"}, run.logs
        assert ("Nothing changed" in run.logs["package"]) is (status == "unchanged")
    for name in (*names, f"main.slm.{MODEL}-transformers"):
        assert len(client.search_model_versions(f"name = '{name}'")) == 1
        assert client.get_model_version_by_alias(name, CHAMPION).version == "1"
    assert {r.info.status for r in client.search_runs([experiment])} == {"FINISHED"}
    [served] = workspace.endpoints["whole"]["config"]["served_entities"]
    assert (served["entity_name"], served["entity_version"]) == (names[0], "1")
    model = mlflow.pyfunc.load_model(f"models:/{names[0]}@{CHAMPION}")
    request = {"messages": [{"role": "user", "content": "Capital of France?"}], "max_tokens": 16}
    assert "Paris" in model.predict(request)["choices"][0]["message"]["content"]


def test_a_submitted_project_is_the_last_commit_and_its_failure_is_the_jobs(
    workspace: Workspace,
    client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(DatabricksSubmittedRun, "POLL_STATUS_INTERVAL", 0.5)
    experiment = client.create_experiment("/Shared/slm")
    overrides = "overrides=model.name=tiny model.source='/no where/at all'"
    code = submit("fetch", [overrides], "/Shared/slm", CLUSTER)
    [(run_id, run)] = [(i, r) for i, r in workspace.jobs.runs.items() if r.job_id == 0]
    [failed] = client.search_runs([experiment])
    error = failed.data.tags["error"]
    assert code == 2 and "/no where/at all" in error, run.logs
    assert f"fetch: {error}" in capsys.readouterr().err
    assert f"RuntimeError: fetch: exit code 2 (bad input): {error}" in run.logs["main"]
    assert failed.info.status == "FAILED"
    [sent] = workspace.folder.glob(f"dbfs/**/{experiment}/projects-code/*.tar.gz")
    assert sent.stat().st_size < LIMIT_MB * 1e6
    with tarfile.open(sent) as archive:
        names = {Path(*Path(name).parts[1:3]).as_posix() for name in archive.getnames()}
    assert {"MLproject", "project/MLproject", "project/requirements.txt"} <= names
    assert not {f"project/{name}" for name in (".git", ".venv", "work", "mlruns")} & names


def test_an_endpoint_follows_the_champion_and_is_left_alone_otherwise(
    workspace: Workspace, client: MlflowClient
) -> None:
    def configuration() -> dict[str, Any]:
        return workspace.endpoints["follower"]["config"]

    name = "main.slm.phi-3.5-chat"
    first = make_champion(client, "main.slm.phi-3_5-chat")
    serve("follower", name)
    [served] = configuration()["served_entities"]
    assert (served["entity_version"], served["workload_type"]) == (first, "CPU")
    assert served["environment_vars"] == {"OMP_NUM_THREADS": str(FEW_THREADS)}
    serve("follower", name)
    assert configuration()["config_version"] == 1

    workspace.endpoints["follower"]["state"] = {**READY, "config_update": "UPDATE_FAILED"}
    second = make_champion(client, "main.slm.phi-3_5-chat")
    serve("follower", name)
    serve("follower", name, "CPU_LARGE")
    [served] = configuration()["served_entities"]
    assert (served["entity_version"], served["workload_type"]) == (second, "CPU_LARGE")
    assert served["environment_vars"] == {"OMP_NUM_THREADS": str(THREADS["CPU_LARGE"])}
    assert configuration()["config_version"] == 3
