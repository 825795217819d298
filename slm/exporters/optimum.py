"""Graphs by optimum: architectures that neither the builder nor mobius knows.

It needs another transformers than ours, so it runs as an MLflow project of its own,
exporters/optimum, in an environment that is made once. Its graphs have no GroupQueryAttention:
their caches grow, which the runtime serves one sequence at a time (`past_present_share_buffer`).
"""

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.config.common import ROOT
from slm.config.target import ExecutionProvider, Precision, Target
from slm.environments import environment_of
from slm.errors import StepError
from slm.exporters.builder import Save
from slm.running.memory import releasing_mapped
from slm.running.tracking import environment
from slm.sources.verify import context_length_of

if TYPE_CHECKING:
    import onnx_ir as ir

PROJECT = ROOT / "exporters" / "optimum"
PAST = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
PRESENT = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
LOG = "optimum.log"


def make(
    checkpoint: Path, target: Target, precision: Precision, folder: Path, save: Save | None
) -> None:
    """Make the ONNX folder of a checkpoint; `save` writes its graph.

    Raises StepError if optimum does not know the architecture, or the target is not its own.
    """
    import onnx_ir as ir

    if save is None:
        raise StepError(
            "optimum makes float graphs: its int4 is by target.quantizer=rtn, not by the builder's."
        )
    on_cpu = target.execution_provider is ExecutionProvider.cpu
    if not on_cpu or precision in (Precision.fp16, Precision.bf16):
        raise StepError(
            f"optimum makes graphs in float32 for the CPU alone; the target is {precision.value} "
            f"for {target.execution_provider.value}."
        )
    floats = folder.with_name(f"{folder.name}.float32")
    run_project(checkpoint, floats)
    model = ir.load(floats / "model.onnx")
    products_of_gemms(model.graph)
    name_weights(model.graph)
    folder.mkdir(parents=True, exist_ok=True)
    with releasing_mapped(floats):
        save(model, folder / "model.onnx")
    write_genai_config(checkpoint, model.graph, folder)
    shutil.rmtree(floats)


def python() -> Path:
    """The Python of the project's environment, which is made if it is not there.

    It is kept where `mlflow run` keeps environments, apart from the work folder. Raises StepError
    if it cannot be made.
    """
    from mlflow.environment_variables import MLFLOW_ENV_ROOT

    return environment_of(pins(), Path(MLFLOW_ENV_ROOT.get()))


def pins() -> list[str]:
    """The requirements of the project."""
    lines = (PROJECT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def versions() -> dict[str, str]:
    """What the environment has that makes the graph, by name; torch is the same as ours."""
    pinned = dict(pin.split("==") for pin in pins())
    return {f"exporters/{name}": pinned[name] for name in ("optimum-onnx", "transformers")}


def run_project(checkpoint: Path, out: Path) -> None:
    """Run exporters/optimum as a child of this process's MLflow run, its log an artifact there.

    Raises StepError with the end of the log where it fails.
    """
    import mlflow
    from mlflow.exceptions import ExecutionException
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

    client, parent_id = mlflow.MlflowClient(), os.environ.get("MLFLOW_RUN_ID")
    experiment, tags = "0", {MLFLOW_RUN_NAME: "optimum"}
    if parent_id:
        experiment = client.get_run(parent_id).info.experiment_id
        tags[MLFLOW_PARENT_RUN_ID] = parent_id
    log = out.with_name(LOG)
    out.parent.mkdir(parents=True, exist_ok=True)
    own = {"PATH": f"{python().parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}
    run_id = client.create_run(experiment, tags=tags).info.run_id
    parameters = {"checkpoint": str(checkpoint), "out": str(out), "log": str(log)}
    try:
        with environment(own), ending_its_children():
            mlflow.run(str(PROJECT), parameters=parameters, env_manager="local", run_id=run_id)
    except ExecutionException as error:
        raise StepError(
            f"{last_words(log)} All that it said is {LOG} of the MLflow run {run_id}."
        ) from error
    finally:
        if log.is_file():
            client.log_artifact(run_id, str(log))
            log.unlink()


def last_words(log: Path) -> str:
    """How a log of Python ends: its error in one sentence."""
    lines = log.read_text().strip().splitlines() if log.is_file() else []
    if not lines or not re.match(r"[\w.]+: ", lines[-1]):
        return "it ended without an error, most likely for lack of memory."
    return f"{lines[-1][:300].rstrip('.')}."


@contextlib.contextmanager
def ending_its_children() -> Iterator[None]:
    """Meanwhile, take a SIGTERM as a Ctrl-C: MLflow then ends what it runs."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def products_of_gemms(graph: "ir.Graph") -> None:
    """Put MatMul and Add in the place of each Gemm with a constant weight.

    torch writes linears of two dimensions so; what is quantized is a MatMul.
    """
    import onnx_ir as ir

    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "Gemm" else None
        if weight is None or not weight.is_initializer():
            continue
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        told = {name: attribute.value for name, attribute in node.attributes.items()}
        if any(told.get(name, value) != value for name, value in plain.items()):
            continue
        nodes = []
        if told.get("transB"):
            nodes.append(ir.node("Transpose", [weight], {"perm": [1, 0]}))
            weight = nodes[-1].outputs[0]
        nodes.append(ir.node("MatMul", [node.inputs[0], weight], name=node.name))
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = [nodes[-1].outputs[0], node.inputs[2]]
            nodes.append(ir.node("Add", bias, name=f"{node.name}_bias"))
        [before], [after] = node.outputs, nodes[-1].outputs
        after.name, after.type, after.shape = before.name, before.type, before.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [before], [after])


def name_weights(graph: "ir.Graph") -> None:
    """Name weights that torch transposed after the modules whose products they are in.

    /model/layers.0/mlp/up_proj/MatMul reads onnx::MatMul_521, which becomes
    model.layers.0.mlp.up_proj.weight.
    """
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer() or "::" not in str(weight.name):
            continue
        module = str(node.name).strip("/").rpartition("/")[0].replace("/", ".")
        name = f"{module}.weight"
        if module and name not in graph.initializers:
            weight.name = name


def write_genai_config(checkpoint: Path, graph: "ir.Graph", folder: Path) -> None:
    """Write genai_config.json by what the graph takes and gives, and the tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(checkpoint)
    given = {str(value.name): value for value in graph.inputs if not value.is_initializer()}
    caches = [PAST["past_key_names"] % layer for layer in range(config.num_hidden_layers)]
    if missing := [name for name in caches if name not in given]:
        raise StepError(f"optimum's graph has no {missing[0]}: its cache is of another kind.")
    shape = given[caches[0]].shape
    if shape is None or len(shape) != 4 or not all(isinstance(shape[i], int) for i in (1, 3)):
        raise StepError(f"optimum's graph keeps keys as {shape}, not by heads.")
    context = context_length_of(config)
    tokens = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")}
    decoder: dict[str, Any] = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "head_size": shape[3],
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": shape[1],
        "inputs": {name: name for name in given if not name.startswith("past_")} | PAST,
        "outputs": {"logits": "logits", **PRESENT},
    }
    model = {
        "type": "decoder",
        "context_length": context,
        "vocab_size": config.vocab_size,
        **{name: value for name, value in tokens.items() if value is not None},
        "decoder": decoder,
    }
    search = {"max_length": context, "past_present_share_buffer": False}
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": search}))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(folder)
