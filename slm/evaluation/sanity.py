"""What a model must do whatever its quality: read its chat template, stop, repeat itself by seed.

Each check is a metric, 1 where it holds and 0 where not, with words for the latter.
"""

import json
from pathlib import Path

from slm.evaluation.models import Answer, Genai, Messages, Model, Transformers

CONVERSATIONS: list[Messages] = [
    [{"role": "user", "content": "Hello! What is 2 + 2?"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Une autre, s'il vous plaît."},
    ],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Is water wet?\n\nAnswer: "},
    ],
]
Checked = tuple[dict[str, float], dict[str, str]]


def write_expectations(model: Transformers, answers: list[Answer], out: Path) -> None:
    """Leave what the candidate is held to: rendered conversations, and how answers ended."""
    rendered = []
    for messages in CONVERSATIONS:
        try:
            rendered.append([messages, *model.render(messages)])
        except ValueError:  # a template that knows no system message, for one
            continue
    expected = {
        "rendered": rendered,
        "ended": [answer.ended for answer in answers],
        "end_tokens": model.end_tokens,
        "special_tokens": model.tokenizer.all_special_tokens,
    }
    (out / "expected.json").write_text(json.dumps(expected))


def check_sanity(model: Genai, answers: list[Answer], reference: Path) -> Checked:
    """The checks of a candidate that answered the prompts, as metrics and words."""
    expected = json.loads((reference / "expected.json").read_text())
    failures = {
        "chat_template_match": template_difference(model, expected["rendered"]),
        "stop_token_honoured": end_token_failure(model, expected["end_tokens"])
        or stop_failure(answers, expected["ended"], expected["special_tokens"]),
        "deterministic": seed_failure(model),
    }
    words = {name: failure for name, failure in failures.items() if failure}
    return {name: float(not failure) for name, failure in failures.items()}, words


def template_difference(model: Genai, expected: list[tuple[Messages, str, list[int]]]) -> str:
    """Where the model's chat template or tokenizer differs from the checkpoint's, in words."""
    for messages, text, tokens in expected:
        try:
            found, found_tokens = model.render(messages)
        except Exception as error:  # the runtime's class comes with the model
            return f"the chat template refuses {messages}: {error}"
        if found != text:
            return f"the chat template renders {found!r}, the checkpoint's {text!r}"
        if found_tokens != tokens:
            return f"the tokenizer encodes {text!r} as {found_tokens}, the checkpoint's as {tokens}"
    return ""


def end_token_failure(model: Genai, end_tokens: list[int]) -> str:
    """Whether the model lacks an end token of the checkpoint, in words.

    fetch saw to it that the token which ends a turn is among them: so this holds also against a
    checkpoint none of whose answers ended.
    """
    lacking = sorted(set(end_tokens) - set(model.end_tokens))
    return f"its end tokens lack {lacking}, at which the checkpoint ends" if lacking else ""


def stop_failure(answers: list[Answer], ended: list[bool], special_tokens: list[str]) -> str:
    """Whether the model runs past its end tokens, in words.

    Other answers end elsewhere, and rounding decides which of a few, so that a quarter as many ends
    as the checkpoint's are enough.
    """
    for answer in answers:
        for token in special_tokens:
            if token in answer.text:
                return f"the answer {answer.text[:200]!r} holds {token!r}"
    found = sum(answer.ended for answer in answers)
    if found < sum(ended) / 4:
        return f"{found} answers ended by themselves; {sum(ended)} of the checkpoint's did"
    return ""


def seed_failure(model: Genai) -> str:
    """Whether a seed gives two answers, in words."""
    conversation = [{"role": "user", "content": "Invent a name for a boat, and say why."}]
    sampling = {"temperature": 1.0, "seed": 7}
    first, second = (model.ask([conversation], 16, **sampling)[0].text for _ in range(2))
    return "" if first == second else f"seed 7 gave {first!r}, and then {second!r}"


def degenerate_share(model: Model, answers: list[Answer]) -> float:
    """The share of answers that are empty, or end in a loop."""
    return sum(is_degenerate(model.encode(a.text)) for a in answers) / len(answers)


def is_degenerate(tokens: list[int]) -> bool:
    """Whether tokens are none, or at least half of them (and 8) one pattern, four times or more."""
    if not tokens:
        return True
    for period in range(1, len(tokens) // 4 + 1):
        repeated = period
        while repeated < len(tokens) and tokens[-repeated - 1] == tokens[-repeated - 1 + period]:
            repeated += 1
        if repeated >= max(4 * period, 8, len(tokens) / 2):
            return True
    return False
