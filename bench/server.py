"""MLflow's scoring server on a free port of 127.0.0.1, for the benchmark and the tests."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

START_S = 120


class ScoringServer:
    """`mlflow models serve` on a logged model's folder; it may be stopped and started again."""

    def __init__(self, folder: str | Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = str(folder), environment
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"

    def start(self) -> None:
        """Return once it answers; RuntimeError with the end of its output where it does not."""
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", self.folder]
        command += ["--env-manager", "local", "--host", "127.0.0.1"]
        command += ["--port", self.url.rpartition(":")[2]]
        path = f"{Path(sys.executable).parent}{os.pathsep}{self.environment['PATH']}"
        with tempfile.TemporaryFile() as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**self.environment, "PATH": path},
                start_new_session=True,
            )
            until = time.monotonic() + START_S
            while self.process.poll() is None and time.monotonic() < until:
                try:
                    urlopen(f"{self.url}/ping").close()
                    return
                except OSError:
                    time.sleep(0.1)
            self.stop()
            output.seek(0)
            words = output.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"the scoring server did not start: {words}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Send it and its workers a signal, and wait for its end."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
        self.process.wait()


@contextmanager
def serving(folder: str | Path, environment: dict[str, str]) -> Iterator[ScoringServer]:
    """A started server, stopped in the end."""
    server = ScoringServer(folder, environment)
    server.start()
    try:
        yield server
    finally:
        server.stop()
