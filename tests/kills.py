"""Kill real processes at their n-th write, run again, and hold what is left against no kill.

    python -m tests.kills <empty folder> 4
    python -m tests.kills <empty folder> 12 --real

A write is a file opened for writing, renamed or removed in the work folder or the artifact store,
or a commit to MLflow's database. For each step, as many points as asked for, spread over its
writes; every process is forked from this one, which has imported all that is heavy. Without
`--real`, the exporter works once, and what measures, proves and makes traces is left out. With it,
as many points again are spread over the step's time, where other processes work for it. Before
that, two processes run all steps at once. Prints a line of JSON for each.
"""

import argparse
import importlib
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sqlalchemy.event
from mlflow.tracking._model_registry.utils import _get_store as registry_store
from mlflow.tracking._tracking_service.utils import _get_store as tracking_store
from sqlalchemy.engine import Engine

from slm.digests import digest_files
from slm.evaluation.measure import Measurement
from slm.evaluation.worker import Found
from slm.exporters import worker
from slm.records import LoggedModel
from slm.registry import turns
from slm.running.chain import PIPELINE, Link
from slm.running.command import split_overrides
from slm.running.logs import set_up_logging
from slm.running.tracking import mlflow_run
from slm.running.work import RESULT
from tests.checkpoints import write_tiny, write_tokenizer
from tests.conftest import TINY, Project, composed, create_experiment, tracking

