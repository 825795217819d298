"""What of `score` needs no Spark: requests, places, parts, and the answers of a worker."""

import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from slm.config.use import Format, Score
from slm.errors import InputError, UnreachableError
from slm.scoring.rows import BUCKETS, first_bucket, parts_of, rows_of_parts
from slm.scoring.spark import require_java, require_master, spark_session
from slm.scoring.tables import Manifest, place_of
from slm.scoring.worker import Answer, Work, answer_batches, conversation
from tests.conftest import composed

HELLO = {"role": "user", "content": "hello"}
BRIEF = {"role": "system", "content": "Be brief."}
MANIFEST = Manifest("m", "prompt", None, None, {"seed": 0}, None, "", ["prompt string"], 9, "1", 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"parameters": {"max_token": 9}}, "'max_token' is unknown; valid: max_tokens, temperat"),
        ({"parameters": {"n": 2}}, "score.parameters: 'n' is unknown"),
        ({"parameters": {"system": "x"}}, "The system prompt is score.system."),
        ({"parameters": {"max_tokens": 0}}, "max_tokens is 0; it must be an integer of at least"),
        ({"parameters": {"seed": -1}}, "seed is -1; it must be an integer from 0"),
        ({"parameters": [1]}, "score.parameters is [1]; it must be {name: value, …}."),
        ({"settings": {"batch": 1}}, "score.settings has batch; valid: threads, max"),
        ({"settings": {"threads": 0}}, "threads is 0; it must be an integer of at least 1"),
        ({"rows_per_part": 0}, "score.rows_per_part is 0; it must be at least 1"),
    ],
)
def test_wrong_requests_are_refused_before_spark_starts(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as raised:
        Score(**given)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_request_has_a_seed_unless_none_is_asked_for() -> None:
    assert composed("score.parameters={max_tokens: 9}").score.parameters == {
        "max_tokens": 9,
        "seed": 0,
    }
    assert Score(parameters={"seed": None}).parameters == {"seed": None}


@pytest.mark.parametrize(
    ("name", "given", "format"),
    [
        ("/data/a.parquet", None, Format.parquet),
        ("/data/a.jsonl", None, Format.json),
        ("s3a://bucket/a.csv", None, Format.csv),
        ("/data/a", Format.delta, Format.delta),
        ("main.talks.asked", None, Format.table),
        ("asked", None, Format.table),
    ],
)
def test_a_place_tells_its_format(name: str, given: Format | None, format: Format) -> None:
    place = place_of("input", name, given)
    assert (place.name, place.format) == (name, format)


def test_a_relative_path_starts_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of("input", "a.csv", None).name == (tmp_path / "a.csv").as_uri()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, "input is missing"),
        ("/data/a.xlsx", "does not tell its format: it ends in none of .parquet, .csv, "),
    ],
)
def test_a_place_that_tells_no_format_is_refused(name: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        place_of("input", name, None)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 512])
def test_every_bucket_is_in_one_part(parts: int) -> None:
    ranges = [range(first_bucket(p, parts), first_bucket(p + 1, parts)) for p in range(parts)]
    assert [bucket for part in ranges for bucket in part] == list(range(BUCKETS))
    expected = rows_of_parts({bucket: bucket for bucket in range(BUCKETS)}, parts)
    assert expected == {part: sum(buckets) for part, buckets in enumerate(ranges)}


@pytest.mark.parametrize(("rows", "parts"), [(0, 1), (1, 1), (100, 1), (101, 2), (10**9, 512)])
def test_parts_hold_about_the_rows_that_were_asked_for(rows: int, parts: int) -> None:
    assert parts_of(rows, 100) == parts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "n"}, 'its model was "m", and is "n"'),
        ({"parameters": {"seed": 1}}, 'its parameters was {"seed": 0}, and is {"seed": 1}'),
        ({"rows": 8, "fingerprint": "2"}, "its rows was 9, and is 8"),
        ({"fingerprint": "2"}, "its rows were others"),
    ],
)
def test_an_output_of_another_run_is_refused(change: dict[str, Any], words: str) -> None:
    kept = Manifest.of(MANIFEST.json(), "out")
    with pytest.raises(InputError) as raised:
        kept.require_same(replace(MANIFEST, **change), "out")
    assert words in str(raised.value)
    kept.require_same(replace(MANIFEST, parts=5), "out")  # cut otherwise, it is the same run


