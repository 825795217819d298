"""The Spark session: the one that is there, a cluster's, or one on this machine; and its errors."""

import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from slm.config.common import ROOT
from slm.config.use import Score
from slm.digests import digest_of
from slm.errors import InputError, StepError, UnreachableError, UserError, one_line
from slm.scoring.tables import reason
from slm_pyfunc.engine.cores import available_cores

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# The code that executors import: the worker, and the packages that it stands in.
SHIPPED = ("slm/__init__.py", "slm/scoring/__init__.py", "slm/scoring/worker.py")
JAVA = 17  # of Spark 4
PATIENCE_S = 20
# What Spark and py4j say if the cluster, or the driver's Java, went away.
GONE = (
    "stopped SparkContext|SparkContext was shut down|masters are unresponsive|Master removed our"
    "|ExecutorLostFailure|Answer from Java side is empty|Error while sending or receiving"
)
QUIET = {"spark.ui.showConsoleProgress": "false", "spark.log.level": "ERROR"}
ON_THIS_MACHINE = {
    **QUIET,
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.ui.enabled": "false",
}


@contextlib.contextmanager
def spark_session(settings: Score) -> Iterator["SparkSession"]:
    """The active session, or one of our own, which ends with the block.

    Errors of Spark's are StepErrors of one line, InfrastructureErrors if the cluster went away.
    """
    try:
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise InputError(
            "pyspark is not installed: pip install -r requirements-spark.txt"
        ) from error
    # mapInArrow, the one of its functions that is used here, hands no pandas over.
    warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas")
    spark = SparkSession.getActiveSession()
    if spark is None and "DATABRICKS_RUNTIME_VERSION" in os.environ:
        spark = SparkSession.builder.getOrCreate()
    ours = None if spark else start(settings)
    try:
        yield spark or ours  # type: ignore[misc]
    except UserError:
        raise
    except (PySparkException, Py4JError) as error:
        if re.search(GONE, str(error)):
            raise UnreachableError(
                f"the cluster went away: {cause(error)[:300]} Run it again: the parts that are "
                "done stay."
            ) from error
        raise StepError(f"Spark stopped: {cause(error)}") from error
    finally:
        if ours is not None:
            ours.stop()


def start(settings: Score) -> "SparkSession":
    """A session at `score.master`, or on this machine; UnreachableError if the master is away."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    require_java()
    master, cores = settings.master, settings.executor_cores
    if master is None and "PYSPARK_SUBMIT_ARGS" not in os.environ:
        master = f"local[{available_cores()}]"
    builder = SparkSession.builder.appName("score")
    if master:
        builder = builder.master(master)
    if master and master.startswith("local"):
        # Executors take one task at a time, and there is one executor here.
        count = re.search(r"\[(\d+)", master)
        cores = cores or (int(count[1]) if count else available_cores())
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = builder.config(map=ON_THIS_MACHINE)
    elif cores:
        builder = builder.config("spark.executor.cores", str(cores)).config(map=QUIET)
    if cores:
        builder = builder.config("spark.task.cpus", str(cores))
    require_master(master or "")
    try:
        return builder.getOrCreate()
    except (PySparkException, Py4JError) as error:
        if re.search(GONE, str(error)):
            raise away(str(master), reason(error)) from error
        raise StepError(f"Spark does not start: {reason(error)}") from error


def require_master(master: str) -> None:
    """Raise UnreachableError if no master of a `spark://host:port,host:port` is there.

    Spark itself would try for one and a half minutes, and then show Java's stack.
    """
    if not re.fullmatch(r"spark://[^,:]+:\d+(,[^,:]+:\d+)*", master):
        return
    errors: list[OSError] = []
    for place in master.removeprefix("spark://").split(","):
        host, port = place.split(":")
        try:
            socket.create_connection((host, int(port)), PATIENCE_S).close()
            return
        except OSError as error:
            errors.append(error)
    raise away(master, one_line(errors[-1]))


def away(master: str, why: str) -> UnreachableError:
    return UnreachableError(
        f"the cluster score.master={master} cannot be reached: {why}. Start it, or correct the URL."
    )


def require_java() -> None:
    """Raise InputError unless there is a Java that Spark 4 runs on."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None)
    if java is None:
        where = f"JAVA_HOME={home} has none" if home else "PATH has none"
        raise InputError(f"Spark needs Java {JAVA} or newer, and {where}. Install a JRE.")
    shown = subprocess.run([java, "-version"], capture_output=True, text=True).stderr
    version = re.search(r'version "(\d+)', shown)
    if version is None or int(version[1]) < JAVA:
        found = next(iter(shown.splitlines()), "nothing")
        raise InputError(f"Spark needs Java {JAVA} or newer; {java} says: {found}. Install a JRE.")


def cause(error: Exception) -> str:
    """What went wrong in one line: a Python worker's exception, or Spark's first line."""
    text = str(error)
    raised = re.findall(r"Traceback \(most recent call last\):\n(?:[ \t].*\n)+(\S.*)", text)
    return f"a Python worker: {raised[-1]}" if raised else reason(error)


def cores_of_a_task(spark: "SparkSession") -> int:
    return int(spark.sparkContext.getConf().get("spark.task.cpus", "1") or 1)


def tasks_at_once(spark: "SparkSession") -> int:
    return max(1, spark.sparkContext.defaultParallelism // cores_of_a_task(spark))


def ship(spark: "SparkSession", model: Path) -> str:
    """Send the model and the worker's code to the executors; what a Work calls the folder.

    On this machine the model stays where it is. A name is sent once in the life of a session, which
    other processes may have used before: so names are this process's own.
    """
    context, parcels = spark.sparkContext, Path(parcel_folder().name)
    code = parcels / f"{parcels.name}.zip"
    with zipfile.ZipFile(code, "w") as archive:
        for name in SHIPPED:
            archive.write(ROOT / name, name)
    context.addPyFile(str(code))
    if context.master.startswith("local"):
        return str(model.resolve())
    packed = parcels / f"{parcels.name}-{digest_of(str(model))[:16]}.tar"
    if not packed.exists():
        with tarfile.open(packed, "w") as tar:
            tar.add(model, arcname="model")
    context.addArchive(str(packed))
    return f"{packed.name}/model"


@functools.cache
def parcel_folder() -> tempfile.TemporaryDirectory[str]:
    """Where executors fetch from, also those that come late: it lasts as long as the process."""
    return tempfile.TemporaryDirectory(prefix="slm-score-")
