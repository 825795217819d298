"""Measure one logged model in a process of its own: how it loads, answers and scores texts.

    python -m steps.evaluation.measure models:/m-… --request request.json --out work/reference

`evaluate` runs it for the checkpoint, which leaves in `--out` what the ONNX models are compared
with, and then for each of these with `--reference` at that folder. `--request` holds what to
measure: texts, prompts, and settings of conf/evaluate.
"""

import argparse
import json
import logging
import math
import re
import resource
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from tqdm import tqdm

from steps.evaluation import fidelity, harness, sanity
from steps.evaluation.models import Answer, Genai, Model, Transformers
from steps.evaluation.speed import measure_speed
from steps.step import EXPECTED_ERRORS, one_line, set_up_logging

log = logging.getLogger("steps.measure")

OVERHEAD = 64  # tokens of a timed prompt beside its passage: the chat template, the question


@dataclass
class Measured:
    """What was found of one model.

    `series` are what the report draws, `answers` one for each prompt. `failures` say in words, by
    metric, why it is 0 or missing. `unavailable` says why this machine cannot run the model at all.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    unavailable: str = ""


def measure_checkpoint(folder: str, request: dict[str, Any], out: Path) -> Measured:
    """Measure the checkpoint, and leave in `out` what a candidate is compared with."""
    start = time.perf_counter()
    model = Transformers(folder)
    found = Measured({"load_s": time.perf_counter() - start})
    log.info("measure: loaded in %.1f s", found.metrics["load_s"])
    require_room(model, request)
    time_answers(found, model, request)
    answers = answer_prompts(found, model, request)
    scored = {key: request[key] for key in ("texts", "window", "max_tokens")}
    found.metrics |= fidelity.write_reference(model, **scored, out=out)
    log.info("measure: scored %d tokens", found.metrics["scored_tokens"])
    conversations = [prompt["messages"] for prompt in request["prompts"]]
    fidelity.write_greedy(model, conversations, found.answers, out)
    sanity.write_expectations(model, answers, out)
    found.metrics |= harness.run_tasks(model, **request["harness"])
    return found


def measure_candidate(folder: str, request: dict[str, Any], reference: Path | None) -> Measured:
    """Measure an ONNX model against what the checkpoint left in `reference`, or only load it.

    What a broken model cannot do is no error: its metrics are missing, and `failures` say why.
    """
    found = Measured()
    start = time.perf_counter()
    try:
        model = Genai(folder)
    except Exception as error:
        if type(error).__name__ == "ExecutionProviderUnavailable":  # the class ships with the model
            return Measured(unavailable=str(error))
        log.exception("measure: the candidate does not load")
        return Measured({"loads": 0.0}, failures={"loads": one_line(error)})
    found.metrics = {"loads": 1.0, "load_s": time.perf_counter() - start}
    log.info("measure: loaded in %.1f s", found.metrics["load_s"])
    if reference is None:
        return found

    def times() -> None:
        time_answers(found, model, request)

    def answers() -> None:
        answers = answer_prompts(found, model, request)
        checks, failures = sanity.check_sanity(model, answers, reference)
        found.metrics |= checks
        found.failures |= failures

    def scores() -> None:
        metrics, series = fidelity.compare_with_reference(model.log_probabilities, reference)
        found.metrics |= metrics | fidelity.compare_greedy(model.log_probabilities, reference)
        found.series |= series
        log.info("measure: scored %d tokens", metrics["scored_tokens"])

    def tasks() -> None:
        found.metrics |= harness.run_tasks(model, **request["harness"])

    for part in (times, answers, scores, tasks):
        try:
            part()
        except Exception as error:
            log.exception("measure: %s failed", part.__name__)
            found.failures[part.__name__] = one_line(error)
    return found


def require_room(model: Transformers, request: dict[str, Any]) -> None:
    """Raise ValueError where something to measure is longer than the context."""
    length, new = model.context_length, request["max_new_tokens"]
    needs = {"evaluate.window": request["window"]}
    needs["evaluate.prompt_lengths"] = max(request["prompt_lengths"]) + new + OVERHEAD
    for number, prompt in enumerate(request["prompts"], 1):
        _, tokens = model.render(prompt["messages"])
        needs[f"evaluate.prompts, row {number}"] = len(tokens) + (prompt.get("max_tokens") or new)
    for what, tokens_needed in needs.items():
        if tokens_needed > length:
            raise ValueError(
                f"{what} needs {tokens_needed} tokens, more than the context's {length}."
            )


def time_answers(found: Measured, model: Model, request: dict[str, Any]) -> None:
    names = ("texts", "prompt_lengths", "repeats", "max_new_tokens", "batch_size")
    metrics, series = measure_speed(model, **{name: request[name] for name in names})
    found.metrics |= metrics
    found.series |= series
    log.info("measure: decodes %.1f tokens/s", metrics["decode_tokens_per_s"])


def answer_prompts(found: Measured, model: Model, request: dict[str, Any]) -> list[Answer]:
    """Answer the prompts one by one; after it, peak memory is that of serving."""
    answers = []
    for prompt in tqdm(request["prompts"], desc="prompts", leave=False):
        max_tokens = prompt.get("max_tokens") or request["max_new_tokens"]
        answers += model.ask([prompt["messages"]], max_tokens)
    found.answers = [answer.text for answer in answers]
    found.metrics["degenerate_share"] = sanity.degenerate_share(model, answers)
    found.metrics["peak_rss_mb"] = peak_rss_mb()  # scoring, which comes later, needs more
    return answers


def peak_rss_mb() -> float:
    """Peak resident memory of this program, in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike ru_maxrss, begins anew with the program
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) * 1024 / 1e6  # type: ignore[union-attr]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("uri", help="URI of a logged model")
    parser.add_argument("--request", type=Path, required=True, help="JSON: what to measure")
    parser.add_argument("--out", type=Path, required=True, help="folder for measured.json")
    parser.add_argument("--reference", type=Path, help="folder that the checkpoint's run left")
    parser.add_argument("--only-load", action="store_true", help="whether this machine can run it")
    arguments = parser.parse_args()
    set_up_logging()
    request = json.loads(arguments.request.read_text())
    try:
        folder = mlflow.artifacts.download_artifacts(artifact_uri=arguments.uri)
        if arguments.reference or arguments.only_load:
            found = measure_candidate(folder, request, arguments.reference)
        else:
            found = measure_checkpoint(folder, request, arguments.out)
    except EXPECTED_ERRORS as error:
        (arguments.out / "error").write_text(one_line(error))
        parser.exit(1, f"measure: {one_line(error)}\n")
    found.metrics = {name: value for name, value in found.metrics.items() if math.isfinite(value)}
    (arguments.out / "measured.json").write_text(json.dumps(asdict(found), indent=2))


if __name__ == "__main__":
    main()
