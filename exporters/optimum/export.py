"""Export a checkpoint to ONNX in float32, with past keys and values, by optimum.

    mlflow run exporters/optimum --env-manager uv -P checkpoint=/data/checkpoint -P out=/data/onnx

A project of its own, because optimum-onnx 0.1 needs an older transformers than the rest. Holds the
whole model in memory, in float32 and more than once. Writes `out`/model.onnx and its weights beside
it, where they can be read one by one.
"""

import argparse
import ctypes
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
SMALL = 1024  # bytes: tensors that stay in the graph


def export(checkpoint: Path, out: Path) -> None:
    """Write the graph of a checkpoint folder. Nothing is fetched, and none of its code is run."""
    import onnx
    from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory() as scratch:
        older = as_older(checkpoint, Path(scratch))
        main_export(
            str(older),
            out,
            task="text-generation-with-past",
            dtype="fp32",
            do_validation=False,  # the caller compares it, at more positions
            library_name="transformers",
            local_files_only=True,
            trust_remote_code=False,
        )
    if any(path.name.startswith(f"{GRAPH}_data") for path in out.iterdir()):
        return  # larger than protobuf allows: the weights are beside it already
    onnx.save_model(
        onnx.load(out / GRAPH),
        out / GRAPH,
        save_as_external_data=True,
        location=WEIGHTS,
        size_threshold=SMALL,
    )


def as_older(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as transformers 4.57 reads it: links to its files, and another config.json.

    Version 5 keeps all of rotary embeddings under `rope_parameters`, which 4.57 passes over.
    """
    for path in checkpoint.iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | older_rope(config)))
    return folder


def older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """What 4.57 calls the settings of `rope_parameters`; GPT-NeoX has names of its own for two."""
    rope = dict(config.get("rope_parameters") or {})
    if "rope_scaling" in config or any(isinstance(value, dict) for value in rope.values()):
        return {}  # written by 4.57; or one for each kind of layer, which it has no words for
    older: dict[str, Any] = {}
    if "rope_theta" in rope:
        older["rope_theta"] = older["rotary_emb_base"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = older["rotary_pct"] = rope.pop("partial_rotary_factor")
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = rope
    return older


def end_with_parent() -> None:
    """Have the kernel end this process if the one that started it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a folder of safetensors and config.json")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--log", default="", help="a file for all that is said")
    arguments = parser.parse_args()
    end_with_parent()
    if arguments.log:
        said = os.open(arguments.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(said, sys.stdout.fileno())
        os.dup2(said, sys.stderr.fileno())
    os.environ["HF_HUB_OFFLINE"] = "1"
    shutil.rmtree(arguments.out, ignore_errors=True)
    export(arguments.checkpoint, arguments.out)


if __name__ == "__main__":
    main()
