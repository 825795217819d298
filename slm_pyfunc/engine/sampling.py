"""Choose the next token from logits, by one request's parameters."""

from collections import Counter

import numpy as np

from ..parameters import Parameters
from ..tokenizer import Grammar

CANDIDATES = 1024  # top_p rarely needs more tokens than these
GREEDY = 1e-5  # temperatures up to this one: float32 could not divide by them


class Sampler:
    """Chooses one sequence's tokens; `choice` tells the n answers to one prompt apart.

    Sampling draws Gumbel noise onto the scores and takes the highest, which is a draw from their
    softmax (Gumbel, 1954). A grammar leaves only those tokens that fit.
    """

    def __init__(
        self, parameters: Parameters, prompt: list[int], choice: int, grammar: Grammar | None
    ) -> None:
        self.parameters, self.grammar = parameters, grammar
        seed = parameters.seed
        self.random = np.random.default_rng(None if seed is None else (seed, choice))
        self.seen = np.unique(prompt) if parameters.repetition_penalty != 1 else None
        self.said: Counter[int] | None = None
        if parameters.frequency_penalty or parameters.presence_penalty:
            self.said = Counter()

    def choose(self, logits: np.ndarray) -> int:
        """The next token, from float32 [vocabulary], which stays as it is."""
        scores = self.penalised(logits)
        if self.grammar is not None:
            scores = self.grammar.within(scores)
        if self.parameters.temperature > GREEDY:
            token = self.draw(scores / np.float32(self.parameters.temperature))
        else:
            token = int(scores.argmax())
        if self.grammar is not None:
            self.grammar.accept(token)
        if self.seen is not None:
            self.seen = np.union1d(self.seen, [token])
        if self.said is not None:
            self.said[token] += 1
        return token

    def penalised(self, logits: np.ndarray) -> np.ndarray:
        """Logits with the bias of tokens, and those that the sequence has made less likely.

        `repetition_penalty` counts the prompt too (arXiv:1909.05858), OpenAI's two only the answer.
        """
        parameters = self.parameters
        if self.seen is None and not self.said and not parameters.logit_bias:
            return logits
        scores = logits.copy()
        if self.seen is not None:
            seen, penalty = scores[self.seen], np.float32(parameters.repetition_penalty)
            scores[self.seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self.said:
            counts = np.array(list(self.said.values()), np.float32)
            penalties = parameters.presence_penalty + parameters.frequency_penalty * counts
            scores[list(self.said)] -= penalties.astype(np.float32)
        for token, bias in parameters.logit_bias:
            scores[token] += np.float32(bias)
        return scores

    def draw(self, scores: np.ndarray) -> int:
        parameters = self.parameters
        kept = candidates(scores, parameters.top_k, parameters.top_p, parameters.min_p)
        noisy = scores[kept] - np.log(self.random.exponential(size=len(kept)).astype(np.float32))
        return int(kept[noisy.argmax()])


def candidates(scores: np.ndarray, top_k: int, top_p: float, min_p: float = 0) -> np.ndarray:
    """The tokens among which to draw: the `top_k` best, and of these the fewest that hold `top_p`.

    Of these again, those at least `min_p` times as likely as the best (arXiv:2407.01082). Returns
    token ids, int64 [candidates].
    """
    if min_p:
        kept = candidates(scores, top_k, top_p)
        return kept[scores[kept] >= scores.max() + np.log(min_p)]
    kept = best(scores, top_k or (CANDIDATES if top_p < 1 else 0))
    if top_p == 1:
        return kept
    weights = np.exp(scores - scores.max())
    total = weights[kept].sum() if top_k else weights.sum()
    if weights[kept].sum() < top_p * total:
        kept = np.arange(len(scores))
    kept = kept[np.argsort(-weights[kept], kind="stable")]
    share = weights[kept].cumsum() / total
    return kept[: int(np.searchsorted(share, top_p)) + 1]


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The ids of the `count` highest scores, in no order; 0 or more than there are means all."""
    if not 0 < count < len(scores):
        return np.arange(len(scores))
    return np.argpartition(scores, -count)[-count:]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities over the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
