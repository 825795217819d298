import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import onnx as onnx_format
import pandas as pd
import pytest
import yaml
from mlflow.exceptions import MlflowException

from slm.config.model import Baseline, Gate
from slm.config.packaging import Evaluate
from slm.errors import InputError, VerdictError
from slm.evaluation.data import read_prompts, read_texts
from slm.evaluation.fidelity import (
    KINDS,
    Blocks,
    by_position,
    compare_with_reference,
    token_windows,
    write_reference,
)
from slm.evaluation.gates import gates_of, judge
from slm.evaluation.measure import (
    CONDITIONS,
    MEASURED_IN,
    Champion,
    Measurement,
    Measuring,
    logged_metrics,
    measure_champion,
    run_worker,
)
from slm.evaluation.metrics import metric_named
from slm.evaluation.models import Answer, Transformers
from slm.evaluation.positions import turning_point
from slm.evaluation.report import About, write_report
from slm.evaluation.sanity import is_degenerate
from slm.evaluation.speed import decode_rates
from slm.evaluation.tasks import missed, show_answers
from slm.evaluation.worker import measure_candidate
from slm.records import Evaluation, LoggedModel
from slm.registry.names import version_with_alias
from slm.running.command import split_overrides
from steps.evaluate import champion_against, logged_pair, reasons_of
from tests.checkpoints import write_as_phi3, write_shallow
from tests.conftest import TINY, Generations, Packaged, composed, tracking
from tests.registry_state import CHAT

FIDELITY = {"perplexity", "perplexity_ratio", "kl_divergence", "kl_divergence_p99"}
FIDELITY |= {"top1_agreement", "greedy_prefix_tokens", "perplexity_ratio_tail"}
SPEED = {"ttft_s_p50", "ttft_s_p95", "prefill_tokens_per_s", "decode_tokens_per_s"}
SPEED |= {"batch_tokens_per_s", "load_s", "decode_tokens_per_s_at_32"}
COST = {"peak_rss_mb", "size_mb"}
ASKED = '{"inputs": {"messages": [{"role": "user", "content": "?"}]}, '
SANITY = {"loads", "chat_template_match", "stop_token_honoured", "deterministic"}


def test_both_logged_models_bear_their_metrics_linked_to_the_texts(packaged: Packaged) -> None:
    for models, names in (
        (
            packaged.candidates.models,
            FIDELITY | SPEED | COST | SANITY | {"kl_divergence_ci95_low"},
        ),
        ([packaged.reference], {"perplexity"} | SPEED | COST),
    ):
        for logged in models:
            model = packaged.client.get_logged_model(logged.model_id)
            metrics = {metric.key: metric for metric in model.metrics or []}
            assert names | {"task_accuracy", "degenerate_share"} <= metrics.keys()
            assert all(metrics[name].value > 0 for name in names)
            assert {metrics[name].dataset_name for name in names} == {"texts.jsonl"}


def test_int4_is_smaller_and_close_to_its_checkpoint(packaged: Packaged) -> None:
    evaluation = packaged.evaluation
    candidate, reference = evaluation.candidate_metrics, evaluation.reference_metrics
    assert candidate["size_mb"] < reference["size_mb"] / 4
    assert candidate["peak_rss_mb"] < reference["peak_rss_mb"]
    assert 1 < candidate["perplexity_ratio"] < 2
    assert candidate["kl_divergence"] < candidate["kl_divergence_p99"]
    for metric in FIDELITY:
        low, high = (candidate[f"{metric}_ci95_{end}"] for end in ("low", "high"))
        assert low <= candidate[metric] <= high


def test_the_report_is_one_self_contained_page_with_the_verdict_first(packaged: Packaged) -> None:
    page = Path(packaged.evaluation.report).read_text()
    body = page[page.index("<body>") :]
    assert body.index("Passed") < body.index("Gates") < body.index("<svg") < body.index("Answers")
    assert "src=" not in page and 'href="http' not in page and "@import" not in page
    assert "Paris" in page and "SHA-256" in page
    assert page.count("<svg") == 2


