"""Write an evaluation as report.html: one self-contained page, the verdict first, no network."""

import io
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from steps.config import Config

# Metric -> label with its unit, digits after the point, and whether more is better (None: neither).
METRICS: dict[str, tuple[str, int, bool | None]] = {
    "perplexity": ("Perplexity", 2, False),
    "perplexity_ratio": ("Perplexity ratio, candidate / reference", 3, False),
    "kl_divergence": ("KL divergence (nats)", 3, False),
    "top1_agreement": ("Top-1 agreement (share of tokens)", 3, True),
    "scored_tokens": ("Tokens scored", 0, None),
    "ttft_s_p50": ("Time to first token, median (s)", 3, False),
    "prefill_tokens_per_s": ("Prefill (tokens/s)", 0, True),
    "decode_tokens_per_s": ("Decode (tokens/s)", 1, True),
    "load_s": ("Load (s)", 2, False),
    "peak_rss_mb": ("Peak resident memory (MB)", 0, False),
    "size_mb": ("Size on disk (MB)", 0, False),
}
PLOTS = {"size_mb": "Size (MB)", "peak_rss_mb": "Peak memory (MB)", "ttft_s_p50": "First token (s)"}
PLOTS |= {"prefill_tokens_per_s": "Prefill (tokens/s)", "decode_tokens_per_s": "Decode (tokens/s)"}


def write_report(
    evaluation: dict[str, Any], config: Config, versions: dict[str, str], path: Path
) -> None:
    """Render steps/report.html.j2 from an Evaluation's fields."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    rows = []
    for metric, (label, digits, more_is_better) in METRICS.items():
        values = [evaluation[f"{side}_metrics"].get(metric) for side in ("candidate", "reference")]
        if any(value is not None for value in values):
            rows.append(
                (
                    label,
                    *[formatted(value, digits) for value in values],
                    comparison(values, more_is_better),
                )
            )
    page = environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        model=config.model,
        target=config.target,
        settings=config.evaluate,
        rows=rows,
        gates=[
            (METRICS.get(g["metric"], (g["metric"],))[0], (formatted(g["value"], 3), bounds(g)), g)
            for g in evaluation["gates"]
        ],
        plot=plot(evaluation["candidate_metrics"], evaluation["reference_metrics"]),
        versions=versions,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path.write_text(page, encoding="utf-8")


def formatted(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def bounds(gate: dict[str, Any]) -> str:
    """A gate's bounds in signs."""
    sides = (("min", "≥"), ("max", "≤"))
    return " and ".join(f"{sign} {gate[side]:g}" for side, sign in sides if gate[side] is not None)


def comparison(values: list[float | None], more_is_better: bool | None) -> str:
    """How the candidate stands to the reference, as a factor, whichever way is better."""
    candidate, reference = values
    if more_is_better is None or not candidate or not reference:
        return ""
    factor = candidate / reference if more_is_better else reference / candidate
    return f"{factor:.1f}× better" if factor >= 1 else f"{1 / factor:.1f}× worse"


def plot(candidate: dict[str, float], reference: dict[str, float]) -> str:
    """Bars of both models side by side, as an SVG element."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PLOTS), figsize=(11, 2.8), layout="constrained")
    for axis, (metric, label) in zip(axes, PLOTS.items(), strict=True):
        values = [reference.get(metric, 0), candidate.get(metric, 0)]
        bars = axis.bar(["reference", "candidate"], values, color=["#9aa5b1", "#2f6fab"], width=0.6)
        axis.bar_label(
            bars,
            labels=[f"{v:,.3g}" if v < 100 else f"{v:,.0f}" for v in values],
            fontsize=9,
            padding=2,
        )
        axis.set_title(label, fontsize=10)
        axis.margins(y=0.18)
        axis.set_yticks([])
        axis.tick_params(axis="x", labelsize=9, length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
