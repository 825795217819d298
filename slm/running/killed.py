"""Runs of killed processes: MLflow says RUNNING of them until the next command ends them.

While a process has a run open, it holds the lock of the run's record, `<work>/running/<run>.json`.
A record whose lock is free is of a process that is gone, however it went. A run without a record
here, or a parent with one, is not touched: it may live elsewhere.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import mlflow
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Run
from mlflow.exceptions import MlflowException

from slm.errors import one_line
from slm.redaction import redacted
from slm.running.whole import partial_of, write_whole
from slm.running.work import RESULT

log = logging.getLogger("slm.killed")

FOLDER = "running"
KILLED = "its process was killed"


@contextlib.contextmanager
def on_record(name: str, query: str, work: Path) -> Iterator[None]:
    """Keep a run on record while the body runs; after an error, until the next command looks.

    `query` is what finds the run in MLflow's store: its id, or a tag that it will be made with.
    """
    record = work / FOLDER / f"{name}.json"
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # what makes an outcome will say so
            record.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_of(record))
            write_whole(record, json.dumps({"store": store(), "query": query}))
        yield
        forget(record)


def end_killed(work: Path) -> None:
    """End the runs of this store that killed processes left, and delete what they half logged."""
    for name in {path.name.partition(".")[0] for path in (work / FOLDER).glob("*.*")}:
        record = work / FOLDER / f"{name}.json"
        with contextlib.suppress(Timeout), lock_of(record):
            if not record.is_file():  # killed before it was written, thus before there was a run
                forget(record)
                continue
            told = json.loads(record.read_text())
            if told["store"] != store():
                continue
            try:
                for run in search(told["query"]):
                    end(run, record.parent)
            except MlflowException as error:
                log.warning("what a killed process left stays: %s", one_line(error))
            else:
                forget(record)


def search(query: str) -> list[Run]:
    """The runs of all experiments that meet a query."""
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    return list(mlflow.search_runs(experiments, query, output_format="list"))


def children_of(run: Run) -> list[Run]:
    return search(f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")


def end(run: Run, folder: Path) -> None:
    """End a run and all below it, unless they ended; nothing at or below a run that lives."""
    if run.info.status == "RUNNING":
        client = MlflowClient()
        client.set_tag(run.info.run_id, "error", KILLED)
        client.set_terminated(run.info.run_id, "KILLED")
        log.info("run %s (%s): %s", run.info.run_id, run.info.run_name, KILLED)
    discard_models(run, folder.parent)
    for child in children_of(run):
        if not lives(child, folder):
            end(child, folder)


def discard_models(run: Run, work: Path) -> None:
    """Delete what a run logged in vain: half uploaded, or lost with the process that logged it.

    `mlflow gc` then removes the files.
    """
    client, was_running = MlflowClient(), run.info.status == "RUNNING"
    outcomes = "".join(path.read_text() for path in work.glob(f"*/*/{RESULT}"))
    query = f"source_run_id = '{run.info.run_id}'"
    for model in client.search_logged_models([run.info.experiment_id], query):
        half = model.status == LoggedModelStatus.PENDING
        if half or (was_running and model.model_id not in outcomes):
            log.info("%s of that run is in no outcome: deleted", model.model_uri)
            client.delete_logged_model(model.model_id)


def forget(record: Path) -> None:
    """Remove a record while its lock is held, and the lock's file."""
    for path in (record, partial_of(record), record.with_suffix(".lock")):
        path.unlink(missing_ok=True)


def lives(run: Run, folder: Path) -> bool:
    """Whether a process holds the lock of the run's record."""
    record = folder / f"{run.info.run_id}.json"
    if not record.is_file():
        return False
    try:
        with lock_of(record):
            return False
    except Timeout:
        return True


def was_killed(run: Run, work: Path) -> bool:
    """Whether the process that had the run on record is gone."""
    folder = work / FOLDER
    return (folder / f"{run.info.run_id}.json").is_file() and not lives(run, folder)


def lock_of(record: Path) -> FileLock:
    return FileLock(record.with_suffix(".lock"), timeout=0)


def store() -> str:
    """Where runs are, without a password."""
    return redacted(mlflow.get_tracking_uri())
