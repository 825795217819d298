"""Answer many sequences at once: one thread, one decoder, a queue.

Every turn of the loop computes a piece of the prompts that wait, and one token of every sequence
that is being answered. A sequence joins when there is room, and leaves when it ends. A short prompt
is read in turns with a long one that came before it.
"""

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from ..parameters import Parameters
from ..tokenizer import TextStream
from .cores import Turn
from .decoder import PROMPT_PIECE, Decoder, Row
from .lookup import PromptLookup
from .sampling import Sampler, log_softmax

PIECE_AMONG_OTHERS = 64  # tokens of prompts per turn while others are being answered
SHORT_PROMPT = 256  # tokens of one that need not wait for the end of a longer one
LAST_STEP_S = 30  # for which the process waits at its end

# A token, its natural-log probability, and the most likely tokens with theirs.
LogProbability = tuple[int, float, list[tuple[int, float]]]


class Busy(RuntimeError):
    """The queue is full."""


@dataclass(frozen=True)
class Completion:
    """An answer; `finish_reason` is `stop` or `length`.

    Tokens are counted as the model computes them: an end token and a stop string's tokens count as
    generated, and `cached_tokens` of the prompt came from the cache. `logprobs` holds, for each
    token but an end token, its id, its natural-log probability, and the most likely tokens as
    (id, log-probability).
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish_reason: str
    logprobs: list[LogProbability]


Event = tuple[int, str | Completion | Exception]


class Events(Protocol):
    """Where the events of sequences go, from the scheduler's thread: a queue, a server."""

    def put(self, event: Event) -> None:
        """Take an event, and return at once."""


@dataclass(eq=False)
class Sequence:
    """One answer on its way, the `choice`th to its prompt.

    `events` receives its pieces of text if it is streamed, then its Completion or an error, each
    with the choice; the answers to one prompt share it.
    """

    prompt: list[int]
    parameters: Parameters
    sampler: Sampler
    text: TextStream
    end_tokens: frozenset[int]
    events: Events
    max_tokens: int
    choice: int = 0
    streamed: bool = False
    cancelled: bool = False
    lookup: PromptLookup | None = None
    row: Row = field(init=False)  # once it is open
    cached_tokens: int = 0
    generated: int = 0
    pieces: list[str] = field(default_factory=list)
    logprobs: list[LogProbability] = field(default_factory=list)

    @property
    def left(self) -> int:
        """How many tokens of the prompt are not computed."""
        return len(self.prompt) - len(self.row.tokens)

    def take(self, logits: np.ndarray) -> int | None:
        """Choose the next token; None where the sequence ends with it."""
        token = self.sampler.choose(logits)
        self.generated += 1
        ended = token in self.end_tokens
        if not ended:
            if self.parameters.logprobs:
                self.logprobs.append(log_probabilities(logits, token, self.parameters.top_logprobs))
            self.say(self.text.push(token))
        if ended or self.text.stopped:
            self.end("stop")
        elif self.generated == self.max_tokens:
            self.end("length")
        else:
            return token
        return None

    def say(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            if self.streamed:
                self.events.put((self.choice, piece))

    def end(self, reason: str) -> None:
        self.say(self.text.end())
        text = "".join(self.pieces)
        counts = len(self.prompt), self.generated, self.cached_tokens
        self.events.put((self.choice, Completion(text, *counts, reason, self.logprobs)))


SCHEDULERS: "weakref.WeakSet[Scheduler]" = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SCHEDULERS.clear)  # their threads are the parent's


@atexit.register
def end_all() -> None:
    """A thread that came back from ONNX Runtime while Python ends would abort the process."""
    for scheduler in list(SCHEDULERS):
        scheduler.end()