def test_the_run_has_the_report_the_card_and_tables(packaged: Packaged) -> None:
    run = packaged.runs("evaluate")[-1].info.run_id
    artifacts = [f for at in ("", "tables") for f in packaged.client.list_artifacts(run, at)]
    tables = {f"tables/{name}.json" for name in ("answers", "gates", "metrics")}
    assert {"report.html", "model_card.md", *tables} <= {artifact.path for artifact in artifacts}
    card = packaged.evaluation.model_card
    assert card.startswith("# smollm2-135m-instruct on cpu-int4") and len(card) <= 5000


def test_mlflows_evaluation_page_has_every_prompt_with_both_answers(packaged: Packaged) -> None:
    run = packaged.runs("evaluate")[-1].info.run_id
    experiments = [packaged.client.get_run(run).info.experiment_id]
    traces = packaged.client.search_traces(locations=experiments, run_id=run)
    answers = packaged.evaluation.answers
    shown = [json.loads(trace.data.response) for trace in traces]
    for answer in answers:
        assert {"candidate": answer.candidate, "reference": answer.reference} in shown
    [paris] = [trace for trace in traces if "capital of France" in trace.data.request]
    assessments = {a.name: a.feedback.value for a in paris.info.assessments if a.feedback}
    assert assessments == {"candidate_correct": True, "reference_correct": True}


def test_a_gate_holds_at_its_bound_and_fails_beyond_it_or_without_a_number() -> None:
    gates = {"a": Gate(max=1.0), "b": Gate(min=0.5), "c": Gate(min=0, max=2), "d": Gate(max=1)}
    results = judge(gates, {"a": 1.0, "b": 0.4, "c": math.nan}, {})
    assert [result.passed for result in results] == [True, False, False, False]
    assert [result.words() for result in results[1:]] == [
        "b is 0.4, below 0.5 by 0.1",
        "c was not measured",
        "d was not measured",
    ]


def test_a_gate_may_be_a_factor_of_the_checkpoints_or_the_champions_metric() -> None:
    gates = {
        "speed": Gate(min=2, of=Baseline.reference),
        "no slower": Gate(min=0.9, of=Baseline.champion, metric="speed"),
        "size": Gate(max=1, of=Baseline.champion),
    }
    baselines = {Baseline.reference: {"speed": 10.0}, Baseline.champion: {"speed": 40.0}}
    results = judge(gates, {"speed": 30.0, "size": 5.0}, baselines)
    assert [result.passed for result in results] == [True, False, False]
    assert results[1].words() == "speed is 30, below 36 (0.9 of the champion's) by 6"
    assert results[2].words() == "size was not measured of the champion"
    no_champion = {**baselines, Baseline.champion: None}
    assert all(result.passed for result in judge(gates, {"speed": 30.0, "size": 5.0}, no_champion))
    [_, _, size] = judge(gates, {"speed": 30.0}, no_champion)
    assert not size.passed and size.words() == "size was not measured"


@pytest.mark.parametrize("bounds", [{}, {"min": 2, "max": 1}, {"max": math.nan}])
def test_a_gate_without_bounds_that_can_be_kept_is_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it must have one of them, or both"):
        Gate(**bounds)


def test_a_gate_of_an_unknown_metric_is_refused_before_anything_is_measured() -> None:
    config = composed("+evaluate.gates={perplexty: {max: 2}}")
    with pytest.raises(
        ValueError,
        match="the gate perplexty bounds perplexty: perplexty is no metric; valid: loads",
    ):
        gates_of(config)


def test_decoding_is_timed_only_where_it_took_time() -> None:
    def answer(tokens: int) -> list[Answer]:
        return [Answer("", 10, tokens, True)]

    timed = [(2.0, answer(11)), (0.9, answer(11)), (5.0, answer(2))]
    assert decode_rates(timed, ttft_s=1.0) == [10.0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=phi-3-mini-4k-instruct"], "those of phi-3-mini-4k-instruct and cpu-int4"),
        (["target=cuda-fp16"], "candidate is of model=smollm2-135m-instruct and target=cpu-int4"),
        (["reference=CANDIDATE"], "is not what log_transformers ends with"),
        (["candidate=REFERENCE"], "is not what log_pyfunc ends with"),
        (["candidate=models:/m-none"], "candidate=models:/m-none is not a logged model: "),
    ],
)
def test_a_candidate_is_held_against_its_own_checkpoint_and_gates(
    packaged: Packaged, overrides: list[str], words: str
) -> None:
    uris = {"CANDIDATE": packaged.candidates.uri, "REFERENCE": packaged.reference.uri}
    arguments = [f"candidate={uris['CANDIDATE']}", f"reference={uris['REFERENCE']}", *overrides]
    for name, uri in uris.items():
        arguments = [argument.replace(name, uri) for argument in arguments]
    with tracking(packaged), pytest.raises(ValueError) as raised:
        logged_pair(composed(*arguments))
    assert words in str(raised.value)


