"""Real MLflow tracking servers on loopback, which tests start, kill, and start again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class Server:
    """`mlflow server` at an address that it keeps when it is killed and started again."""

    def __init__(self, database: str, folder: Path, *options: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        # MLflow 3.17 starts eight processes for jobs of its own, which no test asks for.
        self.environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}
        self.folder = folder
        self.command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        self.command += ["--port", str(self.port), "--workers", "1"]
        self.command += ["--backend-store-uri", database]
        self.command += options or ["--artifacts-destination", str(folder / "artifacts")]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
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
