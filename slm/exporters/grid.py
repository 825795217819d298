"""Keep the grid that a checkpoint's weights stand on, if they were quantized once before.

A GGUF that is dequantized to float32 still shows its integers: each block's values are the lowest
one plus multiples of a step (GGUF's Q4_0, Q4_1, Q4_K, Q5_*, Q8_0). Found again, they are carried
over, and nothing is rounded a second time.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np

from slm.exporters.graph import (
    ROUNDED_AT_ONCE,
    Packed,
    Rtn,
    as_stored,
    columns_of_means,
    nonzero,
    on_all_cores,
    packed_integers,
)

LEVELS = 255  # the most steps between a block's lowest and highest value
EXACT = 2.0**-21  # of a block's largest value: what dequantizing in float32 rounds off
STORED = 2.0**-18  # of a step: what it may lose by that, and still be known as a float16


@dataclass(frozen=True)
class Grid:
    """Integers and scales as they were before the weights were dequantized to float32.

    A row of at most 16 levels in every block gets 4 bits, another one 8. Where zero is no level of
    a block (Q4_1, Q4_K), the rest is the weight of the mean of the block's inputs. Rows that stand
    on no grid are rounded to 8 bits, and the weight's name is added to `rounded`; so are those of a
    weight that is looked up as well, if they are of several kinds or need means.
    """

    block_size: int
    accuracy_level: int = 0
    kept: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)

    def quantize(self, name: str, weight: np.ndarray, looked_up: bool = False) -> list[Packed]:
        """The integers of a weight [outputs, inputs], in parts of one kind of rows each."""
        if weight.shape[1] % self.block_size:
            return self.rounded_anew(name, weight)
        levels, steps, lows = self.find(weight)
        bits = np.where(levels.max((1, 2)) > 15, 8, 4)
        bits[np.isnan(steps).any(1)] = 0
        full = np.flatnonzero(levels.any((1, 2)) | lows.any(1))
        if len(full):  # rows of zeros are of any kind: that of the row before
            before = np.searchsorted(full, np.arange(len(bits)), side="right") - 1
            bits = bits[full[np.maximum(before, 0)]]
        bounds = [0, *(np.flatnonzero(np.diff(bits)) + 1), len(bits)]
        parts = []
        for start, stop in itertools.pairwise(bounds):
            some = slice(start, stop)
            if bits[start]:
                parts.append(self.pack(bits[start], levels[some], steps[some], lows[some]))
            else:
                parts += self.rounded_anew(name, weight[some])
        blocks = weight.shape[1] // self.block_size
        if looked_up and (len(parts) > 1 or parts[0][1].shape[1] > blocks):
            return self.rounded_anew(name, weight)
        if bits.any():
            self.kept.append(name)
        return parts

    def rounded_anew(self, name: str, weight: np.ndarray) -> list[Packed]:
        if name not in self.rounded:
            self.rounded.append(name)
        return Rtn(8, self.block_size).quantize(name, weight)

    def find(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The levels, uint8 [outputs, blocks, block_size], on steps and from lows of each block.

        Where values stand on no grid, step and low are NaN.
        """
        outputs, inputs = weight.shape
        levels = np.empty((outputs, inputs // self.block_size, self.block_size), np.uint8)
        steps = np.empty(levels.shape[:2], np.float32)
        lows = np.empty_like(steps)

        def find_in_rows(some: slice) -> None:
            blocks = weight[some].astype(np.float32).reshape(-1, *levels.shape[1:])
            levels[some], steps[some], lows[some] = grid_of(blocks)

        on_all_cores(find_in_rows, outputs, max(1, ROUNDED_AT_ONCE // inputs))
        return levels, steps, lows

    def pack(self, bits: int, levels: np.ndarray, steps: np.ndarray, lows: np.ndarray) -> Packed:
        """Rows on grids, with integers about 0, and after them the weights of their means."""
        half = 2 ** (bits - 1)
        highest = levels.max(-1).astype(np.int16)
        lowest = np.rint(lows / np.where(steps > 0, steps, 1))
        lowest = np.clip(lowest, -half, half - highest).astype(np.int16)
        stored = as_stored(steps)
        if (np.abs(stored - steps) <= STORED * steps).all():
            steps = stored
        rest = lows - steps * lowest
        rest[np.abs(rest) <= 2 * EXACT * largest(steps, lows, highest)] = 0
        # Integers go from -half to half - 1, so those that reach half change sign with their scale.
        sign = np.where(lowest + highest == half, -1, 1).astype(np.int16)
        integers = (levels + lowest[..., None]) * sign[..., None] + half
        packed, scales = packed_integers(integers.astype(np.uint8), bits), steps * sign
        if rest.any():
            means, their_scales = self.pack_means(bits, rest * self.block_size)
            packed = np.concatenate([packed, means], 1)
            scales = np.concatenate([scales, their_scales], 1)
        return packed, scales.astype(np.float16) if steps is stored else scales

    def pack_means(self, bits: int, wanted: np.ndarray) -> Packed:
        """The weights [outputs, blocks] of the means, and once more what rounding them leaves.

        A mean that stands several times in the same block of inputs is weighed there once.
        """
        columns = columns_of_means(wanted.shape[1], self.block_size)
        left, half = wanted.copy(), 2 ** (bits - 1)
        packed, scales = [], []
        for start in range(0, len(columns), self.block_size):
            own = columns[start : start + self.block_size][: wanted.shape[1]]
            values = left[:, own]
            extremes = values[np.arange(len(values)), np.abs(values).argmax(1)]
            scale = as_stored(extremes / -half)[:, None]
            nearest = np.clip(np.rint(values / nonzero(scale)), -half, half - 1)
            left[:, own] -= nearest * scale
            integers = np.full((len(values), self.block_size), half, np.uint8)
            integers[:, : len(own)] += nearest.astype(np.int8).view(np.uint8)
            packed.append(packed_integers(integers, bits))
            scales.append(scale)
        return np.stack(packed, 1), np.concatenate(scales, 1)


def grid_of(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The levels of blocks [rows, blocks, block_size], and their steps and lows [rows, blocks].

    A step is the greatest common divisor of the distances from the lowest value.
    """
    lows = blocks.min(-1)
    distances = blocks - lows[..., None]
    spans = distances.max(-1)
    steps = np.where(spans > 0, spans, np.where(lows != 0, np.abs(lows), 1))
    for i in range(blocks.shape[-1]):
        to_common_divisors(steps, distances[..., i], spans / (2 * LEVELS))
    np.divide(spans, np.rint(spans / steps), out=steps, where=spans > 0)
    levels = np.rint(distances / steps[..., None])
    errors = np.abs(levels * steps[..., None] + lows[..., None] - blocks).max(-1)
    fits = (errors <= EXACT * np.abs(blocks).max(-1)) & (spans <= (LEVELS + 0.5) * steps)
    steps[~fits] = lows[~fits] = np.nan
    return np.where(fits[..., None], levels, 0).astype(np.uint8), steps, lows


def to_common_divisors(steps: np.ndarray, values: np.ndarray, least: np.ndarray) -> None:
    """Make steps those that they have in common with values, in place.

    It is Euclid's algorithm on floats: what is not above `least` is 0.
    """
    rest = np.abs(values - steps * np.rint(values / steps))
    open_ = np.nonzero(rest > least)
    while open_[0].size:
        before, steps[open_] = steps[open_], rest[open_]
        rest[open_] = np.abs(before - steps[open_] * np.rint(before / steps[open_]))
        open_ = np.nonzero(rest > least)


def largest(steps: np.ndarray, lows: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """The largest absolute value of each block."""
    return np.maximum(np.abs(lows), np.abs(lows + steps * highest))
