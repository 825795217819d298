"""A stand-in for a Databricks workspace on 127.0.0.1, for MLflow's and Databricks' real clients.

    with Workspace(folder) as workspace:  # the fixture `workspace` of tests/conftest.py
        subprocess.run(command, env={**os.environ, **workspace.environment})

It has Unity Catalog's models (tests/unity_catalog.py), the Files API, DBFS, jobs whose Python tasks
really run, serving endpoints that serve nothing, and SCIM's Me. Whatever else is asked for goes to
a real `mlflow server`: tracking. What it cannot show: Unity Catalog's real consistency and rights,
clusters, runtimes, and images.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import requests
from databricks.sdk.service.jobs import JobSettings
from databricks.sdk.service.serving import EndpointCoreConfigInput
from flask import Blueprint, Flask, Response, request
from mlflow.exceptions import MlflowException
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.refusals import asked, refusal, refuse
from tests.servers import Server
from tests.unity_catalog import Catalog, aliases, unity_catalog

TOKEN = "dapi-of-the-stand-in"
USER = "someone@example.com"
READY = {"ready": "READY", "config_update": "NOT_UPDATING"}
# Databricks runs a Python task in a REPL: there is no __file__, and sys.exit is no success.
REPL = """
import sys
sys.argv = sys.argv[1:]
with open(sys.argv[0]) as file:
    code = compile(file.read(), "<command>", "exec")
try:
    exec(code, {"__name__": "__main__"})
except SystemExit as error:
    raise RuntimeError(f"SystemExit: {error.code}")
"""


class Workspace:
    """The stand-in; files of tasks are those of this machine, or dbfs:/….

    A request is refused as for want of a right if its method and the end of its path are `denied`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.denied: set[tuple[str, str]] = set()
        self.catalog = Catalog(folder)
        self.jobs = Jobs(self)
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.app = Flask("databricks")
        self.app.before_request(self.check)
        self.app.errorhandler(MlflowException)(refusal)
        for routes in (
            unity_catalog(self.catalog),
            aliases(self.catalog),
            files(self),
            jobs(self),
            serving(self),
            others(self),
        ):
            self.app.register_blueprint(routes)

    def __enter__(self) -> "Workspace":
        store = f"sqlite:///{self.folder / 'tracking.db'}"
        self.tracking = Server(store, self.folder, "--default-artifact-root", "dbfs:/mlflow")
        self.server = make_server("127.0.0.1", 0, self.app, True, request_handler=Silent)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.jobs.stop()
        self.server.shutdown()
        self.server.server_close()
        self.tracking.kill()

    @property
    def credentials(self) -> dict[str, str]:
        return {"DATABRICKS_HOST": self.address, "DATABRICKS_TOKEN": TOKEN}

    @property
    def environment(self) -> dict[str, str]:
        """How a client outside finds the workspace's tracking server and registry."""
        stores = {"MLFLOW_TRACKING_URI": "databricks", "MLFLOW_REGISTRY_URI": "databricks-uc"}
        return {**self.credentials, **stores}

    def check(self) -> None:
        if request.path.startswith("/.well-known/"):
            return
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            refuse("UNAUTHENTICATED", "no valid token")
        if any(request.method == m and request.path.endswith(end) for m, end in self.denied):
            refuse("PERMISSION_DENIED", f"User does not have the right to {request.path}.")

    def local(self, path: str) -> Path:
        """Where a path of the workspace (dbfs:/…, /dbfs/…, /Models/…) lies on this machine."""
        if path.startswith("Models/"):  # names are kept in lower case
            *model, file = path.split("/", 5)
            path = "/".join([part.lower() for part in model] + [file])
        return self.folder / path.replace("dbfs:/", "/dbfs/").lstrip("/")


class Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


