"""Time a loaded model: first token, prefill and decode at several prompt lengths, a batch."""

import statistics
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from slm.evaluation.models import Answer, Messages, Model

# Something to write much about, so that answers seldom end before they are timed.
TOPICS = ("a lighthouse", "a market", "a train journey", "an old library", "a storm", "a bridge")

LEAST_TOKENS = 4  # of an answer whose decoding is timed


def measure_speed(
    model: Model,
    texts: list[str],
    prompt_lengths: list[int],
    repeats: int,
    max_new_tokens: int,
    batch_size: int,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics, and the series `ttft_s` (seconds of each timed answer).

    Time to first token is that of an answer of one token; decoding is timed over the tokens after
    it, in an answer of `max_new_tokens` to another prompt of that length. No prompt comes twice.
    Metrics that name no length are those at the longest, but for decoding, which is the median of
    all.
    """
    passages = Passages(model, texts)
    model.ask([passages.next(16)], 2)  # warm-up
    metrics: dict[str, float] = {}
    first_token_s: dict[int, list[float]] = {}
    decodes: list[float] = []
    for length in tqdm(sorted(prompt_lengths), desc="speed", leave=False):
        ttft, prefill, answers = [], [], []
        for _ in range(repeats):
            seconds, [answer] = timed(model, [passages.next(length)], 1)
            ttft.append(seconds)
            prefill.append(answer.prompt_tokens / seconds)
            answers.append(timed(model, [passages.next(length)], max_new_tokens))
        first_token_s[length] = ttft
        decode = decode_rates(answers, statistics.median(ttft))
        decodes += decode
        metrics[f"ttft_s_p50_at_{length}"] = statistics.median(ttft)
        metrics[f"prefill_tokens_per_s_at_{length}"] = statistics.median(prefill)
        metrics[f"decode_tokens_per_s_at_{length}"] = median(decode)
    longest = max(prompt_lengths)
    batch = [passages.next(min(prompt_lengths)) for _ in range(batch_size)]
    seconds, answers_of_batch = timed(model, batch, max_new_tokens)
    metrics |= {
        "ttft_s_p50": metrics[f"ttft_s_p50_at_{longest}"],
        "ttft_s_p95": float(np.percentile(first_token_s[longest], 95)),
        "prefill_tokens_per_s": metrics[f"prefill_tokens_per_s_at_{longest}"],
        "decode_tokens_per_s": median(decodes),
        "batch_tokens_per_s": sum(answer.tokens for answer in answers_of_batch) / seconds,
    }
    return metrics, {"ttft_s": first_token_s[longest]}


def decode_rates(timed_answers: list[tuple[float, list[Answer]]], ttft_s: float) -> list[float]:
    """Tokens/s after the first token, of the answers that took long enough to tell."""
    return [
        (answer.tokens - 1) / (seconds - ttft_s)
        for seconds, [answer] in timed_answers
        if answer.tokens >= LEAST_TOKENS and seconds > ttft_s
    ]


class Passages:
    """Conversations of about a given number of tokens, each with a passage of its own."""

    def __init__(self, model: Model, texts: list[str]) -> None:
        self.text = "\n\n".join(texts)
        self.characters_per_token = len(self.text) / len(model.encode(self.text))
        self.given = 0

    def next(self, tokens: int) -> Messages:
        self.given += 1
        start = self.given * 997 % len(self.text)  # a prime, so that no two begin alike
        characters = round(tokens * self.characters_per_token)
        text = self.text[start:] + self.text * (1 + characters // len(self.text))
        topic = TOPICS[self.given % len(TOPICS)]
        question = f"Here is a passage. {text[:characters]} Now write a long story about {topic}."
        return [{"role": "user", "content": question}]


def timed(
    model: Model, conversations: list[Messages], max_tokens: int
) -> tuple[float, list[Answer]]:
    start = time.perf_counter()
    answers = model.ask(conversations, max_tokens)
    return time.perf_counter() - start, answers


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")
