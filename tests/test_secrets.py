"""Canaries in whatever may hold a secret, and a search for them in all that is left."""

import json
import os
import shlex
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest

from slm.digests import Provenance, digest_files, write_provenance
from slm.redaction import redacted
from slm.running.tracking import mlflow_run, without_password
from slm.variables import variables
from tests.conftest import TARGET, Project, tracking
from tests.test_seal import write_keys

# Values as they are given; {} takes a canary.
GIVEN = {
    "HF_TOKEN": "hf_{}",
    "HF_ENDPOINT": "http://user:{}@127.0.0.1:9",
    "MLFLOW_TRACKING_USERNAME": "user",
    "MLFLOW_TRACKING_PASSWORD": "{}",
    "MLFLOW_TRACKING_TOKEN": "{}",
    "MLFLOW_REGISTRY_URI": "http://user:{}@127.0.0.1:9",
    "DATABRICKS_TOKEN": "dapi{}",
    "AWS_ACCESS_KEY_ID": "AKIA{}",
    "AWS_SECRET_ACCESS_KEY": "{}/+=",
    "AWS_SESSION_TOKEN": "{}",
    "AZURE_CLIENT_SECRET": "{}",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=a;AccountKey={};EndpointSuffix=b",
    "AZURE_STORAGE_SAS_TOKEN": "?sv=1&sig={}",
    "GOOGLE_API_KEY": "{}",
    "PIP_INDEX_URL": "http://user:{}@127.0.0.1:9/simple",
    "SLM_WEBHOOK_URL": "https://hooks.invalid/services/{}",
    "SLM_SIGNING_PASSWORD": "{}",
    "PLACE": "https://user:{}@127.0.0.1:9/model?X-Amz-Signature={}",
}
CANARIES = {name: f"canary{number:02}of{name.lower()}" for number, name in enumerate(GIVEN)}
ENVIRONMENT = {name: value.replace("{}", CANARIES[name]) for name, value in GIVEN.items()}

# Commands one after the other in one process; a list is a command, a string is Python.
DRIVER = """
import importlib, json, os, sys
from slm.running.command import entry_point

for command in json.loads(sys.argv[1]):
    if isinstance(command, str):
        exec(command)
        continue
    sys.argv = command
    try:
        entry_point(importlib.import_module(f"steps.{command[0]}").main)
    except SystemExit as end:
        print(command[0], "ended with", end.code)
"""
BREAK = """
import steps.fetch
def sources_of(model):
    raise RuntimeError(f"unexpected: {os.environ!r}, https://a:b@c/d, Authorization: Bearer abc")
whole, steps.fetch.sources_of = steps.fetch.sources_of, sources_of
"""
MEND = "steps.fetch.sources_of = whole"


