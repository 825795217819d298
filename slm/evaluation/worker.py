"""Measure one logged model in this process: how it loads, answers and scores texts.

    python -m slm.evaluation.worker models:/m-… --request request.json --out work/measure/<key>

`measure.py` starts it. Without `--reference` the model is a checkpoint, which leaves in `--out`
what ONNX models are compared with. An ONNX model gets that folder as `--reference`.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from tqdm import tqdm

from slm.errors import InputError, StepError, as_user_error, one_line
from slm.evaluation import fidelity, harness, sanity
from slm.evaluation.models import Answer, Genai, Messages, Model, Transformers
from slm.evaluation.speed import measure_speed
from slm.records import from_json
from slm.running.logs import set_up_logging
from slm.running.memory import peak_rss_mb
from slm.running.orphans import end_with_parent

log = logging.getLogger("slm.measure")

OVERHEAD = 64  # tokens of a timed prompt beside its passage: the chat template, the question


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer; `max_tokens` None takes the request's `max_new_tokens`."""

    messages: Messages
    max_tokens: int | None = None


@dataclass(frozen=True)
class Request:
    """What to measure: texts and prompts, and the settings of conf/evaluate that say how.

    `kinds` has one for each text. `long_text` is for what shows in long texts alone.
    """

    texts: list[str]
    kinds: list[str]
    long_text: str
    prompts: list[Prompt]
    window: int
    max_tokens: int
    prompt_lengths: list[int]
    repeats: int
    max_new_tokens: int
    batch_size: int
    harness: dict[str, Any]

    def limit(self, prompt: Prompt) -> int:
        """The tokens that an answer may have."""
        return prompt.max_tokens or self.max_new_tokens


@dataclass
class Found:
    """What was found of one model.

    `series` are what the report draws, `answers` one for each prompt. `failures` say in words, by
    metric, why it is 0 or missing. `unavailable` says why this machine cannot run the model at all.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    unavailable: str = ""

    def add(self, other: "Found") -> None:
        self.metrics |= other.metrics
        self.series |= other.series
        self.answers += other.answers
        self.failures |= other.failures


def measure_checkpoint(folder: str, request: Request, out: Path) -> Found:
    """Measure the checkpoint, and leave in `out` what a candidate is compared with."""
    start = time.perf_counter()
    model = Transformers(folder)
    found = Found({"load_s": time.perf_counter() - start})
    log.info("measure: loaded in %.1f s", found.metrics["load_s"])
    require_room(model, request)
    found.add(speed_of(model, request))
    answers, answered = answer_prompts(model, request)
    found.add(answered)
    scored = fidelity.write_reference(
        *(model, request.texts, request.long_text, request.window, request.max_tokens, out),
        request.kinds,
    )
    found.metrics |= scored
    log.info("measure: scored %d tokens", scored["scored_tokens"])
    conversations = [prompt.messages for prompt in request.prompts]
    fidelity.write_greedy(model, conversations, found.answers, out)
    sanity.write_expectations(model, answers, out)
    found.metrics |= harness.run_tasks(model, **request.harness)
    return found


def measure_candidate(folder: str, request: Request, reference: Path | None) -> Found:
    """Measure an ONNX model against what the checkpoint left in `reference`, or only load it.

    What a broken model cannot do is no error: its metrics are missing, and `failures` say why.
    """
    start = time.perf_counter()
    try:
        model = Genai(folder)
    except Exception as error:
        if type(error).__name__ == "ExecutionProviderUnavailable":  # the class ships with the model
            return Found(unavailable=str(error))
        log.exception("measure: the candidate does not load")
        return Found({"loads": 0.0}, failures={"loads": one_line(error)})
    found = Found({"loads": 1.0, "load_s": time.perf_counter() - start})
    log.info("measure: loaded in %.1f s", found.metrics["load_s"])
    if reference is None:
        return found
    for name, part in PARTS.items():
        try:
            found.add(part(model, request, reference))
        except Exception as error:
            log.exception("measure: %s failed", name)
            found.failures[name] = one_line(error)
    return found


def require_room(model: Transformers, request: Request) -> None:
    """Raise InputError if something to measure is longer than the context."""
    length = model.context_length
    needs = {"evaluate.window": request.window}
    longest = max(request.prompt_lengths) + request.max_new_tokens + OVERHEAD
    needs["evaluate.prompt_lengths"] = longest
    for number, prompt in enumerate(request.prompts, 1):
        _, tokens = model.render(prompt.messages)
        needs[f"evaluate.prompts, row {number}"] = len(tokens) + request.limit(prompt)
    for what, tokens_needed in needs.items():
        if tokens_needed > length:
            raise InputError(
                f"{what} needs {tokens_needed} tokens, more than the context's {length}."
            )


def speed_of(model: Model, request: Request, _: Path | None = None) -> Found:
    """Times of answers (slm/evaluation/speed.py)."""
    metrics, series = measure_speed(
        model,
        request.texts,
        request.prompt_lengths,
        request.repeats,
        request.max_new_tokens,
        request.batch_size,
    )
    log.info("measure: decodes %.1f tokens/s", metrics["decode_tokens_per_s"])
    return Found(metrics, series)


def answer_prompts(model: Model, request: Request) -> tuple[list[Answer], Found]:
    """Answer the prompts one by one; after it, peak memory is that of serving."""
    answers: list[Answer] = []
    for prompt in tqdm(request.prompts, desc="prompts", leave=False):
        answers += model.ask([prompt.messages], request.limit(prompt))
    metrics = {
        "degenerate_share": sanity.degenerate_share(model, answers),
        "peak_rss_mb": peak_rss_mb(),  # scoring, which comes later, needs more
    }
    return answers, Found(metrics, answers=[answer.text for answer in answers])


def answers_of(model: Genai, request: Request, reference: Path) -> Found:
    """Answers to the prompts, and the sanity checks of them."""
    answers, found = answer_prompts(model, request)
    checks, failures = sanity.check_sanity(model, answers, reference)
    found.add(Found(checks, failures=failures))
    return found


def fidelity_of(model: Genai, _: Request, reference: Path) -> Found:
    """How close its next-token distributions are to the checkpoint's."""
    metrics, series = fidelity.compare_with_reference(model.log_probabilities, reference)
    log.info("measure: scored %d tokens", metrics["scored_tokens"])
    return Found(metrics | fidelity.compare_greedy(model.log_probabilities, reference), series)