def files(workspace: Workspace) -> Blueprint:
    """The Files API, DBFS's API, and DBFS's legacy upload, over a folder of this machine."""
    routes = Blueprint("files", __name__)

    @routes.put("/api/2.0/fs/files/<path:path>")
    @routes.post("/dbfs/<path:path>")
    def write(path: str) -> dict[str, Any]:
        legacy = request.path.startswith("/dbfs/")
        target = workspace.local(f"/dbfs/{path}" if legacy else path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(request.get_data())
        return {}

    @routes.get("/api/2.0/fs/files/<path:path>")
    @routes.get("/dbfs/<path:path>")
    def read(path: str) -> Response:
        legacy = request.path.startswith("/dbfs/")
        source = existing(workspace.local(f"/dbfs/{path}" if legacy else path))
        headers = {"last-modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
        return Response(source.read_bytes(), mimetype="application/octet-stream", headers=headers)

    @routes.get("/api/2.0/fs/directories/<path:path>")  # and HEAD
    def directory(path: str) -> Response:
        folder = workspace.local(path)
        if not folder.is_dir():
            refuse("NOT_FOUND", f"no directory {path}")
        contents = [
            entry(f"/{path}/{file.name}", file, "is_directory") for file in folder.iterdir()
        ]
        return Response(json.dumps({"contents": contents}), mimetype="application/json")

    @routes.get("/api/2.0/dbfs/get-status")
    def status() -> dict[str, Any]:
        path = asked()["path"]
        return entry(path, existing(workspace.local(f"/dbfs{path}")), "is_dir")

    @routes.get("/api/2.0/dbfs/list")
    def listing() -> dict[str, Any]:
        path = asked()["path"].rstrip("/")
        found = existing(workspace.local(f"/dbfs{path}"))
        if found.is_file():
            return {"files": [entry(path, found, "is_dir")]}
        return {"files": [entry(f"{path}/{f.name}", f, "is_dir") for f in found.iterdir()]}

    @routes.post("/api/2.0/dbfs/delete")
    def delete() -> dict[str, Any]:
        shutil.rmtree(workspace.local(f"/dbfs{asked()['path']}"), ignore_errors=True)
        return {}

    def existing(path: Path) -> Path:
        if not path.exists():
            refuse("RESOURCE_DOES_NOT_EXIST", f"no file or directory {path.name}")
        return path

    def entry(path: str, file: Path, is_folder: str) -> dict[str, Any]:
        return {"path": path, is_folder: file.is_dir(), "file_size": file.stat().st_size}

    return routes


@dataclass
class JobRun:
    """A run of a job; `states` are those of its tasks, `logs` what these wrote, by task key."""

    run_id: int
    job_id: int
    settings: dict[str, Any]
    parameters: dict[str, str]
    life_cycle: str = "QUEUED"
    result: str | None = None
    states: dict[str, str] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def shown(self) -> dict[str, Any]:
        def state(result: str | None) -> dict[str, str]:
            if result:
                return {"life_cycle_state": "TERMINATED", "result_state": result}
            return {"life_cycle_state": self.life_cycle}

        keys = [task["task_key"] for task in self.settings["tasks"]]
        return {
            "run_id": self.run_id,
            "job_id": self.job_id,
            "run_page_url": f"http://127.0.0.1/#job/{self.job_id}/run/{self.run_id}",
            "state": state(self.result),
            "tasks": [
                {
                    "task_key": key,
                    "run_id": self.run_id * 100 + n,
                    "state": state(self.states.get(key)),
                }
                for n, key in enumerate(keys)
            ],
        }


class Jobs:
    """Jobs and their runs: one process for each task, one task after the other."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.settings: dict[int, dict[str, Any]] = {}
        self.runs: dict[int, JobRun] = {}
        self.turns: dict[int, threading.Semaphore] = {}
        self.ids = itertools.count(1)
        # What a process on the cluster has; a test may add to it.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DATABRICKS_"))}
        self.environment = kept

    def create(self, settings: dict[str, Any]) -> int:
        if (understood := JobSettings.from_dict(settings).as_dict()) != settings:
            refuse("INVALID_PARAMETER_VALUE", f"{settings} is understood as {understood}")
        job_id = next(self.ids)
        self.settings[job_id] = settings
        self.turns[job_id] = threading.Semaphore(settings.get("max_concurrent_runs", 1))
        return job_id

    def start(self, job_id: int, settings: dict[str, Any], given: dict[str, str]) -> JobRun:
        defaults = {p["name"]: p["default"] for p in settings.get("parameters", [])}
        if unknown := given.keys() - defaults.keys():
            refuse("INVALID_PARAMETER_VALUE", f"the job has no parameters {sorted(unknown)}")
        run = JobRun(next(self.ids), job_id, settings, {**defaults, **given})
        self.runs[run.run_id] = run
        threading.Thread(target=self.work, args=[run], daemon=True).start()
        return run

    def work(self, run: JobRun) -> None:
        with self.turns.get(run.job_id, threading.Semaphore()):
            run.life_cycle = "RUNNING"
            tasks = {task["task_key"]: task for task in run.settings["tasks"]}
            before = {
                key: [one["task_key"] for one in task.get("depends_on", [])]
                for key, task in tasks.items()
            }
            for key in TopologicalSorter(before).static_order():
                if {run.states[one] for one in before[key]} <= {"SUCCESS"}:
                    went_well = self.runs_through(run, tasks[key])
                    run.states[key] = "SUCCESS" if went_well else "FAILED"
                else:
                    run.states[key] = "UPSTREAM_FAILED"
            run.result = "SUCCESS" if set(run.states.values()) == {"SUCCESS"} else "FAILED"
            run.life_cycle = "TERMINATED"

    def runs_through(self, run: JobRun, task: dict[str, Any]) -> bool:
        """Run a task's Python file as a cluster does: elsewhere, and without __file__."""
        if "spark_python_task" not in task:
            run.logs[task["task_key"]] = "the stand-in runs Python tasks alone"
            return False
        python = task["spark_python_task"]
        folder = self.workspace.folder / "clusters" / f"{run.run_id}-{task['task_key']}"
        folder.mkdir(parents=True)
        command = [sys.executable, "-c", REPL, str(self.file_of(python["python_file"], folder))]
        for parameter in python.get("parameters", []):
            command.append(
                re.sub(r"\{\{job\.parameters\.(\w+)\}\}", lambda m: run.parameters[m[1]], parameter)
            )
        run.process = subprocess.Popen(
            command,
            cwd=folder,
            env={
                **self.environment,
                **self.cluster_of(run, task).get("spark_env_vars", {}),
                **self.workspace.credentials,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        run.logs[task["task_key"]] = run.process.communicate()[0]
        return run.process.returncode == 0

    def cluster_of(self, run: JobRun, task: dict[str, Any]) -> dict[str, Any]:
        """The cluster that a task names, or has of its own."""
        clusters = {
            one["job_cluster_key"]: one["new_cluster"]
            for one in run.settings.get("job_clusters", [])
        }
        return clusters.get(task.get("job_cluster_key")) or task["new_cluster"]

    def file_of(self, python_file: str, folder: Path) -> Path:
        """The file of a task; in one from DBFS, the cluster's folders become the stand-in's."""
        if not python_file.startswith("dbfs:/"):
            return Path(python_file)
        text = self.workspace.local(python_file).read_text()
        for root in ("/dbfs/", "/databricks/"):
            text = re.sub(rf"(?<![\w/]){root}", f"{self.workspace.folder}{root}", text)
        if shutil.which("rsync") is None:
            text = text.replace("rsync -a -v --ignore-existing", "cp -n")
        copied = folder.with_suffix(".py")
        copied.write_text(text)
        return copied

    def stop(self) -> None:
        for run in self.runs.values():
            if run.process is not None and run.process.poll() is None:
                os.killpg(run.process.pid, 9)


def jobs(workspace: Workspace) -> Blueprint:
    """/api/2.x/jobs: MLflow asks for 2.0, the SDK for 2.2."""
    routes = Blueprint("jobs", __name__, url_prefix="/api/<version>/jobs")
    known = workspace.jobs

    @routes.url_value_preprocessor
    def any_version(_: str | None, values: dict[str, Any] | None) -> None:
        (values or {}).pop("version", None)

    def job() -> tuple[int, dict[str, Any]]:
        job_id = int(asked()["job_id"])
        if job_id not in known.settings:
            refuse("RESOURCE_DOES_NOT_EXIST", f"Job {job_id} does not exist.")
        return job_id, known.settings[job_id]

    def run() -> JobRun:
        run_id = int(asked()["run_id"])
        if run_id not in known.runs:
            refuse("RESOURCE_DOES_NOT_EXIST", f"Run {run_id} does not exist.")
        return known.runs[run_id]

    @routes.post("/create")
    def create() -> dict[str, Any]:
        return {"job_id": known.create(asked())}

    @routes.get("/get")
    def get() -> dict[str, Any]:
        job_id, settings = job()
        return {"job_id": job_id, "creator_user_name": USER, "settings": settings}

    @routes.post("/run-now")
    def run_now() -> dict[str, Any]:
        started = known.start(*job(), asked().get("job_parameters", {}))
        return {"run_id": started.run_id, "number_in_job": started.run_id}

    @routes.post("/runs/submit")
    def submit() -> dict[str, Any]:
        body = asked()
        tasks = body.get("tasks") or [{"task_key": "main", **body}]  # 2.0 has one task, unnamed
        return {"run_id": known.start(0, {**body, "tasks": tasks}, {}).run_id}

    @routes.get("/runs/get")
    def get_run() -> dict[str, Any]:
        return run().shown()

    @routes.get("/runs/get-output")
    def output() -> dict[str, Any]:
        run_id, number = divmod(int(asked()["run_id"]), 100)
        one = known.runs[run_id]
        key = one.settings["tasks"][number]["task_key"]
        failed = one.states.get(key) != "SUCCESS"
        logs = one.logs.get(key, "")
        last = logs.strip().splitlines()[-1:] if failed else []
        return {"logs": logs, **({"error": last[0]} if last else {})}

    @routes.post("/runs/cancel")
    def cancel() -> dict[str, Any]:
        process = run().process
        if process is not None and process.poll() is None:
            os.killpg(process.pid, 9)
        return {}

    return routes


def serving(workspace: Workspace) -> Blueprint:
    """/api/2.0/serving-endpoints: what is to be served is kept and checked, and nothing served."""
    routes = Blueprint("serving", __name__, url_prefix="/api/2.0/serving-endpoints")
    known = workspace.endpoints

    def checked(config: dict[str, Any], name: str) -> dict[str, Any]:
        own = {"name": name, **config}
        if (understood := EndpointCoreConfigInput.from_dict(own).as_dict()) != own:
            refuse("INVALID_PARAMETER_VALUE", f"{own} is understood as {understood}")
        for served in config.get("served_entities", []):
            if not served["entity_version"].isdigit():
                refuse("INVALID_PARAMETER_VALUE", "entity_version must be a number")
            name = workspace.catalog.name(served["entity_name"])
            workspace.catalog.store.get_model_version(name, served["entity_version"])
        return {k: v for k, v in config.items() if k != "name"}

    def endpoint(name: str) -> dict[str, Any]:
        if name not in known:
            refuse("RESOURCE_DOES_NOT_EXIST", f"Endpoint {name} does not exist.")
        return known[name]

    @routes.post("")
    def create() -> dict[str, Any]:
        body = asked()
        if (name := body["name"]) in known:
            refuse("RESOURCE_ALREADY_EXISTS", f"Endpoint {name} exists.")
        config = {**checked(body.get("config", {}), name), "config_version": 1}
        known[name] = {**body, "creator": USER, "config": config, "state": READY}
        return known[name]

    @routes.get("/<name>")
    def get(name: str) -> dict[str, Any]:
        return endpoint(name)

    @routes.put("/<name>/config")
    def update(name: str) -> dict[str, Any]:
        version = endpoint(name)["config"]["config_version"] + 1
        config = {**checked(asked(), name), "config_version": version}
        known[name] |= {"config": config, "state": READY}
        return known[name]

    @routes.delete("/<name>")
    def delete(name: str) -> dict[str, Any]:
        known.pop(name, None)
        return {}

    return routes


def others(workspace: Workspace) -> Blueprint:
    """Who one is; and tracking, which a real `mlflow server` answers."""
    routes = Blueprint("others", __name__)

    @routes.get("/api/2.0/preview/scim/v2/Me")
    def me() -> dict[str, Any]:
        return {"id": "1", "userName": USER, "displayName": USER, "active": True}

    @routes.get("/.well-known/databricks-config")
    def configuration() -> dict[str, Any]:
        return {"host_type": "workspace"}

    @routes.route("/<path:path>", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    def tracking(path: str) -> Response:
        answer = requests.request(
            request.method,
            f"{workspace.tracking.address}/{unquote(path)}",
            params=list(request.args.items(multi=True)),
            data=request.get_data(),
            headers={"Content-Type": request.content_type or "application/json"},
        )
        headers = {"x-databricks-org-id": "1"}
        kind = answer.headers.get("Content-Type")
        return Response(answer.content, answer.status_code, headers, content_type=kind)

    return routes
