import contextlib
import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from slm.digests import digest_files
from slm.errors import UnreachableError, words_for
from slm.running.run import run_step
from slm.running.tracking import absolute_uri, calling_folder, mlflow_run, settle_tracking
from slm.running.work import NotKept, code_digests, keep
from steps import fetch
from tests.conftest import Project, composed, ended, tracking

GONE = "models:/m-1 is gone"


@dataclass(frozen=True)
class Letter:
    uri: str
    files: dict[str, str]


class Writer:
    """A step that writes one file, and counts how often it had to."""

    def __init__(self, project: Project, text: str = "hello") -> None:
        self.project, self.text, self.count = project, text, 0

    def work(self, folder: Path) -> Letter:
        self.count += 1
        (folder / "letter").mkdir()
        (folder / "letter" / "text").write_text(self.text)
        return Letter(str(folder / "letter"), digest_files(folder / "letter"))

    def run(self, *overrides: str, there: bool = True) -> Letter:
        config = composed(f"paths.work={self.project.folder / 'work'}", *overrides)
        with tracking(self.project):
            return run_step(
                "letter",
                config,
                Letter,
                key={"text": self.text},
                module=__name__,
                make=self.work,
                stale=lambda _: "" if there else GONE,
            )


def test_the_same_key_is_reused(project: Project) -> None:
    writer = Writer(project)
    assert writer.run() == writer.run()
    assert writer.count == 1
    assert [run.data.tags["reused"] for run in project.runs("letter")] == ["true", "false"]


def test_another_key_is_made_beside_it(project: Project) -> None:
    assert Writer(project, "hello").run().uri != Writer(project, "goodbye").run().uri


def test_an_outcome_whose_files_changed_is_made_anew(project: Project) -> None:
    writer = Writer(project)
    Path(writer.run().uri, "text").write_text("tampered")
    assert Path(writer.run().uri, "text").read_text() == "hello"
    assert writer.count == 2


def test_an_outcome_that_is_no_longer_there_is_made_anew(project: Project) -> None:
    writer = Writer(project)
    writer.run()
    writer.run(there=False)
    assert writer.count == 2


def test_a_step_that_is_forced_is_made_again(project: Project) -> None:
    writer = Writer(project)
    assert writer.run() == writer.run("force=letter") == writer.run("force=[letter,fetch]")
    assert writer.run("force=fetch") and writer.count == 3


def reason(work: Path, key: dict[str, Any], again: bool = False, there: bool = True) -> str:
    """Why an outcome is not kept, "" if it is; it is kept from then on."""

    def make(folder: Path) -> Letter:
        (folder / "text").write_text("hello")
        return Letter(str(folder), {})

    asked = partial(keep, "letter", str(work), Letter, key=key, module="slm.digests", make=make)
    try:
        asked(only_kept=True, again=again, stale=lambda _: "" if there else GONE)
    except NotKept as why:
        asked()
        return str(why)
    return ""


def test_the_reason_is_what_differs_from_the_nearest_outcome(tmp_path: Path) -> None:
    first: dict[str, Any] = {"target": {"int8": [], "name": "cpu"}, "onnx": "1", "text": "a" * 99}
    assert reason(tmp_path, first) == "never made"
    assert reason(tmp_path, first) == ""
    second = first | {"target": {"int8": ["v_proj"], "name": "cpu"}}
    assert reason(tmp_path, second) == "target.int8: [] → ['v_proj']"
    third = second | {"onnx": "2", "torch": "3"}
    assert reason(tmp_path, third) == "onnx: 1 → 2; torch: none → 3"
    assert reason(tmp_path, third | {"text": "b" * 99}) == "text changed"
    assert reason(tmp_path, {"torch": "4"}).endswith("onnx: 2 → none and 2 more")


def test_the_reason_may_be_what_became_of_the_outcome(tmp_path: Path) -> None:
    reason(tmp_path, {})
    assert reason(tmp_path, {}, again=True) == "asked for again"
    assert reason(tmp_path, {}, there=False) == GONE
    [text] = tmp_path.glob("letter/*/text")
    text.write_text("tampered")
    assert reason(tmp_path, {}) == f"{text.parent} changed since it was made"


def test_to_ask_for_what_is_kept_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(NotKept):
        keep(
            "letter",
            str(tmp_path / "work"),
            Letter,
            key={},
            module=__name__,
            make=lambda _: Letter("", {}),
            only_kept=True,
        )
    assert not list(tmp_path.iterdir())


def test_another_file_of_code_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason(tmp_path, {})
    monkeypatch.setattr("slm.running.work.digest_file", lambda path: path.name)
    assert reason(tmp_path, {}) == "slm/digests.py changed"


def test_a_step_that_broke_off_is_begun_anew(project: Project) -> None:
    writer = Writer(project)
    folder = Path(writer.run().uri).parent
    (folder / "result.json").unlink()
    (folder / "leftover").write_text("half")
    writer.run()
    assert not (folder / "leftover").exists()


def test_a_step_that_fails_leaves_no_folder(project: Project) -> None:
    class Failing(Writer):
        def work(self, folder: Path) -> Letter:
            super().work(folder)
            raise OSError("broken")

    with tracking(project):
        with pytest.raises(OSError, match="broken"):
            Failing(project).run()
        mlflow.end_run()
    assert not [path for path in (project.folder / "work" / "letter").iterdir() if path.is_dir()]