def harness_of(model: Genai, request: Request, _: Path) -> Found:
    """Tasks of lm-evaluation-harness, if any were asked for."""
    return Found(harness.run_tasks(model, **request.harness))


# What is measured of a candidate, in this order: peak memory has to be read before scoring.
PARTS: dict[str, Callable[[Genai, Request, Path], Found]] = {
    "times": speed_of,
    "answers": answers_of,
    "scores": fidelity_of,
    "tasks": harness_of,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("uri", help="URI of a logged model")
    parser.add_argument("--request", type=Path, required=True, help="JSON: what to measure")
    parser.add_argument("--out", type=Path, required=True, help="folder for found.json")
    parser.add_argument("--reference", type=Path, help="folder that the checkpoint's run left")
    parser.add_argument("--only-load", action="store_true", help="whether this machine can run it")
    arguments = parser.parse_args()
    set_up_logging()
    end_with_parent()
    request = from_json(Request, json.loads(arguments.request.read_text()))
    try:
        folder = mlflow.artifacts.download_artifacts(artifact_uri=arguments.uri)
        if arguments.reference or arguments.only_load:
            found = measure_candidate(folder, request, arguments.reference)
        else:
            found = measure_checkpoint(folder, request, arguments.out)
    except Exception as error:
        known = as_user_error(error)
        if known is None:
            log.exception("measure: failed")
            known = StepError(f"{type(error).__name__}: {one_line(error)}")
        (arguments.out / "error").write_text(one_line(known))
        parser.exit(known.exit_code)
    found.metrics = {name: value for name, value in found.metrics.items() if math.isfinite(value)}
    (arguments.out / "found.json").write_text(json.dumps(asdict(found), indent=2))


if __name__ == "__main__":
    main()
