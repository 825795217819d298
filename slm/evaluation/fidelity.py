"""How close a model's next-token distributions are to its checkpoint's.

The checkpoint's tokens and log-probabilities are left on disk, and the candidate is compared with
them window by window, so that memory is bounded by one window.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slm.evaluation.metrics import INTERVAL_ENDS
from slm.evaluation.models import Messages, Model, Transformers

# Neighbouring tokens are not independent, so intervals resample blocks of them (the block
# bootstrap: Künsch 1989, https://doi.org/10.1214/aos/1176347265).
BLOCK = 32
RESAMPLES = 1000
KINDS = "kinds.json"  # beside the scored windows: the kind of each, "" if it has none
Scorer = Callable[[list[int]], np.ndarray]  # a Model's log_probabilities


def write_reference(
    model: Transformers,
    texts: list[str],
    long_text: str,
    window: int,
    max_tokens: int,
    out: Path,
    kinds: Sequence[str] = (),
) -> dict[str, float]:
    """Score the texts, each of a kind if `kinds` are given; leave tokens and log-probabilities.

    If the model has a length beyond which it reads otherwise, `window` tokens beyond it are scored
    besides, of the long text.
    """
    losses, blocks = [], Blocks()
    tokens_of = [model.tokenizer(text)["input_ids"] for text in texts]
    numbered = token_windows(tokens_of, window, max_tokens)
    windows = [tokens for _, tokens in numbered]
    own_kinds = [kinds[number] if kinds else "" for number, _ in numbered]
    scored = [len(tokens) - 1 for tokens in windows]
    if (point := model.turning_point) is not None:
        windows.append(long_window(model, long_text, min(point + window, model.context_length)))
        scored.append(len(windows[-1]) - point)
        own_kinds.append("")
    (out / KINDS).write_text(json.dumps(own_kinds))
    for i, tokens in enumerate(tqdm(windows, desc="scoring", leave=False)):
        logp = model.log_probabilities(tokens, last=scored[i] + 1)[:-1]
        losses.append(-logp[np.arange(len(logp)), tokens[-len(logp) :]])
        blocks.add(len(logp))
        np.save(out / f"tokens-{i:05}.npy", np.array(tokens))
        np.save(out / f"logp-{i:05}.npy", logp)
    loss = np.concatenate(losses)
    return {
        "scored_tokens": float(len(loss)),
        **bounded("perplexity", np.exp(loss.mean()), np.exp(blocks.interval_of_mean(loss))),
    }


def compare_with_reference(
    log_probabilities: Scorer, reference: Path
) -> tuple[dict[str, float], dict[str, Any]]:
    """Score the same tokens: perplexity, KL(reference || candidate) in nats, top-1 agreement.

    Returns metrics, with the ends of their 95 % intervals, and the series `kl_by_position`: pairs
    of the position in the window and the mean divergence about there. The tail is the last quarter
    of each window: faults of position show there. Where texts are of several kinds, ratio,
    divergence and agreement of each are `<metric>_of_<kind>`.
    """
    kinds = json.loads((reference / KINDS).read_text())
    losses, reference_losses, divergences, agreements, positions = [], [], [], [], []
    blocks, tails, tail_blocks = Blocks(), [], Blocks()
    for path in tqdm(sorted(reference.glob("tokens-*.npy")), desc="scoring", leave=False):
        tokens = np.load(path).tolist()
        p = np.load(path.with_name(path.name.replace("tokens", "logp")))
        # A graph may pad its vocabulary.
        q = log_probabilities(tokens)[-len(p) - 1 : -1, : p.shape[1]]
        rows, following = np.arange(len(p)), tokens[-len(p) :]
        losses.append(-q[rows, following])
        reference_losses.append(-p[rows, following])
        divergences.append((np.exp(p) * (p - q)).sum(axis=-1))
        agreements.append(p.argmax(axis=-1) == q.argmax(axis=-1))
        positions.append(len(tokens) - 1 - len(p) + rows)
        blocks.add(len(p))
        tails.append(positions[-1] >= 3 * (len(tokens) - 1) // 4)
        tail_blocks.add(int(tails[-1].sum()))
    loss, divergence = np.concatenate(losses), np.concatenate(divergences)
    loss_ratio = loss - np.concatenate(reference_losses)
    tail_ratio = loss_ratio[np.concatenate(tails)]
    agreement = np.concatenate(agreements).astype(float)
    own_kinds = np.repeat(kinds, [len(each) for each in losses])
    several = sorted(set(kinds) - {""})
    mean = blocks.interval_of_mean
    metrics = {
        "scored_tokens": float(len(loss)),
        **bounded("perplexity", np.exp(loss.mean()), np.exp(mean(loss))),
        **bounded("perplexity_ratio", np.exp(loss_ratio.mean()), np.exp(mean(loss_ratio))),
        **bounded(
            "perplexity_ratio_tail",
            np.exp(tail_ratio.mean()),
            np.exp(tail_blocks.interval_of_mean(tail_ratio)),
        ),
        **bounded("kl_divergence", divergence.mean(), mean(divergence)),
        **bounded(
            "kl_divergence_p99",
            np.percentile(divergence, 99),
            blocks.interval_of_percentile(divergence, 99),
        ),
        **bounded("top1_agreement", agreement.mean(), mean(agreement)),
    }
    for kind in several if len(several) > 1 else []:
        of = own_kinds == kind
        metrics |= {
            f"perplexity_ratio_of_{kind}": float(np.exp(loss_ratio[of].mean())),
            f"kl_divergence_of_{kind}": float(divergence[of].mean()),
            f"top1_agreement_of_{kind}": float(agreement[of].mean()),
        }
    series = {"kl_by_position": by_position(np.concatenate(positions), divergence)}
    return metrics, series


def bounded(metric: str, value: float, interval: np.ndarray) -> dict[str, float]:
    """A metric, and the ends of its 95 % interval under names of their own."""
    ends = zip(INTERVAL_ENDS, map(float, interval), strict=True)
    return {metric: float(value), **{f"{metric}_{end}": bound for end, bound in ends}}


class Blocks:
    """Block boundaries of the scored tokens, and bootstrap intervals over those blocks."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.length = 0

    def add(self, tokens: int) -> None:
        """A window of so many tokens, cut into blocks."""
        self.starts += range(self.length, self.length + tokens, BLOCK)
        self.length += tokens

    def resamples(self) -> np.ndarray:
        """The blocks of each resample, drawn with replacement: int [resamples, blocks]."""
        generator = np.random.default_rng(0)
        return generator.integers(len(self.starts), size=(RESAMPLES, len(self.starts)))

    def interval_of_mean(self, values: np.ndarray) -> np.ndarray:
        """The 95 % percentile interval of the mean of one value for each token."""
        sizes = np.diff([*self.starts, self.length])
        sums = np.add.reduceat(values.astype(float), self.starts)
        drawn = self.resamples()
        means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
        return np.percentile(means, [2.5, 97.5])

    def interval_of_percentile(self, values: np.ndarray, percentile: float) -> np.ndarray:
        """The same of a percentile."""
        blocks = np.split(values, self.starts[1:])
        resampled = [
            np.percentile(np.concatenate([blocks[i] for i in drawn]), percentile)
            for drawn in self.resamples()
        ]
        return np.percentile(resampled, [2.5, 97.5])


