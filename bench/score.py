"""Rows per second of `score` on one and on two executors of one core each, beside a plain loop.

    make bench-score
    python -m bench.score models:/…-chat@champion --rows 512

The executors are a standalone cluster's on this machine's loopback. All have loaded the model
before they are timed. The loop asks the same model, on one core, for one row after the other.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd

from bench.cluster import cluster
from bench.workers import TOPICS
from slm.config.use import Format, Score
from slm.running.logs import set_up_logging
from slm.running.tracking import local_path, settle_tracking
from slm.scoring.spark import spark_session
from slm.scoring.tables import Place
from steps.score import score


def loop(folder: Path, prompts: list[str], parameters: dict[str, Any], rounds: int) -> list[float]:
    """Rows per second of each round, one `predict` a row."""
    settings = {"threads": 1, "cache_mb": 256}
    model = mlflow.pyfunc.load_model(str(folder), suppress_warnings=True, model_config=settings)
    found = []
    for _ in range(rounds):
        start = time.monotonic()
        for prompt in prompts:
            model.predict({"messages": [{"role": "user", "content": prompt}], **parameters})
        found.append(len(prompts) / (time.monotonic() - start))
    return found


def spark(
    folder: Path, scratch: Path, parameters: dict[str, Any], executors: int, rounds: int
) -> list[float]:
    """Rows per second of each round, after one that starts the executors and loads the model."""
    found = []
    with cluster(scratch, executors) as master:
        settings = Score(master=master, executor_cores=1, parameters=parameters)
        with spark_session(settings) as session:
            source = Place(str(scratch / "prompts.parquet"), Format.parquet)
            for number in range(rounds + 1):
                output = Place(str(scratch / f"{executors}-{number}"), Format.parquet)
                found.append(score(session, folder, source, output, settings).rows_per_s)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_uri", help="a chat model that this project registered")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    set_up_logging()
    settle_tracking()
    os.environ |= {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    folder = local_path(arguments.model_uri, "model_uri", "register")
    parameters = {"max_tokens": arguments.max_tokens, "temperature": 0.7, "seed": 0}
    prompts = [
        f"Write a very long story about {TOPICS[i % len(TOPICS)]}, number {i}."
        for i in range(arguments.rows)
    ]
    print("| | rows/s | of the loop's |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        pd.DataFrame({"prompt": prompts}).to_parquet(f"{scratch}/prompts.parquet")
        few = prompts[: max(1, arguments.rows // 8)]
        alone = statistics.median(loop(folder, few, parameters, arguments.rounds))
        print(f"| a loop over `predict` | {alone:.2f} | 1 |", flush=True)
        for executors in (1, 2):
            rates = spark(folder, Path(scratch), parameters, executors, arguments.rounds)
            rate = statistics.median(rates)
            print(f"| {executors} × one core | {rate:.2f} | {rate / alone:.1f} |", flush=True)


if __name__ == "__main__":
    main()
