"""Targets side by side: a table, and a plot of size, speed and closeness, of which none is free."""

import csv
import io
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from rich.console import Console

from slm.config.model import Gate
from slm.digests import digest_of
from slm.evaluation.metrics import metric_named
from slm.evaluation.report import formatted, svg, templates
from slm.evaluation.summary import table
from slm.running.summary import Summary
from slm.running.whole import write_whole
from slm.running.work import enum_value

# What is weighed against each other; a row is on the front if no other is at least as good in all.
WEIGHED = ("size_mb", "decode_tokens_per_s", "kl_divergence")
SHORT = {
    "size_mb": "MB",
    "decode_tokens_per_s": "decode tokens/s",
    "kl_divergence": "KL",
    "perplexity_ratio": "ppl ratio",
    "top1_agreement": "top-1",
    "task_accuracy": "tasks",
    "ttft_s_p50": "TTFT s",
    "peak_rss_mb": "peak MB",
}
COLUMNS = tuple(SHORT)


@dataclass(frozen=True)
class Row:
    """What became of one of them.

    `verdict` is "" if it was not judged: for the `error`, or for what `obstacles` say. These are
    all that keep it from being taken. `front` says that no other passes and is as good in all that
    is WEIGHED.
    """

    name: str
    verdict: str
    metrics: dict[str, float]
    error: str = ""
    obstacles: list[str] = field(default_factory=list)
    registered: list[str] = field(default_factory=list)
    report: str = ""
    front: bool = False


@dataclass(frozen=True)
class Comparison:
    """Rows as they were tried, what they came to, the `chosen` one's name, and the budget."""

    title: str
    rows: list[Row]
    chosen: str = ""
    budget: dict[str, Gate] = field(default_factory=dict)


def row_of(told: Summary) -> Row:
    """How a job ended, as a row."""
    evaluated = told.steps.get("evaluate")
    return Row(
        name=told.label,
        verdict=told.verdict,
        metrics=told.metrics,
        error=told.error,
        obstacles=told.reasons or [told.error] * bool(told.error),
        registered=[f"{v.name} version {v.version} {v.alias}".strip() for v in told.registered],
        report=f"{evaluated.uri}/report.html" if evaluated else "",
    )


def with_front(rows: list[Row]) -> list[Row]:
    """The same rows, each saying whether it is on the front."""
    candidates = [row for row in rows if row.verdict == "passed" and is_weighed(row)]
    return [
        replace(row, front=row in candidates and not any(beats(o, row) for o in candidates))
        for row in rows
    ]


def is_weighed(row: Row) -> bool:
    return all(math.isfinite(row.metrics.get(name, math.nan)) for name in WEIGHED)


def beats(one: Row, other: Row) -> bool:
    """Whether one is as good in all that is weighed, and better in something."""
    signs = [1 if metric_named(name).more_is_better else -1 for name in WEIGHED]
    gains = [
        sign * (one.metrics[name] - other.metrics[name])
        for sign, name in zip(signs, WEIGHED, strict=True)
    ]
    return min(gains) >= 0 and max(gains) > 0


def publish(found: Comparison, folder: Path) -> Path:
    """Write page, table and plot, log them on the active run, and print the table.

    They lie in `folder`, under the digest of what they show. Returns the page.
    """
    found = replace(found, rows=with_front(found.rows))
    record = asdict(found)
    place = folder / digest_of(record)[:16]
    place.mkdir(parents=True, exist_ok=True)
    figure = drawn(found)
    if figure is not None:
        figure.savefig(place / "pareto.png", dpi=120)
    page = place / "comparison.html"
    columns = {SHORT[name]: metric_named(name) for name in COLUMNS}
    html = (
        templates()
        .get_template("comparison.html.j2")
        .render(
            found=found,
            columns=columns,
            plot=svg(figure) if figure is not None else "",
            formatted=formatted,
            verdict_of=verdict_of,
        )
    )
    write_whole(page, html)
    write_whole(place / "comparison.json", json.dumps(record, indent=2, default=enum_value) + "\n")
    write_whole(place / "comparison.csv", as_csv(found))
    mlflow.log_artifacts(str(place))
    rows = [[row.name, row.verdict, *(row.metrics.get(c) for c in COLUMNS)] for row in found.rows]
    mlflow.log_table(
        pd.DataFrame(rows, columns=["name", "verdict", *COLUMNS]), "tables/comparison.json"
    )
    show(found, page)
    return page


