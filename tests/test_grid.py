"""What a GGUF holds is what an export with `quantizer=grid` holds."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from slm.config.target import Quantizer
from slm.errors import StepError
from slm.exporters import builder, graph, mobius
from slm.exporters.generation import carry_over
from slm.exporters.graph import Packed, Rtn, columns_of_means
from slm.exporters.grid import Grid
from slm.exporters.worker import require_kept, silent
from slm_pyfunc.engine.runtime import Runtime
from tests.checkpoints import quantized, write_tiny_gguf
from tests.conftest import composed
from tests.test_fetch import fetched

PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
# Of the largest value of a block: float32, and the second rounding of a mean's weight, which
# shares its scale with those of up to 32 blocks.
LOSSLESS, BOUND = 5e-7, 1 / 128


def dequantized(part: Packed, inputs: int, block_size: int) -> np.ndarray:
    """The weights [outputs, inputs] that a part stands for, those of means included."""
    packed, scales = part
    bits = packed.shape[2] * 8 // block_size
    halves = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
    integers = (packed if bits == 8 else halves).astype(np.float32) - 2 ** (bits - 1)
    values = (integers * scales[..., None].astype(np.float32)).reshape(len(packed), -1)
    weights = values[:, :inputs]
    if values.shape[1] - inputs >= block_size:
        of = columns_of_means(inputs // block_size, block_size)
        each = np.eye(inputs // block_size, dtype=np.float32)[of]
        means = values[:, inputs : inputs + len(of)] @ each
        weights = weights + np.repeat(means / block_size, block_size, 1)
    return weights


def errors(parts: list[Packed], weight: np.ndarray, block_size: int) -> np.ndarray:
    found = np.concatenate([dequantized(part, weight.shape[1], block_size) for part in parts])
    return np.abs(found - weight)


def weight_of(kind: str, inputs: int = 768, outputs: int = 24) -> np.ndarray:
    random = np.random.default_rng(0).standard_normal((outputs, inputs), np.float32)
    stored = quantized(random, kind)
    return quants.dequantize(stored, GGMLQuantizationType[kind]).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "block_size", "bits", "bound"),
    [
        ("Q4_0", 32, 4, LOSSLESS),
        ("TQ2_0", 32, 4, LOSSLESS),
        ("Q5_0", 32, 8, LOSSLESS),
        ("MXFP4", 32, 8, LOSSLESS),
        ("IQ4_NL", 32, 8, LOSSLESS),
        ("IQ4_XS", 32, 8, LOSSLESS),
        ("Q8_0", 32, 8, LOSSLESS),
        ("Q6_K", 16, 8, LOSSLESS),
        ("Q4_1", 32, 4, BOUND),
        ("Q4_K", 32, 4, BOUND),
        ("Q5_1", 32, 8, BOUND),
        ("Q5_K", 32, 8, BOUND),
        ("Q4_1", 16, 4, BOUND),
    ],
)
@pytest.mark.parametrize("inputs", [256, 768, 1024])
def test_a_weight_of_a_gguf_keeps_its_grid(
    kind: str, block_size: int, bits: int, bound: float, inputs: int
) -> None:
    weight = weight_of(kind, inputs)
    grid = Grid(block_size)
    [part] = grid.quantize("w", weight)
    assert grid.kept == ["w"] and not grid.rounded
    assert part[0].shape[2] * 8 // block_size == bits
    found = errors([part], weight, block_size)
    assert found.max() <= bound * np.abs(weight).max()
    anew = errors(Rtn(bits, block_size).quantize("w", weight), weight, block_size)
    assert bound == LOSSLESS or (found**2).mean() < 0.01 * (anew**2).mean()


def test_rows_of_several_types_are_parts_of_one_product() -> None:
    weight = np.concatenate([weight_of(kind) for kind in ("Q4_1", "Q4_0", "Q8_0", "F32")])
    weight[1] = weight[-30] = 0
    grid = Grid(32)
    parts = grid.quantize("qkv", weight)
    assert [(len(packed), packed.shape[2]) for packed, _ in parts] == [(48, 16), (24, 32), (24, 32)]
    assert grid.rounded == ["qkv"]
    anew = errors(Rtn(8, 32).quantize("", weight[72:]), weight[72:], 32)
    assert (errors(parts[2:], weight[72:], 32) == anew).all()
    assert not errors(parts, weight, 32)[[1, -30]].any()


def test_rounding_is_refused_where_nothing_is_on_a_grid() -> None:
    grid = Grid(32)
    grid.quantize("w", weight_of("F32"))
    with pytest.raises(StepError, match="never quantized.*target.quantizer=rtn"):
        require_kept(grid)


@pytest.mark.parametrize(
    ("maker", "kinds", "rounded", "within"),
    [
        (mobius.make, {"blk": "Q4_1", "token_embd": "Q8_0"}, 0, 0.02),
        (builder.make, {"blk": "Q4_0", "token_embd": "Q4_0"}, 0, 1e-3),
        (builder.make, {"blk": "Q4_1", "token_embd": "Q8_0"}, 0, 0.02),
        (builder.make, {"blk": "Q8_0", "token_embd": "Q4_1"}, 1, 0.1),
        (builder.make, {"blk.0.attn_v": "Q6_K", "blk": "Q4_K", "token_embd": "Q8_0"}, 1, 0.1),
    ],
)
def test_the_graph_of_a_gguf_answers_as_its_checkpoint(
    maker: Callable[..., None], kinds: dict[str, str], rounded: int, within: float, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    gguf = write_tiny_gguf(tmp_path / "model.gguf", PLAIN, kinds=kinds)
    checkpoint = Path(fetched(gguf, tmp_path).uri)
    target = composed("target=cpu-int4-grid-block-32-acc-level-4").target
    assert target.quantizer is Quantizer.grid
    grid = Grid(32)
    write = partial(graph.write, quantizer=grid, said=silent)
    maker(checkpoint, target, target.precision, tmp_path / "onnx", write)
    carry_over(checkpoint, tmp_path / "onnx")
    assert len(grid.rounded) == rounded
    tokens = list(range(3, 200))
    found = Runtime(tmp_path / "onnx").log_probabilities(tokens)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, : len(found)]
    np.testing.assert_allclose(found, logits.log_softmax(-1).numpy(), atol=within)