def test_comparing_a_model_with_itself_finds_no_difference(tmp_path: Path) -> None:
    model = Fixed(np.random.default_rng(0).normal(size=(4, 6)))
    leave_reference(tmp_path, model)
    metrics, _ = compare_with_reference(model.log_probabilities, tmp_path)
    assert metrics["perplexity_ratio"] == pytest.approx(1)
    assert metrics["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert metrics["top1_agreement"] == 1
    assert metrics["perplexity_ratio_ci95_low"] == pytest.approx(1)


def test_divergence_is_that_of_the_candidate_from_the_reference(tmp_path: Path) -> None:
    leave_reference(tmp_path, Fixed(np.log([[0.5, 0.5]] * 2)))
    candidate = Fixed(np.log([[0.9, 0.1]] * 2))
    metrics, _ = compare_with_reference(candidate.log_probabilities, tmp_path)
    assert metrics["kl_divergence"] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(5))
    assert metrics["perplexity_ratio"] == pytest.approx((1 / 0.1) / (1 / 0.5))
    assert metrics["perplexity_ratio_tail"] == metrics["perplexity_ratio"]


def test_each_kind_of_text_has_closeness_of_its_own(tmp_path: Path) -> None:
    leave_reference(tmp_path, Fixed(np.log([[0.5, 0.5]] * 2)), "prose-en")
    leave_reference(tmp_path, Fixed(np.log([[0.9, 0.1]] * 2)), "prose-en", "code-en")
    candidate = Fixed(np.log([[0.9, 0.1]] * 2))
    metrics, _ = compare_with_reference(candidate.log_probabilities, tmp_path)
    assert metrics["kl_divergence_of_code-en"] == pytest.approx(0, abs=1e-9)
    assert metrics["perplexity_ratio_of_prose-en"] == pytest.approx((1 / 0.1) / (1 / 0.5))
    assert metrics["kl_divergence"] == pytest.approx(metrics["kl_divergence_of_prose-en"] / 2)
    assert metric_named("top1_agreement_of_code-en").name == "top1_agreement"


def test_a_fault_past_the_sliding_window_shows_in_the_tail(smollm2: Path, tmp_path: Path) -> None:
    """The same weights without their window, as an export that dropped it would read them."""
    from transformers import AutoTokenizer, Phi3ForCausalLM

    shallow = write_shallow(tmp_path / "shallow", smollm2)
    folder = write_as_phi3(tmp_path / "phi3", shallow, sliding_window=128)
    phi3 = Phi3ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model = object.__new__(Transformers)  # without MLflow
    model.pipeline, model.context_length = SimpleNamespace(model=phi3), 8192
    model.tokenizer = AutoTokenizer.from_pretrained(folder)
    model.turning_point = turning_point(phi3.config)
    text = "The lighthouse keeper wrote a letter about the storm, and nobody ever read it. " * 8
    write_reference(model, [text], text, window=64, max_tokens=64, out=tmp_path)
    phi3.config.sliding_window = None
    metrics, series = compare_with_reference(model.log_probabilities, tmp_path)
    assert metrics["scored_tokens"] == 63 + 64
    assert abs(np.log(metrics["perplexity_ratio_tail"])) > 0.01
    points = series["kl_by_position"]
    assert max(kl for position, kl in points if position < 128) < 1e-6
    assert max(kl for position, kl in points if position > 128) > 1e-3


