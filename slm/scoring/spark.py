"""The Spark session: the one that is there, a cluster's, or one on this machine; and its errors."""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from slm.config import ROOT, Score
from slm.digests import digest_of
from slm.errors import InputError, StepError, UserError
from slm.scoring.tables import reason
from slm_pyfunc.engine.cores import available_cores

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# The code that executors import: the worker, and the packages that it stands in.
SHIPPED = ("slm/__init__.py", "slm/scoring/__init__.py", "slm/scoring/worker.py")
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

    Errors of Spark's are StepErrors of one line.
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
        raise StepError(f"Spark stopped: {cause(error)}") from error
    finally:
        if ours is not None:
            ours.stop()


def start(settings: Score) -> "SparkSession":
    """A session at `score.master`, or on this machine."""
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    version = java_version()
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
    try:
        return builder.getOrCreate()
    except PySparkException as error:
        raise StepError(
            f"Spark does not start: {reason(error)} It needs Java 17 or newer; found {version}."
        ) from error


def java_version() -> str:
    """The first line of `java -version`; InputError if there is no Java."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None)
    if java is None:
        where = f"JAVA_HOME={home} has none" if home else "PATH has none"
        raise InputError(f"Spark needs Java 17 or newer, and {where}. Install a JRE.")
    shown = subprocess.run([java, "-version"], capture_output=True, text=True)
    return next(iter(shown.stderr.splitlines()), "nothing")


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
