"""Tables answered on a real standalone cluster with two workers: `make test-spark`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
import pytest

from bench.cluster import cluster
from deploy.databricks.score import score as databricks_score
from slm.config.common import ROOT
from slm.config.packaging import Interface
from slm.digests import write_provenance
from slm.errors import InputError, StepError
from slm.exporters.builder import make
from slm.exporters.graph import Rtn, write
from slm.exporters.worker import silent
from slm.records import Scored
from slm.scoring.worker import Model, Work
from tests.checkpoints import write_tiny, write_tokenizer
from tests.conftest import Project, composed, create_experiment, log_onnx, tracking

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytest.importorskip("pyspark", reason="needs requirements-spark.txt: make test-spark")
pytestmark = pytest.mark.xdist_group("spark")

PARAMETERS = "score.parameters={max_tokens: 8, temperature: 1.0, seed: 7}"
GREETING = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A registry with the champions `tiny-chat` and `tiny-prompt`, of random weights."""
    folder = tmp_path_factory.mktemp("models")
    create_experiment(folder)
    project, target = Project(folder), composed().target
    tokenizer = folder / "tokenizer"
    checkpoint = write_tiny(folder / "checkpoint", write_tokenizer(tokenizer))
    rtn = Rtn(4, target.builder_options["block_size"], target.builder_options["accuracy_level"])
    onnx = folder / "onnx"
    make(checkpoint, target, target.precision, onnx, partial(write, quantizer=rtn, said=silent))
    write_provenance(onnx, target=target.name, checked_on="cpu")
    with tracking(project), mlflow.start_run():
        for model in log_onnx(onnx, 16, Interface.chat, Interface.prompt):
            version = mlflow.register_model(model.uri, f"tiny-{model.interface}")
            name = f"tiny-{model.interface}"
            project.client.set_registered_model_alias(name, "champion", version.version)
    return project


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SparkSession"]:
    """A session on two workers of one core each, which `score` finds active."""
    from pyspark.sql import SparkSession

    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch, cluster(folder) as master:
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        builder = SparkSession.builder.master(master).config("spark.ui.enabled", "false")
        builder = builder.config("spark.sql.warehouse.dir", str(folder / "warehouse"))
        session = builder.config("spark.log.level", "ERROR").getOrCreate()
        yield session
        session.stop()


def score(
    models: Project, source: object, output: object, *overrides: str, kind: str = "chat"
) -> Scored:
    uri = f"model_uri=models:/tiny-{kind}@champion"
    return models.call("score", uri, f"input={source}", f"output={output}", PARAMETERS, *overrides)


def prompts(count: int) -> pd.DataFrame:
    return pd.DataFrame({"id": range(count), "prompt": [f"say {i % 9}" for i in range(count)]})


def answers(output: Path) -> pd.DataFrame:
    return pd.read_parquet(output).sort_values("id").reset_index(drop=True)


def test_rows_of_every_kind_come_back_with_their_answers_and_bad_ones_with_their_errors(
    models: Project, spark: "SparkSession", tmp_path: Path
) -> None:
    conversations: list[Any] = [GREETING, None, [], [{"role": "king", "content": "x"}]]
    conversations += [[{"role": "user", "content": "a" * 9000}], GREETING]
    table = pd.DataFrame(
        {"id": range(6), "messages": conversations, "note": pd.array([1, None] * 3, "Int64")}
    )
    table.to_parquet(tmp_path / "in.parquet")
    result = score(models, tmp_path / "in.parquet", tmp_path / "out.parquet")
    found = answers(tmp_path / "out.parquet")
    assert (result.rows, result.errors, result.answered_rows) == (6, 4, 6)
    assert (
        found["note"].tolist()[::2] == [1, 1, 1]
        and found["note"].isna().tolist()[1::2] == [True] * 3
    )
    assert found["answer"].notna().tolist() == [True, False, False, False, False, True]
    good = found[found["error"].isna()]
    assert set(good["finish_reason"]) <= {"stop", "length"}
    assert result.completion_tokens == good["completion_tokens"].sum() > 0
    words = ["", "messages is None", "at least one message", "role is 'king'", "context length", ""]
    for row, expected in zip(found["error"].fillna(""), words, strict=True):
        assert expected in row and bool(row) == bool(expected)


