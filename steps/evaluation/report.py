"""Write an evaluation down: report.html, one page that needs no network, and model_card.md."""

import io
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from steps.config import Config
from steps.evaluation.tasks import failures

# Metric -> label with its unit, digits after the point, and whether more is better (None: neither).
METRICS: dict[str, tuple[str, int, bool | None]] = {
    "perplexity": ("Perplexity", 2, False),
    "perplexity_ratio": ("Perplexity ratio, to the checkpoint", 3, False),
    "kl_divergence": ("KL divergence, mean (nats)", 3, False),
    "kl_divergence_p99": ("KL divergence, 99th percentile (nats)", 2, False),
    "top1_agreement": ("Top-1 agreement (share of tokens)", 3, True),
    "greedy_prefix_tokens": ("Greedy answers agree for (tokens, mean)", 1, True),
    "scored_tokens": ("Tokens scored", 0, None),
    "task_accuracy": ("Task accuracy (share of prompts)", 3, True),
    "degenerate_share": ("Degenerate answers (share)", 3, False),
    "ttft_s_p50": ("Time to first token of the longest prompts, median (s)", 3, False),
    "ttft_s_p95": ("Time to first token of the longest prompts, 95th percentile (s)", 3, False),
    "prefill_tokens_per_s": ("Prefill of the longest prompts (tokens/s)", 0, True),
    "decode_tokens_per_s": ("Decode (tokens/s)", 1, True),
    "batch_tokens_per_s": ("Batch throughput, prefill included (tokens/s)", 1, True),
    "load_s": ("Load (s)", 2, False),
    "peak_rss_mb": ("Peak resident memory (MB)", 0, False),
    "size_mb": ("Size on disk (MB)", 0, False),
}
# Metrics that say yes or no.
CHECKS = {
    "loads": "Loads",
    "chat_template_match": "Chat template and tokenizer are the checkpoint's",
    "stop_token_honoured": "Stops at its end tokens",
    "deterministic": "The same seed gives the same answer",
}
# Metrics of each prompt length, as the page heads them in this order -> digits after the point.
AT_LENGTH = {"ttft_s_p50": 3, "prefill_tokens_per_s": 0, "decode_tokens_per_s": 1}
BARS = {
    "size_mb": "Size (MB)",
    "peak_rss_mb": "Peak memory (MB)",
    "load_s": "Load (s)",
    "perplexity": "Perplexity",
    "prefill_tokens_per_s": "Prefill (tokens/s)",
    "decode_tokens_per_s": "Decode (tokens/s)",
    "batch_tokens_per_s": "Batch (tokens/s)",
    "task_accuracy": "Task accuracy",
}
SIDES = {"reference": "checkpoint", "champion": "champion", "candidate": "ONNX"}
COLOURS = {"reference": "#9aa5b1", "champion": "#c9a227", "candidate": "#2f6fab"}
CARD_LIMIT = 5000  # characters of a version's description, in MLflow's database


def write_report(
    evaluation: dict[str, Any], about: dict[str, Any], config: Config, folder: Path
) -> tuple[Path, str]:
    """Render report.html and model_card.md from an Evaluation's fields, and what is known `about`.

    `about` has the series of both sides, machine, versions and digests of weights. Returns the
    report's path and the card's text.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
    )
    facts = {
        "evaluation": evaluation,
        "about": about,
        "model": config.model,
        "target": config.target,
        "settings": config.evaluate,
        "rows": rows(evaluation),
        "lengths": lengths(evaluation, config.evaluate.prompt_lengths),
        "gates": [
            (label(gate), shown_value(gate), bounds(gate), gate) for gate in evaluation["gates"]
        ],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    drawings = {"bars": bars(evaluation), "lines": lines(evaluation, about["series"])}
    page = environment.get_template("report.html.j2")
    report = folder / "report.html"
    report.write_text(page.render(**facts, **drawings, failures=failures), encoding="utf-8")
    card = environment.get_template("model_card.md.j2").render(**facts).strip() + "\n"
    card = card if len(card) <= CARD_LIMIT else card[: CARD_LIMIT - 2] + "…\n"
    (folder / "model_card.md").write_text(card, encoding="utf-8")
    return report, card


def rows(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of each metric: label, candidate, its interval, checkpoint, champion, two comparisons."""
    found: list[tuple[str, ...]] = []
    measured = evaluation["candidate_metrics"] | evaluation["reference_metrics"]
    of_harness = {metric: (metric, 3, None) for metric in measured if "/" in metric}
    for metric, (name, digits, more_is_better) in {**METRICS, **of_harness}.items():
        values = {side: evaluation[f"{side}_metrics"].get(metric) for side in SIDES}
        if all(value is None for value in values.values()):
            continue
        ends = [f"{metric}_ci95_{end}" for end in ("low", "high")]
        interval = [evaluation["candidate_metrics"].get(end) for end in ends]
        found.append(
            (
                name,
                formatted(values["candidate"], digits),
                " to ".join(formatted(end, digits) for end in interval if end is not None),
                formatted(values["reference"], digits),
                comparison(values["candidate"], values["reference"], more_is_better),
                formatted(values["champion"], digits),
                comparison(values["candidate"], values["champion"], more_is_better),
            )
        )
    return found