@pytest.mark.parametrize(
    ("changes", "point"),
    [
        ({}, None),
        ({"sliding_window": 2047}, 2047),
        ({"sliding_window": 16384}, None),
        ({"sliding_window": 512, "rope_parameters": {"rope_type": "longrope"}}, 4096),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, 4096),
        ({"rope_parameters": {"rope_type": "yarn"}}, None),
        ({"sliding_window": 2047, "max_position_embeddings": 2047}, None),
    ],
)
def test_a_model_turns_at_its_window_or_where_its_rope_changes(
    changes: dict[str, Any], point: int | None
) -> None:
    config = {"max_position_embeddings": 32768, "original_max_position_embeddings": 4096}
    assert turning_point(SimpleNamespace(**{**config, **changes})) == point


def test_windows_cover_the_tokens_in_order_up_to_the_budget() -> None:
    texts = [[1, 2, 3, 4, 5], [6, 7], [8, 9]]
    first = [(0, [1, 2, 3]), (0, [4, 5])]
    assert token_windows(texts, window=3, max_tokens=7) == [*first, (1, [6, 7])]
    assert token_windows([[1, 2, 3]], window=8, max_tokens=2) == [(0, [1, 2])]


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(1), 0
    for _ in range(100):
        blocks = Blocks()
        blocks.add(1600)
        # Neighbours that are alike: each block of 32 shares a level of its own.
        values = np.repeat(generator.normal(size=50), 32) + generator.normal(size=1600)
        low, high = blocks.interval_of_mean(values)
        covered += low <= 0 <= high
    assert 88 <= covered <= 99  # of 95; an interval over single tokens covers some 40


def test_means_by_position_are_those_of_the_tokens_there() -> None:
    positions = np.array([0, 1, 2, 3, 0, 1])
    assert by_position(positions, np.array([1.0, 1, 5, 7, 3, 3]), bins=2) == [[1, 2], [3, 6]]


@pytest.mark.parametrize(
    ("tokens", "degenerate"),
    [
        ([], True),
        ([5] * 8, True),
        ([1, 2, 3, *[7, 8] * 6], True),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], False),
        ([7, 7, 7], False),  # "no no no" is an answer
        ([*range(40), *[7, 8] * 6], False),  # a list at the end of a long answer
    ],
)
def test_an_answer_is_degenerate_where_it_is_empty_or_loops(
    tokens: list[int], degenerate: bool
) -> None:
    assert is_degenerate(tokens) is degenerate


@pytest.mark.parametrize(
    ("answer", "expectations", "met"),
    [
        (" Paris \n", {"exact_match": "Paris"}, True),
        ("Paris.", {"exact_match": "Paris"}, False),
        ("It is PARIS.", {"contains": ["Lutetia", "Paris"]}, True),
        ("It is Rome.", {"contains": "Paris"}, False),
        ("7 + 5 = 12", {"regex": r"\b12\b"}, True),
        ('```json\n{"age": 3}\n```', {"json_schema": {"required": ["age"]}}, True),
        ('{"age": "3"}', {"json_schema": {"properties": {"age": {"type": "integer"}}}}, False),
        ("no JSON", {"json_schema": {}}, False),
        ("Paris", {"contains": "Paris", "regex": "^Rome"}, False),
    ],
)
def test_an_answer_meets_all_its_expectations_or_fails(
    answer: str, expectations: dict[str, Any], met: bool
) -> None:
    assert (not missed(answer, expectations)) is met


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"messages": []}', "row 1 is malformed at $: 'inputs' is a required"),
        ("{nonsense", "line 1 is not JSON"),
        (ASKED + '"expectations": {"equals": "a"}}', "row 1 is malformed at $.expectations: "),
        (ASKED + '"expectations": {"regex": "("}}', "expects a regex that is none: "),
        (ASKED + '"expectations": {"json_schema": {"type": "no"}}}', "expects a json_schema that"),
    ],
)
def test_a_malformed_prompt_is_named_with_its_row(row: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError) as raised:
        read_prompts(settings(prompts=str(tmp_path / "prompts.jsonl")))
    assert words in str(raised.value)


