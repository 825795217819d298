"""Turns: one run at a time writes to a set of registered models."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from slm.registry.names import PROMOTING

log = logging.getLogger("slm.registry")

LEASE_S = 60.0


@contextlib.contextmanager
def turn(client: MlflowClient, names: list[str], holder: str) -> Iterator[None]:
    """Have registered models, which must exist, to oneself among all that ask for a turn.

    `holder` is unique: the id of the MLflow run.
    """
    own = Turn(client, names, holder)
    try:
        own.wait()
        with repeated(own.announce):
            yield
    finally:
        own.withdraw()


class Turn:
    """One run's place among those that want a turn.

    MLflow can neither lock nor compare and set. This is the one-bit algorithm (J. E. Burns; L.
    Lamport, "The mutual exclusion problem: part II", J. ACM 33(2), 1986), which needs no more than
    tags that can be read and written.

    A tag that was not renewed for LEASE_S is that of a process that died, and is deleted. A process
    that was suspended for longer can still write when it wakes up: MLflow has nothing to stop it.
    """

    def __init__(self, client: MlflowClient, names: list[str], holder: str) -> None:
        self.client, self.names, self.tag = client, names, PROMOTING + holder
        self.seen: dict[tuple[str, str], tuple[str, float]] = {}  # others' tags, and since when

    def announce(self) -> None:
        for name in self.names:
            self.client.set_registered_model_tag(name, self.tag, str(time.time_ns()))

    def withdraw(self) -> None:
        for name in self.names:
            self.client.delete_registered_model_tag(name, self.tag)

    def wait(self) -> None:
        """Announce oneself, let those with a lower tag go first, and wait for the others to end."""
        self.announce()
        while self.lower():
            self.withdraw()
            wait_while(self.lower)
            self.announce()
        wait_while(self.higher, self.announce)

    def lower(self) -> bool:
        return any(tag < self.tag for tag in self.others())

    def higher(self) -> bool:
        return any(tag > self.tag for tag in self.others())

    def others(self) -> set[str]:
        """The promotion tags of other runs whose lease has not expired."""
        living = set()
        for name in self.names:
            for tag, value in self.client.get_registered_model(name).tags.items():
                if not tag.startswith(PROMOTING) or tag == self.tag:
                    continue
                last, since = self.seen.get((name, tag), ("", 0.0))
                if value != last:
                    self.seen[name, tag] = value, time.monotonic()
                elif time.monotonic() - since > LEASE_S:
                    log.info("%s: run %s died in its turn", name, tag.removeprefix(PROMOTING))
                    self.client.delete_registered_model_tag(name, tag)
                    continue
                living.add(tag)
        return living


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
    """Repeat an action beside the body, often enough to keep the lease while a model uploads."""
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
