"""Prompts with checkable answers: reading them, checking answers, MLflow's evaluation page.

A prompt is a row of MLflow's evaluation datasets, https://mlflow.org/docs/latest/genai/datasets/:

    {"inputs": {"messages": [{"role": "user", "content": "The capital of France?"}]},
     "expectations": {"contains": "Paris"}}

`max_tokens` may stand in its inputs. Without expectations its answers are shown and not judged.
"""

import json
import logging
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import mlflow
from mlflow.exceptions import MlflowException

from slm.errors import is_away, one_line
from slm.records import AnsweredPrompt
from slm.sources.rows import MESSAGES

log = logging.getLogger("slm.evaluate")


def exact_match(answer: str, expected: str) -> bool:
    """The answer is the expected text, white space around it aside."""
    return answer.strip() == expected.strip()


def contains(answer: str, expected: str | list[str]) -> bool:
    """The expected text, or one of several, is in the answer, in upper or lower case."""
    texts = [expected] if isinstance(expected, str) else expected
    return any(text.casefold() in answer.casefold() for text in texts)


def regex(answer: str, expected: str) -> bool:
    """The pattern is found in the answer."""
    return re.search(expected, answer) is not None


def json_schema(answer: str, expected: dict[str, Any]) -> bool:
    """The answer, a Markdown fence around it aside, is JSON that the schema allows."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", answer, re.DOTALL)
    try:
        jsonschema.validate(json.loads(fenced.group(1) if fenced else answer), expected)
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    return True


MATCHERS: dict[str, Callable[[str, Any], bool]] = {
    check.__name__: check for check in (exact_match, contains, regex, json_schema)
}


TEXT = {"type": "string"}
# What a row may be, as a JSON schema.
PROMPT = {
    "required": ["inputs"],
    "properties": {
        "inputs": {
            "type": "object",
            "required": ["messages"],
            "properties": {
                "messages": MESSAGES,
                "max_tokens": {"type": "integer", "minimum": 1},
            },
        },
        "expectations": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "exact_match": TEXT,
                "contains": {"anyOf": [TEXT, {"type": "array", "minItems": 1, "items": TEXT}]},
                "regex": TEXT,
                "json_schema": {"type": "object"},
            },
        },
    },
}
VALIDATOR = jsonschema.validators.validator_for(PROMPT)(PROMPT)  # made once: that takes a while


def require_prompt(row: dict[str, Any]) -> None:
    """Raise ValueError where a prompt is malformed."""
    error = jsonschema.exceptions.best_match(VALIDATOR.iter_errors(row))
    if error is not None:
        raise ValueError(f"is malformed at {error.json_path}: {error.message}") from error
    for name, expected in (row.get("expectations") or {}).items():
        try:
            if name == "json_schema":
                jsonschema.validators.validator_for(expected).check_schema(expected)
            MATCHERS[name]("{}", expected)  # resolves what a schema refers to
        except Exception as error:  # of re, jsonschema or referencing
            raise ValueError(f"expects a {name} that is none: {error}") from error


def missed(answer: str, expectations: dict[str, Any]) -> list[str]:
    """The expectations that an answer does not meet, in words."""
    return [
        f"{name}: {json.dumps(expected, ensure_ascii=False)}"
        for name, expected in expectations.items()
        if not MATCHERS[name](answer, expected)
    ]


def accuracy(prompts: list[dict[str, Any]], answers: list[str]) -> dict[str, float]:
    """`task_accuracy`: the share of the checkable prompts whose answer meets its expectations."""
    correct = [
        not missed(answer, prompt["expectations"])
        for prompt, answer in zip(prompts, answers, strict=True)
        if prompt.get("expectations")
    ]
    return {"task_accuracy": sum(correct) / len(correct)} if correct else {}


def show_answers(answers: list[AnsweredPrompt], model_id: str) -> None:
    """Log every prompt with both answers as a trace of the run, with what was found of them.

    A tracking server that takes no traces, of an earlier MLflow say, costs no evaluation: the
    report has the answers too.
    """
    from mlflow.entities import Feedback
    from mlflow.genai.scorers import Scorer, scorer

    def correct(side: str) -> Scorer:
        @scorer(name=f"{side}_correct")
        def judge(outputs: dict[str, str], expectations: dict[str, Any]) -> Feedback | None:
            if not expectations:
                return None
            misses = missed(outputs[side], expectations)
            rationale = f"misses {'; '.join(misses)}" if misses else "meets its expectations"
            return Feedback(value=not misses, rationale=rationale)

        return judge

    data = [
        {
            "inputs": {"messages": answer.messages},
            "outputs": {"candidate": answer.candidate, "reference": answer.reference},
            "expectations": answer.expectations,
        }
        for answer in answers
    ]
    scorers = [correct("candidate"), correct("reference")]
    try:
        mlflow.genai.evaluate(data=data, scorers=scorers, model_id=model_id)
    except MlflowException as error:
        if is_away(one_line(error)):
            raise
        log.warning("the tracking server takes no traces: %s", one_line(error)[:200])
