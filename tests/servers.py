"""Real MLflow tracking servers on loopback, which tests start, kill, and start again."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import requests

# MLflow 3.17 starts eight processes for jobs of its own, which no test asks for.
WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


class Server:
    """`mlflow server` at an address that it keeps when it is killed and started again."""

    def __init__(self, database: str, folder: Path, *options: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.environment = {**WITHOUT_JOBS, **environment}
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


class Lossy(ThreadingHTTPServer):
    """Stands before a server, and loses its replies to the first requests of a path each."""

    def __init__(self, server: Server, path: str, losses: int) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.server, self.path, self.losses = server, path, losses
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Passing(BaseHTTPRequestHandler):
    server: Lossy

    def log_message(self, *_: object) -> None:
        pass

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = f"{self.server.server.address}{self.path}"
        answer = requests.request(self.command, url, headers=dict(self.headers), data=body)
        if self.path.endswith(self.server.path) and self.server.losses:
            self.server.losses -= 1
            self.connection.close()
            return
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on
