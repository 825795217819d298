"""Round a weight to int4 or int8 so that its products with real inputs change least.

GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323) with static blocks, then sweeps of
coordinate descent over scales and integers (QuantEase, https://arxiv.org/abs/2309.01885). What they
minimise is the weighted error: the squared difference of the products, summed over the inputs.
"""

import numpy as np
from scipy.linalg import solve_triangular

from slm.exporters.graph import packed_integers

COLUMNS = 32  # inputs rounded between two large matrix products
ROWS = 4096  # outputs rounded at a time, which bounds memory
SWEEPS = 3
DAMPING = 0.01  # of the moments' mean diagonal


def round_weight(
    weight: np.ndarray, moments: np.ndarray, bits: int, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Integers [outputs, inputs] and float16 scales [outputs, blocks] of a weight.

    `weight` is [outputs, inputs], `moments` the sums of its inputs' products, X^T X.
    """
    hessian = moments.astype(np.float32, copy=True)
    hessian.flat[:: len(hessian) + 1] += DAMPING * (np.diag(hessian).mean() or 1)
    # Upper triangle U with U^T U = H^-1, by the Cholesky factor of H from its end to its start.
    lower = np.linalg.cholesky(hessian[::-1, ::-1].astype(np.float64))
    upper = solve_triangular(lower[::-1, ::-1], np.eye(len(hessian))).astype(np.float32)
    integers = np.empty(weight.shape, np.int16)
    scales = np.empty((len(weight), -(-len(hessian) // block_size)), np.float16)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        wanted = np.ascontiguousarray(weight[rows].T, np.float32)
        own = as_stored(signed_extremes(wanted, block_size) / -(2 ** (bits - 1)))
        q = feed_errors_back(wanted, upper, own, bits, block_size)
        for _ in range(SWEEPS):
            sweep(wanted, hessian, q, own, bits, block_size)
        integers[rows], scales[rows] = q.T, own.T
    return integers, scales


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
    left = wanted.copy()
    integers = np.empty_like(wanted)
    for start in range(0, inputs, COLUMNS):
        stop = min(start + COLUMNS, inputs)
        errors = np.empty_like(left[start:stop])
        for i in range(start, stop):
            scale = scales[i // block_size]
            integers[i] = nearest(left[i], scale, bits)
            errors[i - start] = (left[i] - integers[i] * scale) / upper[i, i]
            left[i + 1 : stop] -= upper[i, i + 1 : stop, None] * errors[i - start]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return integers


def sweep(
    wanted: np.ndarray,
    hessian: np.ndarray,
    integers: np.ndarray,
    scales: np.ndarray,
    bits: int,
    block_size: int,
) -> None:
    """Set each block's scale, then each of its integers, to the best while all others stay.

    No step raises the weighted error. `integers` and `scales` change in place.
    """
    inputs = len(wanted)
    each = np.repeat(scales, block_size, 0)[:inputs]
    gradient = hessian @ (integers * each - wanted)
    for b, start in enumerate(range(0, inputs, block_size)):
        block = slice(start, min(start + block_size, inputs))
        own = hessian[block, block]
        q, before, slope = integers[block], integers[block] * scales[b], gradient[block].copy()
        curvature = (q * (own @ q)).sum(0)
        change = -(slope * q).sum(0) / np.where(curvature > 0, curvature, 1)
        scale = as_stored(scales[b] + np.where(np.abs(change) < np.abs(scales[b]) / 2, change, 0))
        slope += own @ (q * (scale - scales[b]))
        for i in range(len(q)):
            better = nearest(q[i] * scale - slope[i] / own[i, i], scale, bits)
            slope += own[:, i, None] * ((better - q[i]) * scale)
            q[i] = better
        scales[b] = scale
        gradient += hessian[:, block] @ (q * scale - before)


def as_stored(scales: np.ndarray) -> np.ndarray:
    """Scales as the file keeps them, in float16."""
    return scales.astype(np.float16).astype(np.float32)


def nearest(values: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The integers whose multiples of the scales are nearest to the values."""
    half = 2 ** (bits - 1)
    quotients = values / np.where(scale == 0, 1, scale)
    return np.clip(np.rint(quotients), -half, half - 1)


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