def test_texts_are_read_from_every_kind_of_file_as_far_as_needed(tmp_path: Path) -> None:
    rows = pd.DataFrame({"body": ["first text", "second text", "third " * 100]})
    rows.to_parquet(tmp_path / "texts.parquet")
    rows.to_csv(tmp_path / "texts.csv")
    rows.to_json(tmp_path / "texts.jsonl", orient="records", lines=True)
    (tmp_path / "texts.txt").write_text("first text")
    for suffix in ("parquet", "csv", "jsonl", "txt"):
        column = "text" if suffix == "txt" else "body"
        config = settings(texts=str(tmp_path / f"texts.{suffix}"), text_column=column, max_tokens=2)
        texts = [row["text"] for row in read_texts(config)]
        assert texts[0] == "first text"
        assert len(texts) <= 3 and sum(map(len, texts[:-1])) < 2 * 16


def test_shipped_texts_are_picked_by_kind_and_language() -> None:
    config = replace(composed("evaluate=full").evaluate, kinds=["prose"], languages=["de", "fr"])
    texts = read_texts(config)
    assert {text["language"] for text in texts} == {"de", "fr"}
    everything = read_texts(composed("evaluate=full").evaluate)
    assert {text["kind"] for text in everything} == {"prose", "dialogue", "code", "numbers"}
    assert len({text["language"] for text in everything}) >= 3


def test_a_text_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"body": "text", "id": 1}\n')
    with pytest.raises(ValueError, match=r"without 'text'; it has body, id\. Set evaluate"):
        read_texts(settings(texts=str(tmp_path / "texts.jsonl")))


def test_a_harness_task_without_the_harness_says_what_to_install(packaged: Packaged) -> None:
    with pytest.raises(InputError, match="pip install -r requirements-harness.txt"):
        packaged.call("evaluate", "evaluate.harness.tasks=[arc_easy]", *packaged.pair)


def double_scales(onnx: Path) -> None:
    """Double the scales of one layer's projection."""
    graph = onnx_format.load(onnx / "model.onnx", load_external_data=False).graph
    name = "model.layers.4.mlp.down_proj.MatMul.weight_scales"
    [tensor] = [tensor for tensor in graph.initializer if tensor.name == name]
    place = {entry.key: entry.value for entry in tensor.external_data}
    scales = np.memmap(
        onnx / place["location"], np.float32, "r+", int(place["offset"]), tuple(tensor.dims)
    )
    scales *= 2
    scales.flush()


def truncate_weights(onnx: Path) -> None:
    path = onnx / "model.onnx.data"
    os.truncate(path, path.stat().st_size // 2)


def swap_roles(onnx: Path) -> None:
    path = onnx / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "[INST]"))


def forget_end_token(onnx: Path) -> None:
    path = onnx / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["eos_token_id"] = 5
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "gate", "words"),
    [
        (double_scales, "perplexity_ratio", "above 1.6 by "),
        (truncate_weights, "loads", "loads is 0, below 1 by 1: "),
        (swap_roles, "chat_template_match", "the chat template renders '[INST]"),
        (forget_end_token, "stop_token_honoured", "stop_token_honoured is 0, below 1 by 1: "),
    ],
)
def test_a_damaged_export_fails_the_gate_that_it_should(
    packaged: Packaged,
    measuring: Measuring,
    measured_checkpoint: Measurement,
    chat_folder: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    gate: str,
    words: str,
) -> None:
    damaged = copy_without_digests(chat_folder, tmp_path / "model")
    damage(next(damaged.glob("artifacts/*")))
    found = measure_candidate(str(damaged), measuring.request, Path(measured_checkpoint.uri))
    config = composed()
    gates = {**config.evaluate.gates, **config.model.gates}
    # What evaluate adds, and what so few tokens do not tell.
    for elsewhere in ("task_accuracy", "size_mb", "decode_tokens_per_s", "scored_tokens"):
        gates.pop(elsewhere)
    judged = judge(gates, found.metrics, {})
    reasons = reasons_of(judged, found)
    assert gate in [result.name for result in judged if not result.passed]
    assert any(reason.startswith(f"{gate} is ") and words in reason for reason in reasons)


def copy_without_digests(logged: Path, folder: Path) -> Path:
    """A logged model whose files may be changed: it does not check them at load."""
    shutil.copytree(logged, folder)
    path = folder / "MLmodel"
    model = yaml.safe_load(path.read_text())
    model["flavors"]["python_function"]["config"]["sha256"] = {}
    path.write_text(yaml.safe_dump(model))
    return folder


