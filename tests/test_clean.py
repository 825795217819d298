import json
import os
import time
from pathlib import Path

import mlflow
import pytest
from filelock import FileLock

from slm import environments
from slm.digests import Provenance
from slm.evaluation import measure, worker
from slm.records import LoggedModel
from slm.running.killed import end_killed
from slm.running.work import RESULT
from steps import log_pyfunc
from steps.clean import Cleaning, clean, main
from tests.conftest import Packaged, Project, composed, tracking

DAY_S = 86400


def outcome(work: Path, name: str, days: float, mb: int = 1) -> Path:
    """A folder of the work folder that was used so many days ago."""
    folder = work / name
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(mb * 10**6))
    (folder / RESULT).write_text("{}")
    then = time.time() - days * DAY_S
    os.utime(folder / RESULT, (then, then))
    return folder


def cleaned(folder: Path, *overrides: str) -> Cleaning:
    """What `clean` does with a project, which may have no store yet."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(Project(folder).tracking_uri)
    try:
        return clean(folder / "work", composed(*overrides).clean)
    finally:
        mlflow.set_tracking_uri(before)


def record(project: Project, run_id: str) -> None:
    """What a process notes of its run, and a kill leaves."""
    file = project.folder / "work" / "running" / f"{run_id}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"store": project.tracking_uri, "query": f"attributes.run_id = '{run_id}'"}
    file.write_text(json.dumps(told))


def names(done: Cleaning) -> list[str]:
    return [entry.folder for entry in done.removed]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Three outcomes, and what is none of a step's."""
    work = tmp_path / "work"
    for name, days in (("fetch/old", 40), ("fetch/new", 1), ("export_onnx/middle", 10)):
        outcome(work, name, days)
    outcome(work, "letters/mine", 400)
    return work


@pytest.mark.parametrize(
    ("bounds", "gone"),
    [
        ([], ["fetch/old"]),
        (["clean.older_than_days=5"], ["fetch/old", "export_onnx/middle"]),
        (["clean.older_than_days=null"], []),
        (["clean.older_than_days=null", "clean.max_gb=0.0021"], ["fetch/old"]),
        (["clean.max_gb=0"], ["fetch/old", "export_onnx/middle", "fetch/new"]),
    ],
)
def test_the_longest_unused_go_until_the_bounds_are_kept(
    tmp_path: Path, work: Path, bounds: list[str], gone: list[str]
) -> None:
    planned = cleaned(tmp_path, *bounds, "clean.dry_run=true")
    assert all((work / name).exists() for name in gone)
    done = cleaned(tmp_path, *bounds)
    assert names(planned) == names(done) == gone
    assert not any((work / name).exists() for name in gone)
    assert (work / "letters/mine").exists()
    assert done.left_gb == pytest.approx((3 - len(gone)) / 1000, rel=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]  # no store was made


def test_what_has_a_name_elsewhere_frees_nothing(tmp_path: Path, work: Path) -> None:
    """As weights have in MLflow's store, and two outcomes may share."""
    os.link(work / "fetch/old/weights", tmp_path / "elsewhere")
    os.link(work / "fetch/new/weights", work / "export_onnx/middle/weights.2")
    for dry in ("true", "false"):
        done = cleaned(tmp_path, "clean.max_gb=0", f"clean.dry_run={dry}")
        assert (done.removed_gb, done.freed_gb) == pytest.approx((4e-3, 2e-3), rel=0.01)


def test_the_hubs_cache_in_the_work_folder_is_bounded_while_nothing_runs(
    tmp_path: Path, work: Path
) -> None:
    for name, days in (("models--a--old", 40), ("models--a--new", 0)):
        blob = work / "hub" / name / "blobs" / "1"
        blob.parent.mkdir(parents=True)
        blob.write_bytes(b"weights")
        for path in (blob, blob.parent):
            os.utime(path, (time.time() - days * DAY_S,) * 2)
    (work / "running").mkdir()
    with FileLock(work / "running" / "1.lock"):
        assert cleaned(tmp_path).kept["hub/models--a--old"] == "a live run uses it"
    assert names(cleaned(tmp_path)) == ["hub/models--a--old"]


def test_what_is_being_made_stays(tmp_path: Path, work: Path) -> None:
    with FileLock(work / "fetch" / "old.lock"):
        assert cleaned(tmp_path).kept["fetch/old"] == "it is being made"
    assert names(cleaned(tmp_path)) == ["fetch/old"]