def test_no_secret_is_found_in_anything_that_commands_leave(
    project: Project, tiny: Path, tiny_onnx: Path
) -> None:
    write_provenance(tiny_onnx, target=TARGET, checkpoint=Provenance(digest_files(tiny)))
    elsewhere = project.folder.with_name(f"{project.folder.name}-keys")
    elsewhere.mkdir()
    keys = write_keys(elsewhere, "own", password=CANARIES["SLM_SIGNING_PASSWORD"])
    signing = [
        f"signing.{name}_key={getattr(keys, f'{name}_key')}" for name in ("private", "public")
    ]
    secret_source = ["model.source=${oc.env:PLACE}", "model.name=other"]
    commands = [
        ["fetch", *secret_source],
        ["fetch", "model=phi-3-mini-4k-instruct"],
        ["fetch"],
        BREAK,
        ["fetch"],
        MEND,
        ["log_transformers", f"source={tiny}", *signing],
        [
            "log_pyfunc",
            f"source={tiny_onnx}",
            "log_pyfunc.interfaces=[chat]",
            "log_pyfunc.prove_environment=false",
            *signing,
        ],
        ["main", *secret_source],
    ]
    driver = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    patience = {"HF_HOME": str(project.folder / "hub"), "PIP_RETRIES": "0"}
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as registry:
        threading.Thread(target=registry.serve_forever, daemon=True).start()
        there = ENVIRONMENT["MLFLOW_REGISTRY_URI"].replace(":9", f":{registry.server_port}")
        process = project.run(driver, **{**ENVIRONMENT, "MLFLOW_REGISTRY_URI": there}, **patience)
        registry.shutdown()
    said = process.stdout + process.stderr
    ends = [line for line in process.stdout.splitlines() if " ended with " in line]
    done = [line.endswith(" 0") for line in ends]
    assert done == [*[False] * 4, True, True, False], said
    assert "https://127.0.0.1:9/model?X-Amz-Signature=*** cannot be read: " in said
    left = {"said": said.encode()}
    left |= {str(path): path.read_bytes() for path in project.folder.rglob("*") if path.is_file()}
    assert [name for name in left if name.endswith(("model.sig", "traceback.txt"))]
    found = {
        (name, variable)
        for name, data in left.items()
        for variable, canary in CANARIES.items()
        if canary.encode() in data
    }
    assert not found
    [run] = [run for run in project.runs("fetch") if "mlflow.parentRunId" in run.data.tags]
    [overrides] = shlex.split(run.data.params["overrides"])
    assert json.loads(overrides) == [*secret_source, "preflight=off"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://u:p@ss@host:1/a?b=c failed", "at http://host:1/a?b=c failed"),
        ("postgresql+psycopg2://u:p%40ss@host/db", "postgresql+psycopg2://host/db"),
        ("https://token@host/x and s3://a/b@c", "https://host/x and s3://a/b@c"),
        (
            "abfss://c@a.dfs.core/x, wasbs://c@a.blob/x",
            "abfss://c@a.dfs.core/x, wasbs://c@a.blob/x",
        ),
        ("abfss://user:pass@a.dfs.core/x", "abfss://a.dfs.core/x"),
        ("https://h/x?sv=1&sig=a%2Bb&se=2", "https://h/x?sv=1&sig=***&se=2"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': '***'}"),
        ("hf://org/name@main, models:/a@champion", "hf://org/name@main, models:/a@champion"),
        ("a-very-secret-value, quoted a%20secret%2Fvalue", "***, quoted ***"),
        ("max_tokens=5; the key /keys/own.pub; true", "max_tokens=5; the key /keys/own.pub; true"),
    ],
)
def test_what_is_secret_in_a_text_is_hidden_and_nothing_else(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "a-very-secret-value")
    monkeypatch.setenv("SOME_SECRET", "a secret/value")
    monkeypatch.setenv("USES_TOKENS", "true")
    monkeypatch.setenv("SLM_MODEL_PUBLIC_KEY", "/keys/own.pub")
    assert redacted(text) == shown


def test_the_password_in_a_servers_uri_goes_where_mlflows_client_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setitem(os.environ, name, "")
        monkeypatch.delitem(os.environ, name)
    assert without_password("https://me:p%40ss@host:5000/mlflow") == "https://host:5000/mlflow"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "p@ss"
    for other in ("https://you:pass@registry", "https://host", f"postgresql://a:{quote('@')}@b/c"):
        assert without_password(other) == other


def test_a_token_in_a_projects_git_uri_does_not_stay_on_the_run(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = {"mlflow.source.name": "https://user:canary-of-git@host/repo.git#sub"}
    with tracking(project):
        run = project.client.create_run("1", tags=tags)
        monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
        with mlflow_run("main", project.folder):
            pass
        assert mlflow.get_run(run.info.run_id).data.tags["mlflow.source.name"] == (
            "https://host/repo.git#sub"
        )
    assert b"canary-of-git" not in (project.folder / "mlflow.db").read_bytes()


def test_a_variable_that_vanishes_while_all_are_read_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Vanishing(dict[str, str]):
        def __iter__(self) -> Iterator[str]:
            return iter([*super().__iter__(), "UNSET_BY_A_THREAD"])

    monkeypatch.setattr(os, "environ", Vanishing(HOME="/home/me"))
    assert variables() == {"HOME": "/home/me"}
