"""Run an entry point by `mlflow run -b databricks`, for workspaces that still allow it.

    python deploy/databricks/submit.py --experiment-name /Shared/slm \
        -P overrides="register.catalog=main.slm"

The last commit is sent, as a project whose one job is run.py (MLflow's `databricks_spark_job`).
Waits for the end, and exits as the entry point does (docs/unattended.md).
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import mlflow
import yaml
from mlflow.projects.submitted_run import SubmittedRun

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "deploy/databricks/cluster.json"
LIMIT_MB = 5  # what is sent goes through DBFS's old upload, all of it in memory


def submit(entry_point: str, parameters: list[str], experiment: str, cluster: Path) -> int:
    """Run the entry point on a new cluster; return its exit code, and print the error if any."""
    sys.path.append(str(ROOT))
    from slm.errors import UserError, one_line
    from slm.running.tracking import settle_tracking

    if mlflow.get_tracking_uri().partition(":")[0] != "databricks":
        mlflow.set_tracking_uri("databricks")
    try:
        settle_tracking()  # is the workspace there? MLflow would ask for minutes
    except UserError as error:
        print(f"submit: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    with tempfile.TemporaryDirectory() as folder:
        stage(Path(folder), entry_point, parameters)
        run = mlflow.projects.run(
            folder,
            backend="databricks",
            backend_config=json.loads(cluster.read_text()),
            experiment_name=experiment,
            run_name=entry_point,
            synchronous=False,
        )
    return exit_code_of(run)


def stage(folder: Path, entry_point: str, parameters: list[str]) -> None:
    """Write the last commit into `project/`, and an MLproject beside it that starts it."""
    archive = subprocess.check_output(["git", "archive", "--prefix=project/", "HEAD"], cwd=ROOT)
    if len(archive) > LIMIT_MB * 1e6:
        sys.exit(f"The commit has {len(archive) / 1e6:.0f} MB; at most {LIMIT_MB} MB can be sent.")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    file = "project/deploy/databricks/run.py"
    job = {"python_file": file, "parameters": ["project", entry_point, *parameters]}
    project = {"name": "slm-packaging", "databricks_spark_job": job}
    (folder / "MLproject").write_text(yaml.safe_dump(project))


def exit_code_of(run: SubmittedRun) -> int:
    """Wait for the job; the entry point's exit code, or 1 if it never began."""
    client = mlflow.MlflowClient()
    try:
        went_well = run.wait()
    except KeyboardInterrupt:
        run.cancel()
        client.set_terminated(run.run_id, "KILLED")
        raise
    ended = client.get_run(run.run_id)
    if ended.info.status == "RUNNING":  # nobody ended it: the entry point never began
        client.set_terminated(run.run_id, "FINISHED" if went_well else "FAILED")
    if went_well:
        return 0
    tags = ended.data.tags
    never = f"the entry point never began; the job is {tags['mlflow.databricks.runURL']}"
    print(f"{tags['mlflow.runName']}: {tags.get('error', never)}", file=sys.stderr)
    return int(tags.get("exit_code", 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-e", "--entry-point", default="main")
    parser.add_argument("-P", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--experiment-name", required=True)
    parser.add_argument("--cluster", type=Path, default=CLUSTER)
    given = parser.parse_args()
    sys.exit(submit(given.entry_point, given.parameter, given.experiment_name, given.cluster))
