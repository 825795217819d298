import json
import re
from dataclasses import replace

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from slm.config.common import ROOT
from slm.errors import InputError
from slm.running.command import ALIASES, COMMON, hydra_arguments, split_overrides
from slm.running.hydra_errors import explain
from steps import fetch
from tests.conftest import MODEL, Project, composed, ended


def test_overrides_split_at_spaces_outside_quotes_and_brackets() -> None:
    text = """a=1 b='x y'  c="it's" d=[1, 2] e={f: 'g h'} 'i=j k'"""
    assert split_overrides(text) == [
        "a=1",
        "b='x y'",
        'c="it\'s"',
        "d=[1, 2]",
        "e={f: 'g h'}",
        "i=j k",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["a=1", "b='x y'"],
        ["c=x y"],
        ['d="a" b'],
        [],
        ["x=[['a b'], \"c d\"]"],
        ["+evaluate.gates={a: {min: 1}, b: {max: 2}}", "y=it\\'s"],
    ],
)
def test_a_json_list_holds_any_overrides(overrides: list[str]) -> None:
    assert split_overrides(json.dumps(overrides)) == overrides


def test_nested_brackets_and_quotes_in_them_are_one_word() -> None:
    for override in ("+evaluate.gates={a: {min: 1}, b: {max: 2}}", "x=[['a b'], \"c d\"]"):
        assert split_overrides(f"a=1 {override} b=2") == ["a=1", override, "b=2"]


def test_two_gates_can_be_added_in_one_string_of_overrides() -> None:
    text = "+evaluate.gates={load_s: {max: 9}, peak_rss_mb: {max: 9}}"
    gates = composed(*split_overrides(text)).evaluate.gates
    assert gates["load_s"].max == gates["peak_rss_mb"].max == 9


def test_a_quote_that_is_not_closed_is_refused() -> None:
    with pytest.raises(HydraException, match="not closed: model.source=/a/it's"):
        split_overrides("model.source=/a/it's x=1")


@pytest.mark.parametrize("text", ["[evaluate=full]", '["a=1", 1]', '[["a=1"]]', "["])
def test_a_list_that_is_not_one_of_texts_in_json_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(HydraException) as raised:
        split_overrides(text)
    line = explain(raised.value)
    assert line.startswith(f"command line: overrides={text} begins with [ and is no list of texts")
    assert "\n" not in line


def test_mlproject_parameters_become_quoted_overrides_and_empty_ones_vanish() -> None:
    argv = ["--model", "m", "--source", "/a b/it's,=1", "--target", "", "--overrides", "x=1 y=2"]
    assert hydra_arguments("export_onnx", argv) == [
        "model='m'",
        r"source='/a b/it\'s,=1'",
        "x=1",
        "y=2",
    ]


def test_hydra_flags_pass_through() -> None:
    assert hydra_arguments("fetch", ["--cfg", "job", "--multirun", "a=1,2"]) == [
        "--cfg",
        "job",
        "--multirun",
        "a=1,2",
    ]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (
            "model=phi-9",
            "conf/model/phi-9.yaml does not exist: model=phi-9 is unknown; valid: gemma-3",
        ),
        ("target=tpu", "conf/target/tpu.yaml does not exist"),
        (
            "evaluate.repeat=1",
            "conf/evaluate/smoke.yaml: unknown key 'evaluate.repeat'; valid: texts",
        ),
        (
            "evaluate.repeats=many",
            "conf/evaluate/smoke.yaml: key 'evaluate.repeats': Value 'many' of type 'str' could ",
        ),
        ("target.precision=int5", "expected one of [int4, int8, bf16, fp16, fp32]"),
        ("colour=red", "conf/config.yaml: unknown key 'colour'; valid: model, target"),
        ("nonsense", "command line: "),
    ],
)
def test_a_wrong_configuration_is_one_line_that_names_file_and_key(
    argument: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fetch", argument])
    with pytest.raises((HydraException, OmegaConfBaseException)) as raised:
        composed(argument)
    line = explain(raised.value)
    assert words in line and "\n" not in line


def test_a_source_of_ones_own_is_refused_without_a_name() -> None:
    with pytest.raises(InputError, match=f"Give model.name=<its own name>, or model.name={MODEL}"):
        composed("model.source=/data/mine")


def test_an_adapter_is_refused_without_a_name_for_what_it_makes() -> None:
    with pytest.raises(InputError, match=r"model\.adapter is overridden, and model\.name is not"):
        composed("model.adapter=/data/lora")
    tuned = composed("model.adapter=/data/lora", "model.name=tuned").model
    assert (tuned.source, tuned.licence) == (composed().model.source, "apache-2.0")


def test_a_source_of_ones_own_inherits_nothing_that_was_said_of_another() -> None:
    own = composed("model.source=/data/mine", "model.name=mine", "model.context_length=99").model
    assert (own.licence, own.architecture, own.context_length) == (None, None, 99)
    assert not own.sha256 and own.gates


def test_a_copy_of_a_model_is_held_to_what_is_known_of_that_model() -> None:
    copy = composed("model.source=/data/copy", f"model.name={MODEL}").model
    assert copy == replace(composed().model, source="/data/copy", sha256={})


def test_a_wrong_configuration_exits_with_2_and_one_line(project: Project) -> None:
    process = project.step("fetch", "model=phi-9")
    assert process.returncode == 2
    [line] = process.stderr.strip().splitlines()
    assert line.startswith("fetch: conf/model/phi-9.yaml does not exist")


def test_a_wrong_configuration_leaves_the_mlflow_run_failed_with_that_line(
    project: Project,
) -> None:
    process = project.mlflow_run("fetch", "overrides=evaluate.repeat=1")
    assert process.returncode == 1
    [run] = project.client.search_runs(["1"])
    assert run.info.status == "FAILED"
    assert "unknown key 'evaluate.repeat'" in run.data.tags["error"]
    assert run.data.tags["exit_code"] == "2"


def test_a_name_that_mlflow_refuses_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(fetch.main, monkeypatch, "model.name=a/b") == 2
    words = "fetch: model.name is 'a/b'; it must be letters, digits, dots, _ and -."
    assert capsys.readouterr().err.strip() == words


def test_an_undeclared_parameter_is_refused_with_the_valid_ones(project: Project) -> None:
    process = project.mlflow_run("fetch", "colour=red")
    valid = "model, target, force, summary, preflight, overrides"
    assert f"fetch has no parameter 'colour'; valid: {valid}" in process.stderr


def test_mlproject_names_what_every_entry_point_takes_besides() -> None:
    comment = (ROOT / "MLproject").read_text().partition("entry_points:")[0]
    named = re.findall("`([a-z]+)`", comment.partition("and takes")[2])
    assert {*named} == {*COMMON, *ALIASES}


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--help"], "== Configuration groups =="), (["--cfg", "job"], "licence: apache-2.0")],
)
def test_help_and_cfg_are_hydras(
    flags: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(fetch.main, monkeypatch, *flags) == 0
    assert words in capsys.readouterr().out
