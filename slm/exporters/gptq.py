"""Round a weight to int4 or int8 so that its products with real inputs change least.

GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323) with static blocks, then sweeps of
coordinate descent over scales and integers (QuantEase, https://arxiv.org/abs/2309.01885). What they
minimise is the weighted error: the squared difference of the products, summed over the inputs.
"""

from functools import cached_property

import numpy as np
from scipy.linalg import cholesky
from scipy.linalg.lapack import dtrtri

from slm.exporters.graph import as_stored, nonzero, on_all_cores, packed_integers

COLUMNS = 32  # inputs rounded between two large matrix products
ROWS = 1024  # outputs rounded at a time by each core: their columns stay in its cache
SWEEPS = 3
SHRINKS = np.linspace(1.0, 0.6, 33, dtype=np.float32)  # of the scale that clips nothing
DAMPING = 0.01  # of the moments' mean diagonal


class Inputs:
    """What rounding has to know of a linear's inputs: their `moments`, X^T X, which are damped."""

    def __init__(self, moments: np.ndarray) -> None:
        self.importance = moments.diagonal().copy()
        self.hessian = moments.astype(np.float32, copy=True)
        diagonal = self.hessian.reshape(-1)[:: len(moments) + 1]
        diagonal += DAMPING * (diagonal.mean() or 1)

    @cached_property
    def upper(self) -> np.ndarray:
        """The upper triangle U with U^T U = H^-1."""
        # By the Cholesky factor of H from its end to its start.
        flipped = self.hessian[::-1, ::-1].astype(np.float64, order="F")
        lower = cholesky(flipped, True, overwrite_a=True)
        inverse, _ = dtrtri(lower, lower=1, overwrite_c=1)
        return inverse[::-1, ::-1].astype(np.float32)


