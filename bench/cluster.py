"""A standalone Spark cluster on this machine's loopback, for tests and measurements."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

DEPLOY = "org.apache.spark.deploy"


@contextlib.contextmanager
def cluster(folder: Path, workers: int = 2, cores: int = 1) -> Iterator[str]:
    """The master's URL, `spark://127.0.0.1:port`; `folder` holds the logs, and the workers' files.

    Each worker has so many cores and 1 GB for its executors' Java.
    """
    import pyspark

    home = Path(pyspark.__file__).parent
    port, page = free_port(), free_port()
    master = f"spark://127.0.0.1:{port}"
    environment = {**os.environ, "SPARK_HOME": str(home), "SPARK_LOCAL_IP": "127.0.0.1"}
    local = ["--host", "127.0.0.1", "--webui-port"]
    commands = [["master.Master", *local, str(page), "--port", str(port)]]
    for number in range(workers):
        own = ["--cores", str(cores), "--memory", "1g", "--work-dir", str(folder / f"{number}")]
        commands.append(["worker.Worker", *local, "0", *own, master])
    with contextlib.ExitStack() as stack:
        for number, (name, *arguments) in enumerate(commands):
            log = stack.enter_context((folder / f"{name}-{number}.log").open("w"))
            process = subprocess.Popen(
                [str(home / "bin" / "spark-class"), f"{DEPLOY}.{name}", *arguments],
                env=environment,
                stdout=log,
                stderr=log,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
        await_workers(f"http://127.0.0.1:{page}/json/", workers)
        yield master


def await_workers(url: str, workers: int, patience_s: float = 120) -> None:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        with contextlib.suppress(OSError), urlopen(url, timeout=5) as page:
            if json.load(page)["aliveworkers"] == workers:
                return
        time.sleep(0.2)
    raise TimeoutError(f"{workers} workers did not come to {url} in {patience_s:.0f} s")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
