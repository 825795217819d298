"""Hold metrics against gates: constant bounds, or factors of another model's metrics."""

import math
from collections.abc import Mapping

from slm.config import Config
from slm.config.model import Baseline, Gate
from slm.errors import InputError
from slm.evaluation.metrics import base_name, metric_named
from slm.records import Judged

Baselines = Mapping[Baseline, Mapping[str, float] | None]


def gates_of(config: Config) -> dict[str, Gate]:
    """The gates of conf/evaluate, replaced by name by those of the model's file.

    Raises InputError if one bounds a metric that nothing measures.
    """
    gates = {**config.evaluate.gates, **config.model.gates}
    for name, gate in gates.items():
        metric = gate.metric or name
        try:
            metric_named(metric)
        except InputError as error:
            raise InputError(f"the gate {name} bounds {base_name(metric)}: {error}") from error
    return gates


def judge(
    gates: dict[str, Gate], metrics: Mapping[str, float], baselines: Baselines
) -> list[Judged]:
    """Hold each gate against its metric; a missing or NaN number fails it.

    A gate of the reference or the champion bounds the metric by factors of that model's value. If
    there is no such model (its baseline is None: no champion yet), any number passes.
    """
    return [judge_one(name, gate, metrics, baselines) for name, gate in gates.items()]


def judge_one(name: str, gate: Gate, metrics: Mapping[str, float], baselines: Baselines) -> Judged:
    metric = gate.metric or name
    value = metrics.get(metric, math.nan)
    unit, absent = 1.0, False
    if gate.of is not Baseline.constant:
        baseline = baselines.get(gate.of)
        absent = baseline is None
        unit = (baseline or {}).get(metric, math.nan)
    low = None if gate.min is None else gate.min * unit
    high = None if gate.max is None else gate.max * unit
    within = (low is None or value >= low) and (high is None or value <= high)
    is_factor = gate.of is not Baseline.constant
    return Judged(
        name=name,
        metric=metric,
        value=value,
        of=gate.of,
        passed=not math.isnan(value) and (absent or within),
        min=low,
        max=high,
        min_factor=gate.min if is_factor else None,
        max_factor=gate.max if is_factor else None,
    )
