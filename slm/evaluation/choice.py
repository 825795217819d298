"""Choose among evaluated targets: what a budget allows, which of those that fit is best, and why.

A budget is conditions on metrics: "size_mb<=110 decode_tokens_per_s>=60".
"""

import math
import re
from dataclasses import dataclass

from slm.config.model import Gate
from slm.config.packaging import Evaluate
from slm.config.target import Objective
from slm.errors import InputError
from slm.evaluation.gates import judge
from slm.evaluation.metrics import is_of_harness, metric_named
from slm.records import Evaluation, Judged

CONDITION = re.compile(r"([\w/.-]+)\s*(<=|>=|<|>)\s*([^\s,;<>=]+)[\s,;]*")
EXAMPLE = '"size_mb<=110 decode_tokens_per_s>=60"'
# The metric that an objective goes by.
GOES_BY = {
    Objective.closest: "kl_divergence",
    Objective.smallest: "size_mb",
    Objective.fastest: "decode_tokens_per_s",
}


def budget_of(text: str | None, settings: Evaluate) -> dict[str, Gate]:
    """The conditions of a budget as gates, by how they are written; none if there is no budget.

    Raises InputError if it is none, names a metric that `settings` do not measure, or asks for what
    cannot be.
    """
    if text is None:
        return {}
    gates: dict[str, Gate] = {}
    rest = text.strip()
    while rest or not gates:
        match = CONDITION.match(rest)
        if match is None:
            raise InputError(
                f"budget={text!r} is no budget: {rest!r} is not <metric> <=, >=, < or > <number>. "
                f"Write conditions with spaces between, as in {EXAMPLE}."
            )
        metric, operator, number = match.groups()
        require_measured(metric, text, settings)
        gates[f"{metric}{operator}{number}"] = gate_of(metric, operator, number, text)
        rest = rest[match.end() :]
    for metric in {gate.metric for gate in gates.values()}:
        own = [gate for gate in gates.values() if gate.metric == metric]
        least = max((g.min for g in own if g.min is not None), default=-math.inf)
        if least > min((g.max for g in own if g.max is not None), default=math.inf):
            raise InputError(f"budget={text!r} is no budget: no {metric} can keep all of it.")
    return gates


def gate_of(metric: str, operator: str, number: str, text: str) -> Gate:
    """A condition as a gate; one that is strict begins at the next number."""
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise InputError(
            f"budget={text!r} is no budget: {metric} is held against {number!r}, which is no "
            f"number. Write it as in {EXAMPLE}; units stand in the metrics' names."
        )
    if operator in ("<", "<="):
        return Gate(
            max=math.nextafter(bound, -math.inf) if operator == "<" else bound, metric=metric
        )
    return Gate(min=math.nextafter(bound, math.inf) if operator == ">" else bound, metric=metric)


def require_measured(name: str, text: str, settings: Evaluate) -> None:
    """Raise InputError unless an evaluation with these settings measures the metric."""
    if is_of_harness(name):
        if name.split("/")[0] not in settings.harness.tasks:
            raise InputError(
                f"budget={text!r}: {name} is of a task that evaluate.harness.tasks "
                f"({', '.join(settings.harness.tasks) or 'none'}) does not name. Add it there."
            )
        return
    try:
        metric = metric_named(name)
    except InputError as error:
        raise InputError(f"budget={text!r}: {error}.") from error
    length = re.search(r"_at_(\d+)$", name)
    lengths = settings.prompt_lengths if metric.at_length else []
    if length and int(length[1]) not in lengths:
        valid = ", ".join(f"{metric.name}_at_{n}" for n in lengths) or metric.name
        raise InputError(f"budget={text!r}: {name} is not measured; valid: {valid}.")


@dataclass(frozen=True)
class Tried:
    """An evaluated target, and the budget held against its metrics."""

    name: str
    evaluation: Evaluation
    budget: list[Judged]

    @classmethod
    def of(cls, name: str, evaluation: Evaluation, budget: dict[str, Gate]) -> "Tried":
        return cls(name, evaluation, judge(budget, evaluation.candidate_metrics, {}))

    @property
    def fits(self) -> bool:
        return self.evaluation.verdict == "passed" and not self.missed

    @property
    def missed(self) -> list[Judged]:
        """The gates and the conditions of the budget that it does not keep."""
        return [judged for judged in (*self.evaluation.gates, *self.budget) if not judged.passed]

    @property
    def obstacles(self) -> list[str]:
        """In words, what keeps it from being chosen."""
        over = [f"budget: {judged.words()}" for judged in self.budget if not judged.passed]
        return [*self.evaluation.reasons, *over]

    @property
    def distance(self) -> float:
        """By how much it misses the bound that it misses most, as a share of the bound."""
        return max((shortfall(judged) for judged in self.missed), default=math.inf)


def shortfall(judged: Judged) -> float:
    """By how much a bound is missed, as a share of it; infinite without a number."""
    bounds = [bound for bound in (judged.min, judged.max) if bound is not None]
    distances = [abs(judged.value - bound) / abs(bound) if bound else math.inf for bound in bounds]
    return min((d for d in distances if not math.isnan(d)), default=math.inf)


def best(tried: list[Tried], objective: Objective) -> Tried | None:
    """The best that fits, of equals the first; None if none fits."""
    fitting = [one for one in tried if one.fits]
    metric = GOES_BY.get(objective)
    if metric is None:
        return fitting[0] if fitting else None
    sign = -1 if metric_named(metric).more_is_better else 1

    def rank(one: Tried) -> float:
        value = one.evaluation.candidate_metrics.get(metric, math.nan)
        return math.inf if math.isnan(value) else sign * value

    return min(fitting, key=rank, default=None)


def why(winner: Tried, tried: list[Tried], objective: Objective) -> str:
    """Why it was chosen, in words that can be read without the others' figures."""
    metric = GOES_BY.get(objective)
    others = [one for one in tried if one is not winner]
    if metric is None:
        return "the cheapest to make that fits"
    fitting = len([one for one in tried if one.fits])
    words = f"the {objective.value} of {fitting} that fit{'s' * (fitting == 1)}"
    words += f": {metric} {winner.evaluation.candidate_metrics[metric]:.4g}"
    if second := best(others, objective):
        words += f"; next {second.name} with {second.evaluation.candidate_metrics[metric]:.4g}"
    return words


def nearest(tried: list[Tried]) -> Tried:
    """Where none fits, the one whose worst miss is the least; it takes one that was measured."""
    return min(tried, key=lambda one: one.distance)
