"""Serve the model at MODEL_URI with MLflow's scoring server, on port 8080.

    MODEL_URI=models:/my-model-cpu-int4-rtn-block-32-acc-level-4-chat@champion python serve_model.py

For a container, where this is process 1: the server takes its place, so that SIGTERM reaches it,
and requests under way are answered first. `mlflow models serve` (3.17.2) as process 1 ignores it.
"""

import os
import shlex
import sys
from typing import Any

import mlflow
from mlflow.pyfunc import scoring_server

PORT = 8080  # of the image that `mlflow models build-docker` makes


def serve_model(uri: str, workers: int) -> None:
    """Download the model, and become its server."""
    folder = mlflow.artifacts.download_artifacts(artifact_uri=uri)
    host: Any = "0.0.0.0"  # MLflow 3.17.2 annotates it as an int
    command, environment = scoring_server.get_cmd(folder, PORT, host, nworkers=workers)
    program, *arguments = shlex.split(command)
    os.execvpe(program, [program, *arguments], environment)


if __name__ == "__main__":
    if not (uri := os.environ.get("MODEL_URI")):
        sys.exit("MODEL_URI is not set. Set it to a model, such as models:/<name>@champion.")
    serve_model(uri, int(os.environ.get("MLFLOW_MODELS_WORKERS", "1")))
