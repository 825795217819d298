"""Every metric of an evaluation: the one list that gates, tags, reports and summaries go by.

Besides these there are details: the ends of a metric's interval, `<metric>_ci95_low` and
`_ci95_high`; the metric at one prompt length, `<metric>_at_<tokens>`, or of one kind of text,
`<metric>_of_<kind>`; and the harness's `<task>/<metric>`.
"""

import re
from dataclasses import dataclass

from slm.errors import InputError

INTERVAL_ENDS = ("ci95_low", "ci95_high")


@dataclass(frozen=True)
class Metric:
    """A metric: its label with the unit, the digits to show after the point, which way is better.

    `more_is_better` is None where neither is. A `check` is 1 or 0 and says yes or no. `bar` is its
    title among the report's bars. `at_length` says that it is measured at each prompt length too,
    `of_kind` of each kind of text.
    """

    name: str
    label: str
    digits: int = 3
    more_is_better: bool | None = None
    check: bool = False
    bar: str = ""
    at_length: bool = False
    of_kind: bool = False


METRICS = {
    metric.name: metric
    for metric in (
        Metric("loads", "Loads", check=True),
        Metric(
            "chat_template_match", "Chat template and tokenizer are the checkpoint's", check=True
        ),
        Metric("stop_token_honoured", "Stops at its end tokens", check=True),
        Metric("deterministic", "The same seed gives the same answer", check=True),
        Metric("perplexity", "Perplexity", 2, False, bar="Perplexity"),
        Metric("perplexity_ratio", "Perplexity ratio, to the checkpoint", 3, False, of_kind=True),
        Metric("perplexity_ratio_tail", "Perplexity ratio, last quarter of each window", 3, False),
        Metric("kl_divergence", "KL divergence, mean (nats)", 3, False, of_kind=True),
        Metric("kl_divergence_p99", "KL divergence, 99th percentile (nats)", 2, False),
        Metric("top1_agreement", "Top-1 agreement (share of tokens)", 3, True, of_kind=True),
        Metric("greedy_prefix_tokens", "Greedy answers agree for (tokens, mean)", 1, True),
        Metric("scored_tokens", "Tokens scored", 0),
        Metric("task_accuracy", "Task accuracy (share of prompts)", 3, True, bar="Task accuracy"),
        Metric("degenerate_share", "Degenerate answers (share)", 3, False),
        Metric(
            "ttft_s_p50",
            "Time to first token of the longest prompts, median (s)",
            3,
            False,
            at_length=True,
        ),
        Metric(
            "ttft_s_p95",
            "Time to first token of the longest prompts, 95th percentile (s)",
            3,
            False,
        ),
        Metric(
            "prefill_tokens_per_s",
            "Prefill of the longest prompts (tokens/s)",
            0,
            True,
            bar="Prefill (tokens/s)",
            at_length=True,
        ),
        Metric(
            "decode_tokens_per_s",
            "Decode (tokens/s)",
            1,
            True,
            bar="Decode (tokens/s)",
            at_length=True,
        ),
        Metric(
            "batch_tokens_per_s",
            "Batch throughput, prefill included (tokens/s)",
            1,
            True,
            bar="Batch (tokens/s)",
        ),
        Metric("load_s", "Load (s)", 2, False, bar="Load (s)"),
        Metric("peak_rss_mb", "Peak resident memory (MB)", 0, False, bar="Peak memory (MB)"),
        Metric("size_mb", "Size on disk (MB)", 0, False, bar="Size (MB)"),
    )
}


def base_name(name: str) -> str:
    """The metric that a detail is about."""
    return re.sub(r"_(at_\d+|of_[\w-]+|ci95_low|ci95_high)$", "", name)


def is_of_harness(name: str) -> bool:
    return "/" in name


def metric_named(name: str) -> Metric:
    """The metric of that name, or that a detail is about; one of the harness has its own name.

    Raises InputError if there is none.
    """
    if is_of_harness(name):
        return Metric(name, name)
    if metric := METRICS.get(base_name(name)):
        return metric
    raise InputError(f"{name} is no metric; valid: {', '.join(METRICS)}")