@pytest.mark.parametrize(
    ("request_", "holds_messages", "system", "messages"),
    [
        ("hello", False, None, [HELLO]),
        ("hello", False, "Be brief.", [BRIEF, HELLO]),
        ('[{"role": "user", "content": "hello"}]', True, None, [HELLO]),
        ([HELLO], True, "Be brief.", [BRIEF, HELLO]),
        ([BRIEF, HELLO], True, "Be long.", [BRIEF, HELLO]),
        (None, True, "Be brief.", None),
    ],
)
def test_a_row_becomes_a_conversation(
    request_: Any, holds_messages: bool, system: str | None, messages: Any
) -> None:
    assert conversation(request_, holds_messages, system) == messages


def answered(folder: Path, requests: list[Any], **work: Any) -> list[dict[str, Any]]:
    """The rows that a worker gives back for a batch with a column `id` and a seed."""
    columns = {"id": range(len(requests)), "request": requests, "seed": [7] * len(requests)}
    batch = pa.RecordBatch.from_pydict({k: pa.array(v) for k, v in columns.items()})
    about: dict[str, Any] = {"holds_messages": False, "system": None, "settings": {}, **work}
    parameters = {"max_tokens": 4, "temperature": 1.0, "seed": 1}
    [result] = answer_batches([batch], Work(str(folder), "request", parameters=parameters, **about))
    assert result.schema.names == ["id", "request", *Answer._fields]
    return result.to_pylist()


def test_a_bad_prompt_fails_alone(prompt_folder: Path) -> None:
    good, null, empty, long, same = answered(
        prompt_folder, ["The sea is", None, "", "word " * 9000, "The sea is"]
    )
    assert good["answer"] and good["answer"] == same["answer"]
    assert (good["prompt_tokens"], good["completion_tokens"]) == (3, 4)
    assert (good["finish_reason"], good["error"]) == ("length", None)
    words = {"must be a string": null, "prompt is empty": empty, "context length": long}
    for text, row in words.items():
        assert text in row["error"] and row["answer"] is row["prompt_tokens"] is None


def test_a_bad_conversation_fails_alone(chat_folder: Path) -> None:
    good, text, king = answered(
        chat_folder,
        ['[{"role": "user", "content": "Hello"}]', "Hello", '[{"role": "king"}]'],
        holds_messages=True,
    )
    assert good["answer"] and good["completion_tokens"] == 4 and good["error"] is None
    assert "messages is no JSON" in text["error"]
    assert "role is 'king'" in king["error"]


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (None, "Spark needs Java 17 or newer, and JAVA_HOME="),
        ('openjdk version "11.0.2" 2019-01-15', 'java says: openjdk version "11.0.2"'),
        ('java version "1.8.0_292"', "Spark needs Java 17 or newer"),
    ],
)
def test_without_the_java_that_spark_needs_the_error_says_what_to_install(
    says: str | None, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    if says:
        java = tmp_path / "bin" / "java"
        java.parent.mkdir()
        java.write_text(f"#!/bin/sh\necho '{says}' >&2\n")
        java.chmod(0o755)
    with pytest.raises(InputError, match=words):
        require_java()


def test_without_spark_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.errors", None)
    with (
        pytest.raises(InputError, match="pip install -r requirements-spark.txt"),
        spark_session(Score()),
    ):
        pass


def test_a_cluster_that_is_away_is_said_at_once() -> None:
    with socket.socket() as master, pytest.raises(UnreachableError, match="Start it, or correct"):
        master.bind(("127.0.0.1", 0))  # and does not listen
        require_master(f"spark://127.0.0.1:{master.getsockname()[1]}")
    with socket.create_server(("127.0.0.1", 0)) as master:
        require_master(f"spark://no.such.host.invalid:7,127.0.0.1:{master.getsockname()[1]}")
    require_master("yarn")
