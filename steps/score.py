"""Answer a table of prompts or conversations with Spark.

    mlflow run . -e score -P model_uri=models:/…-chat@champion -P input=in.parquet -P output=out.csv
    python -m steps.score model_uri=models:/…@champion input=in.jsonl output=catalog.schema.answers

The answers stand beside the input's columns, with the reason why each ended, its tokens, and the
error of a row that could not be answered. Rows are answered in parts (slm/scoring/tables.py): run
again after a kill, it goes on with the parts that are not done.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow

from slm.config import Config
from slm.config.use import Score
from slm.errors import StepError
from slm.records import LoggedModel, Scored
from slm.redaction import redacted
from slm.running.command import entry_point
from slm.running.run import numbers
from slm.running.summary import note
from slm.running.tracking import local_path, log_parameters, mlflow_run
from slm.running.work import work_folder
from slm.scoring.rows import (
    answered,
    column_of,
    counted,
    holds_messages,
    part_of,
    parts_of,
    require_columns,
    rows_of_parts,
    with_keys,
)
from slm.scoring.spark import cores_of_a_task, ship, spark_session, tasks_at_once
from slm.scoring.tables import PART, Files, Manifest, Place, keeper_of, place_of, read
from slm.scoring.worker import Work
from slm.seal import require_signed

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger("slm.score")

ROWS_PER_TASK = 256  # of a part: enough to keep a batch of 16 full most of the time


def score(
    spark: "SparkSession", folder: Path, source: Place, output: Place, settings: Score
) -> Scored:
    """Answer the rows of `source` with the logged model in `folder`, and keep them in `output`."""
    model = LoggedModel.load(str(folder))
    table, keeper = read(spark, source).drop(PART), keeper_of(spark, output)
    column = column_of(table, model, settings)
    require_columns(table, settings)
    rows = with_keys(table, settings)
    counts, fingerprint = counted(rows)
    total, tasks = sum(counts.values()), tasks_at_once(spark)
    manifest = Manifest(
        model=model.content,
        column=column,
        id=settings.id,
        system=settings.system,
        parameters=settings.parameters,
        context_length=settings.settings.get("context_length"),
        prefix=settings.prefix,
        columns=[f"{field.name} {field.dataType.simpleString()}" for field in table.schema],
        rows=total,
        fingerprint=fingerprint,
        parts=parts_of(total, settings.rows_per_part or ROWS_PER_TASK * tasks),
    )
    begun = keeper.manifest()
    if begun is not None:
        begun.require_same(manifest, output.name)
        manifest = begun
    expected = rows_of_parts(counts, manifest.parts)
    work = Work(
        folder=ship(spark, folder),
        column=column,
        holds_messages=holds_messages(table, column),
        system=settings.system,
        parameters=settings.parameters,
        settings={"threads": cores_of_a_task(spark), **settings.settings},
        prefix=settings.prefix,
    )

    def answers(part: int) -> "DataFrame":
        chosen = part_of(rows, part, manifest.parts)
        return keeper.fit(answered(chosen, tasks, work))

    like = spark.createDataFrame([], answers(0).schema)
    if begun is None:
        keeper.begin(manifest, like)
    kept = keeper.rows_kept(like)
    todo = {p: n for p, n in expected.items() if kept.get(p, 0) != n or not total}
    start = time.monotonic()
    answer_parts(keeper, answers, todo, expected)
    seconds = time.monotonic() - start
    kept = keeper.rows_kept(like)
    if any(kept.get(part, 0) != n for part, n in expected.items()):
        raise StepError(
            f"output={output.name} has not the rows of input={source.name}: the input changed "
            "while it was answered. Score a copy that stays as it is."
        )
    return Scored(
        uri=redacted(output.name),
        model=model.uri,
        rows=total,
        parts=manifest.parts,
        answered_rows=sum(todo.values()),
        rows_per_s=round(sum(todo.values()) / seconds, 3) if todo else 0.0,
        **totals(keeper.answers(like), settings.prefix),
    )


def answer_parts(
    keeper: Files,
    answers: Callable[[int], "DataFrame"],
    todo: dict[int, int],
    expected: dict[int, int],
) -> None:
    """Answer and keep the parts `todo`, with their rows, out of all that are `expected`."""
    context, group = keeper.spark.sparkContext, f"score {redacted(keeper.place.name)}"
    parts, rows, answered_rows = len(expected) - len(todo), sum(expected.values()), 0
    before = rows - sum(todo.values())
    log.info(
        "score: %d of %d parts and %d of %d rows are there", parts, len(expected), before, rows
    )

    def work(part: int) -> int:
        context.setJobGroup(group, f"part {part}", interruptOnCancel=True)
        keeper.write(part, answers(part))
        return todo[part]

    start = time.monotonic()
    with ThreadPoolExecutor(keeper.at_once) as pool:
        under_way = [pool.submit(work, part) for part in todo]
        try:
            for future in as_completed(under_way):
                answered_rows += future.result()
                parts += 1
                rate = answered_rows / (time.monotonic() - start)
                log.info(
                    "score: %d of %d parts, %d of %d rows, %.3g rows/s, about %s left",
                    *(parts, len(expected), before + answered_rows, rows, rate),
                    timedelta(seconds=round((rows - before - answered_rows) / (rate or 1))),
                )
        except BaseException:  # Ctrl-C too: what was not begun never is, what was is stopped
            pool.shutdown(wait=False, cancel_futures=True)
            context.cancelJobGroup(group)
            raise


def totals(answers: "DataFrame", prefix: str) -> dict[str, int]:
    """Errors and tokens of all rows; StepError if there is an error in every one."""
    from pyspark.sql import functions as F

    tokens = [F.sum(prefix + name).alias(name) for name in ("prompt_tokens", "completion_tokens")]
    error = F.col(prefix + "error")
    row = answers.agg(F.count(F.lit(1)).alias("rows"), F.count(error).alias("errors"), *tokens)
    [found] = [{name: value or 0 for name, value in r.asDict().items()} for r in row.collect()]
    if found["errors"]:
        most = answers.where(error.isNotNull()).groupBy(error.alias("words")).count()
        for text, count in most.orderBy(F.desc("count"), "words").limit(3).collect():
            log.info("score: %d of %d rows: %s", count, found["rows"], text)
        if found["errors"] == found["rows"]:
            raise StepError(f"every row has an error, as this one: {text}")
    del found["rows"]
    return found


def main(config: Config) -> Scored:
    source = place_of("input", config.input, config.score.input_format)
    output = place_of("output", config.output, config.score.output_format)
    folder = local_path(config.model_uri, "model_uri", "register")
    require_signed([str(folder)], config.signing)  # executors may not know the key
    with mlflow_run("score", work_folder(config.paths.work)):
        log_parameters("score", config, shared=())
        with spark_session(config.score) as spark:
            result = score(spark, folder, source, output, config.score)
        rows = result.rows, result.errors, result.uri
        log.info("score: %d rows, %d of them with an error, are in %s", *rows)
        mlflow.log_metrics(numbers(result))
        mlflow.log_dict({"outcome": asdict(result)}, "result.json")
        note(result=asdict(result))
    return result


if __name__ == "__main__":
    entry_point(main)
