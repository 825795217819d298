"""Start `mlflow run` on a Databricks cluster: the file of a job's `spark_python_task`.

    run.py /Workspace/…/files main model=smollm2-135m-instruct overrides="evaluate=full"

The project gets an environment of its own on the cluster's disk, or takes the one at SLM_VENV. A
run that fails is a RuntimeError. A file on that disk names the registered model for serve.py, for
Databricks has task values in notebooks alone. Databricks executes this file in a REPL: there is no
__file__, the working directory is anywhere, and what a child prints is lost unless it is passed on.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from databricks.sdk.core import Config

REGISTERED = "registered"  # serve.py reads it
CODES = {2: "bad input", 3: "the verdict is failed", 4: "infrastructure"}  # docs/unattended.md
# Variables of the driver. The child is a client like any other, and is told who it is.
FOREIGN = ("PYTHON", "PYSPARK", "VIRTUAL_ENV", "DATABRICKS_RUNTIME_VERSION")


def run(project: Path, entry_point: str, parameters: list[str]) -> None:
    """Run the entry point; RuntimeError says with which exit code and error it failed."""
    local = Path("/local_disk0")
    disk = (local if local.exists() else Path(tempfile.gettempdir())) / "slm"
    (disk / "tmp").mkdir(parents=True, exist_ok=True)
    (disk / REGISTERED).unlink(missing_ok=True)
    summary = Path(tempfile.mkdtemp(dir=disk / "tmp")) / "summary.json"
    environment = variables(disk)
    scripts = venv_of(project, disk, environment) / "bin"
    environment["PATH"] = f"{scripts}:{os.environ['PATH']}"
    command = [f"{scripts}/python", "-m", "mlflow", "run", str(project), "--entry-point"]
    command += [entry_point, "--env-manager", "local"]
    if run_id := os.environ.get("MLFLOW_RUN_ID"):  # submit.py opened it
        command += ["--run-id", run_id]
    for parameter in [*parameters, f"summary={summary}"]:
        command += ["-P", parameter] if parameter.partition("=")[2] else []
    try:
        call(command, environment)
    except subprocess.CalledProcessError as error:
        said = json.loads(summary.read_text()) if summary.exists() else {}
        code, words = said.get("exit_code", 1), said.get("error", "its output says why")
        meaning = CODES.get(code, "failed")
        raise RuntimeError(f"{entry_point}: exit code {code} ({meaning}): {words}") from error
    (disk / REGISTERED).write_text("\n".join(registered(json.loads(summary.read_text()))))


def registered(said: dict[str, Any]) -> list[str]:
    """The leads of the versions that a summary says were registered, or made champion again."""
    rollback = (said["result"] or {}).get("steps", []) if said["entry_point"] == "rollback" else []
    made = [told["registered"] for told in (said, *said["jobs"])]
    return list(dict.fromkeys(versions[0]["name"] for versions in (rollback, *made) if versions))


def variables(disk: Path) -> dict[str, str]:
    """The child's environment; `spark_env_vars` of the cluster stand, an empty one unsets."""
    config = Config()
    token = config.authenticate()["Authorization"].removeprefix("Bearer ")
    defaults = {"MLFLOW_TRACKING_URI": "databricks", "MLFLOW_REGISTRY_URI": "databricks-uc"}
    defaults |= {"SLM_WORK": f"{disk}/work", "HF_HOME": f"{disk}/huggingface"}
    defaults |= {"TMPDIR": f"{disk}/tmp", "UV_CACHE_DIR": f"{disk}/uv-cache"}
    defaults |= {"UV_TORCH_BACKEND": "auto"}  # a build of torch for this node
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    own = {"DATABRICKS_HOST": str(config.host), "DATABRICKS_TOKEN": token}
    every = {**defaults, **kept, **own, "PYTHONDONTWRITEBYTECODE": "1"}
    return {name: value for name, value in every.items() if value}


def venv_of(project: Path, disk: Path, environment: dict[str, str]) -> Path:
    """An environment of requirements.txt and of what Unity Catalog's storage needs, made once."""
    if given := environment.get("SLM_VENV"):
        return Path(given)
    requirements = (project / "requirements.txt").read_text()
    venv = disk / f"venv-{hashlib.sha256(requirements.encode()).hexdigest()[:16]}"
    if not (venv / "whole").exists():
        pins = dict(line.split("==") for line in requirements.splitlines() if "==" in line)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", f"{disk}/uv"]
        call([*pip, f"uv=={pins['uv']}"], environment)
        uv = f"{disk}/uv/bin/uv"  # unlike `python -m venv`, it needs no ensurepip
        made = [uv, "venv", "--quiet", "--clear", "--seed"]  # with pip, for `fetch`
        call([*made, "--python", sys.executable, str(venv)], environment)
        install = [uv, "pip", "install", "--quiet", "--python", str(venv)]
        install += ["-r", f"{project}/requirements.txt", f"mlflow[databricks]=={pins['mlflow']}"]
        call(install, environment)
        (venv / "whole").touch()
    return venv


def call(command: list[str], environment: dict[str, str]) -> None:
    """Run a command, and pass on what it prints; CalledProcessError if it fails."""
    out, err = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, env=environment, stdout=out, stderr=err, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3:])