@pytest.mark.parametrize("levels", [1, 2], ids=["a step of main", "a step of choose"])
def test_what_a_live_run_used_stays(project: Project, levels: int) -> None:
    made, read, other = (f"{number:016x}" for number in range(3))
    for key in (made, read, other):
        outcome(project.folder / "work", f"fetch/{key}", 40)
    client = project.client
    parent = client.create_run("1").info.run_id
    above = parent
    for _ in range(levels):
        above = client.create_run("1", tags={"mlflow.parentRunId": above}).info.run_id
        client.set_terminated(above)
    client.set_tag(above, "key", made)
    client.log_param(above, "input.source", f"fetch/{read}/checkpoint")
    assert names(cleaned(project.folder)) == [f"fetch/{other}"]
    client.set_terminated(parent)
    assert names(cleaned(project.folder)) == [f"fetch/{made}", f"fetch/{read}"]


def test_what_a_live_run_measured_or_asked_models_in_stays(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is locked while it is read."""
    work, model = project.folder / "work", LoggedModel("m:/1", "n", "m", "chat", "", Provenance({}))
    asked = measure.request_of(measure.Inputs([], model, None, [], [], ""), composed().evaluate)
    measuring = measure.Measuring(asked, "one machine", str(work))
    monkeypatch.setattr(
        measure, "run_worker", lambda *given: measure.Measurement(str(given[2]), worker.Found())
    )
    monkeypatch.setattr(environments, "made_by_uv", lambda _, place, __: place.mkdir() is None)
    monkeypatch.setattr(log_pyfunc, "prove", lambda *_, **__: "")
    with tracking(project), mlflow.start_run():
        measured = Path(measuring.measure(model).uri)
        log_pyfunc.prove_environment(["a==1"], [], str(work))
        [environment] = (work / "environments").glob("*/")
        for used in (measured / RESULT, environment):
            os.utime(used, (0, 0))
        assert not names(cleaned(project.folder))
    assert {*names(cleaned(project.folder))} == {
        f"measure/{measured.name}",
        f"environments/{environment.name}",
    }


def test_an_environment_that_is_used_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> Path:
        return environments.environment_of(["a==1"], tmp_path / "work/environments").parents[1]

    monkeypatch.setattr(environments, "made_by_uv", lambda _, place, __: place.mkdir() is None)
    os.utime(ask(), (0, 0))
    ask()
    assert not names(cleaned(tmp_path))


def test_a_dry_run_ends_no_run_of_a_killed_process(project: Project) -> None:
    run_id, work = project.client.create_run("1").info.run_id, project.folder / "work"
    record(project, run_id)
    for dry, status in (("true", "RUNNING"), ("false", "KILLED")):
        with tracking(project):
            main(composed(f"paths.work={work}", f"clean.dry_run={dry}"))
        assert project.client.get_run(run_id).info.status == status


def test_of_a_killed_run_all_that_is_below_ends_but_what_lives(project: Project) -> None:
    """As of `choose`, whose rungs have steps below them, and one step that outlived it."""
    client, running = project.client, project.folder / "work" / "running"

    def run(above: str = "") -> str:
        tags = {"mlflow.parentRunId": above} if above else {}
        return client.create_run("1", tags=tags).info.run_id

    choose = run()
    rungs = [run(choose), run(choose)]
    client.set_terminated(rungs[0])
    steps = [run(rung) for rung in rungs]
    living = run(rungs[1])
    below = run(living)
    for run_id in (choose, living):
        record(project, run_id)
    with tracking(project), FileLock(running / f"{living}.lock"):
        end_killed(running.parent)
    status = {run_id: client.get_run(run_id).info.status for run_id in (choose, *rungs, *steps)}
    assert [*status.values()] == ["KILLED", "FINISHED", "KILLED", "KILLED", "KILLED"]
    assert {client.get_run(run_id).info.status for run_id in (living, below)} == {"RUNNING"}


def test_what_a_registered_version_was_made_from_stays(packaged: Packaged) -> None:
    """Dry runs: other tests read what would go."""
    bounds = ["clean.older_than_days=0", "clean.dry_run=true"]
    kept = cleaned(packaged.folder, *bounds).kept
    outcomes = [packaged.fetched.uri, packaged.exported.uri]
    folders = [str(Path(uri).parent.relative_to(packaged.folder / "work")) for uri in outcomes]
    folders += [str(Path(packaged.evaluation.uri).relative_to(packaged.folder / "work"))]
    assert {kept[folder] for folder in folders} == {"a registered version was made from it"}
    kinds = {folder.split("/")[0] for folder in kept}
    assert {"log_pyfunc", "log_transformers", "measure", "register"} <= kinds
    assert {*folders} <= {*names(cleaned(packaged.folder, *bounds, "clean.registered=true"))}
