"""Whether an ONNX file is what its target's name says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slm.config import CONF, Precision
from slm.errors import InputError, StepError
from slm.exporters.structure import kept_in_int8, require_structure
from slm.exporters.worker import export
from slm.target_name import is_whole
from slm_pyfunc.engine.runtime import Runtime
from tests.checkpoints import write_tiny, write_tiny_gguf, write_tokenizer
from tests.conftest import composed
from tests.test_fetch import fetched
from tests.test_parity import request_of

TARGETS = sorted(path.stem for path in (CONF / "target").glob("*.yaml"))
DEFAULT = "cpu-int4-rtn-block-32-acc-level-4"
MIXED = "cpu-int4-mixed-acc-level-4"
TRT_RTX = "trt-rtx-int4-rtn-block-32"
ROWS = [{"text": " ".join(str(number) for number in range(400))}]
PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("structure")
    return write_tiny(folder / "checkpoint", write_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="module")
def exports(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ONNX folder of each target, made as export_onnx makes it, and its record."""
    gguf = tmp_path_factory.mktemp("gguf")
    quantized = write_tiny_gguf(gguf / "model.gguf", PLAIN, kinds={"blk": "Q4_0"})
    made: dict[str, Any] = {}
    for target in TARGETS:
        folder = tmp_path_factory.mktemp(target)
        source = Path(fetched(quantized, gguf).uri) if "grid" in target else checkpoint
        request = replace(
            request_of(source, folder, f"target={target}"),
            parity_tokens=64,
            makers=["genai"],
            calibration=ROWS,
            calibration_tokens=512,
            calibrated=str(folder / "calibrated"),
        )
        exported = export(request)
        made[target] = (Path(request.onnx), kept_in_int8(source, request.target, exported.linears))
    return made


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_exported_as_its_name_says(target: str, exports: dict[str, Any]) -> None:
    assert is_whole(target)
    onnx, in_int8 = exports[target]
    require_structure(onnx, composed(f"target={target}").target, in_int8)
    assert bool(in_int8) == ("mixed" in target)