def lengths(evaluation: dict[str, Any], prompt_lengths: list[int]) -> list[list[str]]:
    """Of each prompt length: its tokens, then candidate and checkpoint of each timed metric."""
    return [
        [f"{length:,}"]
        + [
            formatted(evaluation[f"{side}_metrics"].get(f"{metric}_at_{length}"), digits)
            for metric, digits in AT_LENGTH.items()
            for side in ("candidate", "reference")
        ]
        for length in prompt_lengths
    ]


def label(gate: dict[str, Any]) -> str:
    """The metric in words, and the gate's name where it is another."""
    metric = gate["metric"]
    words = CHECKS.get(metric) or METRICS.get(metric, (metric,))[0]
    return words if gate["name"] == metric else f"{words}: {gate['name']}"


def shown_value(gate: dict[str, Any]) -> str:
    if gate["metric"] in CHECKS:
        return "not tried" if math.isnan(gate["value"]) else "yes" if gate["value"] else "no"
    return formatted(gate["value"], METRICS.get(gate["metric"], ("", 3))[1])


def bounds(gate: dict[str, Any]) -> str:
    """A gate's bounds in signs, and whose metric they are factors of."""
    if gate["metric"] in CHECKS:
        return "yes"
    shown = []
    for side, sign in (("min", "≥"), ("max", "≤")):
        if (factor := gate["factors"][side]) is not None:
            digits = METRICS.get(gate["metric"], ("", 3))[1]
            bound = f"{factor:g}" if gate["of"] == "constant" else formatted(gate[side], digits)
            whose = "" if gate["of"] == "constant" else f" ({factor:g} × {gate['of']})"
            shown.append(f"{sign} {bound}{whose}")
    return " and ".join(shown)


def formatted(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def comparison(candidate: float | None, other: float | None, more_is_better: bool | None) -> str:
    """How the candidate stands to another model, as a factor, whichever way is better."""
    if more_is_better is None or not candidate or not other:
        return ""
    factor = candidate / other if more_is_better else other / candidate
    if 0.995 <= factor <= 1.005:
        return "the same"
    digits = 2 if 0.5 < factor < 2 else 1
    return f"{factor:.{digits}f}× better" if factor > 1 else f"{1 / factor:.{digits}f}× worse"


def bars(evaluation: dict[str, Any]) -> str:
    """Bars of the models side by side, as an SVG element."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    sides = [side for side in SIDES if evaluation[f"{side}_metrics"]]
    figure = Figure(figsize=(11, 5), layout=ConstrainedLayoutEngine(h_pad=0.12))
    for axis, (metric, title) in zip(figure.subplots(2, 4).flat, BARS.items(), strict=True):
        values = [evaluation[f"{side}_metrics"].get(metric, 0) for side in sides]
        colours = [COLOURS[side] for side in sides]
        drawn = axis.bar([SIDES[side] for side in sides], values, color=colours, width=0.6)
        shown = [f"{v:,.3g}" if v < 100 else f"{v:,.0f}" for v in values]
        axis.bar_label(drawn, labels=shown, fontsize=9, padding=2)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.18)
        axis.set_yticks([])
        axis.tick_params(axis="x", labelsize=9, length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    return svg(figure)


def lines(evaluation: dict[str, Any], series: dict[str, dict[str, Any]]) -> str:
    """KL divergence over positions, and first-token latency over percentiles, as an SVG element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    divergence, latency = figure.subplots(1, 2)
    if points := series["candidate"].get("kl_by_position"):
        mean = evaluation["candidate_metrics"]["kl_divergence"]
        divergence.plot(*zip(*points, strict=True), color=COLOURS["candidate"], marker=".")
        divergence.axhline(mean, color="#9aa5b1", linestyle=":", label=f"mean {mean:.3g}")
        divergence.legend(frameon=False, fontsize=9)
    divergence.set_title("KL divergence over the window", fontsize=10)
    divergence.set_xlabel("position (tokens)", fontsize=9)
    divergence.set_ylabel("nats", fontsize=9)
    for side in ("reference", "candidate"):
        if seconds := sorted(series[side].get("ttft_s", [])):
            percentiles = [100 * (i + 0.5) / len(seconds) for i in range(len(seconds))]
            latency.plot(percentiles, seconds, color=COLOURS[side], marker=".", label=SIDES[side])
            latency.legend(frameon=False, fontsize=9)
    latency.set_title("Time to first token of the longest prompts, by percentile", fontsize=10)
    latency.set_xlabel("percentile", fontsize=9)
    latency.set_ylabel("s", fontsize=9)
    for axis in (divergence, latency):
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    latency.set_xlim(0, 100)
    return svg(figure)


def svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
