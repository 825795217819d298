"""Write an evaluation down: report.html, one page that needs no network, and model_card.md."""

import io
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from slm.config import Config
from slm.config.model import Baseline
from slm.digests import Provenance
from slm.evaluation.metrics import INTERVAL_ENDS, METRICS, Metric, is_of_harness, metric_named
from slm.evaluation.tasks import missed
from slm.records import Evaluation, Judged
from slm.running.tracking import TEXT_LIMIT

SIDES = {"reference": "checkpoint", "champion": "champion", "candidate": "ONNX"}
OF_KIND = [metric for metric in METRICS.values() if metric.of_kind]
COLOURS = {"reference": "#9aa5b1", "champion": "#c9a227", "candidate": "#2f6fab"}


@dataclass(frozen=True)
class About:
    """What a report says besides the evaluation: the drawn `series` of both sides, by name, the
    machine, versions of libraries, SHA-256 of weights by file, and the ONNX model's provenance."""

    series: dict[str, dict[str, Any]]
    machine: str
    versions: dict[str, str]
    digests: dict[str, str]
    provenance: Provenance


def templates() -> Environment:
    """The templates beside this file; what they show in HTML is escaped."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
    )


def write_report(
    evaluation: Evaluation, about: About, config: Config, folder: Path
) -> tuple[Path, str]:
    """Write report.html and model_card.md; return the report's path and the card's text."""
    environment = templates()
    facts = {
        "evaluation": evaluation,
        "about": about,
        "model": config.model,
        "target": config.target,
        "settings": config.evaluate,
        "rows": rows(evaluation),
        "lengths": lengths(evaluation, config.evaluate.prompt_lengths),
        "kinds": kinds(evaluation),
        "kind_metrics": OF_KIND,
        "gates": [
            (label(gate), shown_value(gate), bounds(gate), gate) for gate in evaluation.gates
        ],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    drawings = {"bars": bars(evaluation), "lines": lines(evaluation, about.series)}
    page = environment.get_template("report.html.j2")
    report = folder / "report.html"
    report.write_text(page.render(**facts, **drawings, missed=missed), encoding="utf-8")
    card = environment.get_template("model_card.md.j2").render(**facts).strip() + "\n"
    card = card if len(card) <= TEXT_LIMIT else card[: TEXT_LIMIT - 2] + "…\n"
    (folder / "model_card.md").write_text(card, encoding="utf-8")
    return report, card


def shown_metrics(evaluation: Evaluation) -> list[Metric]:
    """The metrics that some side has a number of, checks and details aside, the harness's last."""
    measured = evaluation.reference_metrics | evaluation.candidate_metrics
    known = [metric for metric in METRICS.values() if not metric.check]
    known += [metric_named(name) for name in measured if is_of_harness(name)]
    everything = measured | evaluation.champion_metrics
    return [metric for metric in known if metric.name in everything]


def rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Of each metric: label, candidate, its interval, reference, champion, two comparisons."""
    found: list[tuple[str, ...]] = []
    for metric in shown_metrics(evaluation):
        values = {side: evaluation.metrics(side).get(metric.name) for side in SIDES}
        ends = [evaluation.candidate_metrics.get(f"{metric.name}_{end}") for end in INTERVAL_ENDS]
        found.append(
            (
                metric.label,
                formatted(values["candidate"], metric.digits),
                " to ".join(formatted(end, metric.digits) for end in ends if end is not None),
                formatted(values["reference"], metric.digits),
                comparison(values["candidate"], values["reference"], metric.more_is_better),
                formatted(values["champion"], metric.digits),
                comparison(values["candidate"], values["champion"], metric.more_is_better),
            )
        )
    return found


def lengths(evaluation: Evaluation, prompt_lengths: list[int]) -> list[list[str]]:
    """Of each prompt length: its tokens, then candidate and reference of each timed metric."""
    timed = [metric for metric in METRICS.values() if metric.at_length]
    return [
        [f"{length:,}"]
        + [
            formatted(evaluation.metrics(side).get(f"{metric.name}_at_{length}"), metric.digits)
            for metric in timed
            for side in ("candidate", "reference")
        ]
        for length in prompt_lengths
    ]


def kinds(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """Of each kind of text, if there are several: its name, then the candidate's metrics of it."""
    found, first = evaluation.candidate_metrics, f"{OF_KIND[0].name}_of_"
    names = sorted(name.removeprefix(first) for name in found if name.startswith(first))
    return [
        (name, [formatted(found.get(f"{m.name}_of_{name}"), m.digits) for m in OF_KIND])
        for name in names
    ]


def label(gate: Judged) -> str:
    """The metric in words, and the gate's name if it is another."""
    words = metric_named(gate.metric).label
    return words if gate.name == gate.metric else f"{words}: {gate.name}"


def shown_value(gate: Judged) -> str:
    metric = metric_named(gate.metric)
    if metric.check:
        return "not tried" if math.isnan(gate.value) else "yes" if gate.value else "no"
    return formatted(gate.value, metric.digits)


def bounds(gate: Judged) -> str:
    """A gate's bounds in signs, and the model whose metric they are factors of."""
    metric = metric_named(gate.metric)
    if metric.check:
        return "yes"
    shown = []
    for sign, bound, factor in (
        ("≥", gate.min, gate.min_factor),
        ("≤", gate.max, gate.max_factor),
    ):
        if bound is None:
            continue
        if gate.of is Baseline.constant:
            shown.append(f"{sign} {bound:g}")
        else:
            shown.append(
                f"{sign} {formatted(bound, metric.digits)} ({factor:g} × {SIDES[gate.of.value]})"
            )
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


def bars(evaluation: Evaluation) -> str:
    """Bars of the models side by side, as an SVG element."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    sides = [side for side in SIDES if evaluation.metrics(side)]
    drawn_metrics = [metric for metric in METRICS.values() if metric.bar]
    figure = Figure(figsize=(11, 5), layout=ConstrainedLayoutEngine(h_pad=0.12))
    for axis, metric in zip(figure.subplots(2, 4).flat, drawn_metrics, strict=True):
        values = [evaluation.metrics(side).get(metric.name, 0) for side in sides]
        colours = [COLOURS[side] for side in sides]
        drawn = axis.bar([SIDES[side] for side in sides], values, color=colours, width=0.6)
        shown = [f"{v:,.3g}" if v < 100 else f"{v:,.0f}" for v in values]
        axis.bar_label(drawn, labels=shown, fontsize=9, padding=2)
        axis.set_title(metric.bar, fontsize=10)
        axis.margins(y=0.18)
        axis.set_yticks([])
        axis.tick_params(axis="x", labelsize=9, length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    return svg(figure)


def lines(evaluation: Evaluation, series: dict[str, dict[str, Any]]) -> str:
    """KL divergence over positions, and first-token latency over percentiles, as an SVG element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    divergence, latency = figure.subplots(1, 2)
    if points := series["candidate"].get("kl_by_position"):
        mean = evaluation.candidate_metrics["kl_divergence"]
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