def test_the_result_is_logged_to_the_run(project: Project) -> None:
    letter = Writer(project).run()
    [run] = project.runs("letter")
    path = project.client.download_artifacts(run.info.run_id, "result.json")
    assert json.loads(Path(path).read_text())["outcome"]["uri"] == letter.uri
    assert run.data.metrics["duration_s"] >= 0
    assert run.data.params["model.name"] == "smollm2-135m-instruct"


def test_a_full_disk_is_one_line_with_the_cure() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert str(words_for(full)).endswith(
        "Free space there, or set paths.work to a folder with more."
    )


def test_an_error_that_nobody_expected_has_no_words_of_its_own() -> None:
    for error in (ValueError("math domain error"), RuntimeError("CUDA"), OSError("strange")):
        assert words_for(error) is None


def test_the_code_of_a_step_is_what_it_imports() -> None:
    """Also behind functions and relative imports; not the command line, nor what it only ships."""
    evaluate = code_digests("steps.evaluate")
    assert {"slm/evaluation/worker.py", "slm/evaluation/report.html.j2"} <= evaluate.keys()
    assert not [name for name in evaluate if name.startswith(("slm/running", "slm/config"))]
    export = code_digests("steps.export_onnx")
    assert {"slm/exporters/checks.py", "slm_pyfunc/engine/scheduler.py"} <= export.keys()
    assert "slm_pyfunc/chat.py" not in export and "slm/registry/turns.py" not in export
    assert "slm/sources/gguf.py" in code_digests("steps.fetch")


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "./mlruns", "mlruns", "file:mlruns"])
def test_a_relative_store_means_the_same_from_every_folder(uri: str, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        settled = absolute_uri(uri)
    assert str(tmp_path / "ml") in settled and settled.startswith(("sqlite:////", "file:///"))
    assert absolute_uri(settled) == settled


def test_a_relative_store_is_where_mlflow_run_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["sleep", "60"], cwd=tmp_path) as mlflow_run:
        monkeypatch.setattr("psutil.Process.parents", lambda _: [psutil.Process(mlflow_run.pid)])
        outside = absolute_uri("sqlite:///mlflow.db")
        calling_folder.cache_clear()  # as another process
        monkeypatch.setenv("MLFLOW_RUN_ID", "1")
        inside = absolute_uri("sqlite:///mlflow.db")
        monkeypatch.delenv("MLFLOW_RUN_ID")  # as MLflow does when the first job starts its run
        later = absolute_uri("sqlite:///mlflow.db")
        mlflow_run.kill()
    assert outside == f"sqlite:///{Path.cwd()}/mlflow.db"
    assert inside == later == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("opened", [True, False])
def test_who_has_a_run_open_waits_for_the_server(
    opened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the second job of a --multirun has, whose run is in no variable."""
    patience: list[str | None] = []
    retries = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    monkeypatch.setattr(
        mlflow, "search_experiments", lambda **_: patience.append(os.environ.get(retries))
    )
    monkeypatch.setattr(mlflow, "active_run", lambda: object() if opened else None)
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "http://127.0.0.1:9")
    monkeypatch.setattr(mlflow, "set_tracking_uri", lambda _: None)
    settle_tracking()
    assert patience == [None if opened else "0"]


def test_a_store_that_is_no_path_stays_as_it_is() -> None:
    for uri in ("http://host:5000", "databricks", "databricks://profile", "databricks-uc"):
        assert absolute_uri(uri) == uri


def test_an_unreachable_tracking_server_is_one_line_with_the_cure(project: Project) -> None:
    command = [sys.executable, "-m", "steps.fetch"]
    uri = "http://user:secret@127.0.0.1:9"
    process = project.run(command, MLFLOW_TRACKING_URI=uri)
    assert process.returncode == 4
    [line] = process.stderr.strip().splitlines()
    assert line.startswith("fetch: the tracking server http://127.0.0.1:9 cannot be reached")
    assert line.endswith("Start it, or set MLFLOW_TRACKING_URI.")


@pytest.mark.parametrize(
    ("tracking", "registry", "words"),
    [
        ("databricks", "", "the Databricks workspace http://127.0.0.1:9 cannot be reached"),
        ("databricks://mine", "", "the Databricks workspace http://127.0.0.1:10 cannot be reached"),
        ("sqlite:////x", "http://u:secret@127.0.0.1:9", "the registry http://127.0.0.1:9 cannot"),
    ],
)
def test_a_workspace_and_a_registry_that_are_away_are_said_at_once(
    tracking: str, registry: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "databrickscfg"
    file.write_text("[mine]\nhost = http://127.0.0.1:10\ntoken = of-the-tests\n")
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(file))
    if tracking == "databricks":
        monkeypatch.setenv("DATABRICKS_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr("slm.running.tracking.PATIENCE_S", 1)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracking)
    if registry:
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    try:
        with pytest.raises(UnreachableError, match=words):
            settle_tracking()
    finally:
        mlflow.set_tracking_uri(before)


def test_an_experiment_that_another_run_just_made_is_taken(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw that it was missing."""
    find, asked = mlflow.MlflowClient.get_experiment_by_name, []

    def missed(client: mlflow.MlflowClient, name: str) -> object:
        asked.append(name)
        return find(client, name) if len(asked) > 1 else None

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(project.tracking_uri)
    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", missed)
    with mlflow_run("fetch", project.folder / "work") as run:
        assert run.info.experiment_id == "1" and len(asked) > 1
    mlflow.set_tracking_uri(before)


def test_a_work_folder_that_cannot_be_written_is_one_line_with_the_cure(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracking(project):
        assert ended(fetch.main, monkeypatch, "paths.work=/sys/nowhere") == 4
    assert "Set paths.work to a folder" in capsys.readouterr().err.splitlines()[-1]