def test_answers_do_not_depend_on_parts_executors_or_batches(
    models: Project, spark: "SparkSession", tmp_path: Path
) -> None:
    prompts(40).to_parquet(tmp_path / "in.parquet")
    score(models, tmp_path / "in.parquet", tmp_path / "1.parquet", "score.id=id", kind="prompt")
    some = ["score.rows_per_part=7", "score.id=id", "score.settings={max_batch_size: 3}"]
    result = score(models, tmp_path / "in.parquet", tmp_path / "2.parquet", *some, kind="prompt")
    one, many = answers(tmp_path / "1.parquet"), answers(tmp_path / "2.parquet")
    assert result.parts == 6
    pd.testing.assert_frame_equal(one.drop(columns="score_part"), many.drop(columns="score_part"))
    assert one["answer"].nunique() > 30  # the same prompt has another seed in another row
    bare = Model(
        Work(
            str(folder_of(models, "prompt")),
            "prompt",
            False,
            None,
            {"max_tokens": 8, "temperature": 1.0},
            {"threads": 1},
        )
    )
    from pyspark.sql import functions as F

    table = spark.read.parquet(f"{tmp_path}/in.parquet")
    key = F.xxhash64(F.to_json(F.struct("id"), {"timeZone": "UTC"}))
    seed = F.xxhash64(F.lit(7).cast("long"), key).bitwiseAND(F.lit(2**63 - 1))
    asked = [tuple(row) for row in table.orderBy("id").select("prompt", seed).collect()]
    alone = [bare.answer_row(*row).answer for row in asked]
    assert one["answer"].tolist() == alone


def folder_of(models: Project, kind: str) -> Path:
    with tracking(models):
        return Path(mlflow.artifacts.download_artifacts(f"models:/tiny-{kind}@champion"))


def test_a_killed_run_goes_on_with_the_parts_that_are_not_done(
    models: Project, spark: "SparkSession", tmp_path: Path
) -> None:
    prompts(200).to_parquet(tmp_path / "in.parquet")
    output = tmp_path / "out.parquet"
    arguments = ["model_uri=models:/tiny-chat@champion", f"input={tmp_path / 'in.parquet'}"]
    arguments += [
        f"output={output}",
        PARAMETERS,
        "score.rows_per_part=5",
        "score.master='local[1]'",
    ]
    command = [sys.executable, "-m", "steps.score", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=models.environment, stderr=subprocess.DEVNULL)
    while len(list(output.glob("score_part=*/_SUCCESS"))) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.parent.name for path in output.glob("score_part=*/_SUCCESS")}
    torn = min(done)  # as if the kill had come while its files were moved into place
    next((output / torn).glob("*.parquet")).unlink()
    kept = {path: path.stat().st_mtime_ns for path in output.glob("score_part=*/*.parquet")}
    result = score(models, tmp_path / "in.parquet", output, "score.rows_per_part=999")
    assert 0 < result.answered_rows < 200 and result.parts == 40 and len(done) < 40
    for path, changed in kept.items():
        assert path.stat().st_mtime_ns == changed or path.parent.name not in done - {torn}
    assert answers(output)["id"].tolist() == list(range(200))
    score(models, tmp_path / "in.parquet", tmp_path / "undisturbed.parquet")
    texts = answers(tmp_path / "undisturbed.parquet")["answer"]
    assert answers(output)["answer"].tolist() == texts.tolist()
    again = score(models, tmp_path / "in.parquet", output)
    assert (again.answered_rows, again.rows, again.completion_tokens) == (
        0,
        200,
        result.completion_tokens,
    )


def test_texts_go_through_csv_and_json_lines_unharmed(
    models: Project, spark: "SparkSession", tmp_path: Path
) -> None:
    texts = ['a "quoted", word', " two\nlines ", "back\\slash", "grüße 你好"]
    table = pd.DataFrame({"id": [f"00{i}" for i in range(4)], "prompt": texts})
    table.to_csv(tmp_path / "in.csv", index=False)
    score(models, tmp_path / "in.csv", tmp_path / "out.jsonl")
    table.to_json(tmp_path / "in.jsonl", orient="records", lines=True)
    score(models, tmp_path / "in.jsonl", tmp_path / "out.csv")
    lines = [
        json.loads(line)
        for file in (tmp_path / "out.jsonl").glob("*/*.json")
        for line in file.open()
    ]
    rows = [
        row
        for file in (tmp_path / "out.csv").glob("*/*.csv")
        for row in pd.read_csv(file, dtype=str).to_dict("records")
    ]
    for found in (lines, rows):
        found.sort(key=lambda row: row["id"])
        assert [row["prompt"] for row in found] == texts
        assert [row["id"] for row in found] == table["id"].tolist()
    assert [row["answer"] for row in lines] == [row["answer"] for row in rows]


