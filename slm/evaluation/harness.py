"""Tasks of EleutherAI's lm-evaluation-harness, on either flavor: an extra, installed by

    pip install -r requirements-harness.txt
    python -m steps.evaluate … evaluate.harness.tasks=[arc_easy] evaluate.harness.limit=200

https://github.com/EleutherAI/lm-evaluation-harness
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from slm.errors import InputError
from slm.evaluation.models import Model

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

MAX_LENGTH = 2048  # tokens of context and continuation together; what is longer is cut at its left


def require_harness(tasks: list[str]) -> None:
    """Raise InputError where tasks are asked for and the harness is not installed."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "evaluate.harness.tasks needs EleutherAI's lm-evaluation-harness: "
            "pip install -r requirements-harness.txt"
        )


def run_tasks(
    model: Model, tasks: list[str], limit: int | None, include: str | None
) -> dict[str, float]:
    """The tasks' metrics, as `<task>/<metric>`."""
    if not tasks:
        return {}
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        adapted(model), tasks=tasks, limit=limit, task_manager=TaskManager(include_path=include)
    )
    return {
        f"{task}/{name.removesuffix(',none').replace(',', '/')}": float(value)
        for task, values in results["results"].items()
        for name, value in values.items()
        if isinstance(value, (int, float)) and "stderr" not in name and "," in name
    }


def adapted(model: Model) -> "TemplateLM":
    """The model as the harness asks it: log-likelihoods of texts, and greedy completions."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapted(TemplateLM):
        backend = "causal"

        @property
        def eot_token_id(self) -> int:
            return model.end_token

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return model.encode(string)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            return [
                loglikelihood(model, context, continuation)
                for _, context, continuation in tqdm(requests, desc="harness", leave=False)
            ]

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            totals = []
            for [text] in (request.args for request in requests):
                rolling = get_rolling_token_windows(
                    model.encode(text), self.prefix_token_id, MAX_LENGTH, 1
                )
                windows = map(make_disjoint_window, rolling)
                totals.append(sum(loglikelihood(model, *window)[0] for window in windows))
            return totals

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            texts = []
            for context, settings in (request.args for request in requests):
                text = model.complete(context, settings.get("max_gen_toks", 256))
                until = settings.get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                texts.append(text)
            return texts

    return Adapted()


def loglikelihood(model: Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The log-likelihood of a continuation, and whether it is the greedy one."""
    tokens = [*context, *continuation][-MAX_LENGTH:]
    logp = model.log_probabilities(tokens[:-1])[-len(continuation) :]
    chosen = sum(float(row[token]) for row, token in zip(logp, continuation, strict=True))
    return chosen, logp.argmax(axis=-1).tolist() == continuation
