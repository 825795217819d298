"""What an export never does: grow with the model, leave a half that is taken for whole."""

import errno
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from bench.export import write_checkpoint
from slm.config.common import ROOT
from slm.errors import words_for
from slm.exporters.builder import make
from slm.exporters.graph import Packed, Rtn, write
from slm.exporters.worker import silent
from slm.running.memory import releasing_mapped
from tests.checkpoints import write_tiny, write_tokenizer
from tests.conftest import Project, composed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /dev/full of Linux")

# Packed it takes 113 MB, in float32 812 MB, and its largest tensor 12 MB.
DEEP = {"hidden": 1024, "inner": 2816, "layers": 16, "heads": 16, "kv": 16, "vocab": 512}
SPARE = 110e6  # bytes
RTN = Rtn(4, 32, 4)


class Hoarding(Rtn):
    """A quantizer that keeps the packed weights in memory."""

    def quantize(self, name: str, weight: np.ndarray, looked_up: bool = False) -> list[Packed]:
        HOARD.extend(super().quantize(name, weight, looked_up))
        return HOARD[-1:]


HOARD: list[Packed] = []


def export(checkpoint: Path, folder: Path, quantizer: Rtn = RTN, said: Any = silent) -> None:
    target = composed().target
    with releasing_mapped(checkpoint):
        save = partial(write, quantizer=quantizer, said=said)
        make(checkpoint, target, target.precision, folder, save)


def export_within_limit(warm: Path, deep: Path, folder: Path, quantizer: Rtn) -> None:
    """Export what is `deep`, in `SPARE` more than another export took.

    The private map of the checkpoint's file counts too, though it takes no memory.
    """
    export(warm, folder / "warm")
    [taken] = re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    mapped = sum(path.stat().st_size for path in deep.glob("*.safetensors"))
    limit = int(taken) * 1024 + mapped + int(SPARE)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    export(deep, folder / "deep", quantizer)


def export_until(checkpoint: Path, folder: Path, last: int) -> None:
    """Export until the kernel kills this process, as soon as that many tensors are written."""

    def die(written: int, *_: object) -> None:
        if written == last:
            os.kill(os.getpid(), signal.SIGKILL)

    export(checkpoint, folder, said=die)


def exit_code(function: Any, *arguments: object) -> int | None:
    """Call a function in a process of its own, forked from one that has the builder loaded."""
    own = multiprocessing.get_context("forkserver")
    own.set_forkserver_preload([__name__, "transformers", "onnxruntime_genai.models.builder"])
    process = own.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounds")
    return write_tiny(folder / "small", write_tokenizer(folder / "tokenizer"))


@pytest.mark.parametrize(("quantizer", "fits"), [(RTN, True), (Hoarding(4, 32, 4), False)])
def test_memory_does_not_grow_with_the_model(
    quantizer: Rtn, fits: bool, small: Path, deep: Path, tmp_path: Path
) -> None:
    code = exit_code(export_within_limit, small, deep, tmp_path, quantizer)
    assert (code == 0) is fits


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file, which stays mapped to the end."""
    folder = tmp_path_factory.mktemp("deep")
    write_checkpoint(folder, DEEP)
    weights: dict[str, Any] = {}
    for path in folder.glob("model-*"):
        weights |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_export_that_is_killed_at_a_tensor_is_not_taken_for_whole(
    small: Path, tmp_path: Path
) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    assert exit_code(export_until, small, broken, 17) == -signal.SIGKILL
    assert (broken / "model.onnx.data").exists() and not (broken / "model.onnx").exists()
    assert exit_code(export, small, broken) == exit_code(export, small, whole) == 0
    for name in ("model.onnx", "model.onnx.data"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_a_step_that_is_killed_takes_its_exporter_along(small: Path, project: Project) -> None:
    arguments = [f"source={small}", "export.parity_tokens=256"]
    command = [sys.executable, "-m", "steps.export_onnx", *arguments]
    step = psutil.Popen(command, cwd=ROOT, env=project.environment)
    outcomes = project.folder / "work" / "export_onnx"
    while not list(outcomes.glob("*/scratch/checkpoint")):
        assert step.poll() is None
        time.sleep(0.02)
    [exporter] = step.children()
    step.kill()
    step.wait()
    psutil.wait_procs([exporter], timeout=20)
    assert not exporter.is_running()
    assert not list(outcomes.glob("*/result.json"))


def test_a_full_disk_names_the_tensor(small: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        export(small, tmp_path)
    assert raised.value.errno == errno.ENOSPC
    words = rf"the disk is full .*, at model.layers.0.attn\S+: '{tmp_path}\S+. Free space there"
    assert re.match(words, words_for(raised.value) or "")
