"""Graphs by optimum in its own environment, which takes a GB and a minute: `make test-optimum`."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from mlflow.environment_variables import MLFLOW_ENV_ROOT

from slm.config.common import ROOT
from slm.errors import StepError
from slm.exporters import optimum
from slm.exporters.worker import choose
from tests.checkpoints import write_tiny, write_tokenizer
from tests.conftest import TINY, Project, tracking
from tests.test_parity import request_of

pytestmark = pytest.mark.skipif("SLM_OPTIMUM" not in os.environ, reason="make test-optimum")

GPT2_SHAPE = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048}
TURNED = {**GPT2_SHAPE, "rotary_dim": 8}
LINEAR = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
GPT_NEO = {
    "num_layers": 4,  # of which the twin has two
    "num_hidden_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 96,
}
# By prefix of transformers' classes, beside TINY_SHAPE. The same table stands in
# docs/targets-and-models.md.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPT2": GPT2_SHAPE,
    "GPTNeo": GPT_NEO,
    "GPTNeoX": {"rotary_pct": 0.5, "tie_word_embeddings": False},
    "GPTJ": {**TURNED, "tie_word_embeddings": False},
    "CodeGen": {**TURNED, "n_ctx": 2048, "tie_word_embeddings": False},
    "GPTBigCode": GPT2_SHAPE,
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "Bloom": {"n_layer": 2, "n_head": 4, "seq_length": 2048},
    "Mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 2048},
    "StableLm": {},
    "Llama": {"rope_parameters": LINEAR},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_optimums_graph_agrees_with_transformers_at_every_position(
    architecture: str, tokenizer: Path, project: Project, tmp_path: Path
) -> None:
    own = {"initializer_range": 0.2, **ARCHITECTURES[architecture]}
    checkpoint = write_tiny(tmp_path / "checkpoint", tokenizer, architecture, **own)
    request = request_of(checkpoint, tmp_path)
    request.makers[:] = ["optimum"]
    with tracking(project):
        chosen, parity, _ = choose(request, checkpoint, tmp_path / "scratch")
    assert (chosen, parity.first) == ("optimum", None) and parity.kl_divergence < 1e-4


def test_an_architecture_that_the_others_lack_is_packaged_and_answers(
    tokenizer: Path, project: Project, tmp_path: Path
) -> None:
    """GPT-Neo: the builder does not know it, and mobius leaves out its windows."""
    source = write_tiny(tmp_path / "source", tokenizer, "GPTNeo", initializer_range=0.1, **GPT_NEO)
    own = [f"model.source={source}", "model.name=neo", "model.licence=mit", *TINY.split()]
    fetched = project.call("fetch", *own)
    with pytest.raises(StepError, match=r"genai: .*; mobius: .*Try export.graph=optimum, which"):
        project.call("export_onnx", *own, f"source={fetched.uri}", "export.graph=auto")
    exported = project.call("export_onnx", *own, f"source={fetched.uri}", "export.graph=optimum")
    assert (exported.graph, exported.checked_on) == ("optimum", "cpu")
    assert exported.versions["exporters/transformers"] == "4.57.6"
    children = project.runs("optimum")  # of the twin, and of the whole
    assert [child.info.status for child in children] == ["FINISHED"] * 2
    [parent, _] = project.runs("export_onnx")
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    logged = project.call("log_pyfunc", *own, f"source={exported.uri}")
    reference = project.call("log_transformers", *own, f"source={fetched.uri}")
    uris = [model.uri for model in logged.models]
    measured = project.call(
        "evaluate", *own, f"candidate={json.dumps(uris)}", f"reference={reference.uri}"
    )
    assert measured.candidate_metrics["kl_divergence"] < 0.15
    with tracking(project):
        chat = mlflow.pyfunc.load_model(uris[-1])
        messages = [{"role": "user", "content": "Hello"}]
        answer = chat.predict({"messages": messages, "max_tokens": 8})
    assert answer["usage"]["completion_tokens"] > 0


def exporting(folder: Path) -> list[psutil.Process]:
    """The processes of optimum that work in a folder."""
    found = psutil.process_iter(["cmdline"])
    lines = [(process, process.info["cmdline"] or []) for process in found]
    return [p for p, line in lines if "export.py" in line and str(folder) in " ".join(line)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_optimum_runs_ends_with_the_step(
    number: int, tokenizer: Path, project: Project, tmp_path: Path
) -> None:
    checkpoint = write_tiny(tmp_path / "checkpoint", tokenizer, "GPTNeo", **GPT_NEO)
    command = [sys.executable, "-m", "steps.export_onnx", "export.graph=optimum"]
    command += [f"source={checkpoint}"]
    environment = {**project.environment, "MLFLOW_ENV_ROOT": MLFLOW_ENV_ROOT.get()}
    heeded = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # in a job as well
    step = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=heeded
    )
    until = time.monotonic() + 120
    while not (nested := exporting(project.folder)) and time.monotonic() < until:
        time.sleep(0.1)
    assert nested
    if number == signal.SIGINT:
        os.killpg(step.pid, number)  # as a terminal sends it
    else:
        step.send_signal(number)
    assert step.wait(60) == (130 if number != signal.SIGKILL else -number)
    psutil.wait_procs(nested, timeout=10)
    assert not any(process.is_running() for process in nested)
    assert not list((project.folder / "work" / "export_onnx").glob("*/result.json"))


def test_the_environment_is_made_once() -> None:
    python = optimum.python()
    ready = python.parents[1] / "ready"
    made = ready.stat().st_mtime_ns
    assert optimum.python() == python and ready.stat().st_mtime_ns == made
