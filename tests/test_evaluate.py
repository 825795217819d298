import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx as onnx_format
import pandas as pd
import pytest

from steps.config import Baseline, Evaluate, Gate, Interface
from steps.evaluate import gates_of, logged_pair, reasons_of
from steps.evaluation.data import read_prompts, read_texts
from steps.evaluation.fidelity import Blocks, by_position, compare_with_reference, token_windows
from steps.evaluation.measurements import measure, measure_champion
from steps.evaluation.models import Answer
from steps.evaluation.report import write_report
from steps.evaluation.sanity import is_degenerate
from steps.evaluation.speed import decode_rates
from steps.evaluation.tasks import failures
from steps.gates import explain, judge
from steps.log_pyfunc import log_interface, runtime_requirements
from steps.provenance import PROVENANCE, write_provenance
from steps.registry import version_with_alias
from tests.conftest import TINY, Project, composed, tracking
from tests.registry_state import CHAT

FIDELITY = {"perplexity", "perplexity_ratio", "kl_divergence", "kl_divergence_p99"}
FIDELITY |= {"top1_agreement", "greedy_prefix_tokens"}
SPEED = {"ttft_s_p50", "ttft_s_p95", "prefill_tokens_per_s", "decode_tokens_per_s"}
SPEED |= {"batch_tokens_per_s", "load_s", "decode_tokens_per_s_at_32"}
COST = {"peak_rss_mb", "size_mb"}
ASKED = '{"inputs": {"messages": [{"role": "user", "content": "?"}]}, '
SANITY = {"loads", "chat_template_match", "stop_token_honoured", "deterministic"}


def test_both_logged_models_bear_their_metrics_linked_to_the_texts(packaged: Project) -> None:
    for step, names in (
        ("log_pyfunc", FIDELITY | SPEED | COST | SANITY | {"kl_divergence_ci95_low"}),
        ("log_transformers", {"perplexity"} | SPEED | COST),
    ):
        made = packaged.made[step]
        for model_id in (m["model_id"] for m in made.get("models", [made])):
            model = packaged.client.get_logged_model(model_id)
            metrics = {metric.key: metric for metric in model.metrics or []}
            assert names | {"task_accuracy", "degenerate_share"} <= metrics.keys()
            assert all(metrics[name].value > 0 for name in names)
            assert {metrics[name].dataset_name for name in names} == {"texts.jsonl"}


def test_int4_is_smaller_and_faster_and_close_to_its_checkpoint(packaged: Project) -> None:
    evaluation = packaged.made["evaluate"]
    candidate, reference = evaluation["candidate_metrics"], evaluation["reference_metrics"]
    assert candidate["size_mb"] < reference["size_mb"] / 4
    assert candidate["peak_rss_mb"] < reference["peak_rss_mb"]
    assert candidate["decode_tokens_per_s"] > reference["decode_tokens_per_s"]
    assert 1 < candidate["perplexity_ratio"] < 2
    assert candidate["kl_divergence"] < candidate["kl_divergence_p99"]
    for metric in FIDELITY:
        low, high = (candidate[f"{metric}_ci95_{end}"] for end in ("low", "high"))
        assert low <= candidate[metric] <= high


def test_the_report_is_one_self_contained_page_with_the_verdict_first(packaged: Project) -> None:
    page = Path(packaged.made["evaluate"]["report"]).read_text()
    body = page[page.index("<body>") :]
    assert body.index("Passed") < body.index("Gates") < body.index("<svg") < body.index("Answers")
    assert "src=" not in page and 'href="http' not in page and "@import" not in page
    assert "Paris" in page and "SHA-256" in page
    assert page.count("<svg") == 2


def test_the_run_has_the_report_the_card_and_tables(packaged: Project) -> None:
    run = packaged.runs("evaluate")[-1].info.run_id
    artifacts = [f for at in ("", "tables") for f in packaged.client.list_artifacts(run, at)]
    tables = {f"tables/{name}.json" for name in ("answers", "gates", "metrics")}
    assert {"report.html", "model_card.md", *tables} <= {artifact.path for artifact in artifacts}
    card = packaged.made["evaluate"]["model_card"]
    assert card.startswith("# smollm2-135m-instruct on cpu-int4") and len(card) <= 5000


def test_mlflows_evaluation_page_has_every_prompt_with_both_answers(packaged: Project) -> None:
    run = packaged.runs("evaluate")[-1].info.run_id
    experiments = [packaged.client.get_run(run).info.experiment_id]
    traces = packaged.client.search_traces(locations=experiments, run_id=run)
    answers = packaged.made["evaluate"]["answers"]
    shown = [json.loads(trace.data.response) for trace in traces]
    for answer in answers:
        assert {side: answer[side] for side in ("candidate", "reference")} in shown
    [paris] = [trace for trace in traces if "capital of France" in trace.data.request]
    assessments = {a.name: a.feedback.value for a in paris.info.assessments if a.feedback}
    assert assessments == {"candidate_correct": True, "reference_correct": True}


