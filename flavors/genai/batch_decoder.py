"""Many sequences in one ONNX Runtime call, on the CPU, and the cache of past prompts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flavors.genai.decoder import CAPACITY_STEP, Row, common

PREFILL_CHUNK = 256  # tokens per call; bounds the memory of logits and attention scores


class BatchDecoder:
    """Sequences in the rows of one batch.

    onnxruntime-genai's own Engine batches on a CPU too, but in groups of four that begin and end
    together (0.18; paged attention, which it needs for more, is there for CUDA and WebGPU).

    Keys and values are float arrays [rows, heads, capacity, head size] per layer, which
    GroupQueryAttention updates in place: sequences of any length share a call, because it takes the
    length of each from the attention mask. Rows in use are the first ones, without gaps. A row's
    logits are the same to the bit whatever else is in the batch, and whether its prompt was cached
    or not; only the keys and values of a past answer, computed token by token, are rounded
    otherwise than a prompt's.
    """

    def __init__(
        self, folder: Path, genai_config: dict[str, Any], threads: int, rows: int, cache_mb: float
    ) -> None:
        import onnxruntime as ort

        decoder = genai_config["model"]["decoder"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        path = str(folder / decoder["filename"])
        try:
            self.session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's have no class in common
            reason = " ".join(str(error).split())
            raise RuntimeError(f"ONNX Runtime cannot load {path}: {reason}") from error
        inputs, outputs = decoder["inputs"], decoder["outputs"]
        self.names = {key: inputs.get(key, key) for key in ("input_ids", "attention_mask")}
        known = {tensor.name: tensor for tensor in self.session.get_inputs()}
        positions = inputs.get("position_ids", "position_ids")
        self.positions = positions if positions in known else None
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
        self.rows: list[Row] = []
        self.capacity = 0
        self.arrays: list[np.ndarray] = []
        self.binding: tuple[Any, ...] = ()
        self.prefixes = Prefixes(int(cache_mb * 1e6))

    def open(self, prompt: list[int], length: int) -> Row:
        self.reserve(length)
        row = Row()
        end = len(prompt) - 1  # the last token's logits are needed, so it is always computed
        shared, source = max(
            ((common(prompt[:end], other.tokens), other) for other in self.rows),
            key=lambda pair: pair[0],
            default=(0, row),
        )
        kept, prefix = self.prefixes.longest(prompt[:end])
        index = len(self.rows)
        if kept > shared and prefix is not None:
            for array, saved in zip(self.arrays, prefix.arrays, strict=True):
                array[index, :, :kept] = saved[:, :kept]
        elif shared:
            self.copy(self.rows.index(source), index, shared)
        row.tokens = prompt[: max(kept, shared)]
        self.rows.append(row)
        return row

    def extend(self, row: Row, tokens: list[int]) -> np.ndarray:
        first = len(self.rows) - 1
        assert self.rows[first] is row
        for chunk in chunks(tokens, PREFILL_CHUNK):
            if len(chunk) == 1 and row.tokens:  # another kernel, which rounds otherwise
                chunk = [row.tokens.pop(), *chunk]
            logits = self.run(first, np.array([chunk]), [len(row.tokens) + len(chunk)])[0, -1]
            row.tokens += chunk
        return logits

    def step(self, rows: list[Row], tokens: list[int]) -> np.ndarray:
        order = [self.rows.index(row) for row in rows]
        assert sorted(order) == list(range(len(rows)))
        ids = np.empty((len(rows), 1), np.int64)
        ids[order, 0] = tokens
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
        lengths = [len(row.tokens) for row in self.rows[: len(rows)]]
        logits = self.run(0, ids, lengths)[:, -1]
        return logits if order == sorted(order) else logits[order]

    def close(self, row: Row, keep: bool = True) -> None:
        gap, last = self.rows.index(row), len(self.rows) - 1
        if keep:
            self.prefixes.keep(row.tokens, [array[gap] for array in self.arrays])
        for source in (
            last - 1,
            last,
        ):  # the last may be in the middle of its prompt: it stays last
            if source > gap:
                self.copy(source, gap, len(self.rows[source].tokens))
                self.rows[gap], gap = self.rows[source], source
        self.rows.pop()

    def score(self, tokens: list[int]) -> np.ndarray:
        row = Row(list(tokens))
        self.reserve(len(tokens))
        self.rows.append(row)
        try:
            return self.run(len(self.rows) - 1, np.array([tokens]), [len(tokens)])[0]
        finally:
            self.rows.pop()

    def run(self, first: int, ids: np.ndarray, lengths: list[int]) -> np.ndarray:
        """Append `ids` [rows, tokens] to the rows from `first` on, which then are `lengths` long.

        Returns logits, float32 [rows, tokens, vocabulary].
        """
        count, new = ids.shape
        key = (first, count, new, self.capacity)
        if not self.binding or self.binding[0] != key:
            self.binding = (key, *self.bind(first, count, new))
        _, binding, own_ids, mask, logits = self.binding
        own_ids[:] = ids
        longest = max(lengths)
        mask = mask[: count * longest].reshape(count, longest)
        mask[:] = np.arange(longest) < np.array(lengths)[:, np.newaxis]
        bind_input(binding, self.names["attention_mask"], mask)
        if self.positions:
            starts = np.array(lengths)[:, np.newaxis] - new
            binding.bind_cpu_input(self.positions, starts + np.arange(new))
        self.session.run_with_iobinding(binding)
        return logits if logits.dtype == np.float32 else logits.astype(np.float32)

    def bind(self, first: int, count: int, new: int) -> tuple[Any, ...]:
        """Bind rows of the caches, in place, and arrays for the ids, mask and logits."""
        binding = self.session.io_binding()
        for (past, present), array in zip(self.caches, self.arrays, strict=True):
            rows = array[first : first + count]
            bind_input(binding, past, rows)
            bind_output(binding, present, rows)
        ids = np.empty((count, new), np.int64)
        bind_input(binding, self.names["input_ids"], ids)
        logits = np.empty((count, new, self.vocabulary_size), self.logits_type)
        bind_output(binding, self.logits_name, logits)
        return binding, ids, np.empty(count * self.capacity, np.int64), logits

    def reserve(self, length: int) -> None:
        """Make every row hold `length` tokens. Memory is taken up only where a row is used."""
        if self.capacity >= length and (self.rows or self.capacity <= 4 * length + CAPACITY_STEP):
            return
        capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        shape = (self.max_rows, self.heads, capacity, self.head_size)
        self.binding = ()
        previous, self.arrays = self.arrays, []
        for _ in self.caches:
            array = np.zeros(shape, self.cache_type)
            old = previous.pop(0) if previous else None
            for index, row in enumerate(self.rows) if old is not None else ():
                array[index, :, : len(row.tokens)] = old[index, :, : len(row.tokens)]  # type: ignore[index]
            self.arrays.append(array)
        self.capacity = capacity

    def copy(self, source: int, target: int, length: int) -> None:
        for array in self.arrays:
            array[target, :, :length] = array[source, :, :length]


@dataclass
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
        if not tokens or any(common(tokens, prefix.tokens) == len(tokens) for prefix in self.kept):
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


def chunks(tokens: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]


def numpy_type(onnx_type: str) -> type[np.float32] | type[np.float16]:
    """numpy's type for ONNX Runtime's `tensor(float)` or `tensor(float16)`."""
    return np.float16 if onnx_type == "tensor(float16)" else np.float32


def bind_input(binding: Any, name: str, array: np.ndarray) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def bind_output(binding: Any, name: str, array: np.ndarray) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
