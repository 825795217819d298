"""Draft an answer's next tokens from what the prompt or the answer says already.

Prompt lookup decoding (Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding): where
the last tokens stood before, the tokens that followed there are a draft. The model checks all of a
draft in one call, and takes none that it would not have chosen. It needs no second model, and pays
where answers repeat their prompts: summaries, edits, code.
"""

NGRAM = 3  # tokens that have to agree
SHORTEST = 2  # tokens of the first draft, and of one after a draft that failed
PAUSE, LONGEST_PAUSE = 8, 128  # tokens without a draft after one of which nothing was right


class PromptLookup:
    """The tokens of one sequence, and where each NGRAM of them last stood.

    Drafts grow while they are right. After a draft whose first token was wrong, there is
    none for a while, twice as long each time, so that text without repetitions costs little.
    """

    def __init__(self, prompt: list[int], longest: int) -> None:
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}  # where each NGRAM before the last ended
        self.longest, self.length = longest, min(SHORTEST, longest)
        self.pause, self.waiting = PAUSE, 0
        for token in prompt:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token of the prompt, or one that was chosen."""
        if len(self.tokens) >= NGRAM:
            self.ends[tuple(self.tokens[-NGRAM:])] = len(self.tokens)
        self.tokens.append(token)
        self.waiting = max(0, self.waiting - 1)

    def draft(self, most: int) -> list[int]:
        """The tokens that may come next, at most `most`; [] for none."""
        if self.waiting or most < 1:
            return []
        end = self.ends.get(tuple(self.tokens[-NGRAM:]))
        if end is None:
            return []
        period = len(self.tokens) - end  # of a repetition that is not over yet
        return [self.tokens[end + i % period] for i in range(min(self.length, most))]

    def judge(self, drafted: int, right: int) -> None:
        """Learn how many of the tokens of a draft were right."""
        if right == drafted:
            self.length = min(2 * self.length, self.longest)
        else:
            self.length = min(max(SHORTEST, right), self.longest)
        if right:
            self.pause = PAUSE
        else:
            self.waiting = self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