# What steps import where they need it, and forks would import each for itself.
HEAVY = (
    *("cyclonedx.output.json", "databricks.sdk", "git", "matplotlib.pyplot", "mlflow.genai"),
    *("mlflow.pyfunc", "mlflow.transformers", "onnxruntime.quantization", "onnxruntime_genai"),
    "transformers.pipelines",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MOVES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link")
PASSING = {"scored_tokens": 1000.0} | dict.fromkeys(("degenerate_share", "kl_divergence_p99"), 0.0)


class Killer:
    """Counts the writes of this process, and kills it before the one that it is told."""

    def __init__(self, folder: Path, at: int) -> None:
        self.places = tuple(str(folder / name) for name in ("work", "mlruns"))
        self.writes, self.at = 0, at

    def listen(self) -> None:
        sys.addaudithook(self.hear)
        sqlalchemy.event.listen(Engine, "commit", lambda _: self.write())

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in MOVES or (event == "open" and arguments[2] & WRITING)
        if writes and str(arguments[0]).startswith(self.places):
            self.write()

    def write(self) -> None:
        if self.writes == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.writes += 1


class Chain:
    """The steps on a tiny checkpoint, each in a process of its own, and copies of what they left.

    What a process hands on lies in files: its outcome, the number of its writes, the state.
    """

    def __init__(self, folder: Path, real: bool) -> None:
        self.folder, self.real = folder, real
        for module in (*HEAVY, *(f"steps.{link.step}" for link in PIPELINE)):
            importlib.import_module(module)
        self.project = Project(folder / "project")
        self.project.folder.mkdir()
        checkpoint = write_tiny(folder / "tiny", write_tokenizer(folder / "tokenizer"))
        given = f"model.name=tiny model.source={checkpoint} log_pyfunc.interfaces=[chat]"
        given += " ~evaluate.gates.size_mb"  # of so few weights, the descriptions count
        given += f" evaluate.gates.degenerate_share.max=1 paths.work={self.project.folder / 'work'}"
        self.config = composed(*split_overrides(f"{TINY} {given}"))
        create_experiment(self.project.folder)
        with tracking(self.project):
            tracking_store().engine.dispose()  # forks open connections of their own
            registry_store().engine.dispose()

    def run(self, link: Link, at: int = -1, after_s: float | None = None) -> int:
        """Run a step, killed before its write `at`, or after a time; how its process ended."""
        child = self.fork(lambda: self.steps([link], at))
        if after_s is not None:
            time.sleep(after_s)
            os.kill(child, signal.SIGKILL)
        return ended(child)

    def again(self, link: Link) -> tuple[int, dict[str, Any]]:
        """Run a step, undisturbed: how its process ended, and what is left."""

        def step_and_state() -> None:
            self.steps([link], -1)
            self.write("state", state_of(self.project))

        how = ended(self.fork(step_and_state))
        return how, {} if how else self.read("state")

    def both(self) -> dict[str, Any]:
        """Run all steps twice at once."""
        children = [self.fork(lambda: self.steps(PIPELINE, -1)) for _ in range(2)]
        how, (_, state) = [ended(child) for child in children], self.again(PIPELINE[-1])
        return {
            "ended": how,
            "running": state["running"],
            "made": [
                len(list((self.project.folder / "work" / x.step).glob("*/"))) for x in PIPELINE
            ],
            "models": len(state["models"]),
            "versions": [number for _, number, *_ in state["versions"]],
            "waited": ": waiting" in (self.folder / "log").read_text(),
        }

    def steps(self, links: Sequence[Link], at: int) -> None:
        if not self.real:
            self.stand_in()
        killer = Killer(self.project.folder, at)
        killer.listen()
        with mlflow_run("main", self.project.folder / "work"):
            for link in links:
                inputs = link.inputs({of: self.read(of) for of in link.needs})
                step = importlib.import_module(f"steps.{link.step}")
                self.write(link.step, step.main(replace(self.config, **inputs)))
        self.write("writes", killer.writes)

    def stand_in(self) -> None:
        """Leave out what takes long."""
        patch("slm.registry.versions.prove", lambda *_, **__: None).start()
        patch("slm.evaluation.measure.run_worker", measured).start()
        patch("steps.evaluate.show_answers", lambda *_: None).start()
        patch("steps.export_onnx.run_worker", self.exported).start()

    def exported(self, request: worker.Request) -> worker.Exported:
        """What the exporter makes, made once."""
        once, scratch = self.folder / "exported", self.folder / "scratch"
        if not once.exists():
            own = replace(request, onnx=str(once), scratch=str(scratch))
            save(self.folder / "exporter", worker.export(own))
        shutil.copytree(once, request.onnx)
        Path(request.scratch).mkdir()
        return load(self.folder / "exporter")

    def fork(self, work: Callable[[], object]) -> int:
        sys.stdout.flush()
        if child := os.fork():
            return child
        status = 1
        try:
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            set_up_logging()
            with tracking(self.project):
                work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def write(self, name: str, value: object) -> None:
        save(self.project.folder / name, value)

    def read(self, name: str) -> Any:
        return load(self.project.folder / name)

    def keep(self, name: str) -> None:
        shutil.copytree(self.project.folder, self.folder / "kept" / name)

    def restore(self, name: str) -> None:
        shutil.rmtree(self.project.folder)
        shutil.copytree(self.folder / "kept" / name, self.project.folder)


def save(path: Path, value: object) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(pickle.dumps(value))
    partial.replace(path)


def load(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def measured(model: LoggedModel, _: object, out: Path, *__: object) -> Measurement:
    gates = composed().evaluate.gates | composed().model.gates
    metrics = dict.fromkeys(gates, 1.0) | dict.fromkeys(("kl_divergence",), 0.0) | PASSING
    (out / "found.json").write_text("{}")
    return Measurement(str(out), Found(metrics, answers=["", "", ""]))


def state_of(project: Project) -> dict[str, Any]:
    client, work = project.client, project.folder / "work"
    runs = client.search_runs(["1"])
    models = client.search_logged_models(["1"])
    return {
        "running": [run.info.run_name for run in runs if run.info.status == "RUNNING"],
        "last": {run.info.run_name: run.info.status for run in reversed(runs)},
        "models": sorted((model.name, str(model.status)) for model in models),
        "aliases": {m.name: m.aliases for m in client.search_registered_models()},
        "tags": {m.name: m.tags for m in client.search_registered_models()},
        "versions": sorted(
            (v.name, v.version, v.status, v.tags["content"], sorted(v.tags))
            for v in client.search_model_versions()
        ),
        "work": {path.name: sorted(map(shown, path.iterdir()), key=str) for path in work.iterdir()},
    }


def shown(path: Path) -> Any:
    """An entry of the work folder: files alone, with digests where runs make the same."""
    if not path.is_dir():
        return path.suffix
    assert (path / RESULT).is_file() or path.parent.name == "environments", f"{path} is not whole"
    same = path.parent.name in ("fetch", "export_onnx")
    return sorted([n, same and n != RESULT and d] for n, d in digest_files(path).items())


def sweep(folder: Path, points: int, real: bool) -> None:
    turns.LEASE_S = 0.3
    chain = Chain(folder, real)
    chain.keep("nothing")
    print(json.dumps(chain.both()), flush=True)
    chain.restore("nothing")
    for link in PIPELINE:
        chain.keep(link.step)
        start = time.monotonic()
        how, undisturbed = chain.again(link)
        assert how == 0, (folder / "log").read_text()[-3000:]
        seconds, writes = time.monotonic() - start, chain.read("writes")
        chain.keep(f"after {link.step}")
        parts = [(2 * point + 1) / (2 * points) for point in range(points)]
        kills: list[dict[str, Any]] = [{"at": int(part * writes)} for part in parts]
        kills += [{"after_s": part * seconds} for part in parts] if real else []
        for kill in kills:
            chain.restore(link.step)
            killed = chain.run(link, **kill)
            again, found = chain.again(link)
            differs = {k: [v, found.get(k)] for k, v in undisturbed.items() if found.get(k) != v}
            told = {"step": link.step, **kill, "writes": writes, "killed": killed, "again": again}
            print(json.dumps({**told, "differs": differs}), flush=True)
        chain.restore(f"after {link.step}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("points", type=int, help="of each step")
    parser.add_argument("--real", action="store_true", help="nothing is left out")
    arguments = parser.parse_args()
    tempfile.tempdir = os.environ["TMPDIR"] = str(arguments.folder)
    sweep(arguments.folder, arguments.points, arguments.real)


if __name__ == "__main__":
    main()