def test_a_gate_holds_at_its_bound_and_fails_beyond_it_or_without_a_number() -> None:
    gates = {"a": Gate(max=1.0), "b": Gate(min=0.5), "c": Gate(min=0, max=2), "d": Gate(max=1)}
    results = judge(gates, {"a": 1.0, "b": 0.4, "c": math.nan}, {})
    assert [result["passed"] for result in results] == [True, False, False, False]
    assert [explain(result) for result in results[1:]] == [
        "b is 0.4, below 0.5 by 0.1",
        "c was not measured",
        "d was not measured",
    ]


def test_a_gate_may_be_a_factor_of_the_checkpoints_or_the_champions_metric() -> None:
    gates = {
        "speed": Gate(min=2, of=Baseline.checkpoint),
        "no slower": Gate(min=0.9, of=Baseline.champion, metric="speed"),
        "size": Gate(max=1, of=Baseline.champion),
    }
    baselines = {Baseline.checkpoint: {"speed": 10.0}, Baseline.champion: {"speed": 40.0}}
    results = judge(gates, {"speed": 30.0, "size": 5.0}, baselines)
    assert [result["passed"] for result in results] == [True, False, False]
    assert explain(results[1]) == "speed is 30, below 36 (0.9 of the champion's) by 6"
    assert explain(results[2]) == "size was not measured of the champion"
    no_champion = {**baselines, Baseline.champion: None}
    assert all(
        result["passed"] for result in judge(gates, {"speed": 30.0, "size": 5.0}, no_champion)
    )
    [_, _, size] = judge(gates, {"speed": 30.0}, no_champion)
    assert not size["passed"] and explain(size) == "size was not measured"


@pytest.mark.parametrize("bounds", [{}, {"min": 2, "max": 1}, {"max": math.nan}])
def test_a_gate_without_bounds_that_can_be_kept_is_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it must have one of them, or both"):
        Gate(**bounds)


def test_a_gate_of_an_unknown_metric_is_refused_before_anything_is_measured() -> None:
    config = composed("+evaluate.gates={perplexty: {max: 2}}")
    with pytest.raises(ValueError, match="the gate perplexty bounds perplexty, which is no metric"):
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
    packaged: Project, overrides: list[str], words: str
) -> None:
    candidate = packaged.made["log_pyfunc"]["models"][0]["model_id"]
    reference = packaged.made["log_transformers"]["model_id"]
    uris = {"CANDIDATE": f"models:/{candidate}", "REFERENCE": f"models:/{reference}"}
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


def test_windows_cover_the_tokens_in_order_up_to_the_budget() -> None:
    assert token_windows([[1, 2, 3, 4, 5], [6, 7]], window=3, max_tokens=6) == [[1, 2, 3], [4, 5]]
    assert token_windows([[1, 2, 3]], window=8, max_tokens=2) == [[1, 2]]


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
    assert (not failures(answer, expectations)) is met


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


def test_a_harness_task_without_the_harness_says_what_to_install(packaged: Project) -> None:
    uris = [packaged.made[step]["uri"] for step in ("log_pyfunc", "log_transformers")]
    arguments = [f"candidate={uris[0]}", f"reference={uris[1]}"]
    process = packaged.step("evaluate", "evaluate.harness.tasks=[arc_easy]", *arguments)
    assert process.returncode == 1
    assert "pip install -r requirements-harness.txt" in process.stderr.splitlines()[-1]


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
        (None, None, None),
        (double_scales, "perplexity_ratio", "above 1.6 by "),
        (truncate_weights, "loads", "loads is 0, below 1 by 1: "),
        (swap_roles, "chat_template_match", "the chat template renders '[INST]"),
        (forget_end_token, "stop_token_honoured", "stop_token_honoured is 0, below 1 by 1: "),
    ],
)
def test_a_damaged_export_fails_the_gate_that_it_should(
    packaged: Project,
    checkpoint: Path,
    onnx: Path,
    tmp_path: Path,
    damage: Callable[[Path], None] | None,
    gate: str,
    words: str,
) -> None:
    damaged = tmp_path / "onnx"
    shutil.copytree(onnx, damaged)
    if damage:
        damage(damaged)
    facts = json.loads((damaged / PROVENANCE).read_text())
    facts.pop("files")
    (damaged / PROVENANCE).unlink()
    provenance = write_provenance(damaged, **facts)
    config = composed()
    requirements = runtime_requirements(config.target.runtime_package)
    with tracking(packaged), mlflow.start_run(experiment_id="1"):
        logged = log_interface(Interface.chat, damaged, provenance, requirements, config)
        uri = f"models:/{logged['model_id']}"
        found = measure(uri, checkpoint.parent / tmp_path.name, checkpoint)
    gates = {**config.evaluate.gates, **config.model.gates}
    # What evaluate adds, and what so few tokens do not tell.
    for elsewhere in ("task_accuracy", "size_mb", "decode_tokens_per_s", "scored_tokens"):
        gates.pop(elsewhere)
    results = judge(gates, found.metrics, {})
    reasons = reasons_of(results, found)
    if damage is None:
        assert not reasons
    else:
        assert gate in [result["name"] for result in results if not result["passed"]]
        assert any(reason.startswith(f"{gate} is ") and words in reason for reason in reasons)