def round_weight(
    weight: np.ndarray, inputs: Inputs, bits: int, block_size: int, sweeps: int = SWEEPS
) -> tuple[np.ndarray, np.ndarray]:
    """Integers [outputs, inputs] and float16 scales [outputs, blocks] of a weight.

    `weight` is [outputs, inputs].
    """
    integers = np.empty(weight.shape, np.int16)
    scales = np.empty((len(weight), -(-weight.shape[1] // block_size)), np.float16)
    upper = inputs.upper

    def round_rows(rows: slice) -> None:
        wanted = np.ascontiguousarray(weight[rows].T, np.float32)
        own = as_stored(signed_extremes(wanted, block_size) / -(2 ** (bits - 1)))
        q = feed_errors_back(wanted, upper, own, bits, block_size)
        difference = q * np.repeat(own, block_size, 0)[: len(q)] - wanted
        for _ in range(sweeps):
            sweep(wanted, inputs.hessian, q, own, difference, bits, block_size)
        integers[rows], scales[rows] = q.T, own.T

    on_all_cores(round_rows, len(weight), ROWS)
    return integers, scales


def search_scales(
    weight: np.ndarray, importance: np.ndarray, bits: int, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `round_weight`, to nearest, with the scales of least squared error.

    The errors of each input's weights count as much as its `importance`, its mean square say.
    """
    wanted = np.ascontiguousarray(weight.T, np.float32)
    extremes = signed_extremes(wanted, block_size) / -(2 ** (bits - 1))
    starts = range(0, len(wanted), block_size)
    scales = as_stored(extremes)
    least = np.full_like(scales, np.inf)
    for shrink in SHRINKS:
        tried = as_stored(extremes * shrink)
        each = np.repeat(tried, block_size, 0)[: len(wanted)]
        errors = nearest(wanted / nonzero(each), bits) * each - wanted
        lost = np.add.reduceat(errors**2 * importance[:, None], starts, 0)
        scales[lost < least], least = tried[lost < least], np.minimum(lost, least)
    each = np.repeat(scales, block_size, 0)[: len(wanted)]
    integers = nearest(wanted / nonzero(each), bits)
    return integers.T.astype(np.int16), scales.T.astype(np.float16)


def signed_extremes(wanted: np.ndarray, block_size: int) -> np.ndarray:
    """The value farthest from 0 in each block [blocks, outputs] of a weight [inputs, outputs]."""
    starts = range(0, len(wanted), block_size)
    blocks = [wanted[start : start + block_size] for start in starts]
    least, most = (np.stack([f(block, 0) for block in blocks]) for f in (np.min, np.max))
    return np.where(most > -least, most, least)


def feed_errors_back(
    wanted: np.ndarray, upper: np.ndarray, scales: np.ndarray, bits: int, block_size: int
) -> np.ndarray:
    """GPTQ: round one input's weights after the other, and let those that follow make up for it.

    The rows of `upper` say how much of it each of them makes up.
    """
    inputs = len(wanted)
    integers, errors = np.empty_like(wanted), np.empty_like(wanted)
    for start in range(0, inputs, COLUMNS):
        stop = min(start + COLUMNS, inputs)
        left = wanted[start:stop] - upper[:start, start:stop].T @ errors[:start]
        for i in range(start, stop):
            own = left[i - start] - upper[start:i, i] @ errors[start:i]
            scale = scales[i // block_size]
            integers[i] = nearest(own / nonzero(scale), bits)
            errors[i] = (own - integers[i] * scale) / upper[i, i]
    return integers


def sweep(
    wanted: np.ndarray,
    hessian: np.ndarray,
    integers: np.ndarray,
    scales: np.ndarray,
    difference: np.ndarray,
    bits: int,
    block_size: int,
) -> None:
    """Set each block's scale, then each of its integers, to the best while all others stay.

    No step raises the weighted error. `integers`, `scales` and their `difference` from the wanted
    values change in place.
    """
    inputs = len(wanted)
    for b, start in enumerate(range(0, inputs, block_size)):
        block = slice(start, min(start + block_size, inputs))
        own, q = hessian[block, block], integers[block]
        slope = hessian[block] @ difference
        curving = own @ q
        curvature = (q * curving).sum(0)
        change = -(slope * q).sum(0) / np.where(curvature > 0, curvature, 1)
        scale = as_stored(scales[b] + np.where(np.abs(change) < np.abs(scales[b]) / 2, change, 0))
        slope += curving * (scale - scales[b])
        scales[b] = scale
        step = 1 / nonzero(scale)
        changes = np.empty_like(slope)
        for i in range(len(q)):
            left = (slope[i] + own[i, :i] @ changes[:i]) * (step / own[i, i])
            better = nearest(q[i] - left, bits)
            np.multiply(better - q[i], scale, out=changes[i])
            q[i] = better
        difference[block] = q * scale - wanted[block]


def nearest(multiples: np.ndarray, bits: int) -> np.ndarray:
    """The nearest integers that the bits can hold."""
    half = 2 ** (bits - 1)
    return np.clip(np.rint(multiples), -half, half - 1)


def pack(integers: np.ndarray, bits: int, block_size: int) -> np.ndarray:
    """Integers [outputs, inputs] as MatMulNBits reads them: uint8 [outputs, blocks, bytes].

    They are stored above a zero point of 2^(bits - 1), two int4 in a byte, the low half first; a
    last block that is not full is filled up with zeros.
    """
    outputs, inputs = integers.shape
    blocks = -(-inputs // block_size)
    padded = np.pad(np.ascontiguousarray(integers), ((0, 0), (0, blocks * block_size - inputs)))
    raised = (padded + 2 ** (bits - 1)).astype(np.uint8).reshape(outputs, blocks, block_size)
    return packed_integers(raised, bits)


def unpack(packed: np.ndarray, block_size: int) -> np.ndarray:
    """The integers [outputs, blocks, block_size] that `pack` packed."""
    if packed.shape[-1] == block_size:
        return packed.astype(np.float32) - 128
    halves = np.stack([packed & 15, packed >> 4], -1)
    return halves.reshape(*packed.shape[:2], block_size).astype(np.float32) - 8
