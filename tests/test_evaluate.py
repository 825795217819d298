import math
from pathlib import Path

import numpy as np
import pytest

from steps.config import Gate
from steps.evaluate import explain_gate, judge
from steps.measure import compare_with_reference, token_windows
from tests.conftest import TINY, Project

FIDELITY = {"perplexity", "perplexity_ratio", "kl_divergence", "top1_agreement"}
SPEED = {"ttft_s_p50", "prefill_tokens_per_s", "decode_tokens_per_s", "load_s"}
COST = {"peak_rss_mb", "size_mb"}


def test_both_logged_models_bear_their_metrics(packaged: Project) -> None:
    for step, names in (
        ("log_pyfunc", FIDELITY | SPEED | COST),
        ("log_transformers", {"perplexity"} | SPEED | COST),
    ):
        made = packaged.made[step]
        for model_id in (m["model_id"] for m in made.get("models", [made])):
            model = packaged.client.get_logged_model(model_id)
            metrics = {metric.key: metric.value for metric in model.metrics or []}
            assert names <= metrics.keys()
            assert all(math.isfinite(value) and value > 0 for value in metrics.values())


def test_int4_is_smaller_and_faster_and_close_to_its_checkpoint(packaged: Project) -> None:
    evaluation = packaged.made["evaluate"]
    candidate, reference = evaluation["candidate_metrics"], evaluation["reference_metrics"]
    assert candidate["size_mb"] < reference["size_mb"] / 4
    assert candidate["peak_rss_mb"] < reference["peak_rss_mb"]
    assert candidate["decode_tokens_per_s"] > reference["decode_tokens_per_s"]
    assert 1 < candidate["perplexity_ratio"] < 2


def test_the_report_is_one_self_contained_page_with_the_verdict_first(packaged: Project) -> None:
    page = Path(packaged.made["evaluate"]["report"]).read_text()
    body = page[page.index("<body>") :]
    assert body.index("Passed") < body.index("Gates") < body.index("<svg") < body.index("Answers")
    assert "src=" not in page and 'href="http' not in page and "@import" not in page
    assert "Paris" in page


def test_a_gate_holds_at_its_bound_and_fails_beyond_it_or_without_a_number() -> None:
    gates = {"a": Gate(max=1.0), "b": Gate(min=0.5), "c": Gate(min=0, max=2), "d": Gate(max=1)}
    results = judge({"a": 1.0, "b": 0.4, "c": math.nan}, gates)
    assert [result["passed"] for result in results] == [True, False, False, False]
    assert [explain_gate(result) for result in results[1:]] == [
        "b is 0.4, below 0.5 by 0.1",
        "c was not measured",
        "d was not measured",
    ]


def test_comparing_a_model_with_itself_finds_no_difference(tmp_path: Path) -> None:
    model = Fixed(np.random.default_rng(0).normal(size=(4, 6)))
    leave_reference(tmp_path, model)
    metrics = compare_with_reference(model, tmp_path)
    assert metrics["perplexity_ratio"] == pytest.approx(1)
    assert metrics["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert metrics["top1_agreement"] == 1


def test_divergence_is_that_of_the_candidate_from_the_reference(tmp_path: Path) -> None:
    leave_reference(tmp_path, Fixed(np.log([[0.5, 0.5]] * 2)))
    metrics = compare_with_reference(Fixed(np.log([[0.9, 0.1]] * 2)), tmp_path)
    assert metrics["kl_divergence"] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(5))
    assert metrics["perplexity_ratio"] == pytest.approx((1 / 0.1) / (1 / 0.5))


def test_windows_cover_the_tokens_in_order_up_to_the_budget() -> None:
    assert token_windows([[1, 2, 3, 4, 5], [6, 7]], window=3, max_tokens=6) == [[1, 2, 3], [4, 5]]
    assert token_windows([[1, 2, 3]], window=8, max_tokens=2) == [[1, 2]]


def test_a_failed_verdict_names_its_gate_and_is_not_registered(packaged: Project) -> None:
    versions = len(packaged.client.search_model_versions())
    uris = [packaged.made[step]["uri"] for step in ("log_pyfunc", "log_transformers")]
    strict = [*TINY.split(), "model.gates.perplexity_ratio.max=1.0001"]
    process = packaged.step("evaluate", *strict, f"candidate={uris[0]}", f"reference={uris[1]}")
    assert process.returncode == 0, process.stderr
    evaluation = packaged.outcome("evaluate")
    assert evaluation["verdict"] == "failed"
    assert evaluation["reasons"][0].startswith("perplexity_ratio is 1.")
    assert "above 1.0001 by" in evaluation["reasons"][0]
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

    def answer(self, messages: list[dict[str, str]], max_tokens: int) -> tuple[str, int, int]:
        return "", 0, 0

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        return self.logp


def leave_reference(folder: Path, model: Fixed) -> None:
    np.save(folder / "tokens-0000.npy", np.ones(len(model.logp), dtype=int))
    np.save(folder / "logp-0000.npy", model.logp[:-1])