class Scheduler:
    """Answers sequences of several threads together, at most `max_batch_size` at a time.

    Its thread lives while there is work, so that an idle model can be forked and forgotten.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_batch_size: int,
        max_queue_size: int,
        turn: Turn,
        nameless: np.ndarray,
    ) -> None:
        self.decoder = decoder
        self.nameless = nameless  # ids that no sequence may choose
        self.max_batch_size, self.max_queue_size = max_batch_size, max_queue_size
        self.lock = threading.Lock()  # guards `waiting` and `working`
        self.waiting: deque[Sequence] = deque()
        self.working = False
        self.computing = threading.Lock()  # held while the decoder computes
        self.turn = turn  # taken while it computes, on cores that other models use too
        self.open: list[Sequence] = []  # those with a row: the ones read, and the active ones
        self.active: list[tuple[Sequence, int]] = []  # each with the token to compute next
        self.reading: deque[Sequence] = deque()  # partly computed; the first is next
        self.ended = False
        SCHEDULERS.add(self)

    def submit(self, sequences: list[Sequence], may_wait: bool = False) -> None:
        """Queue sequences; raise Busy if the queue would be too long, unless these `may_wait`."""
        with self.lock:
            free = self.max_batch_size - len(self.open)
            waiting = len(self.waiting) + len(sequences) - max(free, 0)
            if waiting > self.max_queue_size and not may_wait:
                raise Busy(
                    f"busy: {len(self.waiting)} requests wait, {len(sequences)} more are too many; "
                    f"max_queue_size is {self.max_queue_size}. Ask again later."
                )
            self.waiting.extend(sequences)
            if self.working:
                return
            self.working = True
        threading.Thread(target=self.work, name="genai-scheduler", daemon=True).start()

    def work(self) -> None:
        while True:
            with self.lock:
                if self.ended or not (self.waiting or self.open):
                    self.working = False
                    return
            with self.computing, self.turn():
                try:
                    self.drop_cancelled()
                    self.read_prompts()
                    if self.active:
                        self.decode()
                except Exception as error:
                    self.fail(error)

    def end(self) -> None:
        """Compute nothing more; returns when the step under way is over."""
        self.ended = True
        if self.working:
            self.computing.acquire(timeout=LAST_STEP_S)

    def read_prompts(self) -> None:
        """Compute a piece of the prompts that wait, smaller while others are being answered."""
        budget = PIECE_AMONG_OTHERS if self.active else PROMPT_PIECE
        while budget > 0:
            self.open_next()
            if not self.reading:
                return
            sequence = self.reading.popleft()
            left, start = sequence.left, len(sequence.row.tokens)
            piece = sequence.prompt[start : start + budget]
            try:
                logits = self.decoder.extend(sequence.row, piece)
            except Exception as error:
                self.drop(sequence, error)
                return
            budget -= len(piece)
            if len(piece) == left:
                self.advance([sequence], [logits])
            else:
                self.reading.append(sequence)

    def open_next(self) -> None:
        """Give a row to the sequence that has waited longest, where there is room.

        While a long prompt is read, only a sequence with a short prompt gets a row, and never the
        last one: the sequence that has waited longest gets that.
        """
        behind_long = bool(self.reading)
        if len(self.open) + behind_long >= self.max_batch_size or len(self.reading) > 1:
            return
        if behind_long and self.reading[0].left <= SHORT_PROMPT:
            return
        with self.lock:
            fitting = (s for s in self.waiting if not behind_long or len(s.prompt) <= SHORT_PROMPT)
            sequence = next(fitting, None)
            if sequence is None:
                return
            self.waiting.remove(sequence)
            self.open.append(sequence)
        length = len(sequence.prompt) + sequence.max_tokens
        try:
            sequence.row = self.decoder.open(sequence.prompt, length)
        except Exception as error:  # its own: there may be no memory for one so long
            self.open.remove(sequence)
            sequence.events.put((sequence.choice, error))
            return
        sequence.cached_tokens = len(sequence.row.tokens)
        self.reading.append(sequence)

    def decode(self) -> None:
        """Compute one token of every active sequence, and choose the next.

        If a sequence is alone, its draft is computed too: beside others, the cores are busy anyway.
        """
        if len(self.active) == 1 and (draft := self.draft_of(self.active[0][0])):
            self.check(*self.active.pop(), draft)
            return
        rows = [sequence.row for sequence, _ in self.active]
        logits = self.decoder.step(rows, [token for _, token in self.active])
        sequences, self.active = [sequence for sequence, _ in self.active], []
        self.advance(sequences, logits)

    def draft_of(self, sequence: Sequence) -> list[int]:
        if sequence.lookup is None:
            return []
        return sequence.lookup.draft(sequence.max_tokens - sequence.generated - 1)

    def check(self, sequence: Sequence, token: int, draft: list[int]) -> None:
        """Compute a sequence's token and a draft in one call, and take what it chooses itself."""
        row, lookup = sequence.row, sequence.lookup
        assert lookup is not None
        computed = len(row.tokens) + 1
        try:
            logits = self.decoder.extend_by_draft(row, [token, *draft])
        except Exception:  # perhaps of the draft: go on without
            del row.tokens[computed - 1 :]
            sequence.lookup = None
            self.active.append((sequence, token))
            return
        chosen: int | None = token
        right = 0
        for after, guess in zip(logits, [*draft, None], strict=True):
            chosen = self.choose(sequence, after)
            if chosen is None or chosen != guess:
                break
            right += 1
        del row.tokens[computed + right :]
        lookup.judge(len(draft), right)
        if chosen is None:
            self.close([sequence])
        else:
            self.active.append((sequence, chosen))

    def advance(self, sequences: list[Sequence], logits: list[np.ndarray | Exception]) -> None:
        """Let each sequence choose a token from its logits; close the rows of those that end."""
        ended = []
        for sequence, scores in zip(sequences, logits, strict=True):
            if isinstance(scores, Exception):
                self.drop(sequence, scores)
                continue
            token = self.choose(sequence, scores)
            if token is None:
                ended.append(sequence)
            else:
                self.active.append((sequence, token))
        self.close(ended)

    def choose(self, sequence: Sequence, scores: np.ndarray) -> int | None:
        """The token that a sequence chooses; None where it ends, perhaps with an error."""
        try:
            if len(self.nameless):
                scores[self.nameless] = -np.inf
            token = sequence.take(scores)
        except Exception as error:  # a grammar's, say: the others go on
            sequence.events.put((sequence.choice, error))
            return None
        if sequence.lookup is not None and token is not None:
            sequence.lookup.push(token)
        return token

    def drop_cancelled(self) -> None:
        dropped = [sequence for sequence, _ in self.active if sequence.cancelled]
        self.active = [pair for pair in self.active if not pair[0].cancelled]
        dropped += [sequence for sequence in self.reading if sequence.cancelled]
        self.reading = deque(s for s in self.reading if not s.cancelled)
        with self.lock:
            self.waiting = deque(s for s in self.waiting if not s.cancelled)
        self.close(dropped)

    def close(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.open.remove(sequence)
            self.decoder.close(sequence.row)

    def drop(self, sequence: Sequence, error: Exception) -> None:
        """Give a sequence its error, and keep nothing of what was computed for it."""
        sequence.row.tokens = []
        self.close([sequence])
        sequence.events.put((sequence.choice, error))

    def fail(self, error: Exception) -> None:
        """End all open sequences with the error; those that wait come next."""
        failed, self.open = self.open, []
        self.active, self.reading = [], deque()
        self.decoder.clear()
        for sequence in failed:
            sequence.events.put((sequence.choice, error))


def log_probabilities(logits: np.ndarray, token: int, count: int) -> LogProbability:
    """The token's log-probability, and the `count` most likely tokens with theirs."""
    scores = log_softmax(logits)
    top = np.argsort(-scores)[:count].tolist() if count else []
    return token, float(scores[token]), [(i, float(scores[i])) for i in top]


def receive(sequences: list[Sequence]) -> Iterator[tuple[int, str | Completion]]:
    """The events of one request's sequences, up to the last end; closing this cancels them."""
    left, events = len(sequences), sequences[0].events
    assert isinstance(events, SimpleQueue)
    try:
        while left:
            choice, event = events.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Completion)
            yield choice, event
    finally:
        for sequence in sequences:
            sequence.cancelled = True
