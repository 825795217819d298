"""Whether an ONNX file is what its target's name says."""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slm.config.common import CONF
from slm.config.target import Target
from slm.errors import InputError, StepError
from slm.exporters import graph, worker
from slm.exporters.generation import carry_over
from slm.exporters.parity import Parity
from slm.exporters.structure import kept_in_int8, require_structure
from slm.exporters.worker import export
from slm.target_name import is_whole
from slm_pyfunc.engine.runtime import Runtime
from tests.checkpoints import write_tiny, write_tiny_gguf, write_tokenizer
from tests.conftest import composed
from tests.test_fetch import fetched
from tests.test_parity import request_of

pytestmark = pytest.mark.xdist_group("structure")  # its fixtures once, not in every process

TARGETS = sorted(path.stem for path in (CONF / "target").glob("*.yaml"))
DEFAULT = "cpu-int4-rtn-block-32-acc-level-4"
MIXED = "cpu-int4-mixed-acc-level-4"
TRT_RTX = "trt-rtx-int4-rtn-block-32"
ROWS = [{"text": " ".join(str(number) for number in range(400))}]
PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@functools.cache
def target_of(name: str) -> Target:
    return composed(f"target={name}").target


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("structure")
    return write_tiny(folder / "checkpoint", write_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="module")
