"""Many sequences in one ONNX Runtime call, on the CPU."""

import contextlib
import math
import mmap
import os
import platform
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .decoder import (
    CAPACITY_STEP,
    LOGITS_TO_KEEP,
    PROMPT_GRAPH,
    PROMPT_PIECE,
    WEIGHTS_FOLDER,
    Row,
    capacity_for,
    common,
)
from .prefixes import Prefixes

NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
SCORES_MB = 256  # what a piece's attention scores may take
OPENING = threading.Lock()  # the environment is the process's
if hasattr(os, "register_at_fork"):  # a child would wait for a thread that it does not have
    os.register_at_fork(
        before=OPENING.acquire, after_in_parent=OPENING.release, after_in_child=OPENING.release
    )


@dataclass
class Bound:
    """What ONNX Runtime reads and writes for some rows: ids and mask in, logits out.

    `keep` is how many of each row's last logits it writes.
    """

    binding: Any
    ids: np.ndarray
    mask: np.ndarray
    logits: np.ndarray
    keep: np.ndarray


class BatchDecoder:
    """Sequences in the rows of one batch.

    onnxruntime-genai's own Engine batches on a CPU too, but in groups of four that begin and end
    together (0.18; paged attention, which it needs for more, is there for CUDA and WebGPU).

    Keys and values are float arrays [rows, heads, capacity, head size] per layer, which
    GroupQueryAttention updates in place: sequences of any length share a call, because it reads
    each sequence's length in the attention mask. Rows in use are the first ones, without gaps. A
    call computes neighbouring rows. Rows between them whose prompt is still being read are computed
    too, and the result is dropped. A row alone is computed beside an empty one where the CPU has
    another kernel for one row, which rounds differently.

    If there is a graph for prompts (slm/exporters/prompts.py), `extend` runs it in place of the
    decoder's, on the same keys and values.

    A row's logits are the same to the bit whatever else is in the batch, and whether its prompt was
    cached or not. Only the keys and values of a past answer, which were computed token by token,
    are rounded differently from a prompt's, and by another graph's weights if there is one for
    prompts; with `cache_mb` 0 they are not used.
    """

    takes_drafts = True

    def __init__(
        self, folder: Path, genai_config: dict[str, Any], threads: int, rows: int, cache_mb: float
    ) -> None:
        decoder = genai_config["model"]["decoder"]
        weights = decoder.get("session_options", {}).get(WEIGHTS_FOLDER)
        told = threads, folder / weights if weights else None
        with OPENING:
            self.session = open_session(folder / decoder["filename"], *told)
        self.prompt_session = self.session
        if (folder / PROMPT_GRAPH).is_file():
            with OPENING, attention_at_once(genai_config):
                self.prompt_session = open_session(folder / PROMPT_GRAPH, *told)
        inputs, outputs = decoder["inputs"], decoder["outputs"]
        self.names = {key: inputs.get(key, key) for key in ("input_ids", "attention_mask")}
        known = {tensor.name: tensor for tensor in self.session.get_inputs()}
        positions = inputs.get("position_ids", "position_ids")
        self.positions = positions if positions in known else None
        optional = {tensor.name for tensor in self.session.get_overridable_initializers()}
        self.keeps_last = LOGITS_TO_KEEP in optional
        self.caches = [
            (inputs[f"past_{kind}_names"] % i, outputs[f"present_{kind}_names"] % i)
            for i in range(decoder["num_hidden_layers"])
            for kind in ("key", "value")
        ]
        self.logits_name = outputs.get("logits", "logits")
        self.vocabulary_size = genai_config["model"]["vocab_size"]
        self.heads, self.head_size = decoder["num_key_value_heads"], decoder["head_size"]
        self.cache_type = numpy_type(known[self.caches[0][0]].type)
        self.logits_type = numpy_type(self.session.get_outputs()[0].type)
        self.max_rows = rows
        # One place for all logits, which are read before the next run.
        most = max(PROMPT_PIECE, rows) * self.vocabulary_size
        self.logits = lazy_zeros((most,), self.logits_type)
        self.rows: list[Row] = []
        self.capacity = 0
        self.arrays: list[np.ndarray] = []
        # By the session, the first row and their number.
        self.bound: dict[tuple[Any, int, int], Bound] = {}
        self.prefixes = Prefixes(int(cache_mb * 1e6))
        self.needs_company = not self.rounds_alike()

    def open(self, prompt: list[int], length: int) -> Row:
        self.reserve(length)
        row = Row(prompt_length=len(prompt), state=len(self.rows))
        known = prompt[:-1]  # the last token's logits are needed, so it is always computed
        shared, source = max(
            ((common(known, other.tokens[: other.prompt_length]), other) for other in self.rows),
            key=lambda pair: pair[0],
            default=(0, row),
        )
        kept, prefix = self.prefixes.longest(known)
        if kept > shared and prefix is not None:
            for array, saved in zip(self.arrays, prefix.arrays, strict=True):
                array[row.state, :, :kept] = saved[:, :kept]
        elif shared:
            self.copy(source.state, row.state, shared)
        row.tokens = prompt[: max(kept, shared)]
        self.rows.append(row)
        return row

    def extend(self, row: Row, tokens: list[int]) -> np.ndarray:
        if len(tokens) == 1 and row.tokens:  # another kernel, which rounds otherwise
            tokens = [row.tokens.pop(), *tokens]
        row.tokens += tokens
        return self.run([row], np.array([tokens]), last=1, session=self.prompt_session)[0, -1]

    def extend_by_draft(self, row: Row, tokens: list[int]) -> np.ndarray:
        row.tokens += tokens
        return self.run([row], np.array([tokens]))[0]

    def step(self, rows: list[Row], tokens: list[int]) -> list[np.ndarray | Exception]:
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
        first = min(row.state for row in rows)
        try:
            logits = self.next_logits(rows)
        except Exception as error:  # perhaps of one row
            return [self.step_alone(row) for row in rows] if len(rows) > 1 else [error]
        return [logits[row.state - first, -1] for row in rows]

    def step_alone(self, row: Row) -> np.ndarray | Exception:
        """The row's logits, computed after a batch failed, or its error."""
        try:
            return self.next_logits([row])[0, -1].copy()
        except Exception as error:
            return error

    def next_logits(self, rows: list[Row]) -> np.ndarray:
        """Run the last token of rows, and of those between them: float32 [rows, 1, vocabulary]."""
        asked = {row.state: row for row in rows}
        first, last = min(asked), max(asked)
        if first == last and self.needs_company:
            last += 1
        states = range(first, last + 1)
        neighbours = [asked.get(state) or self.placeholder(state) for state in states]
        return self.run(neighbours, np.array([row.tokens[-1:] for row in neighbours]))

    def placeholder(self, state: int) -> Row:
        """A token after the end of a row, which its own next one will replace."""
        used = len(self.rows[state].tokens) if state < len(self.rows) else 0
        return Row(state=state, tokens=[0] * min(used + 1, self.capacity))

    def rounds_alike(self) -> bool:
        """Whether a row's logits are the same alone and beside another, on this CPU.

        ONNX Runtime 1.32 has a kernel of its own for one row where there is AVX2 and no AVX-512.
        """
        self.reserve(1)
        pair = [Row(state=0, tokens=[0]), Row(state=1, tokens=[0])]
        alone = self.run(pair[:1], np.array([[0]]))[0].copy()
        alike = np.array_equal(alone, self.run(pair, np.array([[0], [0]]))[0])
        self.clear()
        return alike

    def close(self, row: Row) -> None:
        self.prefixes.keep(row.tokens, [array[row.state] for array in self.arrays])
        last = self.rows.pop()
        if last is not row:
            self.copy(last.state, row.state, len(last.tokens))
            self.rows[row.state], last.state = last, row.state

    def clear(self) -> None:
        self.rows, self.arrays, self.capacity, self.bound = [], [], 0, {}

    def score(self, tokens: list[int], prompt: int | None = None) -> np.ndarray:
        self.reserve(len(tokens))
        row, logits = Row(state=len(self.rows)), []
        if self.prompt_session is self.session:
            prompt = 0
        elif prompt is None:
            prompt = len(tokens) // 2
        for part, session in (
            (tokens[:prompt], self.prompt_session),
            (tokens[prompt:], self.session),
        ):
            # In pieces of equal length: one of a single token would take another kernel.
            for piece in np.array_split(part, -(-len(part) // PROMPT_PIECE)) if part else []:
                row.tokens += piece.tolist()
                logits.append(self.run([row], piece[np.newaxis], session=session)[0].copy())
        return np.concatenate(logits)

    def run(
        self, rows: list[Row], ids: np.ndarray, last: int = 0, session: Any = None
    ) -> np.ndarray:
        """Compute `ids` [rows, tokens], the ends of neighbouring rows' tokens, by `session`.

        Returns logits, float32 [rows, tokens, vocabulary], which stay until the next run: where the
        graph can, only those of the `last` tokens, if not 0.
        """
        first, (count, new) = rows[0].state, ids.shape
        session = session or self.session
        kept = last if last and self.keeps_last else new
        if self.logits.size < count * kept * self.vocabulary_size:
            self.logits = lazy_zeros((count * kept * self.vocabulary_size,), self.logits_type)
            self.bound = {}
        bound = self.bound.get((session, first, count))
        if bound is None:
            bound = self.bound[session, first, count] = self.bind(session, first, count)
        lengths = np.array([[len(row.tokens)] for row in rows])
        # Single tokens need no exact mask, and none bound anew at every step.
        width = self.capacity if new == 1 else int(lengths.max())
        shapes = ids.shape, (count, width), (count, kept, self.vocabulary_size)
        if (bound.ids.shape, bound.mask.shape, bound.logits.shape) != shapes:
            self.bind_tokens(bound, *shapes)
        bound.ids[:] = ids
        bound.mask[:] = np.arange(width) < lengths
        bound.keep[:] = kept
        if self.positions:
            bound.binding.bind_cpu_input(self.positions, lengths - new + np.arange(new))
        session.run_with_iobinding(bound.binding)
        logits = bound.logits
        return logits if logits.dtype == np.float32 else logits.astype(np.float32)

    def bind(self, session: Any, first: int, count: int) -> Bound:
        """Bind neighbouring rows of the caches, as inputs and outputs at once."""
        binding = session.io_binding()
        for (past, present), array in zip(self.caches, self.arrays, strict=True):
            bind(binding.bind_input, past, array[first : first + count])
            bind(binding.bind_output, present, array[first : first + count])
        nothing, keep = np.empty((0, 0)), np.zeros(1, np.int64)
        if self.keeps_last:
            bind(binding.bind_input, LOGITS_TO_KEEP, keep)
        return Bound(binding, nothing, nothing, nothing, keep)

    def bind_tokens(self, bound: Bound, *shapes: tuple[int, ...]) -> None:
        """Bind ids, mask and logits of these shapes."""
        ids, mask, logits = shapes
        bound.ids, bound.mask = np.empty(ids, np.int64), np.empty(mask, np.int64)
        bound.logits = self.logits[: math.prod(logits)].reshape(logits)
        bind(bound.binding.bind_input, self.names["input_ids"], bound.ids)
        bind(bound.binding.bind_input, self.names["attention_mask"], bound.mask)
        bind(bound.binding.bind_output, self.logits_name, bound.logits)

    def reserve(self, length: int) -> None:
        """Make every row hold `length` tokens. Memory is taken up only where a row is used."""
        if self.capacity >= length and (self.rows or self.capacity <= 4 * length + CAPACITY_STEP):
            return
        capacity = capacity_for(length)
        shape = (self.max_rows + 1, self.heads, capacity, self.head_size)  # one more for `score`
        arrays = [lazy_zeros(shape, self.cache_type) for _ in self.caches]
        for array, previous in zip(arrays, self.arrays, strict=False):
            for index, row in enumerate(self.rows):
                array[index, :, : len(row.tokens)] = previous[index, :, : len(row.tokens)]
        self.arrays, self.capacity, self.bound = arrays, capacity, {}

    def copy(self, source: int, target: int, length: int) -> None:
        for array in self.arrays:
            array[target, :, :length] = array[source, :, :length]


def open_session(path: Path, threads: int, weights: Path | None) -> Any:
    """A session of a graph, whose weights are in its own folder unless in `weights`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Longer than from one token to the next, short enough to leave the cores to others.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "300")
    if may_overflow():  # products of uint8 do not, at a fifth of the speed
        options.add_session_config_entry("session.x64quantprecision", "1")
    if weights:
        options.add_session_config_entry(WEIGHTS_FOLDER, str(weights))
    try:
        return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's have no class in common
        reason = " ".join(str(error).split())
        raise RuntimeError(f"ONNX Runtime cannot load {path}: {reason}") from error


def may_overflow() -> bool:
    """Whether the CPU may add products of int8 in 16 bits, which overflow: x86 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: not known
        return True
    return "avx512_vnni" not in flags and "avx_vnni" not in flags


@contextlib.contextmanager
def attention_at_once(genai_config: dict[str, Any]) -> Iterator[None]:
    """Open a session whose attention has all scores of a piece in memory, if these are few.

    Prompts below 2,000 tokens are read faster so than by ONNX Runtime's (1.32) flash attention on
    CPUs, which asks this variable when a session is opened.
    """
    model, before = genai_config["model"], os.environ.get(NO_FLASH)
    heads = model["decoder"]["num_attention_heads"]
    if heads * PROMPT_PIECE * model["context_length"] * 4 > SCORES_MB * 1e6 or before is not None:
        yield
        return
    os.environ[NO_FLASH] = "1"
    try:
        yield
    finally:
        del os.environ[NO_FLASH]


def numpy_type(onnx_type: str) -> type[np.float32] | type[np.float16]:
    """numpy's type for ONNX Runtime's `tensor(float)` or `tensor(float16)`."""
    return np.float16 if onnx_type == "tensor(float16)" else np.float32


def lazy_zeros(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Zeros that take up memory only where they are written; numpy's may take all at once."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)


def bind(to: Callable[..., None], name: str, array: np.ndarray) -> None:
    to(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