def by_position(positions: np.ndarray, values: np.ndarray, bins: int = 32) -> list[list[float]]:
    """The mean value in each of `bins` stretches of the window, with the stretch's middle."""
    edges = np.linspace(0, positions.max() + 1, bins + 1)
    which = np.digitize(positions, edges) - 1
    means = [(i, values[which == i]) for i in range(bins)]
    return [
        [float(edges[i] + edges[i + 1]) / 2, float(found.mean())]
        for i, found in means
        if len(found)
    ]


def token_windows(
    texts: list[list[int]], window: int, max_tokens: int
) -> list[tuple[int, list[int]]]:
    """Cut each text's tokens into windows of two or more, `max_tokens` in all, by text's number."""
    windows: list[tuple[int, list[int]]] = []
    left = max_tokens
    for number, tokens in enumerate(texts):
        for start in range(0, len(tokens), window):
            piece = tokens[start : start + min(window, left)]
            if len(piece) > 1:
                windows.append((number, piece))
                left -= len(piece)
    return windows


def long_window(model: Transformers, text: str, length: int) -> list[int]:
    """The first `length` tokens of a text, which is repeated if it is too short."""
    tokens = model.tokenizer(text)["input_ids"]
    return (tokens * -(-length // len(tokens)))[:length]


def write_greedy(
    model: Model, conversations: list[Messages], answers: list[str], out: Path
) -> None:
    """Leave the tokens that the checkpoint finds likeliest along its own greedy answers."""
    for i, (messages, answer) in enumerate(zip(conversations, answers, strict=True)):
        _, prompt = model.render(messages)
        tokens = [*prompt, *model.encode(answer)]
        likeliest = model.log_probabilities(tokens).argmax(axis=-1)
        start = len(prompt) - 1  # where the answer's first token is foreseen
        np.savez(out / f"greedy-{i:05}.npz", tokens=tokens, start=start, likeliest=likeliest)


def compare_greedy(log_probabilities: Scorer, reference: Path) -> dict[str, float]:
    """How many tokens of the checkpoint's greedy answers the model gives before it first differs.

    Both read the same tokens, so one pass over each answer tells. The mean over prompts.
    """
    lengths = []
    for path in sorted(reference.glob("greedy-*.npz")):
        greedy = np.load(path)
        start = int(greedy["start"])
        likeliest = log_probabilities(greedy["tokens"].tolist()).argmax(axis=-1)
        same = likeliest[start:] == greedy["likeliest"][start:]
        lengths.append(len(same) if same.all() else int(same.argmin()))
    counts = np.array(lengths, dtype=float)
    drawn = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    interval = np.percentile(counts[drawn].mean(axis=1), [2.5, 97.5])
    return bounded("greedy_prefix_tokens", counts.mean(), interval)