def exports(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ONNX folder of each target, made as export_onnx makes it, and its record."""
    gguf, calibrated = tmp_path_factory.mktemp("gguf"), tmp_path_factory.mktemp("calibrated")
    quantized = write_tiny_gguf(gguf / "model.gguf", PLAIN, kinds={"blk": "Q4_0"})
    made: dict[str, Any] = {}
    first = request_of(checkpoint, tmp_path_factory.mktemp("scratch"))
    monkeypatch = pytest.MonkeyPatch()
    # Twins are compared in test_parity.py.
    monkeypatch.setattr(worker, "choose", lambda *_: ("genai", Parity(0, 0, 0, 0, None, [], 0), {}))
    for name in TARGETS:
        folder = tmp_path_factory.mktemp(name)
        source = Path(fetched(quantized, gguf).uri) if "grid" in name else checkpoint
        target = target_of(name)
        once = f"{target.int8} {target.budget_bits}"  # targets alike in these share the pass
        request = replace(
            first,
            checkpoint=str(source),
            onnx=str(folder / "onnx"),
            target=target,
            makers=["genai"],
            calibration=ROWS,
            calibration_tokens=512,
            calibrated=str(calibrated / once),
            shared=str(calibrated / "shared"),
        )
        exported = export(request)
        made[name] = (Path(request.onnx), kept_in_int8(source, target, exported.linears))
    monkeypatch.undo()
    return made


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_exported_as_its_name_says(target: str, exports: dict[str, Any]) -> None:
    assert is_whole(target)
    onnx, in_int8 = exports[target]
    require_structure(onnx, target_of(target), in_int8)
    assert bool(in_int8) == ("mixed" in target)


Change = Callable[[ir.Model, Path], None]


def products(model: ir.Model, op_type: str = "MatMulNBits") -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def says(name: str, value: int) -> Change:
    """One product's attribute is another."""

    def change(model: ir.Model, _: Path) -> None:
        products(model)[3].attributes[name] = ir.AttrInt64(name, value)

    return change


def one_product_of_floats(model: ir.Model, _: Path) -> None:
    node = products(model)[0]
    weight = ir.Value(name="weight", const_value=ir.tensor(np.ones((64, 128), np.float32)))
    weight.dtype, weight.shape = ir.DataType.FLOAT, ir.Shape((64, 128))
    model.graph.register_initializer(weight)
    graph.replace(model.graph, node, "MatMul", [node.inputs[0], weight], {})


def an_int8_product_as_int4(model: ir.Model, _: Path) -> None:
    node = next(n for n in products(model) if n.attributes.get_int("bits") == 8)
    node.attributes["bits"] = ir.AttrInt64("bits", 4)


def keys_in_float16(model: ir.Model, _: Path) -> None:
    keys = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    keys.dtype = ir.DataType.FLOAT16


def an_older_opset(model: ir.Model, _: Path) -> None:
    model.graph.opset_imports[""] = 17


def another_provider(_: ir.Model, onnx: Path) -> None:
    config = json.loads((onnx / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    (onnx / "genai_config.json").write_text(json.dumps(config))


def at_scales(value: float, op_type: str = "MatMulNBits") -> Change:
    """The last scale of a product is another."""

    def change(model: ir.Model, onnx: Path) -> None:
        node = products(model, op_type)[2]
        scales = node.inputs[2 if op_type == "MatMulNBits" else 1]
        assert scales is not None and scales.const_value is not None
        array = scales.const_value.numpy().copy()
        array.reshape(-1)[-1] = value
        scales.const_value = ir.Tensor(array, name=scales.name)

    return change


def half_of_the_data(_: ir.Model, onnx: Path) -> None:
    data = onnx / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


@pytest.mark.parametrize(
    ("target", "change", "words"),
    [
        (DEFAULT, says("accuracy_level", 0), "has accuracy_level 0; expected 4"),
        (DEFAULT, says("block_size", 16), "has block_size 16; expected 32"),
        (DEFAULT, says("bits", 8), "has bits 8; expected 4"),
        (DEFAULT, one_product_of_floats, "has weights in FLOAT; expected int4"),
        (DEFAULT, keys_in_float16, "past_key_values.0.key is FLOAT16; expected FLOAT"),
        (DEFAULT, an_older_opset, "of opset 17; expected 18 to 24"),
        (DEFAULT, another_provider, r"the execution providers \['cuda'\]; expected \[\]"),
        (DEFAULT, at_scales(float("nan")), "holds NaN or infinity"),
        (DEFAULT, half_of_the_data, "bytes into model.onnx.data, which is shorter"),
        (MIXED, an_int8_product_as_int4, "weights in int8; its record says"),
        (TRT_RTX, at_scales(-0.5, "DequantizeLinear"), "not above 0, which TensorRT refuses"),
    ],
)
def test_a_target_whose_name_lies_is_refused(
    target: str, change: Change, words: str, exports: dict[str, Any], tmp_path: Path
) -> None:
    onnx, in_int8 = exports[target]
    tampered = shutil.copytree(onnx, tmp_path / "onnx")
    model = ir.load(tampered / "model.onnx")
    change(model, tampered)
    ir.save(model, tampered / "model.onnx")
    with pytest.raises(StepError, match=f"target's name, {target}, says: .*{words}"):
        require_structure(tampered, target_of(target), in_int8)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["target.precision=int8"], "precision is int4, and it is int8.*target.name=cpu-int8-rtn-"),
        (["target.builder_options.block_size=16"], "block_size is 32, and it is 16"),
        (["~target.builder_options.accuracy_level"], "accuracy_level is 4, and it is 0"),
        (["target.execution_provider=cuda"], "execution_provider is cpu, and it is cuda"),
        (
            ["target.quantizer=gptq", "target.budget_bits=6", "target.name=my-cpu-int4-gptq"],
            "quantizer is gptq, and it is mixed.*target.name=cpu-int4-mixed-acc-level-4",
        ),
        (
            ["target=cpu-int4-rtn-block-32", "+target.builder_options.accuracy_level=4"],
            "accuracy_level is 0, and it is 4",
        ),
        ([f"target={TRT_RTX}", "target.quantizer=gptq"], "it must be int4 by target.quantizer=rtn"),
    ],
)
def test_a_name_that_is_not_true_is_refused_before_anything_runs(
    overrides: list[str], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        composed(*overrides)


def test_words_of_a_name_that_are_parts_of_others_say_nothing() -> None:
    assert composed("target.name=mycpu-fp16ish", "target.precision=int8").target.precision.bits == 8


def test_weights_for_tensorrt_are_as_close_as_int4_is(
    exports: dict[str, Any], checkpoint: Path
) -> None:
    """The CPU runs them too; of random weights, int4 by MatMulNBits is the measure."""
    tokens = list(range(5, 60))
    expected, ours, others = (
        Runtime(carried(exports[name][0], checkpoint)).log_probabilities(tokens)
        for name in ("directml-fp16", TRT_RTX, "directml-int4-rtn-block-32")
    )
    found, usual = (np.square(each - expected).mean() for each in (ours, others))
    assert 0 < found < 1.5 * usual


def carried(onnx: Path, checkpoint: Path) -> Path:
    carry_over(checkpoint, onnx)
    return onnx
