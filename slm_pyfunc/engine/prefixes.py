"""The cache of past prompts: their keys and values, as many as a budget holds."""

from dataclasses import dataclass

import numpy as np

from .decoder import common


@dataclass(eq=False)
class Prefix:
    """Tokens, and their keys and values: per layer [heads, tokens, head size]."""

    tokens: list[int]
    arrays: list[np.ndarray]


class Prefixes:
    """Keys and values of past sequences, the least recently used dropped first."""

    def __init__(self, budget: int) -> None:
        self.budget, self.size = budget, 0
        self.kept: list[Prefix] = []  # the least recently used first

    def longest(self, prompt: list[int]) -> tuple[int, Prefix | None]:
        """How many of the prompt's first tokens are kept, and where."""
        lengths = [common(prompt, prefix.tokens) for prefix in self.kept]
        if not any(lengths):
            return 0, None
        best = max(range(len(lengths)), key=lengths.__getitem__)
        self.kept.append(self.kept.pop(best))
        return lengths[best], self.kept[-1]

    def keep(self, tokens: list[int], arrays: list[np.ndarray]) -> None:
        """Copy a sequence's keys and values, as much of it as the budget holds."""
        bytes_per_token = sum(array[:, 0].nbytes for array in arrays)
        tokens = tokens[: self.budget // bytes_per_token]
        if not tokens or self.longest(tokens)[0] == len(tokens):
            return
        extended = [p for p in self.kept if common(tokens, p.tokens) == len(p.tokens)]
        for prefix in extended:
            self.drop(prefix)
        while self.kept and self.size + len(tokens) * bytes_per_token > self.budget:
            self.drop(self.kept[0])
        copies = [array[:, : len(tokens)].copy() for array in arrays]
        self.kept.append(Prefix(tokens, copies))
        self.size += len(tokens) * bytes_per_token

    def drop(self, prefix: Prefix) -> None:
        self.kept.remove(prefix)
        self.size -= sum(array.nbytes for array in prefix.arrays)
