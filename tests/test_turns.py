import multiprocessing
import os
import time
from pathlib import Path

import pytest

import slm.registry.turns
from slm.registry.names import PROMOTING
from slm.registry.turns import turn
from tests.conftest import Project, tracking
from tests.registry_state import STORES


def test_only_one_at_a_time_has_a_turn(project: Project) -> None:
    """Four processes, of which each asks for two of three models, write a common file in turns."""
    names = ["a", "b", "c"]
    for name in names:
        project.client.create_registered_model(name)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.registry_state", *STORES])
    pairs = [["a", "b"], ["b", "c"], ["a", "c"], ["a", "b"]]
    processes = [context.Process(target=take_turns, args=(project, pair)) for pair in pairs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert all(not project.client.get_registered_model(name).tags for name in names)


def test_who_died_in_its_turn_is_waited_for_no_longer_than_its_lease(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.client.create_registered_model("a")
    for dead in ("0", "z"):
        project.client.set_registered_model_tag("a", PROMOTING + dead, "1")
    monkeypatch.setattr(slm.registry.turns, "LEASE_S", 0.5)
    with turn(project.client, ["a"], "m"):
        assert set(project.client.get_registered_model("a").tags) == {f"{PROMOTING}m"}


def take_turns(project: Project, names: list[str]) -> None:
    with tracking(project):
        for _ in range(4):
            with turn(project.client, names, os.urandom(8).hex()):
                held = [project.folder / f"held-{name}" for name in names]
                for file in held:
                    Path.touch(file, exist_ok=False)
                time.sleep(0.05)
                for file in held:
                    file.unlink()
