"""What evaluate, register and rollback share of the Model Registry: names, aliases and turns.

Aliases of a registered model: `champion` serves, `challenger` passed its evaluation and did not
become champion (yet), `previous` is who the champion succeeded. Tags of a version: `succeeds` (the
version it took the alias from, or none), `rolled_back` (why it must not become champion again) and
`answered` (it was loaded by its URI, and answered).
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from steps.config import Register

log = logging.getLogger("steps.registry")

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
SUCCEEDS, ROLLED_BACK, ANSWERED = "succeeds", "rolled_back", "answered"
PROMOTING = "promoting_"  # and the holder's id: the tag of a registered model in a turn
LEASE_S = 60.0


def registered_name(metadata: dict[str, Any], settings: Register) -> str:
    """The name that a logged model's versions are registered under, by its metadata.

    Unity Catalog separates with dots, so the model's own become underscores there.
    """
    target = metadata["provenance"].get("target")
    template = settings.name_template if target else settings.reference_name_template
    interface = metadata["interface"]
    name = template.format(model=metadata["model"], target=target, interface=interface)
    return f"{settings.catalog}.{name.replace('.', '_')}" if settings.catalog else name


def aliases_of(client: MlflowClient, name: str) -> dict[str, str]:
    """The aliases of a registered model and their versions; none where it does not exist."""
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    return {alias: str(version) for alias, version in aliases.items()}


def version_with_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that has the alias; None where none has, or there is no such model."""
    version = aliases_of(client, name).get(alias)
    return client.get_model_version(name, version) if version else None


@contextlib.contextmanager
def turn(client: MlflowClient, names: list[str], holder: str) -> Iterator[None]:
    """Have registered models, which must exist, to oneself among all that ask for a turn.

    MLflow can neither lock nor compare and set. This is the one-bit algorithm (J. E. Burns; L.
    Lamport, "The mutual exclusion problem: part II", J. ACM 33(2), 1986), which needs no more than
    tags that can be read and written. `holder` is unique: the id of the MLflow run.

    A tag that nobody renewed for LEASE_S is that of a process that died, and is deleted. Who was
    suspended for longer and wakes up can thus still write: MLflow has nothing to fence it off with.
    """
    mine = PROMOTING + holder
    seen: dict[tuple[str, str], tuple[str, float]] = {}  # the tags of others, and since when

    def announce() -> None:
        for name in names:
            client.set_registered_model_tag(name, mine, str(time.time_ns()))

    def withdraw() -> None:
        for name in names:
            client.delete_registered_model_tag(name, mine)

    def others() -> set[str]:
        """The tags of the living."""
        living = set()
        for name in names:
            for tag, value in client.get_registered_model(name).tags.items():
                if not tag.startswith(PROMOTING) or tag == mine:
                    continue
                last, since = seen.get((name, tag), ("", 0.0))
                if value != last:
                    seen[name, tag] = value, time.monotonic()
                elif time.monotonic() - since > LEASE_S:
                    log.info("%s: run %s died in its turn", name, tag.removeprefix(PROMOTING))
                    client.delete_registered_model_tag(name, tag)
                    continue
                living.add(tag)
        return living

    try:
        announce()
        while any(tag < mine for tag in others()):
            withdraw()
            wait_while(lambda: any(tag < mine for tag in others()))
            announce()
        wait_while(lambda: any(tag > mine for tag in others()), announce)
        with repeated(announce):
            yield
    finally:
        withdraw()


def wait_while(busy: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Ask again and again until it is no longer so."""
    waiting = False
    while busy():
        if not waiting:
            log.info("another run has its turn in the registry: waiting")
        waiting = True
        meanwhile()
        time.sleep(LEASE_S / 100)


@contextlib.contextmanager
def repeated(action: Callable[[], None]) -> Iterator[None]:
    """Do it beside the body, often enough to keep a lease: making a version may upload a model."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(LEASE_S / 6):
            with contextlib.suppress(MlflowException):  # the body meets it too, or it passes
                action()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