def test_the_champions_metrics_are_read_from_its_version_or_measured_again(
    registry: Project, checkpoint: Path
) -> None:
    with tracking(registry):
        champion = version_with_alias(registry.client, CHAT, "champion")
        assert champion is not None

        def metrics(conditions: str) -> dict[str, float]:
            settings = composed().evaluate
            scratch = checkpoint.parent
            return measure_champion(champion, reference, settings, conditions, scratch).metrics

        reference = registry.made["1"]["reference"]
        recorded = json.loads(champion.tags["metrics"])
        assert metrics(champion.tags["conditions"]) == recorded
        measured = metrics("another machine")
    assert measured["kl_divergence"] != recorded["kl_divergence"]  # other texts


def test_the_report_shows_how_the_candidate_stands_to_the_champion(
    packaged: Project, tmp_path: Path
) -> None:
    evaluation = packaged.made["evaluate"]
    twice_as_fast = {**evaluation["candidate_metrics"]}
    twice_as_fast["decode_tokens_per_s"] *= 2
    evaluation = evaluation | {"champion": "models:/some/7", "champion_metrics": twice_as_fast}
    about = {"series": {"candidate": {}, "reference": {}}, "machine": "", "versions": {}}
    report, card = write_report(evaluation, {**about, "digests": {}}, composed(), tmp_path)
    assert "models:/some/7" in report.read_text() and "2.0× worse" in report.read_text()
    assert "| champion |" in card


def test_a_failed_verdict_names_its_gate_and_is_not_registered(packaged: Project) -> None:
    versions = len(packaged.client.search_model_versions())
    uris = [packaged.made[step]["uri"] for step in ("log_pyfunc", "log_transformers")]
    strict = [*TINY.split(), "model.gates.perplexity_ratio.max=1.0001"]
    process = packaged.step("evaluate", *strict, f"candidate={uris[0]}", f"reference={uris[1]}")
    assert process.returncode == 0, process.stderr
    evaluation = packaged.outcome("evaluate")
    assert evaluation["verdict"] == "failed"
    assert evaluation["reasons"][0].startswith("perplexity_ratio is 1.")
    assert "above 1 by" in evaluation["reasons"][0]
    process = packaged.step("register", f"source={evaluation['uri']}")
    assert process.returncode == 1
    assert "register: not registered, the evaluation failed: perplexity_ratio is" in process.stderr
    assert len(packaged.client.search_model_versions()) == versions


def test_without_its_provider_a_target_is_registered_but_never_champion(packaged: Project) -> None:
    own = [*TINY.split(), "target=cuda-int4-rtn-block-32", "log_pyfunc.interfaces=[prompt]"]

    def run(step: str, *arguments: str) -> dict:
        process = packaged.step(step, *own, *arguments)
        assert process.returncode == 0, process.stderr[-2000:]
        return packaged.outcome(step)

    onnx = run("export_onnx", f"source={packaged.outcome('fetch')['uri']}")
    candidate = run("log_pyfunc", f"source={onnx['uri']}")
    reference = packaged.made["log_transformers"]
    evaluation = run("evaluate", f"candidate={candidate['uri']}", f"reference={reference['uri']}")
    assert evaluation["verdict"] == "not_evaluated"
    version, checkpoint = run("register", f"source={evaluation['uri']}")["versions"]
    assert (checkpoint["version"], checkpoint["alias"]) == ("1", "")
    assert version["name"] == "smollm2-135m-instruct-cuda-int4-rtn-block-32-prompt"
    tags = packaged.client.get_model_version(version["name"], version["version"]).tags
    assert tags["verdict"] == "not_evaluated"
    assert "cannot run the candidate: cuda: " in tags["verdict_reasons"]
    assert not packaged.client.get_registered_model(version["name"]).aliases


class Fixed:
    """A model that gives the same log-probabilities at every position, whatever the tokens."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        return self.logp


def leave_reference(folder: Path, model: Fixed) -> None:
    np.save(folder / "tokens-0000.npy", np.ones(len(model.logp), dtype=int))
    np.save(folder / "logp-0000.npy", model.logp[:-1])


def settings(**values: Any) -> Evaluate:
    """conf/evaluate/smoke.yaml with other values."""
    return replace(composed().evaluate, kinds=[], languages=[], **values)