def as_csv(found: Comparison) -> str:
    """A line for each row, with all metrics that any of them has."""
    names = list(dict.fromkeys(name for row in found.rows for name in row.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "verdict", "front", "chosen", "obstacles", *names])
    for row in found.rows:
        own = [row.metrics.get(name, "") for name in names]
        told = [row.name, row.verdict, row.front, row.name == found.chosen]
        writer.writerow([*told, "; ".join(row.obstacles), *own])
    return text.getvalue()


def show(found: Comparison, page: Path) -> None:
    """Print what was found, the rows, and what stands in the way of those that were not taken."""
    console = Console(width=160, highlight=False)
    columns = {"": "right", "target": "left", "verdict": "left"}
    columns |= {SHORT[name]: "right" for name in COLUMNS}
    rows = [
        [
            f"{number}{'*' if row.name == found.chosen else ''}",
            row.name,
            verdict_of(row),
            *(formatted(row.metrics.get(n), metric_named(n).digits) for n in COLUMNS),
        ]
        for number, row in enumerate(found.rows, 1)
    ]
    console.print("", table("Side by side", columns, rows), "")
    for number, row in enumerate(found.rows, 1):
        for words in row.obstacles:
            console.print(f"  {number}: {words}", soft_wrap=True, markup=False)
    console.print(f"Comparison  {found.title}", soft_wrap=True, markup=False)
    console.print(f"Report      {page}", soft_wrap=True, markup=False)


def verdict_of(row: Row) -> str:
    """In a word or two."""
    shown = row.verdict.replace("_", " ") or ("error" if row.error else "not tried")
    over = ", over budget" if row.verdict == "passed" and row.obstacles else ""
    return f"{shown}{over}{', front' if row.front else ''}"


def drawn(found: Comparison) -> Any:
    """KL divergence against size and against speed, as a figure; None if nothing was measured.

    A full mark passed its gates, a ring did not; the chosen one has a star. Where the budget
    forbids, the ground is grey. Numbers are those of the table.
    """
    from matplotlib.figure import Figure

    rows = [(number, row) for number, row in enumerate(found.rows, 1) if is_weighed(row)]
    if not rows:
        return None
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    *across, closeness = WEIGHED
    for axis, name in zip(axes, across, strict=True):
        metric = metric_named(name)
        for number, row in rows:
            x, y = row.metrics[name], row.metrics[closeness]
            colour, passed = f"C{(number - 1) % 10}", row.verdict == "passed"
            chosen = row.name == found.chosen
            axis.scatter(
                [x],
                [y],
                s=260 if chosen else 90,
                marker="*" if chosen else "o",
                facecolors=colour if passed else "none",
                edgecolors="#1f2933" if row.front else colour,
                linewidths=1.5,
                zorder=3,
                label=f"{number}  {row.name}",
            )
            axis.annotate(
                str(number), (x, y), xytext=(9, 6), textcoords="offset points", fontsize=9
            )
        better = "more is better →" if metric.more_is_better else "← less is better"
        axis.set_xlabel(f"{metric.label}   {better}", fontsize=9)
        axis.margins(0.15)
        axis.tick_params(labelsize=9)
        axis.grid(color="#e4e7eb", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    if all(row.metrics[closeness] > 0 for _, row in rows):
        axes[0].set_yscale("log")
    axes[0].set_ylabel(f"{metric_named(closeness).label}   ↓ less is better", fontsize=9)
    for axis, name in zip(axes, across, strict=True):
        budget = list(found.budget.values())
        own = [gate for gate in budget if gate.metric == name]
        forbid(axis.get_xlim, axis.axvspan, axis.set_xlim, own)
        closest = [gate for gate in budget if gate.metric == closeness]
        forbid(axis.get_ylim, axis.axhspan, axis.set_ylim, closest)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def forbid(limits: Any, span: Any, set_limits: Any, gates: list[Gate]) -> None:
    """Grey out what a budget's conditions forbid along an axis, as far as it is shown."""
    low, high = limits()
    for gate in gates:
        if gate.max is not None and gate.max < high:
            span(max(gate.max, low), high, color="#9aa5b1", alpha=0.25, zorder=1)
        if gate.min is not None and gate.min > low:
            span(low, min(gate.min, high), color="#9aa5b1", alpha=0.25, zorder=1)
    set_limits(low, high)
