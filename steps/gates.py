"""Hold metrics against gates: constant bounds, and factors of another model's metrics."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from steps.config import Baseline, Gate


def judge(
    gates: dict[str, Gate],
    metrics: dict[str, float],
    baselines: Mapping[Baseline, dict[str, float] | None],
) -> list[dict[str, Any]]:
    """Hold each gate against its metric; a missing or NaN number fails it.

    A gate `of` the checkpoint or the champion bounds the metric as a factor of theirs; where a
    baseline is None (there is no champion yet), any number keeps it. Each result has name, metric,
    value, of, factors, passed, and `min` and `max` in the metric's own unit.
    """
    results = []
    for name, gate in gates.items():
        metric = gate.metric or name
        value = metrics.get(metric, math.nan)
        factor, absent = 1.0, False
        if gate.of is not Baseline.constant:
            baseline = baselines.get(gate.of)
            absent = baseline is None
            factor = (baseline or {}).get(metric, math.nan)
        bounds = {
            side: None if bound is None else bound * factor
            for side, bound in (("min", gate.min), ("max", gate.max))
        }
        low = -math.inf if bounds["min"] is None else bounds["min"]
        high = math.inf if bounds["max"] is None else bounds["max"]
        results.append(
            {
                "name": name,
                "metric": metric,
                "value": value,
                "of": gate.of.value,
                "factors": {k: v for k, v in asdict(gate).items() if k in bounds},
                **bounds,
                "passed": not math.isnan(value) and (absent or low <= value <= high),
            }
        )
    return results


def explain(gate: dict[str, Any]) -> str:
    """A gate that was not kept, in words: the metric, its value, the bound, and by how much."""
    metric, value = gate["metric"], gate["value"]
    bounds = {side: gate[side] for side in ("min", "max") if gate[side] is not None}
    whose = "" if gate["of"] == "constant" else f" ({{factor:g}} of the {gate['of']}'s)"
    if math.isnan(value):
        return f"{metric} was not measured"
    if any(math.isnan(bound) for bound in bounds.values()):
        return f"{metric} was not measured of the {gate['of']}"
    for side, word, beyond in (("max", "above", value), ("min", "below", -value)):
        bound = bounds.get(side)
        if bound is not None and (difference := beyond - (bound if side == "max" else -bound)) > 0:
            of = whose.format(factor=gate["factors"][side] or 0)
            return f"{metric} is {value:.4g}, {word} {bound:.4g}{of} by {difference:.4g}"
    return f"{metric} is {value:.4g}"