def test_a_candidate_whose_process_crashes_does_not_load(
    packaged: Packaged, measuring: Measuring, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    run = subprocess.run
    monkeypatch.setattr(
        "slm.evaluation.measure.subprocess.run",
        lambda *_, **__: run([sys.executable, "-c", crash]),
    )
    model = packaged.candidates.models[0]
    found = run_worker(model, measuring.request, tmp_path).found
    assert found.metrics["loads"] == 0
    assert found.failures == {"loads": "its process died of SIGSEGV"}


def test_the_checkpoint_is_measured_once_for_all_its_targets(
    packaged: Packaged, measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for it again, whatever for, finds what `main` measured."""
    monkeypatch.setattr("slm.evaluation.measure.run_worker", not_again)
    with tracking(packaged):
        found = measuring.measure(packaged.reference).found
    measured = packaged.evaluation.reference_metrics
    assert found.metrics.items() <= measured.items()


def test_metrics_are_read_where_they_were_logged_if_the_conditions_are_the_same(
    packaged: Packaged,
) -> None:
    model = packaged.candidates.models[0]
    with tracking(packaged):
        recorded = logged_metrics(model, packaged.evaluation.conditions)
        assert recorded == pytest.approx(packaged.evaluation.candidate_metrics)
        assert not logged_metrics(model, "another machine")


def test_the_champions_metrics_are_those_that_were_logged_or_measured_again(
    registry: Generations,
    packaged: Packaged,
    measuring: Measuring,
    measured_checkpoint: Measurement,
) -> None:
    with tracking(registry):
        version = version_with_alias(registry.client, CHAT, "champion")
        assert version is not None
        model = LoggedModel.load(f"models:/{CHAT}/{version.version}")
        champion = Champion(f"models:/{CHAT}/1", registry.first.reference)
        other = replace(measuring, conditions="one machine")
        with mlflow.start_run() as run:
            mlflow.log_metrics({"perplexity": 5.0}, model_id=model.model_id)
        tags = {CONDITIONS: "one machine", MEASURED_IN: run.info.run_id}
        registry.client.set_logged_model_tags(model.model_id, tags)

        def metrics(how: Measuring, again: bool = False) -> dict[str, float]:
            reference = packaged.reference
            return measure_champion(champion, reference, measured_checkpoint, how, again).metrics

        assert metrics(other) == {"perplexity": 5.0}
        measured = metrics(measuring)
        assert measured["kl_divergence"] > 0.1
        assert metrics(other, again=True)["kl_divergence"] == measured["kl_divergence"]


def test_a_champion_that_is_gone_stops_no_evaluation(
    registry: Generations,
    packaged: Packaged,
    measuring: Measuring,
    measured_checkpoint: Measurement,
) -> None:
    [lead, *_] = registry.second.candidates
    registry.client.delete_logged_model(lead.removeprefix("models:/"))
    registry.client.set_registered_model_alias(CHAT, "champion", "2")
    with tracking(registry):
        [chat] = [model for model in packaged.candidates.models if model.interface == "chat"]
        champion = champion_against(chat, composed())
        assert champion is not None and champion.uri == f"models:/{CHAT}/2"
        gone = replace(champion, uri="models:/m-00000000000000000000000000000000")
        for missing in (gone, replace(champion, reference_uri="")):
            reference = packaged.reference
            found = measure_champion(missing, reference, measured_checkpoint, measuring, True)
            assert not found.metrics and "champion" in found.failures


def test_the_report_shows_how_the_candidate_stands_to_the_champion_and_in_each_kind_of_text(
    packaged: Packaged, tmp_path: Path
) -> None:
    closeness = {"perplexity_ratio": 1.234, "kl_divergence": 0.1, "top1_agreement": 0.9}
    own = {f"{name}_of_dialogue-en": value for name, value in closeness.items()}
    evaluation = packaged.evaluation
    evaluation = replace(evaluation, candidate_metrics=evaluation.candidate_metrics | own)
    twice_as_fast = {**evaluation.candidate_metrics}
    twice_as_fast["decode_tokens_per_s"] *= 2
    evaluation = replace(evaluation, champion="models:/some/7", champion_metrics=twice_as_fast)
    provenance = replace(packaged.candidates.models[0].provenance, notes=["eos_token_id now has 2"])
    about = About({"candidate": {}, "reference": {}}, "", {}, {}, provenance)
    report, card = write_report(evaluation, about, composed(), tmp_path)
    assert "models:/some/7" in report.read_text() and "2.0× worse" in report.read_text()
    assert '<tr><td>dialogue-en</td><td class="n">1.234</td>' in report.read_text()
    assert "| champion |" in card
    assert "eos_token_id now has 2" in report.read_text() and "eos_token_id now has 2" in card


@pytest.mark.xdist_group("main")  # it writes into the registry that `main` left
def test_a_failed_verdict_names_its_gate_and_is_not_registered(
    packaged: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other gates need no new measurement: nothing is measured here."""
    versions = len(packaged.client.search_model_versions())
    monkeypatch.setattr("slm.evaluation.measure.run_worker", not_again)
    strict = [*split_overrides(TINY), "model.gates.perplexity_ratio.max=1.0001"]
    evaluation: Evaluation = packaged.call("evaluate", *strict, *packaged.pair)
    assert evaluation.verdict == "failed"
    assert evaluation.reasons[0].startswith("perplexity_ratio is 1.")
    assert "above 1 by" in evaluation.reasons[0]
    with pytest.raises(VerdictError, match="not registered, the .* failed: perplexity_ratio is"):
        packaged.call("register", f"source={evaluation.uri}")
    assert len(packaged.client.search_model_versions()) == versions


def not_again(*_: object, **__: object) -> Measurement:
    raise AssertionError("it was measured again")


@pytest.mark.usefixtures("exports_here")
@pytest.mark.xdist_group("main")  # it writes into the registry that `main` left
def test_without_its_provider_a_target_is_registered_but_never_champion(
    packaged: Packaged, tiny: Path
) -> None:
    own = [*split_overrides(TINY), "target=cuda-int4-rtn-block-32", "model.name=tiny"]
    own += ["log_pyfunc.interfaces=[prompt]", f"model.source={tiny}"]
    checkpoint = packaged.call("fetch", *own)
    onnx = packaged.call("export_onnx", *own, f"source={checkpoint.uri}")
    candidate = packaged.call("log_pyfunc", *own, f"source={onnx.uri}")
    reference = packaged.call("log_transformers", *own, f"source={checkpoint.uri}")
    pair = [f"candidate={candidate.uri}", f"reference={reference.uri}"]
    evaluation = packaged.call("evaluate", *own, *pair)
    assert evaluation.verdict == "not_evaluated"
    registration = packaged.call("register", *own, f"source={evaluation.uri}")
    assert not registration.promoted
    version, checkpoint_version = registration.versions
    assert (checkpoint_version.version, checkpoint_version.alias) == ("1", "")
    assert version.name == "tiny-cuda-int4-rtn-block-32-prompt"
    tags = packaged.client.get_model_version(version.name, version.version).tags
    assert tags["verdict"] == "not_evaluated"
    assert "cannot run the candidate: cuda: " in tags["verdict_reasons"]
    assert not packaged.client.get_registered_model(version.name).aliases


class Fixed:
    """A model that gives the same log-probabilities at every position, whatever the tokens."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        return self.logp


def leave_reference(folder: Path, model: Fixed, *kinds: str) -> None:
    """Leave a checkpoint's scores of one more window, and the kind of each, if there are any."""
    number = len(list(folder.glob("tokens-*")))
    np.save(folder / f"tokens-{number:04}.npy", np.ones(len(model.logp), dtype=int))
    np.save(folder / f"logp-{number:04}.npy", model.logp[:-1])
    (folder / KINDS).write_text(json.dumps(kinds or [""] * (number + 1)))


def settings(**values: Any) -> Evaluate:
    """conf/evaluate/smoke.yaml with other values."""
    return replace(composed().evaluate, kinds=[], languages=[], **values)


def test_a_tracking_server_without_traces_costs_no_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(**_: Any) -> None:
        raise MlflowException(words)

    monkeypatch.setattr("mlflow.genai.evaluate", refused)
    words = "NOT_FOUND: 404 Not Found"
    show_answers([], "m-1")
    words = "API request to http://host failed"
    with pytest.raises(MlflowException):
        show_answers([], "m-1")
