"""Rounding to nearest: its properties for any weights in any shape, and real weights."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits
from safetensors import safe_open

from slm.exporters.gptq import unpack
from slm.exporters.graph import Rtn

KERNELS = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}
NUMBERS = st.sampled_from([0.0, 0.5, -0.5, 1.0, -8.0, 7.5]) | st.floats(-8, 8, width=32).filter(
    lambda number: number == 0 or abs(number) > 1e-30
)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 150))  # odd outputs, blocks that are not full
WEIGHTS = SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=NUMBERS, fill=NUMBERS))
BITS, BLOCK_SIZES = st.sampled_from([4, 8]), st.sampled_from([16, 32, 64, 128])
reproducible = settings(max_examples=150, derandomize=True, deadline=None, database=None)


@reproducible
@given(WEIGHTS, BITS, BLOCK_SIZES)
def test_weights_are_rounded_and_packed_as_onnxruntimes_kernel_does(
    weight: np.ndarray, bits: int, block_size: int
) -> None:
    require_as_the_kernel(weight, bits, block_size)


@pytest.mark.parametrize("bits", [4, 8])
def test_real_weights_are_rounded_and_packed_as_onnxruntimes_kernel_does(
    bits: int, smollm2: Path
) -> None:
    with safe_open(smollm2 / "model.safetensors", "np") as file:
        for name in [name for name in file.keys() if ".5." in name and "proj" in name]:  # noqa: SIM118
            require_as_the_kernel(file.get_tensor(name), bits, 32)


def require_as_the_kernel(weight: np.ndarray, bits: int, block_size: int) -> None:
    [(packed, scales)] = Rtn(bits, block_size).quantize("", weight)
    (outputs, inputs), blocks = weight.shape, packed.shape[1]
    expected, expected_scales = np.zeros_like(packed), np.zeros_like(scales)
    zero_points = np.zeros((outputs, -(-blocks * bits // 8)), np.uint8)
    padded = np.pad(weight, ((0, 0), (0, blocks * block_size - inputs))).T.copy()
    kernel = KERNELS[bits]
    kernel(expected, padded, expected_scales, zero_points, block_size, outputs, inputs, True)
    np.testing.assert_array_equal(scales, expected_scales)
    if bits == 4 and inputs % 2:  # the kernel leaves anything in the half of a byte that is left
        for each in (packed, expected):
            each.reshape(outputs, -1)[:, inputs // 2] &= 15
    np.testing.assert_array_equal(packed, expected)


@reproducible
@given(WEIGHTS, BITS, BLOCK_SIZES)
def test_rounding_moves_no_weight_by_more_than_half_a_step(
    weight: np.ndarray, bits: int, block_size: int
) -> None:
    """A weight beyond the last step is moved to it: the grid has one step more on one side."""
    rtn = Rtn(bits, block_size)
    [(packed, scales)] = rtn.quantize("", weight)
    steps = scales[..., None]
    ends = np.sort(steps * [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1], -1)
    blocks = rtn.blocks_of(weight)
    moved = unpack(packed, block_size) * steps - np.clip(blocks, ends[..., :1], ends[..., 1:])
    held = np.arange(blocks.shape[1] * block_size).reshape(blocks.shape[1:]) < weight.shape[1]
    assert (np.abs(moved) <= np.abs(steps) * (0.5 + 1e-4))[:, held].all()