def test_a_catalog_table_is_read_and_written_and_gone_on_with(
    models: Project, spark: "SparkSession", tmp_path: Path
) -> None:
    spark.sql("CREATE DATABASE IF NOT EXISTS talks")
    rows = [(i, json.dumps(GREETING)) for i in range(30)]
    spark.createDataFrame(rows, "id long, messages string").write.saveAsTable("talks.asked")
    result = score(models, "talks.asked", "talks.answered", "score.rows_per_part=9")
    assert (result.rows, result.errors, result.parts) == (30, 0, 4)
    spark.sql("ALTER TABLE talks.answered DROP PARTITION (score_part=2)")
    lost = 30 - spark.table("talks.answered").count()
    assert score(models, "talks.asked", "talks.answered").answered_rows == lost > 0
    found = spark.table("talks.answered").toPandas()
    assert sorted(found["id"]) == list(range(30)) and found["answer"].notna().all()
    # Answers can be answered again, under other names.
    second = score(models, "talks.answered", "talks.second", "score.prefix=second_")
    assert second.rows == 30 and "second_answer" in spark.table("talks.second").columns


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["score.parameters={max_tokens: 9}"], 'its parameters was {"max_tokens": 8, "seed": 7, '),
        (["score.column=other"], "no column other; it has id, prompt. Give score.column="),
        (["score.column=id"], "column id holds bigint; "),
        (["score.id=nr"], "score.id is nr; the input has id, prompt"),
        (["input={folder}/nothing.parquet"], "nothing.parquet cannot be read: Path does not exist"),
        (["input=no_such_table"], "input=no_such_table cannot be read: The table or view"),
        (["input={folder}/changed.parquet"], "belongs to another run: its rows was 3, and is 4"),
        (["input={folder}/swapped.parquet"], "belongs to another run: its rows were others"),
        (["output={folder}/foreign.parquet"], "foreign.parquet exists, and score did not write it"),
        (["input={folder}/out.parquet"], "the input has answer, completion_tokens, error, "),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_in_one_line(
    models: Project, spark: "SparkSession", scored: Path, overrides: list[str], words: str
) -> None:
    given = [
        override.format(folder=scored) if "{folder}" in override else override
        for override in overrides
    ]
    with pytest.raises(InputError) as raised:
        score(models, scored / "in.parquet", scored / "out.parquet", *given)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def scored(
    models: Project, spark: "SparkSession", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a table that was answered, and tables like it."""
    folder = tmp_path_factory.mktemp("scored")
    prompts(3).to_parquet(folder / "in.parquet")
    prompts(4).to_parquet(folder / "changed.parquet")
    prompts(3).assign(prompt="x").to_parquet(folder / "swapped.parquet")
    (folder / "foreign.parquet").mkdir()
    prompts(3).to_parquet(folder / "foreign.parquet" / "x.parquet")
    score(models, folder / "in.parquet", folder / "out.parquet")
    return folder


def test_an_empty_table_has_an_empty_answer_and_one_of_bad_rows_fails(
    models: Project, spark: "SparkSession", tmp_path: Path
) -> None:
    prompts(0).astype({"prompt": "str"}).to_parquet(tmp_path / "in.parquet")
    assert score(models, tmp_path / "in.parquet", tmp_path / "out.parquet").rows == 0
    assert "answer" in pd.read_parquet(tmp_path / "out.parquet").columns
    pd.DataFrame({"prompt": ["a" * 9000] * 2}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(StepError, match="every row has an error, as this one: prompt is 9"):
        score(models, tmp_path / "bad.parquet", tmp_path / "bad-out.parquet")


def test_an_executor_that_cannot_load_the_model_says_so_in_one_line(
    models: Project, spark: "SparkSession", tmp_path: Path
) -> None:
    prompts(3).to_parquet(tmp_path / "in.parquet")
    shutil.copytree(folder_of(models, "chat"), tmp_path / "damaged")
    weights = next((tmp_path / "damaged").glob("artifacts/*/model.onnx.data"))
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    damaged = f"model_uri={tmp_path / 'damaged'}"
    with pytest.raises(StepError, match="a Python worker: .* changed since the model was logged"):
        score(models, tmp_path / "in.parquet", tmp_path / "out.parquet", damaged)


def test_the_job_on_databricks_scores_in_the_session_of_its_process(
    models: Project, spark: "SparkSession", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in models.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    prompts(5).to_parquet(tmp_path / "in.parquet")
    given = ["--model_uri", "models:/tiny-chat@champion", "--input", f"{tmp_path}/in.parquet"]
    given += ["--output", f"{tmp_path}/out.parquet", "--overrides", PARAMETERS]
    with tracking(models):
        databricks_score(str(ROOT), given)
        assert len(answers(tmp_path / "out.parquet")) == 5 and spark.range(1).count() == 1
        with pytest.raises(RuntimeError, match="exit code 2"):
            databricks_score(str(ROOT), [*given, "score.rows_per_part=0"])
